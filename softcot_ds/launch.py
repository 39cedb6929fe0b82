"""A command on several ranks of this machine, without a word of a launcher: ``softcot-ds train RECIPE --gpus 2``."""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from softcot_ds.errors import Interrupted, LostRank, SoftCoTError
from softcot_ds.launchers import alone_of
from softcot_ds.progress import count

_PATIENCE_S = 2.0
"""How long a rank that has a signal takes to end, where it has nothing to save yet."""
_GRACE_S = 10.0
"""How long ranks have to end when another one has failed: one that waits for it on a GPU never will."""
_POLL_S = 0.05


def add_gpus(parser: argparse.ArgumentParser) -> None:
    """The argument of a command that can start its ranks itself."""
    parser.add_argument(
        "--gpus",
        type=_ranks,
        metavar="N",
        help="start N ranks on this machine, one on each GPU, or on a machine without one N on its CPU",
    )


def _ranks(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"a number from 1 on, found {text!r}")
    return int(text)


def launch(command: str, arguments: Sequence[str], ranks: int) -> None:
    """Run a command on so many ranks, to the end of all of them.

    Raises:
        SoftCoTError: there are fewer GPUs, or a launcher has started this process.
        LostRank: a rank was killed.
        SystemExit: a rank did not end well, and has said why.
    """
    if other := alone_of() or ("RANK" in os.environ and f"RANK={os.environ['RANK']}"):
        raise SoftCoTError(
            f"--gpus starts ranks, and a launcher has done so already ({other}): leave one of the two out"
        )
    environment = os.environ | _meeting(ranks)
    program = [sys.executable, "-m", f"softcot_ds.{command}", *arguments]
    processes = [
        subprocess.Popen(
            program,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL if rank else None,
        )
        for rank in range(ranks)
    ]
    try:
        code = _end_of(processes)
    except Interrupted as error:
        code = _stopped(processes, error.signal_number)
    finally:
        for process in processes:
            process.kill()
    if code < 0 and -code != signal.SIGTERM:
        rank = [process.returncode for process in processes].index(code)
        raise LostRank(
            f"rank {rank} was killed by {signal.Signals(-code).name}"
            f"{', as the system does when memory runs out' if -code == signal.SIGKILL else ''}. The same command goes "
            "on from what is finished"
        )
    if code:
        raise SystemExit(code if code > 0 else 128 - code)


def _meeting(ranks: int) -> Mapping[str, str]:
    """What the ranks have in common in their environment. Raises SoftCoTError where there are fewer GPUs."""
    import torch  # takes seconds

    gpus = torch.cuda.device_count()
    if 0 < gpus < ranks:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise SoftCoTError(
            f"--gpus {ranks}, and this machine has {count(gpus, 'GPU')}"
            f"{f' in CUDA_VISIBLE_DEVICES={visible}' if visible else ''}; write --gpus {gpus}"
        )
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if not gpus:
        cores = len(os.sched_getaffinity(0))
        own = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(max(1, cores // ranks))}
        common |= {key: value for key, value in own.items() if key not in os.environ}
    return common


def _end_of(processes: Sequence[subprocess.Popen]) -> int:
    """Wait for all; when one has failed, the others are ended. Returns the exit code of the first that did, or 0."""
    while True:
        codes = [process.poll() for process in processes]
        if failed := [code for code in codes if code]:
            _send(processes, signal.SIGTERM)
            _wait(processes, _GRACE_S)
            return failed[0]
        if None not in codes:
            return 0
        time.sleep(_POLL_S)


def _stopped(processes: Sequence[subprocess.Popen], number: int) -> int:
    """The same when a signal came. Mostly it went to all processes; only those that it did not go to are sent it."""
    sent = False
    give_up = time.monotonic() + _PATIENCE_S
    while True:
        with contextlib.suppress(Interrupted):  # a second Ctrl-C: it went to all of them, too, and the first counts
            if any(process.poll() for process in processes) or all(process.poll() == 0 for process in processes):
                return _end_of(processes)
            if not sent and time.monotonic() >= give_up:
                _send(processes, number)
                sent = True
            time.sleep(_POLL_S)


def _send(processes: Sequence[subprocess.Popen], number: int) -> None:
    for process in processes:
        process.send_signal(number)  # one that has ended is sent none


def _wait(processes: Sequence[subprocess.Popen], seconds: float) -> None:
    give_up = time.monotonic() + seconds
    while any(process.poll() is None for process in processes) and time.monotonic() < give_up:
        time.sleep(_POLL_S)
