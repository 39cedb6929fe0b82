"""The batch scripts and ``softcot-ds submit`` on a real SLURM cluster: ends, restarts, and equal curves.

One run, cut short in every way there is, ends with the curve of a run that nobody disturbed.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from forked import run_forked
from launch import BIN, ROOT
from runs import losses
from safetensors.torch import load_file
from slurm_cluster import Cluster, Process

from softcot_ds.run_dir import Journal, saved_step

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.timeout(900)]

RECIPE = "recipes/word_problems.yaml"
STEPS = 40
SMALL = [
    "task.train_problems=96",
    "task.validation_problems=9",
    "task.test_problems=8",
    "projection.condition=none",  # on other numbers of ranks rounding differs, which the larger steps of centred states
    "projection.init_scale=0.27",  # would show early
    f"training.steps={STEPS}",
    "training.save_every=4",
    "training.validate_every=40",
    "training.global_batch_size=8",
    "training.micro_batch_size=4",
    "training.log_every=1",
    "evaluation.conditions=[learned,none]",
    "evaluation.partition=zero3",
    "evaluation.max_new_tokens=24",
]
SITE = ["--gpus-per-node=1", "--cpus-per-task=1"]
VARIABLES = {
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    "SLURM_WAIT": "3",  # seconds that other ranks get to end
    "SOFTCOT_DOCTOR": "0",  # two tests have it on
}


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory) -> str:
    return f"cache.path={tmp_path_factory.mktemp('cache')}"


@pytest.fixture(scope="module")
def undisturbed(shared_cache, tmp_path_factory) -> Path:
    """The run on two ranks of this machine, without SLURM."""
    folder = tmp_path_factory.mktemp("undisturbed")
    arguments = [RECIPE, *SMALL, shared_cache, f"output_dir={folder}"]
    for command in ("cache", "train", "evaluate"):
        run_forked(2, f"softcot_ds.{command}", *arguments)
    return folder / "demo"


@pytest.fixture
def batch(cluster, shared_cache, tmp_path) -> Iterator["Batch"]:
    batch = Batch(cluster, tmp_path, [*SMALL, shared_cache])
    yield batch
    batch.clean_up()


@pytest.fixture(scope="module")
def side_by_side(cluster, undisturbed, shared_cache, tmp_path_factory) -> Iterator[dict[str, Future]]:
    """Three runs that mostly wait, for timeouts, notices and SLURM: at the same time, each on a cluster of its own."""
    batches, futures = [], {}
    with ThreadPoolExecutor() as pool:
        try:
            for scenario in (outlive_dead_nodes_and_a_hang, be_killed_timed_out_preempted_and_cancelled, fill_the_disk):
                folder = tmp_path_factory.mktemp(scenario.__name__)
                own = Cluster(tmp_path_factory.mktemp("slurm"), nodes=3)
                own.start()
                batches.append(Batch(own, folder, [*SMALL, shared_cache]))
                futures[scenario.__name__] = pool.submit(scenario, batches[-1], undisturbed)
            yield futures
        finally:
            pool.shutdown(cancel_futures=True)
            for batch in batches:
                batch.cluster.stop()


class Batch:
    """Jobs of one test."""

    def __init__(self, cluster: Cluster, folder: Path, overrides: list[str]) -> None:
        self.cluster = cluster
        self.folder = folder
        self.overrides = [*overrides, f"output_dir={folder}"]
        self.run_dir = folder / "demo"
        self.jobs: list[int] = []

    def submit(self, script: str, *options: str, overrides: tuple[str, ...] = (), **env: str) -> int:
        command = ["sbatch", "--parsable", f"--output={self.folder}/%x-%j.log", *SITE, *options, f"slurm/{script}"]
        arguments = [RECIPE, *self.overrides, *overrides]
        done = self.cluster.run(*command, *arguments, cwd=ROOT, env=VARIABLES | env)
        self.jobs.append(int(done.stdout))
        return self.jobs[-1]

    def wait(self, job: int, *states: str, timeout: float = 180) -> str:
        """Wait for one of the states; returns the job's log."""
        record = self.cluster.wait_for(job, set(states), timeout)
        return Path(record["StdOut"]).read_text()

    def wait_until(self, condition: Callable[[], object], what: str, timeout: float = 180) -> None:
        give_up = time.monotonic() + timeout
        while not condition():
            logs = "\n".join(path.read_text() for path in self.folder.glob("*.log"))
            assert time.monotonic() < give_up, f"not {what} in {timeout} s:\n{logs}"
            time.sleep(0.02)

    def wait_for_progress(self) -> None:
        """Until a checkpoint is there that was not there before."""
        before = saved_step(self.run_dir)
        self.wait_until(lambda: saved_step(self.run_dir) > before, f"a checkpoint after step {before}")

    def wait_for_restart(self, number: int) -> None:
        self.wait_until(lambda: self.begins() > number, f"restart {number}")

    def begins(self) -> int:
        return sum(record["event"] == "begin" for record in Journal(self.run_dir).records())

    def ranks(self, node: str, command: str = "train") -> list[Process]:
        return [p for p in self.cluster.processes(node) if p.command.startswith(f"python -u -m softcot_ds.{command}")]

    def preempt(self) -> None:
        """Let another job take all nodes, and end."""
        urgent = "sbatch --parsable --partition=urgent --nodes=3 --exclusive --output=/dev/null --wrap=true".split()
        self.cluster.wait_for(int(self.cluster.run(*urgent).stdout), {"COMPLETED"}, timeout=90)

    def losses(self) -> dict[int, float]:
        return losses(self.run_dir)

    def clean_up(self) -> None:
        for job in self.jobs:
            self.cluster.run("scancel", str(job), check=False)
        for node in self.cluster.nodes:
            self.cluster.revive(node)


