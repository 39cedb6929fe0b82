"""Training as a user starts it, on two ranks: the same curve after a stop, what is there, clear ends."""

import gzip
import json
import re
import signal
from collections import Counter
from functools import partial

import pytest
import torch
from forked import kill_forked, run_forked
from launch import ONLINE, ROOT, deepspeed_command, run_and_signal
from runs import losses, read_events, scalars
from safetensors.torch import load_file
from small_disk import small_disk
from transformers import AutoModelForCausalLM
from transformers.optimization import (
    get_constant_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from softcot_ds.experiment import Experiment
from softcot_ds.progress import size
from softcot_ds.recipe import TrainingConfig, load_recipe
from softcot_ds.training.schedule import learning_rate_at
from softcot_ds.training.tags import DESCRIPTIONS
from softcot_ds.values import resolve_location

RECIPE = ROOT / "recipes" / "word_problems.yaml"
SMALL = ["task.train_problems=96", "task.validation_problems=9", "task.test_problems=8", *ONLINE]
LONG = [
    *SMALL,
    "training.steps=12",
    "training.warmup_steps=2",
    "training.save_every=4",
    "training.validate_every=6",
    "training.log_every=1",
]

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def straight_run(tmp_path_factory):
    """Twelve steps on two ZeRO-3 ranks without interruption, two of them profiled."""
    folder, profiled = tmp_path_factory.mktemp("straight"), "training.profile_steps=[5,6]"
    done = run_forked(2, "softcot_ds.train", RECIPE, f"output_dir={folder}", *LONG, profiled)
    return folder / "demo", done.stdout


def test_killed_run_resumes_to_the_same_curve(straight_run, tmp_path):
    straight, _ = straight_run
    train = [2, "softcot_ds.train", RECIPE, f"output_dir={tmp_path}", *LONG]
    kill_forked(tmp_path / "demo/checkpoints/step-4/COMPLETE", *train)

    resumed = run_forked(*train)
    assert "resuming from" in resumed.stdout
    assert losses(tmp_path / "demo") == losses(straight), "same ranks: bit for bit"
    final = "checkpoints/step-12/projection.safetensors"
    want, found = load_file(straight / final), load_file(tmp_path / "demo" / final)
    assert all(torch.equal(want[name], found[name]) for name in want)
    for tag in ("loss/validation", "loss/validation_gap", "thoughts/question_share"):
        assert scalars(tmp_path / "demo", tag) == scalars(straight, tag)
        assert scalars(straight, tag).keys() == {6, 12}


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
        "README.md",
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
    run_dir, _ = straight_run
    events = read_events(run_dir)
    tags = set(events.Tags()["scalars"])
    assert tags >= {
        "loss/train",
        "loss/validation",
        "loss/validation_shuffled",
        "loss/validation_gap",
        "loss/validation_gap_margin",
        "optimizer/learning_rate",
        "optimizer/gradient_norm",
        "throughput/tokens_per_second",
        "throughput/tokens_per_second_per_rank",
        "throughput/samples_per_second",
        "step_time_ms/data",
        "step_time_ms/forward",
        "step_time_ms/backward",
        "step_time_ms/optimizer",
        "memory/peak_gib",
        "thoughts/norm",
        "thoughts/token_embedding_norm",
        "thoughts/cosine_to_nearest_token",
        "thoughts/constant_norm",
        "thoughts/varying_norm",
        "thoughts/question_share",
    }
    assert tags <= DESCRIPTIONS.keys(), "each says what it is"
    logged = {event.step: event.value for event in events.Scalars("loss/train")}
    for step, loss in losses(run_dir).items():
        assert logged[step] == pytest.approx(loss, rel=1e-6)
    base = AutoModelForCausalLM.from_pretrained(resolve_location("package:pair/base"), dtype=torch.float32)
    table = base.get_input_embeddings().weight
    (norm, *_) = (event.value for event in events.Scalars("thoughts/token_embedding_norm"))
    assert norm == pytest.approx(table.norm(dim=1).mean().item(), rel=1e-5)
    assert {"recipe/text_summary", "samples/text_summary"} <= set(events.Tags()["tensors"])


def test_counts_are_told_before_the_first_step(straight_run):
    _, output = straight_run
    experiment = Experiment(load_recipe(RECIPE, LONG))
    splits = experiment.splits
    examples = splits.train
    columns = zip(*(example.prefix_ids for example in (*examples, *splits.validation)), strict=False)
    shared = next(index for index, column in enumerate(columns) if len(set(column)) > 1)
    tokens = [len(e.prefix_ids) - shared + len(e.suffix_ids) + len(e.target_ids) for e in examples]
    of_a_rank = sum(tokens) / len(tokens) * 32 / 2
    assert f"per rank and step: 1 micro-batch, {of_a_rank:,.0f} tokens on average, without padding" in output
    assert f"and the {shared} tokens of each prompt" in output
    assert re.search(r"memory expected per rank: [\d.]+ MB \(.* MB frozen weights, ", output)
    embedded = {token for e in (*examples, *splits.validation) for token in e.prefix_ids + e.suffix_ids + e.target_ids}
    embedded.add(experiment.base_pad_id)
    assert f", {size(len(embedded) * 192 * 4)} embeddings of the data's tokens, " in output
    assert output.index("per rank and step") < output.index("validation loss")


def test_profiled_steps_are_a_trace_of_rank_0(straight_run):
    run_dir, output = straight_run
    (path,) = (run_dir / "profile").iterdir()
    assert f"profile of the steps 5 to 6: {path}" in output
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    found = Counter(event["name"] for event in events if event.get("cat") == "user_annotation")
    assert {name: found[name] for name in ("data", "forward", "backward", "optimizer")} == dict.fromkeys(
        ("data", "forward", "backward", "optimizer"), 2
    )


def test_finished_run_is_not_trained_again(straight_run):
    run_dir, _ = straight_run
    before = sorted((run_dir / "checkpoints").iterdir())
    again = run_forked(1, "softcot_ds.train", RECIPE, f"output_dir={run_dir.parent}", *LONG)
    assert "trained to step 12 before" in again.stdout
    assert sorted((run_dir / "checkpoints").iterdir()) == before


def test_another_recipe_does_not_touch_the_run(straight_run, tmp_path):
    run_dir, _ = straight_run
    prompts = (ROOT / "softcot_ds/tasks/word_problems.yaml").read_text()
    (tmp_path / "prompts.yaml").write_text(prompts.replace("make a plan", "plan"))
    other = [*LONG, "training.learning_rate=1e-4", f"task.prompts={tmp_path}/prompts.yaml"]
    refused = run_forked(1, "softcot_ds.train", RECIPE, f"output_dir={run_dir.parent}", *other, check=False)
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
    code, output = run_and_signal(command, signal.SIGINT, when=tmp_path / "demo/events.out.tfevents.*")
    assert code != 0
    assert "stopped by SIGINT after step" in output, output
    saved = list((tmp_path / "demo/checkpoints").glob("step-*/COMPLETE"))
    assert len(saved) == 1, output


def test_full_disk_ends_clearly_and_leaves_nothing_half_written(tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk, "700k"):
        often = [*LONG, "training.save_every=1", "training.keep_checkpoints=12"]
        done = run_forked(2, "softcot_ds.train", RECIPE, f"output_dir={disk}", *often, check=False)
        assert done.returncode != 0
        assert "No space left on device" in done.stdout
        assert "Traceback" not in done.stdout
        saved = list((disk / "demo/checkpoints").glob("step-*"))
        assert saved
        for checkpoint in saved:
            assert (checkpoint / "COMPLETE").exists()
            load_file(checkpoint / "projection.safetensors")
            load_file(checkpoint / "optimizer.safetensors")


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (2, 1), (7, 6), (50, 0), (50, 10)])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rate_is_that_of_transformers(schedule, ratio, steps, warmup):
    """Except in the warm-up, which begins at zero there: ours is one step ahead, so that no step is without effect."""
    config = TrainingConfig(
        steps=steps, warmup_steps=warmup, schedule=schedule, min_lr_ratio=ratio, learning_rate=1.0, global_batch_size=4
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedules = {
        "cosine": partial(get_cosine_with_min_lr_schedule_with_warmup, num_training_steps=steps, min_lr_rate=ratio),
        "linear": partial(get_linear_schedule_with_warmup, num_training_steps=steps),
        "constant": get_constant_schedule_with_warmup,
    }
    theirs = schedules[schedule](optimizer, num_warmup_steps=warmup).lr_lambdas[0]
    for step in range(1, steps + 1):
        rate = theirs(step) if step <= warmup and step < steps else theirs(step - 1)
        if schedule == "linear" and step > warmup:
            rate = ratio + (1 - ratio) * rate
        assert learning_rate_at(step, config) == pytest.approx(min(rate, 1.0)), step
        assert learning_rate_at(step, config) > 0
