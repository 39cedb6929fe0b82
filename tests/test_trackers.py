"""Trackers beside TensorBoard: with one in their place, and by hand with the packages, where these are installed."""

import json
import subprocess
import sys
import time

import pytest
from launch import ROOT, environment

from softcot_ds.errors import SoftCoTError
from softcot_ds.recipe import load_recipe
from softcot_ds.training import trackers
from softcot_ds.training.trackers import Trackers, require_trackers


class Service:
    """A tracker of accelerate's kind, which loses its network after some points."""

    def __init__(self, seen: int = -1, lasts: int = 100) -> None:
        self.seen, self.lasts = seen, lasts
        self.points: dict[int, dict[str, float]] = {}
        self.ended = False

    def log(self, values, step):
        if len(self.points) == self.lasts:
            raise ConnectionError("no route to host\nand more")
        self.points[step] = values

    def finish(self):
        self.ended = True


@pytest.fixture
def recipe(tmp_path):
    recipe = load_recipe(ROOT / "recipes/word_problems.yaml", [f"output_dir={tmp_path}", "trackers=[trackio,mlflow]"])
    recipe.run_dir.mkdir()
    return recipe


@pytest.fixture
def opened(monkeypatch):
    """Services by name, and what was opened with which id."""
    services, asked = {}, []

    def open_one(name, recipe, known):
        asked.append((name, known))
        if isinstance(services[name], Exception):
            raise services[name]
        return services[name], known or f"{name}-{len(asked)}", services[name].seen

    monkeypatch.setattr(trackers, "_open", open_one)
    return services, asked


def test_a_run_that_goes_on_is_the_same_run_and_no_step_is_told_twice(recipe, opened):
    services, asked = opened
    services |= {"trackio": Service(), "mlflow": Service()}
    with Trackers() as first:
        first.start(recipe, 0)
        for step in (1, 2, 3):
            first.scalars({"loss/train": 1 / step}, step)
    assert services["mlflow"].points == {step: {"loss/train": 1 / step} for step in (1, 2, 3)}
    assert services["trackio"].ended
    assert json.loads((recipe.run_dir / "trackers.json").read_text()) == {"trackio": "trackio-1", "mlflow": "mlflow-2"}
    services |= {"trackio": Service(seen=3), "mlflow": Service(seen=2)}
    with Trackers() as second:
        second.start(recipe, 2)  # the checkpoint that it goes on from is of step 2
        for step in (3, 4):
            second.scalars({"loss/train": 1 / step}, step)
    assert asked[2:] == [("trackio", "trackio-1"), ("mlflow", "mlflow-2")]
    assert [*services["trackio"].points] == [4]
    assert [*services["mlflow"].points] == [3, 4]
    with Trackers() as anew:
        anew.start(recipe, 0)  # its checkpoints were removed: another run
    assert asked[4:] == [("trackio", None), ("mlflow", None)]


def test_a_tracker_that_fails_midway_is_given_up_with_a_line_and_others_go_on(recipe, opened, capsys):
    services, _ = opened
    services |= {"trackio": Service(), "mlflow": Service(lasts=1)}
    with Trackers() as both:
        both.start(recipe, 0)
        for step in (1, 2, 3):
            both.scalars({"loss/train": 0.5}, step)
    assert [*services["trackio"].points] == [1, 2, 3]
    assert not services["mlflow"].ended
    assert capsys.readouterr().out == (
        "warning: mlflow is told no more of this run: ConnectionError: no route to host; training goes on\n"
    )


def test_a_network_that_hangs_holds_up_no_step(recipe, opened, monkeypatch, capsys):
    services, _ = opened
    services |= {"trackio": Service(), "mlflow": Service()}
    monkeypatch.setattr(services["mlflow"], "log", lambda values, step: time.sleep(0.5))
    monkeypatch.setattr(trackers, "_PATIENCE_S", 0.01)
    monkeypatch.setattr(trackers, "left", [])
    with Trackers() as both:
        both.start(recipe, 0)
        began = time.monotonic()
        for step in (1, 2):
            both.scalars({"loss/train": 0.5}, step)
        assert time.monotonic() - began < 0.4
    assert "mlflow takes more than" in capsys.readouterr().out
    assert trackers.left == ["mlflow"]


