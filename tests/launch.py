"""Starting commands the way users do, from tests."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
ONLINE = ("thoughts.source=online", "projection.condition=none", "projection.init_scale=0.27")
"""Overrides of recipes/word_problems.yaml: the assistant runs along, so its states are not known before, and are taken
as they are. Thoughts start about as long as tokens."""


def environment() -> dict[str, str]:
    """One thread per rank; our checkout and its tests first; no launcher's variables from outside."""
    import torch  # takes seconds; not for those who only want to know where the project is

    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "OMPI_", "PMI"))}
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        kept.pop(key, None)
    if torch.cuda.device_count() < 2:
        kept |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}  # two ranks cannot share one GPU
    folders = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), kept.get("PYTHONPATH", "")]
    return kept | {
        "PYTHONPATH": os.pathsep.join(filter(None, folders)),
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "HF_HUB_OFFLINE": "1",
    }


def free_port() -> str:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def deepspeed_command(ranks: int, module: str, *arguments: object) -> list[str]:
    """The deepspeed launcher on this machine, on a port of its own."""
    launcher = [str(BIN / "deepspeed"), "--log_level", "error", "--num_gpus", str(ranks), "--master_port", free_port()]
    return [*launcher, "--module", module, *map(str, arguments)]


def run(command: list[str], timeout: float = 240, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    """Run to the end; standard output and error come together. With ``check``, a failure shows them."""
    done = subprocess.run(
        command, cwd=ROOT, env=environment() | env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        timeout=timeout,
    )  # fmt: skip
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}")
    return done


def run_and_signal(command: list[str], number: signal.Signals, when: Path, timeout: float = 120) -> tuple[int, str]:
    """Run until a file appears whose name is the pattern of ``when``, then send the signal to all processes of the
    command."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    give_up = time.monotonic() + timeout
    while not any(when.parent.glob(when.name)) and process.poll() is None and time.monotonic() < give_up:
        time.sleep(0.02)
    reached = any(when.parent.glob(when.name))
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=timeout)
    assert reached, f"{when} never appeared:\n{output}"
    return process.returncode, output
