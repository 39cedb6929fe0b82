"""The doctor finds what is wrong, says where and what to do, and leaves nothing behind."""

import math
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from launch import ROOT, deepspeed_command, environment, run
from safetensors.torch import save_file

from softcot_ds import doctor
from softcot_ds.backbone import load_config
from softcot_ds.doctor import Facts, Folder, Model
from softcot_ds.recipe import load_recipe

RECIPE = ROOT / "recipes" / "word_problems.yaml"
GIB = 2**30
TITLES = ["versions", "devices", "communication", "shared folders", "disks", "Triton", "models", "launchers"]


def healthy(rank: int) -> Facts:
    """A rank of two nodes with two GPUs each."""
    first = rank % 2 == 0
    folder = Folder("/data/runs", shared=True, free_bytes=100 * GIB if first else None)
    local = Folder("/tmp", shared=False, free_bytes=50 * GIB if first else None)
    models = {"base": Model("owner/base", "b" * 64, 4096), "assistant": Model("owner/small", "a" * 64, 2048)}
    return Facts(
        rank=rank,
        local_rank=rank % 2,
        node=f"node{rank // 2}",
        versions={"python": "3.11.7", "torch": "2.13.0+cu130", "deepspeed": "0.19.8", "mpi4py": "4.1.2"},
        requirements=["python<3.13,>=3.11", "torch<2.14,>=2.13", "deepspeed<0.20,>=0.19.8", "mpi4py>=4.1"],
        source="0123",
        gpus=2,
        gpus_allotted=2,
        gpus_of_machine=2,
        gpu="NVIDIA H100",
        gpu_bytes=80 * GIB,
        gpu_free_bytes=79 * GIB,
        driver="580.1",
        cuda="13.0",
        matmul_error=1e-7,
        kernel_error=1e-7,
        shm_bytes=64 * GIB,
        sum_right=True,
        bus_gb_per_s=50.0,
        folders={"output_dir": folder, "temporary folder": local},
        models=models if first else {},
        checkpoint_bytes=10 * GIB,
        srun=True,
    )


def cluster(*changed_ranks: int, versions=(), output_dir=(), temporary=(), base=(), **changes) -> list[Facts]:
    """Four healthy ranks, some of them with other facts; without ranks, all of them."""
    everyone = [healthy(rank) for rank in range(4)]
    for rank in changed_ranks or range(4):
        facts = replace(everyone[rank], **changes)
        facts.versions |= dict(versions)
        facts.folders["output_dir"] = replace(facts.folders["output_dir"], **dict(output_dir))
        facts.folders["temporary folder"] = replace(facts.folders["temporary folder"], **dict(temporary))
        if facts.models:
            facts.models["base"] = replace(facts.models["base"], **dict(base))
        everyone[rank] = facts
    return everyone


def test_a_healthy_cluster_gets_one_ok_for_each_check():
    findings = doctor.judge(cluster())
    assert [finding.level for finding in findings] == ["ok"] * 8, findings
    assert [finding.title for finding in findings] == TITLES
    assert "4 ranks over NCCL, the sum is right, bus bandwidth 50.00 GB/s" in findings[2].text


CPU = {"gpus": 0, "gpu": "", "gpus_allotted": None, "gpus_of_machine": 0, "kernel_error": None}

