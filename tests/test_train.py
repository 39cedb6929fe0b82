"""Training on several ranks, with the embedded pair: same gradient, same curve, clear ends."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch import ROOT, deepspeed_command, run, run_and_signal
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from softcot_ds.data import global_batches
from softcot_ds.engine import build_projection
from softcot_ds.experiment import Experiment
from softcot_ds.recipe import load_recipe, resolve_location
from softcot_ds.train import learning_rate_at

RECIPE = ROOT / "recipes" / "word_problems.yaml"
SMALL = ["task.train_problems=96", "task.validation_problems=9", "task.test_problems=8", "thoughts.source=online"]
LONG = [
    *SMALL,
    "training.steps=12",
    "training.warmup_steps=2",
    "training.save_every=4",
    "training.validate_every=6",
    "training.log_every=1",
]

pytestmark = pytest.mark.distributed


def losses(run_dir: Path) -> dict[int, float]:
    records = map(json.loads, (run_dir / "losses.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records}


def naive_loss_and_gradient(recipe) -> tuple[float, dict[str, torch.Tensor]]:
    """One global batch in float64, each example alone, one pass with gradient; nothing of the package's step."""
    base = AutoModelForCausalLM.from_pretrained(resolve_location(recipe.base.model), dtype=torch.float64).eval()
    assistant = AutoModelForCausalLM.from_pretrained(resolve_location(recipe.assistant.model), dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(resolve_location(recipe.base.model))
    experiment = Experiment(recipe)
    examples = experiment.splits.train
    projection = build_projection(recipe, experiment, base)
    weight, bias = projection.weight.detach().double(), projection.bias.detach().double()
    weight.requires_grad_(), bias.requires_grad_()
    batch = next(global_batches([e.length for e in examples], recipe.training.global_batch_size, recipe.seed))
    total, count = 0.0, 0
    for index in batch:
        example = examples[index]
        ids = torch.tensor([example.assistant.token_ids])
        with torch.no_grad():
            hidden = assistant.model(ids).last_hidden_state[0, example.assistant.positions]
        thoughts = hidden @ weight.T + bias
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{example.problem.question}\nplan :\nTHOUGHTS"}],
            tokenize=False,
            add_generation_prompt=True,
        )
        left, right = (tokenizer(t, add_special_tokens=False).input_ids for t in prompt.split("THOUGHTS"))
        answer = f"{example.problem.reasoning}answer {example.problem.answer}"
        target = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        table = base.get_input_embeddings().weight
        embeds = torch.cat([table[left], thoughts, table[right + target]])
        logits = base(inputs_embeds=embeds[None]).logits[0]
        predictions = logits[-len(target) - 1 : -1].log_softmax(-1)
        total = total - predictions[torch.arange(len(target)), target].sum()
        count += len(target)
    loss = total / count
    loss.backward()
    return loss.item(), {"weight": weight.grad, "bias": bias.grad}


@pytest.fixture
def random_pair(tmp_path):
    """The embedded pair with random weights, as overrides.

    Trained weights amplify float32's rounding: any float32 pass through them, the naive one too, gives a gradient some
    2e-5 away from float64's.
    """
    torch.manual_seed(0)
    overrides = []
    for name in ("assistant", "base"):
        location = resolve_location(f"package:pair/{name}")
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(location), dtype=torch.float32)
        model.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(location).save_pretrained(tmp_path / name)
        overrides.append(f"{name}.model={tmp_path / name}")
    return overrides


def run_worker(output: Path, variants: list[str]) -> None:
    """gradient_worker.py on two ranks; its losses and gradients of each variant go to ``output``."""
    # --module wants a module on the path: the tests' folder is put there.
    run(
        deepspeed_command(2, "gradient_worker", RECIPE, output, *variants),
        PYTHONPATH=f"{ROOT}:{ROOT / 'kernels'}:{ROOT / 'tests'}",
    )


def test_two_ranks_give_the_gradient_of_one_big_batch_in_float64(tmp_path, random_pair):
    batch = ["training.global_batch_size=10", "training.micro_batch_size=3", "training.warmup_steps=0"]
    common = " ".join([*SMALL, *random_pair, *batch])
    variants = [
        f"{common} training.step={step} backbone.partition={partition} training.activation_checkpointing={recompute} "
        f"training.steps={steps}"
        for step, partition, recompute, steps in (
            ("fast", "zero3", "false", 20),
            ("fast", "zero3", "true", 1),
            ("fast", "none", "false", 1),
            ("full", "zero3", "false", 20),
        )
    ]
    output = tmp_path / "gradients.safetensors"
    run_worker(output, variants)
    loss, gradient = naive_loss_and_gradient(load_recipe(RECIPE, common.split()))
    found = load_file(output)
    for variant in variants:
        assert found[f"{variant}/losses"][0].item() == pytest.approx(loss, rel=1e-6), variant
        for name, truth in gradient.items():
            error = (found[f"{variant}/{name}"] - truth).norm() / truth.norm()
            assert error < 1e-5, f"{variant}: {name} differs by {error:.1e}"

    # Twenty steps of both give one curve.
    fast, full = (found[f"{variant}/losses"] for variant in (variants[0], variants[-1]))
    assert fast[-1] < fast[0]
    torch.testing.assert_close(fast, full, rtol=1e-6, atol=0)


