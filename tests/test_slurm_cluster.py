"""The cluster that tests of the SLURM scripts run on does what a cluster does."""

import multiprocessing
import sys
import time
from pathlib import Path

import pytest
from slurm_cluster import Cluster

pytestmark = pytest.mark.slurm


def submit(cluster: Cluster, folder: Path, script: str, *options: str) -> int:
    path = folder / "job.sh"
    path.write_text(f"#!/bin/bash\n{script}\n")
    output = f"--output={folder}/%j.out"
    return int(cluster.run("sbatch", "--parsable", "--open-mode=append", output, *options, str(path), "a=b c").stdout)


def test_two_nodes_have_names_gpus_and_mpi(cluster, tmp_path):
    program = "from mpi4py.MPI import COMM_WORLD as w; print(w.allgather(w.rank), flush=True)"
    script = f'srun hostname\necho $SLURM_GPUS_ON_NODE\nsrun --mpi=pmix {sys.executable} -c "{program}"'
    job = submit(cluster, tmp_path, script, "--nodes=2", "--gpus-per-node=1", "--job-name=my job x=y")
    record = cluster.wait_for(job, {"COMPLETED"}, timeout=30)
    lines = Path(record["StdOut"]).read_text().splitlines()
    assert sorted(lines[:2]) == ["node1", "node2"]
    assert lines[2:] == ["1", "[0, 1]", "[0, 1]"]
    assert record["JobName"] == "my job x=y"
    assert record["Command"] == f"{tmp_path}/job.sh a=b c"
    assert (record["NodeList"], record["ExitCode"]) == ("node[1-2]", "0:0")


def test_job_of_a_failed_node_runs_again_on_another(cluster, tmp_path):
    job = submit(cluster, tmp_path, '[ "$SLURM_RESTART_COUNT" ] || sleep 100; hostname', "--nodes=1")
    node = cluster.wait_for(job, {"RUNNING"}, timeout=10)["NodeList"]
    while not any(process.command == "sleep 100" for process in cluster.processes(node)):
        time.sleep(0.05)
    dying = cluster.processes(node)
    cluster.fail(node)
    try:
        assert not any(Path(f"/proc/{process.pid}").exists() for process in dying)
        record = cluster.wait_for(job, {"COMPLETED"}, timeout=20)
    finally:
        cluster.revive(node)
    assert record["Restarts"] == "1"
    assert record["NodeList"] != node
    assert Path(record["StdOut"]).read_text().split() == [record["NodeList"]]


def test_urgent_job_preempts_and_the_other_is_requeued(cluster, tmp_path):
    job = submit(cluster, tmp_path, '[ "$SLURM_RESTART_COUNT" ] || sleep 100', "--nodes=3")
    cluster.wait_for(job, {"RUNNING"}, timeout=10)
    cluster.run("scontrol", "update", "PartitionName=main", "GraceTime=0")
    try:
        urgent = submit(cluster, tmp_path, "true", "--nodes=3", "--exclusive", "--partition=urgent")
        cluster.wait_for(urgent, {"COMPLETED"}, timeout=20)
    finally:
        cluster.run("scontrol", "update", "PartitionName=main", "GraceTime=20")
    record = cluster.job(job)
    assert (record["JobState"], record["Restarts"]) == ("PENDING", "1")
    cluster.run("scancel", str(job))


def test_wait_for_ends_at_once_with_what_the_job_said(cluster, tmp_path):
    job = submit(cluster, tmp_path, "echo all is lost; exit 3")
    begin = time.monotonic()
    with pytest.raises(AssertionError, match=r"FAILED(?s:.*)ExitCode=3:0(?s:.*)all is lost"):
        cluster.wait_for(job, {"COMPLETED"}, timeout=60)
    assert time.monotonic() - begin < 20


def own_cluster(folder: Path, found) -> None:
    cluster = Cluster(folder, nodes=1)
    cluster.start()
    found.send(([process.pid for process in cluster.processes("node1")], cluster._link))
    time.sleep(100)


FREE = ({"idle"}, {"plnd"}, {"idle", "plnd"})
"""Of nodes without a job; for a moment after one has gone SLURM may still have planned it for another."""


def test_nothing_outlives_a_killed_session(cluster, tmp_path):
    """Another cluster beside ours, in a process that is killed."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    owner = context.Process(target=own_cluster, args=(tmp_path, sender))
    owner.start()
    assert receiver.poll(60)
    pids, link = receiver.recv()
    traces = [Path(f"/sys/class/net/{link}"), *(Path(f"/proc/{pid}") for pid in pids)]
    assert len(traces) >= 4
    assert all(trace.exists() for trace in traces)
    assert {*cluster._states().values()} in FREE
    owner.kill()
    owner.join()
    give_up = time.monotonic() + 10
    while any(trace.exists() for trace in traces):
        assert time.monotonic() < give_up, [trace for trace in traces if trace.exists()]
        time.sleep(0.05)
    assert {*cluster._states().values()} in FREE