HANGS = """
import atexit, sys, time
from softcot_ds.command import run_command
from softcot_ds.errors import Stopped
from softcot_ds.recipe import load_recipe
from softcot_ds.training import trackers

class Service:
    def finish(self): time.sleep(100)

def work():
    with trackers.Trackers() as both:
        both.start(recipe, 0)
        raise Stopped("stopped in good order", 10)

atexit.register(time.sleep, 100)  # as W&B does, whose service it waits for
trackers._open = lambda name, recipe, known: (Service(), name, 0)
trackers._end = lambda name, tracker, kind: tracker.finish()
trackers._HURRY_S = 0.2
recipe = load_recipe(sys.argv[1], [f"output_dir={sys.argv[2]}", "trackers=[trackio,mlflow]"])
recipe.run_dir.mkdir()
sys.exit(run_command(work))
"""


@pytest.mark.distributed
def test_trackers_that_hang_keep_no_process_from_ending(tmp_path):
    """The ranks of a job that is to go back into the queue, say."""
    command = [sys.executable, "-c", HANGS, ROOT / "recipes/word_problems.yaml", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment())
    assert done.returncode == 128 + 10
    assert "stopped in good order" in done.stderr
    assert "trackio takes more than" in done.stdout
    assert "mlflow takes more than" in done.stdout


def test_a_tracker_that_refuses_ends_a_run_that_begins_and_not_one_that_goes_on(recipe, opened, capsys):
    services, _ = opened
    services |= {"trackio": Service(), "mlflow": ValueError("log in first")}
    with pytest.raises(SoftCoTError, match=r"mlflow does not take this run: ValueError: log in first\. Mend that, or"):
        Trackers().start(recipe, 0)
    with Trackers() as rest:
        rest.start(recipe, 5)
        rest.scalars({"loss/train": 0.5}, 6)
    assert [*services["trackio"].points] == [6]
    assert (
        "warning: mlflow does not take this run: ValueError: log in first; training goes on" in capsys.readouterr().out
    )


def test_what_is_not_installed_is_named_with_the_command_that_installs_it(recipe, monkeypatch):
    monkeypatch.setattr(trackers, "_is_installed", lambda name: False)
    with pytest.raises(
        SoftCoTError, match="trackers: trackio and mlflow are not installed; pip install trackio mlflow, or"
    ):
        require_trackers(recipe)
    require_trackers(recipe.model_copy(update={"trackers": ["tensorboard"]}))


def test_an_unknown_tracker_is_a_mistake_in_the_recipe():
    with pytest.raises(SoftCoTError, match=r"trackers\.1: input should be 'tensorboard', .*, found 'neptune'"):
        load_recipe(ROOT / "recipes/word_problems.yaml", ["trackers=[tensorboard,neptune]"])


def test_mlflow_and_trackio_have_what_was_logged_once(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    mlflow, trackio = pytest.importorskip("mlflow"), pytest.importorskip("trackio")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    for last, start in ((3, 0), (5, 2)):
        with Trackers() as both:
            both.start(recipe, start)
            for step in range(start + 1, last + 1):
                both.scalars({"loss/train": 1 / step}, step)
    ids = json.loads((recipe.run_dir / "trackers.json").read_text())
    points = mlflow.MlflowClient().get_metric_history(ids["mlflow"], "loss/train")
    assert [(point.step, point.value) for point in points] == [(step, 1 / step) for step in range(1, 6)]
    (run,) = [run for run in trackio.Api().runs("softcot-ds") if run.name == ids["trackio"]]
    assert run.name.startswith("demo-")