def outputs(run_dir: Path) -> dict[str, list[dict]]:
    """Every prompt, output and verdict, by condition; no losses, which are rounded in slices as sums are added up."""
    files = {path.stem: path.read_text().splitlines() for path in run_dir.glob("evaluation/*/*.jsonl")}
    found = {condition: [json.loads(line) for line in lines] for condition, lines in files.items()}
    for record in (record for records in found.values() for record in records):
        del record["loss"]
    return found


def curve(run_dir: Path) -> dict[int, list[float]]:
    """The points of TensorBoard's training loss, by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir))
    events.Reload()
    points: dict[int, list[float]] = {}
    for event in events.Scalars("loss/train"):
        points.setdefault(event.step, []).append(event.value)
    return points


def test_submit_runs_the_chain_and_gives_the_results_of_one_machine(batch, undisturbed, tmp_path):
    cluster = batch.cluster
    command = [str(BIN / "softcot-ds"), "submit", RECIPE, *SMALL, f"output_dir={tmp_path}", f"cache.path={tmp_path}/c"]
    options = ["--nodes=2", "--gpus-per-node=1", "--sbatch=--cpus-per-task=1"]
    done = cluster.run(*command, *options, cwd=ROOT, env=VARIABLES)
    jobs = [int(line.split()[2]) for line in done.stdout.splitlines() if " job " in line]
    batch.jobs += jobs
    assert len(jobs) == 3, done.stdout
    cache, train, evaluate = (batch.wait(job, "COMPLETED") for job in jobs)

    assert "2 processes over MPI" in cache
    assert "step 40  epoch " in train, "rank 0's progress is in the job's log"
    assert "2 ranks (cpu), ZeRO stage 3" in train
    assert "McNemar" in evaluate
    assert losses(tmp_path / "demo") == losses(undisturbed), "the same world size: bit for bit"
    assert outputs(tmp_path / "demo") == outputs(undisturbed)
    assert outputs(undisturbed).keys() == {"learned", "none"}

    run_dir = tmp_path / "demo"
    logs = {path.name for path in (run_dir / "logs").iterdir()}
    names = zip(("cache", "train", "evaluate"), jobs, strict=True)
    for name, job in names:
        assert {f"demo-{name}-{job}.log", *(f"demo-{name}-{job}-node{node}.log" for node in (1, 2))} <= logs
    first_node = (run_dir / "logs" / f"demo-train-{jobs[1]}-node1.log").read_text()
    assert all(line.startswith("[rank 0] ") for line in first_node.splitlines())
    assert {path.name for path in (run_dir / "slurm").iterdir()} == {"cache.sbatch", "train.sbatch", "evaluate.sbatch"}
    assert (run_dir / "recipe.yaml").is_file()

    again = cluster.run(*command, *options, "--dry-run", cwd=ROOT, env=VARIABLES).stdout
    assert "cache     complete in" in again
    assert "train     done to step 40" in again
    assert "#SBATCH --nodes=2\n" in again


def test_wrong_recipe_fails_on_the_terminal_before_a_node_is_used(cluster, tmp_path):
    begin = time.monotonic()
    command = [str(BIN / "softcot-ds"), "submit", RECIPE, "training.setps=3", f"output_dir={tmp_path}", "--nodes=2"]
    done = cluster.run(*command, cwd=ROOT, check=False, env=VARIABLES)
    assert time.monotonic() - begin < 10
    assert done.returncode == 2
    assert "did you mean training.steps?" in done.stderr
    assert cluster.run("squeue", "--noheader").stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_refused_chain_leaves_no_job_and_a_second_chain_is_refused(cluster, tmp_path, shared_cache):
    """SLURM takes the first job and refuses the second: it must not run alone."""
    calls = tmp_path / "calls"
    fake = tmp_path / "bin" / "sbatch"
    fake.parent.mkdir()
    fake.write_text(
        f'#!/bin/bash\necho >>{calls}\n[ $(wc -l <{calls}) = 1 ] && PATH=$REAL_PATH exec sbatch "$@"\n'
        "echo 'sbatch: error: no such account' >&2; exit 1\n"
    )
    fake.chmod(0o755)
    held = [RECIPE, *SMALL, f"output_dir={tmp_path}", f"cache.path={tmp_path}/c", "--nodes=2", "--sbatch=--hold"]
    submit = partial(run_forked, 1, "softcot_ds.submit", *held, check=False)
    variables = cluster.env | VARIABLES
    paths = {"PATH": f"{fake.parent}{os.pathsep}{VARIABLES['PATH']}", "REAL_PATH": os.environ["PATH"]}
    refused = submit(**variables | paths)
    assert refused.returncode == 2
    assert "no such account" in refused.stdout
    assert cluster.run("squeue", "--noheader").stdout == ""

    assert submit(**variables).returncode == 0
    try:
        twice = submit(**variables)
        assert twice.returncode == 2
        assert "of this run is in the queue already" in twice.stdout
        assert len(cluster.run("squeue", "--noheader").stdout.splitlines()) == 3
    finally:
        cluster.run("scancel", "--partition=main")


def test_run_outlives_dead_nodes_and_a_hanging_rank(side_by_side):
    side_by_side["outlive_dead_nodes_and_a_hang"].result()


def outlive_dead_nodes_and_a_hang(batch: Batch, undisturbed: Path) -> None:
    """Of three nodes two are used; when one dies the third takes part; when another dies, the last goes on alone."""
    job = batch.submit("train.sbatch", "--nodes=1-2", overrides=("training.timeout_minutes=0.3",))
    batch.wait_for_progress()
    batch.cluster.fail("node2")

    batch.wait_for_restart(1)
    batch.wait_for_progress()
    (rank,) = batch.ranks("node1")
    os.kill(rank.pid, signal.SIGSTOP)  # the other gives up after 0.3 minutes

    batch.wait_for_restart(2)
    batch.wait_for_progress()
    first_part = batch.losses()
    batch.cluster.fail("node3")
    log = batch.wait(job, "COMPLETED")

    begins = [record for record in Journal(batch.run_dir).records() if record["event"] == "begin"]
    assert [begin["nodes"] for begin in begins] == ["node[1-2]", "node[1,3]", "node[1,3]", "node1"]
    assert [begin["restart"] for begin in begins] == [0, 1, 2, 3]
    steps = [begin["step"] for begin in begins]
    assert steps == sorted(set(steps)), "each attempt got further"
    assert "another rank has died, or has not answered in time" in log
    assert "back into the queue for restart 2 of 100" in log
    assert "2 ranks (cpu)" in log
    assert "1 rank (cpu)" in log
    assert "Traceback" not in log
    straight = losses(undisturbed)
    assert first_part == {step: straight[step] for step in first_part}, "still two ranks: bit for bit"
    assert batch.losses() == pytest.approx(straight, rel=2e-5), "another number of ranks"


def test_killed_timed_out_preempted_and_cancelled_run_goes_on(side_by_side):
    side_by_side["be_killed_timed_out_preempted_and_cancelled"].result()


def be_killed_timed_out_preempted_and_cancelled(batch: Batch, undisturbed: Path) -> None:
    cluster = batch.cluster
    job = batch.submit("train.sbatch", "--nodes=2", "--time=20", "--signal=USR1@60")
    batch.wait_for_progress()
    (rank,) = batch.ranks("node2")
    os.kill(rank.pid, signal.SIGKILL)

    batch.wait_for_restart(1)
    batch.wait_for_progress()
    # SLURM gives notice 60 to 90 s before the time is up. Let the run wait for it, and the time be up soon. SLURM wakes
    # what it signals.
    for node in ("node1", "node2"):
        (rank,) = batch.ranks(node)
        os.kill(rank.pid, signal.SIGSTOP)
    hours, minutes, seconds = map(int, cluster.job(job)["RunTime"].split(":"))
    limit = -(-(3600 * hours + 60 * minutes + seconds + 40) // 60)
    cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")

    batch.wait_for_restart(2)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=20")
    batch.wait_for_progress()
    batch.preempt()

    batch.wait_for_restart(3)
    batch.wait_for_progress()
    cluster.run("scancel", str(job))
    log = batch.wait(job, "CANCELLED")
    assert "rank 1 on node2 was killed by SIGKILL" in log
    assert "its ranks ended with 137; back into the queue for restart 1 of 100" in log
    assert "its time is up; back into the queue for restart 2 of 100" in log
    assert "another job takes its nodes; back into the queue for restart 3 of 100" in log
    assert "Traceback" not in log
    stops = [record["signal"] for record in Journal(batch.run_dir).records() if record["event"] == "stop"]
    assert stops == ["SIGUSR1", "SIGTERM", "SIGTERM"], "time limit, preempted, cancelled"
    cancelled_at = saved_step(batch.run_dir)
    assert cancelled_at < STEPS

    cpu_nodes = (
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=0",
    )  # the doctor would miss the GPUs, which are none
    again = batch.submit("train.sbatch", *cpu_nodes, SOFTCOT_DOCTOR="1")
    batch.wait_until(lambda: batch.ranks("node1", "doctor"), "the doctor at work")
    batch.preempt()
    log = batch.wait(again, "COMPLETED")
    assert "another job takes its nodes; back into the queue for restart 1 of 100" in log
    assert f"resuming from {batch.run_dir}/checkpoints/step-{cancelled_at}" in log
    assert batch.losses() == losses(undisturbed), "bit for bit, after all that"
    final = f"checkpoints/step-{STEPS}/projection.safetensors"
    want, found = load_file(undisturbed / final), load_file(batch.run_dir / final)
    assert all(torch.equal(want[name], found[name]) for name in want)
    assert curve(batch.run_dir) == curve(undisturbed), "TensorBoard has one point per step"


def test_run_that_nodes_held_within_themselves_goes_on_over_all_ranks_and_is_evaluated_in_slices(batch, undisturbed):
    within = ("backbone.partition=node",)
    job = batch.submit("train.sbatch", "--nodes=2", overrides=within, SOFTCOT_RANKS_PER_NODE="2")
    batch.wait_for_progress()
    batch.cluster.run("scancel", str(job))
    log = batch.wait(job, "CANCELLED")
    assert "4 ranks (cpu), ZeRO stage 3" in log
    saved = saved_step(batch.run_dir)
    assert saved < STEPS

    resumed = run_forked(2, "softcot_ds.train", RECIPE, *batch.overrides, "backbone.partition=zero3").stdout
    assert f"resuming from {batch.run_dir}/checkpoints/step-{saved}" in resumed
    assert "2 ranks (cpu), ZeRO stage 3" in resumed
    straight, found = losses(undisturbed), batch.losses()
    assert found.keys() == straight.keys()
    # Micro-batches of other sizes are rounded in other ways, which Adam's first steps amplify: later steps say nothing.
    early = range(1, 8)
    assert [found[step] for step in early] == pytest.approx([straight[step] for step in early], rel=2e-5)

    slices = ("evaluation.partition=tensor",)
    batch.wait(batch.submit("evaluate.sbatch", "--nodes=2", overrides=slices, SOFTCOT_RANKS_PER_NODE="2"), "COMPLETED")
    alone = batch.folder / "alone"
    decoded = shutil.ignore_patterns("outputs", "evaluation", "report.json")
    shutil.copytree(batch.run_dir, alone / "demo", ignore=decoded)
    whole = [*batch.overrides, f"output_dir={alone}", "evaluation.partition=none"]
    run_forked(1, "softcot_ds.evaluate", RECIPE, *whole)
    assert outputs(batch.run_dir) == outputs(alone / "demo")
    assert outputs(alone / "demo").keys() == {"learned", "none"}


def test_full_disk_ends_clearly_and_room_is_all_that_it_takes(side_by_side):
    side_by_side["fill_the_disk"].result()


def fill_the_disk(batch: Batch, undisturbed: Path) -> None:
    disk = batch.folder / "disk"
    disk.mkdir()
    on_node = partial(batch.cluster.on_node, "node1")
    subprocess.run(on_node("mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(disk)), check=True)
    try:
        often = (f"output_dir={disk}", "training.save_every=1", "training.keep_checkpoints=40")
        job = batch.submit("train.sbatch", "--nodelist=node1", overrides=often)
        log = batch.wait(job, "FAILED")
        assert "No space left on device" in log
        assert "Make room and run the same command again" in log
        assert "it stays out of the queue" in log
        assert "Traceback" not in log
        subprocess.run(on_node("mount", "-o", "remount,size=100M", str(disk)), check=True)
        log = batch.wait(batch.submit("train.sbatch", "--nodelist=node1", overrides=often), "COMPLETED")
        assert "resuming from" in log
        subprocess.run(on_node("cp", "-r", str(disk / "demo"), str(batch.run_dir)), check=True)
    finally:
        subprocess.run(on_node("umount", "--lazy", str(disk)), check=True)
    assert batch.losses() == pytest.approx(losses(undisturbed), rel=2e-5)


def test_nodes_are_checked_before_time_is_spent(batch, undisturbed):
    """The doctor looks at both nodes first, and sees that one of them has a folder of its own."""
    unshared = batch.folder / "unshared"
    unshared.mkdir()
    subprocess.run(batch.cluster.on_node("node2", "mount", "-t", "tmpfs", "tmpfs", str(unshared)), check=True)
    try:
        cpu_nodes = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0")  # it would miss the GPUs, which are none
        here = (f"cache.path={unshared}",)
        job = batch.submit("cache.sbatch", *cpu_nodes, overrides=here, SOFTCOT_DOCTOR="1")
        log = batch.wait(job, "FAILED")
    finally:
        subprocess.run(batch.cluster.on_node("node2", "umount", "--lazy", str(unshared)), check=True)
    assert re.search(r"^ok +communication +2 ranks over gloo, the sum is right", log, flags=re.MULTILINE)
    problems = [line for line in log.splitlines() if line.startswith("problem")]
    assert len(problems) == 1
    assert "cache.path" in problems[0]
    assert "node2" in problems[0]
    assert "rows to compute" not in log


def test_tensorboard_answers_and_says_how_to_reach_it(cluster, undisturbed, tmp_path):
    command = ["sbatch", "--parsable", f"--output={tmp_path}/log", "slurm/tensorboard.sbatch", undisturbed.parent]
    job = cluster.run(*map(str, command), cwd=ROOT, env=VARIABLES | {"USER": "ann"}).stdout.strip()
    try:
        log, give_up = tmp_path / "log", time.monotonic() + 60
        while not (found := re.search(r"ssh -N -L (\d+):(node\d):\1 ann@\S+", log.read_text() if log.exists() else "")):
            assert time.monotonic() < give_up
            time.sleep(0.1)
        port, node = found.groups()
        address = dict(line.split()[::-1] for line in (cluster.folder / "hosts").read_text().splitlines())[node]
        url = f"http://{address}:{port}/data/plugin/scalars/tags"
        while True:
            try:
                tags = json.loads(urllib.request.urlopen(url, timeout=5).read())
                assert "loss/train" in tags["demo"]
                break
            except (OSError, KeyError):  # it is starting, or reading
                assert time.monotonic() < give_up, log.read_text()
                time.sleep(0.2)
    finally:
        cluster.run("scancel", job)
