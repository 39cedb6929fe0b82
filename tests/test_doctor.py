"""The doctor finds what is wrong, says where and what to do, and leaves nothing behind."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from launch import ROOT, deepspeed_command, environment, run
from safetensors.torch import load_file, save_file
from small_disk import small_disk

from softcot_ds import distributed, doctor, launchers
from softcot_ds.agreement import code_digest
from softcot_ds.diagnosis import examine
from softcot_ds.diagnosis import judge as diagnosis
from softcot_ds.diagnosis.judge import Facts, Finding, Folder, Model
from softcot_ds.errors import SoftCoTError
from softcot_ds.launchers import alone_of
from softcot_ds.methods import trial
from softcot_ds.models import toy
from softcot_ds.models.backbone import load_config
from softcot_ds.recipe import load_recipe
from softcot_ds.thoughts import manifest
from softcot_ds.thoughts.manifest import row_key
from softcot_ds.thoughts.reader import cache_identity
from softcot_ds.thoughts.store import StoreWriter

RECIPE = ROOT / "recipes" / "word_problems.yaml"
GIB = 2**30
TITLES = ["versions", "devices", "communication", "folders", "disks", "models", "states", "memory", "gathering"]
TITLES.append("launchers")


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
        requirements={
            "python": "<3.13,>=3.11",
            "torch": "<2.14,>=2.13",
            "deepspeed": "<0.20,>=0.19.8",
            "mpi4py": ">=4.1",
        },
        source="0123",
        gpus=2,
        gpus_allotted=2,
        gpu="NVIDIA H100, 80 GiB",
        matmul_error=1e-7,
        kernel_error=1e-7,
        shm_bytes=64 * GIB,
        bus_gb_per_s=50.0,
        folders={"output_dir": folder, "TMPDIR": local},
        models=models if first else {},
        checkpoint_bytes=10 * GIB,
        launchers={"deepspeed": True, "srun": True},
    )


def cluster(*changed_ranks: int, versions=(), output_dir=(), temporary=(), base=(), **changes) -> list[Facts]:
    """Four healthy ranks, some of them with other facts; without ranks, all of them."""
    everyone = [healthy(rank) for rank in range(4)]
    for rank in changed_ranks or range(4):
        facts = replace(everyone[rank], **changes)
        facts.versions |= dict(versions)
        facts.folders["output_dir"] = replace(facts.folders["output_dir"], **dict(output_dir))
        facts.folders["TMPDIR"] = replace(facts.folders["TMPDIR"], **dict(temporary))
        if facts.models:
            facts.models["base"] = replace(facts.models["base"], **dict(base))
        everyone[rank] = facts
    return everyone


def test_a_healthy_cluster_gets_one_ok_for_each_check():
    findings = diagnosis.judge(cluster())
    assert [finding.level for finding in findings] == ["ok"] * 10, findings
    assert [finding.title for finding in findings] == TITLES
    assert "4 ranks over NCCL, the sum is right, bus bandwidth 50.00 GB/s" in findings[2].text


@pytest.mark.slow
def test_what_the_gpus_cannot_hold_is_found_by_plan():
    """By the memory of the smallest GPU that is there, also of a kind that is in no table."""
    large = load_recipe(ROOT / "recipes/gsm8k_llama_70b.yaml", ["backbone.partition=none", "evaluation.partition=none"])
    for gpu in ("NVIDIA H100 80GB HBM3, 79 GiB", "Somebody's X1, 79 GiB"):
        said = examine.too_large(large, cluster(gpu=gpu, gpu_bytes=79 * GIB))
        (training,) = re.findall(r"^training (\d+) GiB and evaluation \d+ GiB", said)
        assert 2 * 70.55e9 / GIB < int(training) < 160, "the weights in 16 bits, and what a step needs"
        assert "of a GPU, by plan, of which it has 79 GiB" in said
    small = load_recipe(RECIPE, ["task.train_problems=20", "task.validation_problems=4", "task.test_problems=4"])
    assert examine.too_large(small, cluster(gpu_bytes=79 * GIB)) == ""
    assert examine.too_large(small, cluster(3, gpu_bytes=0)) is None
    assert examine.too_large(small, cluster(gpu_bytes=79 * GIB)[:3]) is None, "nodes of different size"


CPU = {"gpus": 0, "gpu": "", "gpus_allotted": 0}

WRONG = {
    "states alike": (
        cluster(states=(56.4, 1.23)),
        "warning", "states", "1.23 of their length varies with the question, 56.4 is",
        """cache RECIPE thoughts.placeholder='"1"'""",
    ),
    "too large": (
        cluster(too_large="training 134 GiB of a GPU, by plan"),
        "warning", "memory", "training 134 GiB of a GPU, by plan is too much", "--nodes 2 --gpus-per-node 2 shows",
    ),
    "version differs": (
        cluster(2, 3, versions={"torch": "2.13.1"}),
        "problem", "versions", "torch differs: 2.13.0+cu130 on node0; 2.13.1 on node1", "one environment",
    ),
    "version differs on one rank": (
        cluster(3, versions={"mpi4py": "4.2"}),
        "problem", "versions", "mpi4py differs: 4.1.2 on node0, rank 2 (node1); 4.2 on rank 3 (node1)", "environment",
    ),
    "python differs": (
        cluster(2, 3, versions={"python": "3.12.1"}), "problem", "versions", "3.12.1 on node1", "the same version",
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
        cluster(versions={"python": "3.13.0"}), "problem", "versions", "outside of <3.13,>=3.11", "with Python <3.13",
    ),
    "other commit": (
        cluster(2, 3, source="beef"),
        "problem", "versions", "softcot-ds itself differ (hash 0123 on node0; beef on node1", "same commit",
    ),
    "no GPU on one rank": (
        cluster(3, **CPU), "problem", "devices", "0 of 2 GPUs are seen by rank 3 (node1)", "CUDA_VISIBLE_DEVICES",
    ),
    "no GPU on one node": (
        cluster(2, 3, **CPU), "problem", "devices", "0 of 2 GPUs are seen by node1", "--gpus-per-node",
    ),
    "torch without CUDA": (
        cluster(**(CPU | {"gpus_allotted": 2})),
        "problem", "devices", "0 of 2 GPUs are seen by node0, node1", "torch's CUDA build",
    ),
    "GPU fails": (
        cluster(2, device_failure="CUDA error: uncorrectable ECC error"),
        "problem", "devices", "rank 2 (node1): CUDA error: uncorrectable ECC error", "nvidia-smi",
    ),
    "more ranks than GPUs": (
        cluster(2, 3, gpus=1, gpus_allotted=1),
        "problem", "devices", "1 of 2 GPUs are seen by node1", "--num_gpus",
    ),
    "a GPU dropped out": (
        cluster(2, 3, gpus_allotted=4), "problem", "devices", "2 of 4 GPUs are seen by node1", "nvidia-smi",
    ),
    "wrong product": (
        cluster(1, device_failure="a matrix product is wrong: relative error 3.0e-01"),
        "problem", "devices", "the device fails on rank 1 (node0): a matrix product is wrong", "Leave the node out",
    ),
    "GPU models differ": (
        cluster(2, 3, gpu="NVIDIA A100, 40 GiB"),
        "warning", "devices", "differ: NVIDIA H100, 80 GiB on node0; NVIDIA A100, 40 GiB on node1", "--constraint",
    ),
    "NCCL fails": (
        cluster(exchange_failure="no end within 60 s", bus_gb_per_s=0.0),
        "problem", "communication", "over NCCL fails on node0, node1: no end within 60 s", "NCCL_SOCKET_IFNAME",
    ),
    "wrong sum": (
        cluster(1, exchange_failure="the sum is wrong", bus_gb_per_s=0.0),
        "problem", "communication", "over NCCL fails on rank 1 (node0): the sum is wrong", "NCCL_P2P_DISABLE=1",
    ),
    "slow NCCL": (
        cluster(3, bus_gb_per_s=1.1),
        "warning", "communication", "slow between 2 nodes: bus bandwidth 1.10 GB/s", "NCCL_DEBUG=INFO",
    ),
    "small shm": (
        cluster(shm_bytes=2**26), "warning", "communication", "/dev/shm has 64.0 MiB on node0, node1", "--shm-size",
    ),
    "folder not shared": (
        cluster(2, 3, output_dir={"unseen": [0]}),
        "problem", "folders", "output_dir /data/runs is not shared: node1 does not see what node0 wrote",
        "name it in output_dir",
    ),
    "folder read-only": (
        cluster(2, output_dir={"failure": "Read-only file system", "free_bytes": None}),
        "problem", "folders", "/data/runs cannot be written on node1: Read-only file system", "in output_dir",
    ),
    "no room for checkpoints": (
        cluster(2, output_dir={"free_bytes": 9 * GIB}),
        "problem", "disks", "/data/runs has 9.0 GiB free on node1, 10.0 GiB needed: the checkpoints", "make room",
    ),
    "no room at all": (
        cluster(output_dir={"free_bytes": GIB // 2}, checkpoint_bytes=0),
        "problem", "disks", "512.0 MiB free on node0, node1, 1.0 GiB needed", "make room",
    ),
    "no room to spare": (
        cluster(2, temporary={"free_bytes": 1000}), "warning", "disks", "TMPDIR /tmp has 0.0 MiB", "room",
    ),
    "no temporary folder": (
        cluster(0, temporary={"failure": "No space left on device"}),
        "problem", "folders", "TMPDIR /tmp cannot be written on node0: No space", "in TMPDIR",
    ),
    "kernel fails": (
        cluster(2, 3, kernel_failure="Failed to find C compiler"),
        "problem", "devices", "Triton kernel fails on node1: Failed to find C compiler", "TRITON_CACHE_DIR",
    ),
    "other weights": (
        cluster(2, base={"fingerprint": "c" * 64}),
        "problem", "models", "base owner/base has different weights: bbbbbbbbbbbb on node0; cccccccccccc on node1",
        "base.revision",
    ),
    "weights missing": (
        cluster(2, base={"failure": "owner/base: no weights"}),
        "problem", "models", "base cannot be read on node1: owner/base: no weights", "HF_HOME",
    ),
    "unfit family": (
        cluster(base={"trial_failure": "it is not causal"}),
        "problem", "models", "base owner/base does not do what is asked of it on node0, node1: it is not causal",
        "base.attention: eager",
    ),
    "no prompts": (
        cluster(2, prompts_failure="no chat template"),
        "problem", "models", "the recipe's prompts cannot be made on node1: no chat template", "every command",
    ),
    "a limit too low": (
        cluster(0, 2, limits={"stage3_max_live_parameters": (7000, 8000)}),
        "warning", "gathering",
        "stage3_max_live_parameters is 7000, and these models need 8000: a layer is not gathered", "or set 8000",
    ),
    "a damaged configuration": (
        cluster(2, limits_failure="ds.json: zero_optimization.overlap_comm: no boolean"),
        "problem", "gathering", "cannot be derived on node1: ds.json: zero_optimization.overlap_comm", "mend",
    ),
    "many processes alone": (
        cluster(alone_of="SLURM_STEP_NUM_TASKS=8"),
        "problem", "launchers", "SLURM_STEP_NUM_TASKS=8, but this process knows of no others", "--ntasks-per-node=1",
    ),
    "no srun": (
        cluster(3, launchers={"deepspeed": True, "srun": False}),
        "warning", "launchers", "srun is missing on rank 3 (node1)", "PATH",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_found_alone_with_its_place_and_remedy(case):
    everyone, level, title, text, remedy = WRONG[case]
    wrong = [finding for finding in diagnosis.judge(everyone) if finding.level != "ok"]
    assert [(finding.level, finding.title) for finding in wrong] == [(level, title)], wrong
    assert text in wrong[0].text
    assert remedy in wrong[0].remedy


def test_a_slow_network_within_a_node_or_over_gloo_is_no_warning():
    one_node = [replace(facts, node="node0", bus_gb_per_s=0.1) for facts in cluster()[:2]]
    assert all(finding.level == "ok" for finding in diagnosis.judge(one_node))
    cpus = diagnosis.judge(cluster(**CPU, bus_gb_per_s=0.1))
    assert all(finding.level == "ok" for finding in cpus), cpus
    assert "no GPU: CPU ranks over gloo" in cpus[1].text


def test_known_bad_versions_are_told_without_the_packages_metadata():
    findings = diagnosis.judge(cluster(requirements=None, versions={"deepspeed": "0.19.3"}))
    assert findings[0].level == "problem"
    assert "activation checkpointing with frozen weights fails" in findings[0].text
    assert "ranges unknown" in diagnosis.judge(cluster(requirements=None))[0].text


def test_the_table_puts_problems_last_with_their_remedies():
    lines = diagnosis.table(diagnosis.judge(cluster(1, device_failure="it burns")), cluster()).splitlines()
    assert lines[0] == "4 ranks on 2 nodes"
    assert lines[-2] == "problem  devices         the device fails on rank 1 (node0): it burns"
    assert lines[-1].startswith(" " * 25 + "-> run nvidia-smi there")


def test_work_that_does_not_end_is_left_behind():
    began = time.monotonic()
    assert examine._within(0.2, lambda: time.sleep(5)) == "no end within 0.2 s"
    assert time.monotonic() - began < 4
    assert examine._within(5, lambda: None) == ""
    assert examine._within(5, lambda: [].pop()) == "pop from empty list"


def all_reduced(monkeypatch, factor: float) -> Facts:
    """What rank 0 of two notes when each all-reduce multiplies its tensor and takes 20 ms."""

    def all_reduce(tensor, group):
        time.sleep(0.02)
        tensor *= factor

    monkeypatch.setattr(examine, "MESSAGE_BYTES", 4 * 10**6)
    monkeypatch.setattr(examine.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(examine.dist, "all_reduce", all_reduce)
    facts = replace(healthy(0), bus_gb_per_s=0.0)
    examine.exchange(facts, on_gpu=False)
    return facts


def test_the_sum_is_checked_and_the_bandwidth_is_what_each_link_carries(monkeypatch):
    right = all_reduced(monkeypatch, 3.0)  # 1 of rank 0 and 2 of rank 1
    assert right.exchange_failure == ""
    assert 0.05 < right.bus_gb_per_s <= 0.2  # 4 MB in 20 ms, x 2(2-1)/2; a busy machine is slower
    wrong = all_reduced(monkeypatch, 2.0)
    assert wrong.exchange_failure == "the sum is wrong"


def test_the_kernel_and_the_product_are_compared_with_float64():
    facts = healthy(0)
    examine._run_kernel(facts, "cuda" if torch.cuda.is_available() else "cpu")
    examine._look_at_device(facts)
    for error in (facts.kernel_error, facts.matmul_error):
        assert 0 < error < 1e-5
    truth = torch.ones(3, dtype=torch.float64)
    for wrong in (1.1 * truth, torch.full((3,), torch.nan)):
        with pytest.raises(ArithmeticError, match="it is wrong: relative error"):
            examine._error("it", wrong, truth)


def test_room_for_checkpoints_is_what_they_take(tmp_path):
    recipe = load_recipe(RECIPE, ["training.keep_checkpoints=2", "projection.condition=none"])
    D, P = load_config(recipe.base).hidden_size, load_config(recipe.assistant).hidden_size
    layer = torch.nn.Linear(P, D)
    tensors = {f"{part}.{name}": value.data.clone() for part in "wmv" for name, value in layer.named_parameters()}
    save_file(tensors, tmp_path / "one.safetensors")
    needed = examine.collect(recipe, 0).checkpoint_bytes
    assert needed == pytest.approx(4 * (tmp_path / "one.safetensors").stat().st_size, rel=0.02)


def test_a_process_that_a_launcher_started_among_others_but_did_not_tell_of_them(monkeypatch):
    for name in (*launchers.MPI_SIZE_VARIABLES, *launchers._RANK_VARIABLES, "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PMI_SIZE", "1")
    assert alone_of() == ""
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert alone_of() == "SLURM_STEP_NUM_TASKS=4"
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert alone_of() == "", "a batch script, which SLURM numbers too"
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert alone_of() == "SLURM_PROCID=1"
    monkeypatch.setenv("RANK", "0")
    assert alone_of() == ""


def wrong_alone(*overrides: str, recipe: Path | None = RECIPE) -> list[Finding]:
    """What is wrong on this machine, as a single rank finds it."""
    facts = examine.collect(load_recipe(recipe, overrides) if recipe else None, 0)
    with examine.marks(facts, facts.token):
        examine.look(facts, [facts])
    return [finding for finding in diagnosis.judge([facts]) if finding.level != "ok"]


def test_without_a_recipe_the_current_folder_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert wrong_alone(recipe=None) == []
    assert list(tmp_path.iterdir()) == [], "what was made is removed"
    (tmp_path / "runs").write_text("a file where a folder is meant to be")
    (wrong,) = wrong_alone(recipe=None)
    assert wrong.text == f"output_dir {tmp_path}/runs cannot be written on {socket.gethostname()}: File exists"


def test_a_device_that_raises_becomes_a_fact(tmp_path, monkeypatch):
    # Only here: what tries the base's gradient draws random numbers too.
    monkeypatch.setattr(examine, "torch", Mock(wraps=torch, randn=lambda *_, **__: 1 / 0))
    (wrong,) = wrong_alone(f"output_dir={tmp_path}", f"cache.path={tmp_path}")
    assert wrong.text == f"the device fails on {socket.gethostname()}: division by zero"


@pytest.mark.slow
def test_a_full_disk_is_a_problem_with_a_remedy(tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk, "64k"):
        (disk / "rest").write_bytes(bytes(32 * 1024))
        short = wrong_alone(f"output_dir={disk}", f"cache.path={tmp_path}")
        with (disk / "rest").open("ab") as file, pytest.raises(OSError, match="No space left"):
            file.write(bytes(2**20))
        full = wrong_alone(f"output_dir={disk}", f"cache.path={tmp_path}")
        assert [path.name for path in disk.iterdir()] == ["rest"]
    assert [(finding.level, finding.title) for finding in short] == [("problem", "disks")]
    assert f"output_dir {disk} has 0.0 MiB free" in short[0].text
    assert short[0].remedy == "make room, or name another folder"
    assert [finding.title for finding in full] == ["folders", "disks"]
    assert f"cannot be written on {socket.gethostname()}: No space left on device" in full[0].text


@pytest.mark.slow
def test_an_nvme_folder_that_is_missing_is_a_problem(tmp_path):
    config = (ROOT / "ds_configs/zero3_nvme_offload.json").read_text().replace("/local_nvme", f"{tmp_path}/nvme")
    (tmp_path / "ds.json").write_text(config)
    overrides = [f"backbone.deepspeed={tmp_path}/ds.json", f"output_dir={tmp_path}", f"cache.path={tmp_path}"]
    (wrong,) = wrong_alone(*overrides)
    assert f"offload_param.nvme_path {tmp_path}/nvme cannot be written on {socket.gethostname()}: No such" in wrong.text
    (tmp_path / "nvme").mkdir()
    assert wrong_alone(*overrides) == []


def test_a_limit_below_a_layers_size_is_a_warning_with_the_size(tmp_path):
    zero3 = json.loads((ROOT / "ds_configs/zero3.json").read_text())
    zero3["zero_optimization"] |= {"stage3_prefetch_bucket_size": 5000, "stage3_max_live_parameters": 10**9}
    (tmp_path / "ds.json").write_text(json.dumps(zero3))
    (wrong,) = wrong_alone(
        "backbone.partition=zero3",
        f"backbone.deepspeed={tmp_path}/ds.json",
        f"output_dir={tmp_path}",
        f"cache.path={tmp_path}",
    )
    weights = load_file(ROOT / "softcot_ds/pair/base/model.safetensors")
    layer = sum(w.numel() for name, w in weights.items() if ".layers.0." in name and w.numel() > 20_000)
    assert (wrong.level, wrong.title) == ("warning", "gathering")
    assert f"stage3_prefetch_bucket_size is 5000, and these models need {layer}: the rest of a layer" in wrong.text


def test_states_that_are_not_finite_are_a_problem():
    (verdict, *_) = diagnosis._states(cluster(states=(float("nan"), float("nan"))))
    assert verdict[0] == "problem"
    assert "not finite" in verdict[1]


@pytest.mark.parametrize(("size", "level"), [(0.2, "ok"), (0.05, "warning")])
def test_states_of_the_cache_that_hardly_differ_are_a_warning(tmp_path, size, level):
    recipe = load_recipe(RECIPE, [f"cache.path={tmp_path}", "projection.condition=none"])
    assert examine._states(recipe) is None, "no cache yet"
    identity, shards = cache_identity(recipe), []
    folder = tmp_path / identity.folder_name
    folder.mkdir()
    signs = torch.tensor([[1.0], [-1.0]]).repeat(200, 1)[:, :, None]  # more rows than are looked at
    keys = [row_key([number], [0]) for number in range(len(signs))]
    with StoreWriter(folder, identity, on_commit=shards.append) as writer:
        writer.append(keys, (1 + size * signs).expand(-1, *identity.row_shape))
    manifest.save_manifest(folder, replace(manifest.new_manifest(identity), shards=tuple(shards)))
    constant, varying = examine._states(recipe)
    assert varying / constant == pytest.approx(size, rel=0.2), "of a sample, in which the signs are not half and half"
    (verdict, *_) = diagnosis._states(cluster(states=(constant, varying)))
    assert verdict[0] == level
    for other in ("method=prompt_tuning", "projection.condition=center"):
        assert examine._states(load_recipe(RECIPE, [f"cache.path={tmp_path}", other])) is None


@pytest.mark.slow
def test_a_model_that_cannot_be_read_is_a_problem(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(ROOT / "softcot_ds/pair/base", base)
    overrides = [f"base.model={base}", f"output_dir={tmp_path}", f"cache.path={tmp_path}"]
    assert wrong_alone(*overrides) == []
    weights = (base / "model.safetensors").read_bytes()
    config = json.loads((base / "config.json").read_text())
    damages = {
        "a git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1", {}, "is a pointer of git-lfs"),
        "another vocabulary": (weights, {"vocab_size": config["vocab_size"] + 1}, "have other shapes"),
        "no weights": (None, {}, f"base cannot be read on {socket.gethostname()}: {base}: no weights"),
    }
    for content, settings, said in damages.values():
        (base / "model.safetensors").unlink()
        if content is not None:
            (base / "model.safetensors").write_bytes(content)
        (base / "config.json").write_text(json.dumps(config | settings))
        (wrong,) = wrong_alone(*overrides)
        assert (wrong.level, wrong.title) == ("problem", "models")
        assert said in wrong.text


def test_a_hub_model_that_is_not_downloaded_is_a_problem(tmp_path):
    (wrong,) = wrong_alone("base.model=owner/absent", f"output_dir={tmp_path}", f"cache.path={tmp_path}")
    assert "owner/absent is not downloaded" in wrong.text
    assert "hf download" in wrong.remedy


def test_a_model_is_tried_itself_or_as_a_toy(tmp_path, monkeypatch):
    overrides = [f"output_dir={tmp_path}", f"cache.path={tmp_path}"]
    monkeypatch.setattr(trial, "why_unsuitable", lambda model, role: "it is not causal" if role == "base" else None)
    for small_bytes in (trial.SMALL_BYTES, 0):
        monkeypatch.setattr(trial, "SMALL_BYTES", small_bytes)
        (wrong,) = wrong_alone(*overrides)
        assert (wrong.level, "does not do what is asked of it" in wrong.text) == ("problem", True)
        assert "it is not causal" in wrong.text


def test_a_large_model_of_which_no_toy_can_be_made_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "SMALL_BYTES", 0)
    monkeypatch.setattr(toy, "_MOST_PARAMETERS", 0)
    found = wrong_alone(f"output_dir={tmp_path}", f"cache.path={tmp_path}")
    assert [finding.level for finding in found] == ["warning", "warning"], "base and assistant"
    assert all("shows only when it is loaded" in finding.text for finding in found)


def test_the_sources_compared_are_those_of_the_whole_package(monkeypatch):
    read, seen = Path.read_bytes, []
    monkeypatch.setattr(Path, "read_bytes", lambda path: seen.append(path) or read(path))
    code_digest.cache_clear()
    source = examine.collect(None, 0).source
    assert source == code_digest()
    assert {path.relative_to(ROOT).as_posix() for path in seen} >= {
        *("softcot_ds/cli.py", "softcot_ds/training/loop.py", "softcot_ds/tasks/gsm8k.yaml"),
        "kernels/softcot_kernels/thought_embedding.py",
    }


def test_ranks_with_other_recipes_are_not_compared(monkeypatch):
    def gathered(everyone, facts, group):
        everyone[:] = [facts, replace(facts, rank=1, node="elsewhere", recipe="beef")]

    monkeypatch.setattr(distributed, "init_distributed", lambda *_, **__: None)
    monkeypatch.setattr(examine.dist, "new_group", lambda **_: None)
    monkeypatch.setattr(examine.dist, "all_gather_object", gathered)
    with pytest.raises(SoftCoTError, match=r"the recipe differs \(hash \w{12} on .*; beef on elsewhere\); give all"):
        examine.doctor(load_recipe(RECIPE, ()))


def test_ranks_that_cannot_meet_are_told_where_and_what_to_do(monkeypatch, capfd):
    distributed.shut_down()  # the group of one in which another test has evaluated, say
    launcher = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in (launcher | {"MASTER_PORT": port}).items():
            monkeypatch.setenv(name, value)
        assert doctor.main([]) == 3
        message = capfd.readouterr().err
        assert f"rank 0 of 2 cannot meet the others at MASTER_ADDR=127.0.0.1 MASTER_PORT={port}: " in message
        assert "deepspeed --master_port PORT" in message
        monkeypatch.delenv("MASTER_ADDR")
        assert doctor.main([]) == 3
        assert "MASTER_ADDR expected, but not set" in capfd.readouterr().err


# Below, processes as users start them.


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "softcot_ds.doctor", *map(str, arguments)]


def levels(output: str) -> dict[str, str]:
    """The level of each check in what was printed."""
    rows = [line.split(maxsplit=1) for line in output.splitlines() if not line.startswith(" ")]
    known = {title: row[0] for row in rows for title in TITLES if len(row) == 2 and row[1].startswith(f"{title}  ")}
    assert set(known) == set(TITLES), output
    return known


@pytest.mark.distributed
def test_alone_all_is_well_and_nothing_is_left(tmp_path):
    done = run(command(RECIPE, f"output_dir={tmp_path}/a/b", f"cache.path={tmp_path}/a/cache"))
    assert set(levels(done.stdout).values()) == {"ok"}
    assert f"torch {torch.__version__}" in done.stdout
    assert f"output_dir {tmp_path}/a/b" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.distributed
def test_two_ranks_of_the_launcher_talk_to_each_other(tmp_path):
    done = run(deepspeed_command(2, "softcot_ds.doctor", RECIPE, f"output_dir={tmp_path}", f"cache.path={tmp_path}"))
    assert set(levels(done.stdout).values()) == {"ok"}
    assert done.stdout.count("ranks on 1 node") == 1
    if not torch.cuda.is_available():
        assert "2 ranks over gloo, the sum is right, bus bandwidth " in done.stdout
    assert list(tmp_path.iterdir()) == []


def two_ranks(commands: list[list[str]]) -> list[tuple[int, str]]:
    """Run a command for each of two ranks, as on two nodes: their exit codes and outputs."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    launcher = {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            line, cwd=ROOT, env=environment() | launcher | {"RANK": str(rank)}, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank, line in enumerate(commands)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