WRONG = {
    "version differs": (
        cluster(2, 3, versions={"torch": "2.13.1"}),
        "problem", "versions", "torch differs: 2.13.0+cu130 on node0; 2.13.1 on node1", "pip install 'torch==2.13.0'",
    ),
    "version differs on one rank": (
        cluster(3, versions={"mpi4py": "4.2"}),
        "problem", "versions", "mpi4py differs: 4.1.2 on node0, rank 2 (node1); 4.2 on rank 3 (node1)", "environment",
    ),
    "python differs": (
        cluster(2, 3, versions={"python": "3.12.1"}), "problem", "versions", "3.12.1 on node1", "Python 3.11.7",
    ),
    "below the range": (
        cluster(versions={"torch": "2.12.1+cu130"}),
        "problem", "versions", "torch 2.12.1+cu130 on node0, node1: outside of <2.14,>=2.13",
        "pip install 'torch<2.14,>=2.13'",
    ),
    "known to be bad": (
        cluster(versions={"deepspeed": "0.19.5"}),
        "problem", "versions", "outside of <0.20,>=0.19.8; ZeRO++'s zero_quantized", "pip install 'deepspeed<0.20",
    ),
    "not installed": (
        cluster(versions={"mpi4py": None}),
        "problem", "versions", "mpi4py (not installed) on node0, node1: is required", "pip install 'mpi4py>=4.1'",
    ),
    "wrong python": (
        cluster(versions={"python": "3.13.0"}), "problem", "versions", "outside of <3.13,>=3.11", "new environment",
    ),
    "other commit": (
        cluster(2, 3, source="beef"),
        "problem", "versions", "softcot-ds itself differ (hash 0123 on node0; beef on node1", "same commit",
    ),
    "no metadata": (cluster(requirements=None), "warning", "versions", "cannot be checked", "pip install -e ."),
    "no GPU on one rank": (
        cluster(3, **CPU), "problem", "devices", "no GPU is seen by rank 3 (node1)", "CUDA_VISIBLE_DEVICES",
    ),
    "no GPU on one node": (
        cluster(2, 3, **CPU), "problem", "devices", "no GPU is seen by node1", "--gpus-per-node",
    ),
    "torch without CUDA": (
        cluster(**(CPU | {"gpus_of_machine": 2})),
        "problem", "devices", "torch 2.13.0+cu130 sees none of 2 GPUs on node0, node1", "torch's CUDA build",
    ),
    "GPU fails": (
        cluster(2, device_failure="CUDA error: uncorrectable ECC error"),
        "problem", "devices", "rank 2 (node1): CUDA error: uncorrectable ECC error", "nvidia-smi",
    ),
    "more ranks than GPUs": (
        cluster(2, 3, gpus=1, gpus_allotted=1),
        "problem", "devices", "no GPU of its own for rank 3 (node1): node1 shows 1 to 2 ranks", "--num_gpus",
    ),
    "a GPU dropped out": (
        cluster(2, 3, gpus_allotted=4), "problem", "devices", "SLURM gave 4 GPUs of node1 to this job, 2", "nvidia-smi",
    ),
    "idle GPUs": (
        cluster(2, 3, gpus=8, gpus_allotted=None), "warning", "devices", "node1 has 8 GPUs for 2 ranks", "--num_gpus",
    ),
    "wrong product": (
        cluster(1, matmul_error=0.3), "problem", "devices", "wrong on rank 1 (node0): relative error 3.0e-01", "leave",
    ),
    "product is NaN": (
        cluster(1, matmul_error=math.nan), "problem", "devices", "rank 1 (node0): relative error nan", "leave",
    ),
    "GPU models differ": (
        cluster(2, 3, gpu="NVIDIA A100"),
        "warning", "devices", "differ in model: NVIDIA H100 on node0; NVIDIA A100 on node1", "--constraint",
    ),
    "GPU memory differs": (
        cluster(2, 3, gpu_bytes=40 * GIB, gpu_free_bytes=39 * GIB),
        "warning", "devices", "differ in memory: 80 GiB on node0; 40 GiB on node1", "--constraint",
    ),
    "drivers differ": (
        cluster(2, 3, driver="570.2"), "warning", "devices", "in driver: 580.1 on node0; 570.2 on node1", "one version",
    ),
    "GPU in use": (
        cluster(3, gpu_free_bytes=20 * GIB),
        "warning", "devices", "in use on rank 3 (node1): 20.0 of 80.0 GiB free", "nvidia-smi",
    ),
    "NCCL fails": (
        cluster(exchange_failure="no end within 60 s", sum_right=None, bus_gb_per_s=None),
        "problem", "communication", "over NCCL fails on node0, node1: no end within 60 s", "NCCL_SOCKET_IFNAME",
    ),
    "wrong sum": (
        cluster(1, sum_right=False), "problem", "communication", "a wrong sum on rank 1 (node0)", "NCCL_P2P_DISABLE=1",
    ),
    "slow NCCL": (
        cluster(3, bus_gb_per_s=1.1),
        "warning", "communication", "slow between 2 nodes: bus bandwidth 1.10 GB/s", "NCCL_DEBUG=INFO",
    ),
    "small shm": (
        cluster(shm_bytes=64 * 2**20), "warning", "communication", "/dev/shm has 64 MiB on node0, node1", "--shm-size",
    ),
    "folder not shared": (
        cluster(2, 3, output_dir={"unseen": [0]}),
        "problem", "shared folders", "output_dir /data/runs is not shared: node1 does not see what node0 wrote",
        "output_dir=/path/there",
    ),
    "folder elsewhere": (
        cluster(2, output_dir={"unseen": [0], "path": "/scratch/runs"}),
        "problem", "shared folders", "/data/runs on rank 0 (node0); /scratch/runs on rank 2 (node1)", "all nodes mount",
    ),
    "folder read-only": (
        cluster(2, output_dir={"failure": "Read-only file system", "free_bytes": None}),
        "problem", "shared folders", "/data/runs, on node1: cannot write: Read-only file system", "output_dir=/path/",
    ),
    "no room for checkpoints": (
        cluster(2, output_dir={"free_bytes": 9 * GIB}),
        "problem", "disks", "/data/runs has 9.0 GiB free on node1, 10.0 GiB are needed: the checkpoints", "make room",
    ),
    "no room at all": (
        cluster(output_dir={"free_bytes": GIB // 2}, checkpoint_bytes=0),
        "problem", "disks", "512.0 MiB free on node0, node1, 1.0 GiB are needed", "make room",
    ),
    "no room to spare": (
        cluster(2, temporary={"free_bytes": 1000}), "warning", "disks", "temporary folder /tmp has 0.0 MiB", "room",
    ),
    "no temporary folder": (
        cluster(0, temporary={"failure": "No space left on device"}),
        "problem", "disks", "temporary folder /tmp, on node0: cannot write: No space", "TMPDIR=",
    ),
    "kernel fails": (
        cluster(2, 3, kernel_failure="Failed to find C compiler", kernel_error=None),
        "problem", "Triton", "does not run on node1: Failed to find C compiler", "TRITON_CACHE_DIR",
    ),
    "kernel wrong": (
        cluster(1, kernel_error=0.5), "problem", "Triton", "wrong on rank 1 (node0): relative error 5.0e-01", "report",
    ),
    "other weights": (
        cluster(2, base={"fingerprint": "c" * 64}),
        "problem", "models", "base owner/base has different weights: bbbbbbbbbbbb on rank 0 (node0); cccccccccccc on",
        "base.revision",
    ),
    "weights missing": (
        cluster(2, base={"failure": "owner/base: no weights"}),
        "problem", "models", "base cannot be read on node1: owner/base: no weights", "HF_HOME",
    ),
    "many processes alone": (
        cluster(alone_of="SLURM_STEP_NUM_TASKS=8"),
        "problem", "launchers", "SLURM_STEP_NUM_TASKS=8, but this process knows of no others", "--ntasks-per-node=1",
    ),
    "no mpi4py": (cluster(2, 3, mpi4py=False), "warning", "launchers", "mpi4py is missing on node1", "pip install"),
    "no srun": (cluster(3, srun=False), "warning", "launchers", "srun is missing on rank 3 (node1)", "PATH"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_found_alone_with_its_place_and_remedy(case):
    everyone, level, title, text, remedy = WRONG[case]
    wrong = [finding for finding in doctor.judge(everyone) if finding.level != "ok"]
    assert [(finding.level, finding.title) for finding in wrong] == [(level, title)], wrong
    assert text in wrong[0].text
    assert remedy in wrong[0].remedy


def test_a_slow_network_within_a_node_or_over_gloo_is_no_warning():
    one_node = [replace(facts, node="node0", bus_gb_per_s=0.1) for facts in cluster()[:2]]
    assert all(finding.level == "ok" for finding in doctor.judge(one_node))
    cpus = doctor.judge(cluster(**CPU, bus_gb_per_s=0.1))
    assert all(finding.level == "ok" for finding in cpus), cpus
    assert "no GPU: CPU ranks over gloo" in cpus[1].text


def test_known_bad_versions_are_told_without_the_packages_metadata():
    findings = doctor.judge_versions(cluster(requirements=None, versions={"deepspeed": "0.19.3"}))
    assert any("activation checkpointing with frozen weights fails" in finding[1] for finding in findings)


def test_work_that_does_not_end_is_left_behind():
    began = time.monotonic()
    assert doctor._within(0.2, lambda: time.sleep(5)) == "no end within 0.2 s"
    assert time.monotonic() - began < 4
    assert doctor._within(5, lambda: None) == ""
    assert doctor._within(5, lambda: [].pop()) == "pop from empty list"


def test_the_kernel_and_the_product_are_compared_with_float64():
    facts = healthy(0)
    doctor._run_kernel(facts, "cuda" if torch.cuda.is_available() else "cpu")
    doctor._look_at_device(facts)
    for error in (facts.kernel_error, facts.matmul_error):
        assert 0 < error < 1e-5


def test_room_for_checkpoints_is_what_they_take(tmp_path):
    recipe = load_recipe(RECIPE, ["training.keep_checkpoints=2"])
    D, P = load_config(recipe.base).hidden_size, load_config(recipe.assistant).hidden_size
    layer = torch.nn.Linear(P, D)
    tensors = {f"{part}.{name}": value.data.clone() for part in "wmv" for name, value in layer.named_parameters()}
    save_file(tensors, tmp_path / "one.safetensors")
    needed = doctor.collect(recipe, 0).checkpoint_bytes
    assert needed == pytest.approx(3 * (tmp_path / "one.safetensors").stat().st_size, rel=0.02)


def alone(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "softcot_ds.doctor", *map(str, arguments)]


def levels(output: str) -> dict[str, str]:
    """The level of each check in what was printed."""
    rows = [line.split(maxsplit=1) for line in output.splitlines() if not line.startswith(" ")]
    known = {title: row[0] for row in rows for title in TITLES if len(row) == 2 and row[1].startswith(f"{title}  ")}
    assert set(known) == set(TITLES), output
    return known


def test_alone_all_is_well_and_nothing_is_left(tmp_path):
    folders = [f"output_dir={tmp_path}/a/b", f"cache.path={tmp_path}/a/cache"]
    done = run(alone(RECIPE, *folders))
    assert set(levels(done.stdout).values()) == {"ok"}
    assert f"torch {torch.__version__}" in done.stdout
    assert f"output_dir {tmp_path}/a/b" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_without_a_recipe_the_current_folder_is_looked_at(tmp_path):
    done = subprocess.run(alone(), cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"runs {tmp_path}/runs: written and read" in done.stdout
    assert "no recipe given" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.distributed
def test_two_ranks_of_the_launcher_talk_to_each_other(tmp_path):
    done = run(deepspeed_command(2, "softcot_ds.doctor", RECIPE, f"output_dir={tmp_path}", f"cache.path={tmp_path}"))
    assert set(levels(done.stdout).values()) == {"ok"}
    assert done.stdout.count("ranks on 1 node") == 1
    if not torch.cuda.is_available():
        assert "2 ranks over gloo, the sum is right, bus bandwidth " in done.stdout
    assert list(tmp_path.iterdir()) == []


STUCK = """
import os, sys, time
import torch.distributed as dist
from softcot_ds import doctor

doctor.EXCHANGE_SECONDS = 2
if os.environ["RANK"] == "1":
    dist.all_reduce = lambda *_, **__: time.sleep(60)
sys.exit(doctor.main(sys.argv[1:]))
"""


@pytest.mark.distributed
def test_an_all_reduce_that_a_rank_never_joins_is_told_and_ends(tmp_path):
    (tmp_path / "stuck_worker.py").write_text(STUCK)
    done = run(
        deepspeed_command(2, "stuck_worker", RECIPE, f"output_dir={tmp_path}", f"cache.path={tmp_path}"),
        timeout=50,
        check=False,
        PYTHONPATH=f"{tmp_path}:{ROOT}:{ROOT / 'kernels'}",
    )
    assert done.returncode == 2
    assert f"fails on {socket.gethostname()}: no end within 2 s" in done.stdout
    assert {title for title, level in levels(done.stdout).items() if level != "ok"} == {"communication"}
    assert "Traceback" not in done.stdout


def nodes(script: str, *arguments: object) -> list[tuple[int, str]]:
    """Run on two nodes at once: two hostnames, each with mounts of its own. ``script`` runs first on the second one."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    launcher = {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank, before in enumerate(("true", script)):
        own = ["unshare", "--uts", "--mount", "sh", "-c", f'hostname node{rank} && {before} && exec "$@"', "sh"]
        process = subprocess.Popen(
            [*own, *alone(*arguments)], cwd=ROOT, env=environment() | launcher | {"RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        processes.append(process)
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def may_unshare() -> bool:
    probe = ["unshare", "--uts", "--mount", "sh", "-c", "hostname probe && mount -t tmpfs tmpfs /mnt"]
    return bool(shutil.which("unshare")) and subprocess.run(probe, capture_output=True).returncode == 0


needs_nodes = pytest.mark.skipif(not may_unshare(), reason="hostnames and mounts of one's own need root")


@needs_nodes
@pytest.mark.distributed
def test_two_nodes_that_share_their_folders(tmp_path):
    (first, table), (second, silent) = nodes("true", RECIPE, f"output_dir={tmp_path}/runs", f"cache.path={tmp_path}/c")
    assert (first, second) == (0, 0), table + silent
    assert set(levels(table).values()) == {"ok"}
    assert "2 ranks on 2 nodes" in table
    assert "each of 2 nodes sees what the others write" in table
    assert "versions" not in silent
    assert list(tmp_path.iterdir()) == []


@needs_nodes
@pytest.mark.distributed
def test_two_nodes_with_a_folder_of_their_own_each(tmp_path):
    (tmp_path / "runs").mkdir()
    script = f"mount -t tmpfs tmpfs {tmp_path}/runs"
    folders = [f"output_dir={tmp_path}/runs/out", f"cache.path={tmp_path}/cache"]
    (first, table), (second, silent) = nodes(script, RECIPE, *folders)
    assert (first, second) == (2, 2), table + silent
    wrong = {title for title, level in levels(table).items() if level != "ok"}
    assert wrong == {"shared folders"}, table
    assert f"output_dir {tmp_path}/runs/out is not shared: node0 does not see what node1 wrote; node1 does" in table
    assert "cache.path /" not in table, "that one is shared"
    assert table.splitlines()[-1] == "softcot-ds: error: 1 problem, listed above, each with what to do"
    assert "Traceback" not in table + silent
    assert [path.name for path in tmp_path.rglob("*")] == ["runs"]


@needs_nodes
@pytest.mark.distributed
def test_two_nodes_with_other_recipes(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.read_text())
    changed = tmp_path / "changed.yaml"
    changed.write_text(RECIPE.read_text().replace("seed: 0", "").replace("name: demo", "name: other"))
    for code, output in nodes(f"mount --bind {changed} {recipe}", recipe, f"output_dir={tmp_path}"):
        assert code == 2
        assert "the recipe differs (hash " in output
        assert "Traceback" not in output


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_disk_is_a_problem_with_a_remedy(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        (disk / "rest").write_bytes(bytes(32 * 1024))
        short = run(alone(RECIPE, f"output_dir={disk}", f"cache.path={tmp_path}"), check=False)
        with (disk / "rest").open("ab") as file, pytest.raises(OSError, match="No space left"):
            file.write(bytes(2**20))
        full = run(alone(RECIPE, f"output_dir={disk}", f"cache.path={tmp_path}"), check=False)
        assert [path.name for path in disk.iterdir()] == ["rest"]
    finally:
        subprocess.run(["umount", disk], check=True)
    for done in (short, full):
        assert done.returncode == 2
        assert "Traceback" not in done.stdout
        assert "-> make room, or name another folder" in done.stdout
        assert f"output_dir {disk} has 0.0 MiB free" in done.stdout
    assert {title for title, level in levels(short.stdout).items() if level == "problem"} == {"disks"}
    assert {title for title, level in levels(full.stdout).items() if level == "problem"} == {"disks", "shared folders"}
    assert "cannot write: No space left on device" in full.stdout


def test_an_nvme_folder_that_is_missing_is_a_problem(tmp_path):
    config = (ROOT / "ds_configs/zero3_nvme_offload.json").read_text().replace("/local_nvme", f"{tmp_path}/nvme")
    (tmp_path / "ds.json").write_text(config)
    overrides = [f"backbone.deepspeed={tmp_path}/ds.json", f"output_dir={tmp_path}", f"cache.path={tmp_path}"]
    done = run(alone(RECIPE, *overrides), check=False)
    assert done.returncode == 2
    assert f"offload_param.nvme_path {tmp_path}/nvme, on {socket.gethostname()}: cannot write: No such" in done.stdout
    (tmp_path / "nvme").mkdir()
    assert "offload_param.nvme_path" in run(alone(RECIPE, *overrides)).stdout


def test_a_model_that_cannot_be_read_is_a_problem(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(ROOT / "softcot_ds/pair/base", base)
    (base / "model.safetensors").unlink()
    done = run(alone(RECIPE, f"base.model={base}", f"output_dir={tmp_path}"), check=False)
    assert done.returncode == 2
    assert f"base cannot be read on {socket.gethostname()}: {base}: no weights" in done.stdout
    assert "Traceback" not in done.stdout


def test_ranks_that_cannot_meet_are_told_where_and_what_to_do(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        launcher = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = run(alone(), check=False, **launcher)
    assert done.returncode == 3
    assert f"rank 0 of 2 cannot meet the others at MASTER_ADDR=127.0.0.1 MASTER_PORT={port}: " in done.stdout
    assert "deepspeed --master_port PORT" in done.stdout
    assert "Traceback" not in done.stdout


def test_a_launcher_variable_that_is_missing_is_named():
    done = run(alone(), check=False, RANK="1", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_PORT="29500")
    assert done.returncode == 2
    assert "MASTER_ADDR expected, but not set" in done.stdout
    assert "Traceback" not in done.stdout


def test_processes_that_do_not_know_of_each_other_are_a_problem(tmp_path):
    done = run(alone(RECIPE, f"output_dir={tmp_path}"), check=False, SLURM_STEP_NUM_TASKS="4")
    assert done.returncode == 2
    assert "SLURM_STEP_NUM_TASKS=4, but this process knows of no others" in done.stdout


@pytest.mark.parametrize("library", ["torch", "deepspeed", "transformers"])
def test_a_library_that_does_not_load_is_named_with_the_command_that_mends_it(tmp_path, library):
    (tmp_path / f"{library}.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    done = run(alone(), check=False, PYTHONPATH=f"{tmp_path}:{ROOT}:{ROOT / 'kernels'}")
    assert done.returncode == 2
    assert "libcudart.so.13: cannot open shared object file" in done.stdout
    assert f"pip install --force-reinstall '{library}<" in done.stdout
    assert "Traceback" not in done.stdout
