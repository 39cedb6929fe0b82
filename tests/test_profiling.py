"""The trace of a window of steps: what is in it, and when there is none."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from launch import ROOT

from softcot_ds.errors import SoftCoTError
from softcot_ds.recipe import Recipe, load_recipe
from softcot_ds.training.metrics import PhaseTimer
from softcot_ds.training.profiling import StepProfiler


def steps_through(tmp_path: Path, steps: range, *overrides: str) -> Recipe:
    """Take steps, each with two phases, the profiler around them."""
    recipe = load_recipe(ROOT / "recipes/word_problems.yaml", [f"output_dir={tmp_path}", *overrides])
    recipe.run_dir.mkdir(exist_ok=True)
    profiler, timer = StepProfiler(recipe), PhaseTimer(torch.device("cpu"))
    for step in steps:
        with profiler.step(step):
            with timer.phase("forward"):
                torch.randn(4, 4) @ torch.randn(4, 4)
            with timer.phase("backward"):
                pass
        if profiler.ends_with(step):
            profiler.write()
    return recipe


def phases(path: Path) -> list[str]:
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    marked = [event for event in events if event.get("cat") == "user_annotation"]
    assert sum(event.get("name") == "aten::mm" for event in events) == len(marked) / 2
    return [event["name"] for event in sorted(marked, key=lambda event: event["ts"])]


def test_trace_holds_the_steps_of_the_window_and_no_others(tmp_path, capsys):
    recipe = steps_through(tmp_path, range(1, 9), "training.profile_steps=[3,5]")
    (path,) = (recipe.run_dir / "profile").iterdir()
    assert path.name == "steps-3-5.pt.trace.json.gz"
    assert phases(path) == ["forward", "backward"] * 3
    assert f"profile of the steps 3 to 5: {path}" in capsys.readouterr().out


def test_run_that_begins_within_the_window_records_the_rest_of_it(tmp_path):
    recipe = steps_through(tmp_path, range(4, 9), "training.profile_steps=[3,5]")
    (path,) = (recipe.run_dir / "profile").iterdir()
    assert path.name == "steps-4-5.pt.trace.json.gz"
    assert phases(path) == ["forward", "backward"] * 2


@pytest.mark.parametrize("steps", [range(6, 9), range(1, 5)])
@pytest.mark.parametrize("window", ["[3,5]", "null"])
def test_window_that_is_not_reached_or_not_finished_leaves_nothing(tmp_path, steps, window):
    recipe = steps_through(tmp_path, steps, f"training.profile_steps={window}")
    assert not (recipe.run_dir / "profile").exists()


def test_trace_that_cannot_be_written_is_told_with_what_to_do(tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo/profile").write_text("a file")
    message = r"cannot write to .*/profile/steps-1-1.*\. Mend that or leave out training.profile_steps and run the same"
    with pytest.raises(SoftCoTError, match=message):
        steps_through(tmp_path, range(1, 3), "training.profile_steps=[1,1]")