STUCK = """
import os, sys, time
import torch.distributed as dist
from softcot_ds import doctor
from softcot_ds.diagnosis import examine

examine.EXCHANGE_SECONDS = 1
if os.environ["RANK"] == "1":
    dist.all_reduce = lambda *_, **__: time.sleep(60)
dist.destroy_process_group = lambda: time.sleep(60)  # NCCL would wait for what it has begun
sys.exit(doctor.main(sys.argv[1:]))
"""


@pytest.mark.distributed
def test_an_all_reduce_that_a_rank_never_joins_is_told_and_ends(tmp_path):
    stuck = [sys.executable, "-c", STUCK, str(RECIPE), f"output_dir={tmp_path}", f"cache.path={tmp_path}"]
    began = time.monotonic()
    (first, table), (second, silent) = two_ranks([stuck, stuck])
    assert time.monotonic() - began < 50, "nobody waits for the stuck rank"
    assert (first, second) == (2, 2), table + silent
    assert f"fails on {socket.gethostname()}: no end within 1 s" in table
    assert "-> name the interface that the nodes share in GLOO_SOCKET_IFNAME" in table
    assert {title for title, level in levels(table).items() if level != "ok"} == {"communication"}
    assert "Traceback" not in table + silent


HASTY = """
import sys
from softcot_ds import doctor
from softcot_ds.diagnosis import examine

examine.LOOK_SECONDS = 1
sys.exit(doctor.main(sys.argv[1:]))
"""