def test_training_from_the_cache_gives_the_curve_of_training_online(tmp_path):
    """Online the assistant is partitioned, and its batches are others than the builder's, which hold one row each.

    The learning rate is small because Adam's first steps amplify rounding: at the recipe's own, these curves differ by
    7e-5. An error of 1e-4 in the thoughts shows as 8e-6 here.
    """
    common = [*SMALL, "training.steps=12", "training.learning_rate=1e-6", "training.warmup_steps=0"]
    cached = [*common, "thoughts.source=cache", f"cache.path={tmp_path / 'cache'}", "cache.tokens_per_batch=1"]
    run([sys.executable, "-m", "softcot_ds.cache", str(RECIPE), *cached])
    variants = [" ".join([*overrides, "backbone.partition=zero3"]) for overrides in (common, cached)]
    output = tmp_path / "losses.safetensors"
    run_worker(output, variants)
    found = load_file(output)
    online, from_cache = (found[f"{variant}/losses"] for variant in variants)
    torch.testing.assert_close(from_cache, online, rtol=1e-6, atol=0)


def test_loss_fused_with_a_partitioned_head_gives_the_gradient_in_float64(tmp_path, random_pair, monkeypatch):
    """The kernels run in Triton's interpreter, slowly, so in one step on small batches."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed; it comes with softcot-ds[test]")
    batch = ["training.global_batch_size=4", "training.micro_batch_size=2", "training.warmup_steps=0"]
    variant = " ".join([*SMALL, *random_pair, *batch, "training.steps=1", "backbone.partition=zero3"])
    output = tmp_path / "gradients.safetensors"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    run_worker(output, [variant])
    found = load_file(output)
    assert found[f"{variant}/fuses_loss"]
    loss, gradient = naive_loss_and_gradient(load_recipe(RECIPE, variant.split()))
    assert found[f"{variant}/losses"][0].item() == pytest.approx(loss, rel=1e-6)
    for name, truth in gradient.items():
        assert (found[f"{variant}/{name}"] - truth).norm() < 1e-5 * truth.norm(), name


@pytest.fixture(scope="module")
def straight_run(tmp_path_factory):
    """Twelve steps on two ZeRO-3 ranks without interruption."""
    folder = tmp_path_factory.mktemp("straight")
    done = run(deepspeed_command(2, "softcot_ds.train", RECIPE, f"output_dir={folder}", *LONG))
    return folder / "demo", done.stdout


def test_killed_run_resumes_to_the_same_curve(straight_run, tmp_path):
    straight, _ = straight_run
    command = deepspeed_command(2, "softcot_ds.train", RECIPE, f"output_dir={tmp_path}", *LONG)
    run_and_signal(command, signal.SIGKILL, when=tmp_path / "demo/checkpoints/step-4/COMPLETE")

    resumed = run(deepspeed_command(2, "softcot_ds.train", RECIPE, f"output_dir={tmp_path}", *LONG))
    assert "resuming from" in resumed.stdout
    assert losses(tmp_path / "demo") == losses(straight), "same ranks: bit for bit"
    final = "checkpoints/step-12/projection.safetensors"
    want, found = load_file(straight / final), load_file(tmp_path / "demo" / final)
    assert all(torch.equal(want[name], found[name]) for name in want)


def test_run_directory_holds_what_it_should(straight_run):
    run_dir, output = straight_run
    checkpoint = run_dir / "checkpoints" / "step-12"
    assert {path.name for path in checkpoint.iterdir()} == {
        "projection.safetensors",
        "optimizer.safetensors",
        "adapter.json",
        "trainer.json",
        "recipe.yaml",
        "prompts.yaml",
        "COMPLETE",
    }
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) < 1_000_000, "no frozen weights"
    adapter = json.loads((checkpoint / "adapter.json").read_text())
    assert adapter["num_thoughts"] == 4
    assert adapter["step"] == 12
    assert adapter["base"]["model"] == "package:pair/base"
    summary = json.loads((checkpoint / "trainer.json").read_text())["summary"]
    assert summary["world_size"] == 2
    assert summary["zero_stage"] == 3
    curve = losses(run_dir)
    assert (summary["first_loss"], summary["last_loss"]) == (curve[1], curve[12])
    assert "left)" in output, "progress with time left"


def test_tensorboard_shows_what_a_user_watches(straight_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir, _ = straight_run
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert tags >= {
        "loss/train",
        "loss/validation",
        "optimizer/learning_rate",
        "optimizer/gradient_norm",
        "throughput/tokens_per_second",
        "throughput/samples_per_second",
        "step_time_ms/data",
        "step_time_ms/forward",
        "step_time_ms/backward",
        "step_time_ms/optimizer",
        "memory/peak_gib",
        "thoughts/norm",
        "thoughts/token_embedding_norm",
        "thoughts/cosine_to_nearest_token",
    }
    logged = {event.step: event.value for event in events.Scalars("loss/train")}
    for step, loss in losses(run_dir).items():
        assert logged[step] == pytest.approx(loss, rel=1e-6)
    base = AutoModelForCausalLM.from_pretrained(resolve_location("package:pair/base"), dtype=torch.float32)
    table = base.get_input_embeddings().weight
    (norm, *_) = (event.value for event in events.Scalars("thoughts/token_embedding_norm"))
    assert norm == pytest.approx(table.norm(dim=1).mean().item(), rel=1e-5)
    assert {"recipe/text_summary", "samples/text_summary"} <= set(events.Tags()["tensors"])


def test_finished_run_is_not_trained_again(straight_run):
    run_dir, _ = straight_run
    before = sorted((run_dir / "checkpoints").iterdir())
    again = run(deepspeed_command(1, "softcot_ds.train", RECIPE, f"output_dir={run_dir.parent}", *LONG))
    assert "trained to step 12 before" in again.stdout
    assert sorted((run_dir / "checkpoints").iterdir()) == before


def test_another_recipe_does_not_touch_the_run(straight_run, tmp_path):
    run_dir, _ = straight_run
    prompts = (ROOT / "softcot_ds/tasks/word_problems.yaml").read_text()
    (tmp_path / "prompts.yaml").write_text(prompts.replace("make a plan", "plan"))
    other = [*LONG, "training.learning_rate=1e-4", f"task.prompts={tmp_path}/prompts.yaml"]
    command = deepspeed_command(1, "softcot_ds.train", RECIPE, f"output_dir={run_dir.parent}", *other)
    refused = run(command, check=False)
    assert refused.returncode != 0
    assert "the wording there is not that of" in refused.stdout
    assert "training.learning_rate is 0.001 there and 0.0001 here" in refused.stdout
    assert "Traceback" not in refused.stdout


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    endless = [*SMALL, "training.steps=10000", "training.save_every=1000", "training.validate_every=1000"]
    command = deepspeed_command(
        2, "softcot_ds.train", RECIPE, f"output_dir={tmp_path}", *endless, "training.log_every=1"
    )
    # The event file appears when the loop is about to start.
    code, output = run_and_signal(command, signal.SIGINT, when=tmp_path / "demo/tensorboard")
    assert code != 0
    assert "stopped by SIGINT after step" in output
    saved = list((tmp_path / "demo/checkpoints").glob("step-*/COMPLETE"))
    assert len(saved) == 1, output


def test_loss_that_is_not_finite_stops_and_names_the_batch(tmp_path):
    wild = ["training.learning_rate=1e37", "training.gradient_clipping=0", "training.save_every=1"]
    done = run(
        deepspeed_command(
            2, "softcot_ds.train", RECIPE, f"output_dir={tmp_path}", *LONG, *wild, "training.warmup_steps=0"
        ),
        check=False,
    )
    assert done.returncode != 0
    assert "the loss is " in done.stdout
    assert "whose global batch holds the problems " in done.stdout
    assert "Traceback" not in done.stdout
    for path in (tmp_path / "demo/checkpoints").glob("step-*/projection.safetensors"):
        assert all(torch.isfinite(value).all() for value in load_file(path).values())


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_full_disk_ends_clearly_and_leaves_nothing_half_written(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        often = [*LONG, "training.save_every=1", "training.keep_checkpoints=12"]
        done = run(deepspeed_command(2, "softcot_ds.train", RECIPE, f"output_dir={disk}", *often), check=False)
        assert done.returncode != 0
        assert "No space left on device" in done.stdout
        assert "Traceback" not in done.stdout
        saved = list((disk / "demo/checkpoints").glob("step-*"))
        assert saved
        for checkpoint in saved:
            assert (checkpoint / "COMPLETE").exists()
            load_file(checkpoint / "projection.safetensors")
            load_file(checkpoint / "optimizer.safetensors")
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rate_warms_up_and_ends_where_it_should(schedule):
    config = load_recipe(
        RECIPE,
        [
            "training.steps=100",
            "training.warmup_steps=10",
            f"training.schedule={schedule}",
            "training.min_lr_ratio=0.1",
            "training.learning_rate=1.0",
        ],
    ).training
    rates = [learning_rate_at(step, config) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1)
    assert rates[54] == pytest.approx(1.0 if schedule == "constant" else 0.55)
