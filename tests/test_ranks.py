"""The processes of a build, whatever launches them: each row is computed once, and the death of one ends all."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from forked import exit_code, fork
from launch import environment
from torch import distributed as dist

from softcot_ds.launchers import MEETING
from softcot_ds.thoughts import manifest as tm
from softcot_ds.thoughts import store as ts
from softcot_ds.thoughts.ranks import join_ranks
from softcot_ds.thoughts.store import ThoughtStore

FILL_PROGRAM = """
import json, os, sys, time
from collections import namedtuple
from pathlib import Path
import torch
from softcot_ds.thoughts.ranks import join_ranks
from softcot_ds.thoughts.builder import fill
from softcot_ds.thoughts.manifest import StoreIdentity
assert "transformers" not in sys.modules  # two seconds of a rank's start
Input = namedtuple("Input", "example_id token_ids positions")
inputs = [Input(i, [i, 5, 7], [2]) for i in range(60)]
identity = StoreIdentity("f" * 64, 1, 65536, "float32", "float32", "sdpa")
ranks = join_ranks()
ranks.count("here", 1)
while ranks.count("here") < ranks.size:  # on a busy machine one might have done all before the other has started
    time.sleep(0.01)
computed = []
def compute(batch):
    time.sleep(0.03)
    computed.extend(item.example_id for item in batch)
    return torch.stack([torch.full((1, 65536), float(item.example_id)) for item in batch])
Path(sys.argv[1] + f".{ranks.rank}.pid").write_text(str(os.getpid()))
fill(Path(sys.argv[1]), identity, inputs, lambda: compute, ranks, shard_mib=1, tokens_per_batch=6)
print(json.dumps({"rank": ranks.rank, "size": ranks.size, "computed": computed}), flush=True)
ranks.leave()
"""


def launch(command: list[str], program: str, tmp_path: Path, **variables: str) -> subprocess.Popen:
    arguments = [*command, sys.executable, "-c", program, str(tmp_path / "cache")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(arguments, env=environment() | variables, text=True, **pipes)


def check_ranks(outputs: str, folder: Path) -> list[int]:
    """Both ranks worked, no row was computed twice, all rows are right. Returns what was computed."""
    reports = [json.loads(line) for line in outputs.splitlines() if line.startswith("{")]
    assert sorted(report["rank"] for report in reports) == [0, 1]
    assert {report["size"] for report in reports} == {2}
    assert all(report["computed"] for report in reports)
    computed = [example for report in reports for example in report["computed"]]
    assert len(computed) == len(set(computed))
    rows = ThoughtStore.open(folder).read([tm.row_key([i, 5, 7], [2]) for i in range(60)])
    assert torch.equal(rows, torch.arange(60.0)[:, None, None].expand_as(rows))
    assert tm.leftover_names(folder) == []
    return computed


def find_mpirun() -> str:
    mpirun = Path(sys.executable).parent / "mpirun"
    if not mpirun.exists():
        pytest.skip("no mpirun beside this Python; install softcot-ds[mpi]")
    return str(mpirun)


@pytest.mark.distributed
def test_mpirun_shares_the_work(tmp_path):
    command = [find_mpirun(), "-n", "2", "--oversubscribe", "--bind-to", "none"]
    process = launch(command, FILL_PROGRAM, tmp_path)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert len(check_ranks(output, tmp_path / "cache")) == 60


@pytest.mark.distributed
def test_a_killed_rank_ends_mpirun_and_the_next_run_goes_on(tmp_path):
    """Rank 0, which holds the lock and the board."""
    command = [find_mpirun(), "-n", "2", "--oversubscribe", "--bind-to", "none"]
    process = launch(command, FILL_PROGRAM, tmp_path)
    while len(list(tmp_path.glob("cache/thoughts-*.safetensors"))) < 2:
        assert process.poll() is None
        threading.Event().wait(0.01)
    os.kill(int((tmp_path / "cache.0.pid").read_text()), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    finished = sum(
        ts.read_index(path, ThoughtStore.open(tmp_path / "cache").identity).record.rows
        for path in tmp_path.glob("cache/thoughts-*.safetensors")
    )
    assert 0 < finished < 60
    process = launch(command, FILL_PROGRAM, tmp_path)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert len(check_ranks(output, tmp_path / "cache")) == 60 - finished


@pytest.mark.distributed
def test_the_deepspeed_launchers_environment_shares_the_work(tmp_path):
    """The launcher sets these for each rank and is otherwise not involved."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [launch([], FILL_PROGRAM, tmp_path, RANK=str(r), LOCAL_RANK=str(r), **common) for r in range(2)]
    results = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], results
    assert len(check_ranks("".join(output for output, _ in results), tmp_path / "cache")) == 60


@pytest.mark.parametrize("variable", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
@pytest.mark.distributed
def test_singletons_that_a_launcher_did_not_connect_are_refused(monkeypatch, capfd, variable):
    for name in os.environ.keys() - environment().keys():
        monkeypatch.delenv(name)
    monkeypatch.setenv(variable, "2")
    assert exit_code(fork(join_ranks)) == 2
    assert f"the launcher started several processes ({variable}=2), but MPI sees only one" in capfd.readouterr().out


def test_alone_no_mpi_is_started(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("OMPI_", "PMI", "SLURM_", "MPI_")) or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    before = "mpi4py.MPI" in sys.modules
    ranks = join_ranks()
    assert (ranks.rank, ranks.size) == (0, 1)
    assert ("mpi4py.MPI" in sys.modules) == before


def test_builds_that_share_the_store_of_torchruns_agent_count_apart(monkeypatch):
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": agent.port}
    for name, value in (place | {"TORCHELASTIC_USE_AGENT_STORE": True}).items():
        monkeypatch.setenv(name, str(value))
    assert join_ranks().count("here", 1) == 1
    for name in ("cache-first", "cache-second"):
        monkeypatch.setenv(MEETING, name)
        assert join_ranks().count("here", 1) == 1