def may_unshare() -> bool:
    probe = ["unshare", "--uts", "--mount", "sh", "-c", "hostname probe && mount -t tmpfs tmpfs /mnt"]
    return bool(shutil.which("unshare")) and subprocess.run(probe, capture_output=True).returncode == 0


@pytest.mark.skipif(not may_unshare(), reason="hostnames and mounts of one's own need root")
@pytest.mark.distributed
def test_two_nodes_with_a_folder_of_their_own_each(tmp_path):
    (tmp_path / "runs").mkdir()
    arguments = [str(RECIPE), f"output_dir={tmp_path}/runs/out", f"cache.path={tmp_path}/cache"]
    own = ["unshare", "--uts", "--mount", "sh", "-c"]
    commands = [
        [*own, f'{script} && exec "$@"', "sh", sys.executable, "-c", HASTY, *arguments]
        for script in ("hostname node0", f"hostname node1 && mount -t tmpfs tmpfs {tmp_path}/runs")
    ]
    (first, table), (second, silent) = two_ranks(commands)
    assert (first, second) == (2, 2), table + silent
    assert "2 ranks on 2 nodes" in table
    wrong = {title for title, level in levels(table).items() if level != "ok"}
    assert wrong == {"folders"}, table
    assert f"output_dir {tmp_path}/runs/out is not shared: node0 does not see what node1 wrote; node1 does" in table
    assert "cache.path /" not in table, "that one is shared"
    assert table.splitlines()[-1] == "softcot-ds: error: 1 problem, listed above, each with what to do"
    assert "versions" not in silent
    assert "Traceback" not in table + silent
    assert [path.name for path in tmp_path.rglob("*")] == ["runs"]
