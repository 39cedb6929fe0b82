"""The batch scripts on this machine, with stand-ins for SLURM's programs; test_slurm.py runs them on a cluster."""

import json
import os
import re
import subprocess

import pytest
from launch import BIN, ROOT, environment

pytestmark = pytest.mark.distributed

SLURM = ROOT / "slurm"
RECIPE = "recipes/word_problems.yaml"
# A job of one node. srun runs here what it is given, but for the doctor, which ends as DOCTOR says. A job that goes
# back into the queue is ended at once.
STAND_INS = {
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        case "$*" in *softcot_ds.doctor*) exit "$DOCTOR" ;; *softcot_ds.train*) exit 0 ;; esac
        SLURM_NODEID=0 SLURMD_NODENAME=node1 exec "$@"
    """,
    "scontrol": """
        case "$1 $2" in
            "show hostnames") hostname ;;
            "show job") echo "JobId=7 PreemptTime=$PREEMPTED" ;;
            requeue*) echo "$2" >requeued; kill $PPID ;;
        esac
    """,
}


@pytest.fixture
def job(tmp_path):
    """Runs a script of a job; returns its exit code and output, together."""
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    for name, text in STAND_INS.items():
        (stand_ins / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (stand_ins / name).chmod(0o755)
    variables = {
        "PATH": os.pathsep.join([str(stand_ins), str(BIN), os.environ["PATH"]]),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "train",
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_JOB_NUM_NODES": "1",
        "SOFTCOT_HOME": str(ROOT),
        "PREEMPTED": "None",
        "DOCTOR": "0",
    }

    def run(*command: str, **changed: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", *map(str, command)], cwd=tmp_path, env=environment() | variables | changed, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120,
        )  # fmt: skip

    return run


@pytest.mark.parametrize(
    ("command", "doctor", "preempted", "back"),
    [
        ("train", 143, "2026-11-25T21:00:00", True),
        ("cache", 143, "2026-11-25T21:00:00", True),
        ("evaluate", 138, "None", True),  # the notice before the time limit
        ("train", 3, "None", True),  # a node died
        ("train", 143, "None", False),  # scancel
        ("train", 2, "None", False),  # the doctor found a mistake
    ],
)
def test_what_ends_the_doctor_ends_the_job_as_it_would_the_command(job, tmp_path, command, doctor, preempted, back):
    done = job(
        SLURM / f"{command}.sbatch", ROOT / RECIPE, f"output_dir={tmp_path}/runs", DOCTOR=str(doctor),
        PREEMPTED=preempted,
    )  # fmt: skip
    assert (tmp_path / "requeued").exists() == back, done.stdout
    if not back:
        assert done.returncode == doctor
    if command == "train":
        journal = (tmp_path / "runs/demo/attempts.jsonl").read_text().splitlines()
        assert [json.loads(line)["event"] for line in journal] == ["begin", "end"]


def test_ranks_see_the_gpus_that_slurm_gave(job, tmp_path):
    """The launcher alone would give them 0 and 1."""
    (tmp_path / "shown.py").write_text("import os\nprint(os.environ['LOCAL_RANK'], os.environ['CUDA_VISIBLE_DEVICES'])")
    (tmp_path / "job.sh").write_text(
        f"source {SLURM}/environment.sh\nbegin train {ROOT}/{RECIPE} output_dir=runs\nrun_ranks shown\n"
    )
    paths = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels")])
    done = job(tmp_path / "job.sh", SLURM_GPUS_ON_NODE="2", CUDA_VISIBLE_DEVICES="4,GPU-5", PYTHONPATH=paths)
    assert done.returncode == 0, done.stdout
    log = (tmp_path / "runs/demo/logs/train-7-node1.log").read_text().splitlines()
    assert sorted(line for line in log if "GPU" in line) == ["[rank 0] 0 4,GPU-5", "[rank 1] 1 4,GPU-5"]


WATCHDOG = "[rank1]:[E] ProcessGroupNCCL.cpp:685] [Rank 1] Watchdog caught collective operation timeout: WorkNCCL(...)"


def test_rank_that_nccl_aborts_ends_like_one_that_notices_itself(job, tmp_path):
    variables = {"RANK": "1", "SOFTCOT_LOGS": str(tmp_path), "SLURMD_NODENAME": "node2"}
    abort = "kill -ABRT $$"
    lost = job(SLURM / "rank.sh", "bash", "-c", f"echo '{WATCHDOG}'; {abort}", **variables)
    assert lost.returncode == 3, "as README says"
    assert "softcot-ds: rank 1 on node2: another rank has died, or has not answered in time" in lost.stdout
    own = job(SLURM / "rank.sh", "bash", "-c", abort, **variables)
    assert own.returncode == 134, "of the attempt before, the log still has the watchdog's words"
    assert "softcot-ds: rank 1 on node2 was killed by SIGABRT" in own.stdout
    fine = job(SLURM / "rank.sh", "bash", "-c", f"echo '{WATCHDOG}'", **variables)
    assert fine.returncode == 0


def test_ports_stay_below_those_of_outgoing_connections(job, tmp_path):
    (tmp_path / "ports.sh").write_text(
        f"for SLURM_JOB_ID in 1 1714 4681 999983 67108863; do source {SLURM}/environment.sh; echo $MASTER_PORT; done"
    )
    for restarts in ("0", "99"):
        ports = [int(line) for line in job(tmp_path / "ports.sh", SLURM_RESTART_COUNT=restarts).stdout.split()]
        assert len(set(ports)) == 5
        assert all(20000 <= port < 32768 for port in ports), ports


@pytest.mark.parametrize("path", sorted(SLURM.glob("*.*")), ids=lambda path: path.name)
def test_scripts_suit_bash_4_3(path):
    """With set -u it takes an empty array for an unset variable; newer ones do not, so no test here would see it."""
    assert not re.search(r"\$\{(?!PIPESTATUS)[A-Za-z_]+\[[@*]\]\}", path.read_text())
