"""Several seeds in one command: each run is trained once, what does not depend on a seed is decoded once."""

import json
import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
from adapters import make_adapter
from launch import ONLINE, ROOT
from torch import distributed as dist

from softcot_ds import apart, evaluate
from softcot_ds.cells import Grid
from softcot_ds.distributed import _met_apart
from softcot_ds.evaluation import decoder as decoder_module
from softcot_ds.evaluation import jobs
from softcot_ds.launchers import MEETING
from softcot_ds.models.scoring import Scorer

RECIPE = str(ROOT / "recipes" / "word_problems.yaml")
SMALL = ["task.train_problems=8", "task.validation_problems=0", "task.test_problems=24", *ONLINE]
SMALL += ["training.steps=1", "training.warmup_steps=0", "training.global_batch_size=8", "training.micro_batch_size=8"]
SMALL += ["evaluation.conditions=[learned,none,zero]", "evaluation.max_new_tokens=4"]


@pytest.fixture
def seeds(tmp_path, monkeypatch):
    """Overrides for two seeds, whose trainings only write adapters; and which were trained."""
    trained = []

    def train(command, cell):
        assert command == "train"
        trained.append(cell.seed)
        folder = cell.recipe.run_dir / "checkpoints" / "step-1"
        if not folder.exists():
            make_adapter(folder, cell.recipe, step=1)

    monkeypatch.setattr(evaluate, "run_apart", train)
    monkeypatch.chdir(ROOT)
    return [f"output_dir={tmp_path}", *SMALL, "seeds=[5,6]"], trained


def kept(folder):
    """What each job that is kept there was asked with."""
    return [json.loads(path.read_text()) for path in folder.glob("outputs/*/settings.json")]


def test_each_seed_is_trained_and_what_no_seed_decides_is_decoded_once(seeds, tmp_path, scribe, monkeypatch, capfd):
    overrides, trained = seeds
    loads, decoded = [], []
    load, decode = jobs.load_to_run, decoder_module.decode
    monkeypatch.setattr(jobs, "load_to_run", lambda *args: loads.append(args) or load(*args))
    monkeypatch.setattr(decoder_module, "decode", lambda *args: decoded.append(args) or decode(*args))
    assert evaluate.main([RECIPE, *overrides, "evaluation.thoughts=[4,2]", "evaluation.loss=false"]) == 0
    assert trained == [5, 6], "once for both numbers of thoughts"
    # learned of either seed (whose adapters are the same here) and zero with 4 and with 2 thoughts; none once.
    assert len(decoded) == sum("sampling" in settings for settings in kept(tmp_path / "demo")) == 5
    # Without a cache the assistant makes the states of four thoughts, then of two: the base makes room for it.
    assert len(loads) == 2
    assert not list(tmp_path.glob("demo-seed*/outputs"))
    report = json.loads((tmp_path / "demo" / "grid.json").read_text())
    assert [(cell["seed"], cell["num_thoughts"]) for cell in report["cells"]] == [(5, 4), (5, 2), (6, 4), (6, 2)]
    for cell in report["cells"]:
        own = json.loads(Path(cell["report"]).read_text())
        assert own["seeds"] == [cell["seed"]]
        assert cell["run"] == str(tmp_path / f"demo-seed{cell['seed']}")
        for name, row in cell["conditions"].items():
            assert row["accuracy"] == own["conditions"][name]["accuracy"]
    assert f"results: {tmp_path}/demo/grid.json" in capfd.readouterr().out

    decoded.clear()
    assert evaluate.main([RECIPE, *overrides, "evaluation.thoughts=[4,2]", "evaluation.loss=false"]) == 0
    assert not decoded
    assert json.loads((tmp_path / "demo" / "grid.json").read_text()) == report


def test_adapters_of_different_steps_are_not_reported_as_one(seeds, tmp_path, capfd):
    overrides, _ = seeds
    later = Grid.of(overrides).cells(RECIPE)[1].recipe
    make_adapter(later.run_dir / "checkpoints" / "step-3", later, step=3)
    assert evaluate.main([RECIPE, *overrides]) == 2
    said = capfd.readouterr().err
    assert "of different steps (demo-seed5: 1, demo-seed6: 3)" in said
    assert "training.steps=3" in said
    assert not (tmp_path / "demo" / "grid.json").exists()


def test_sampled_answers_are_of_each_seed(seeds, tmp_path, scribe):
    overrides, _ = seeds
    sampled = ["evaluation.temperature=1", "evaluation.loss=false", "evaluation.conditions=[none]"]
    assert evaluate.main([RECIPE, *overrides, *sampled]) == 0
    assert sorted(settings["sampling"]["seed"] for settings in kept(tmp_path / "demo")) == [5, 6]


@pytest.mark.slow
def test_a_base_that_told_losses_before_tells_the_same_again(seeds, tmp_path, monkeypatch):
    overrides, _ = seeds
    scored = []
    losses = Scorer.scores
    monkeypatch.setattr(Scorer, "scores", lambda self, *args: scored.append(args) or losses(self, *args))
    together = [RECIPE, *overrides, "evaluation.thoughts=[4,2,3]", "evaluation.partition=zero3"]
    assert evaluate.main(together) == 0
    assert len(scored) == 1 + 3 * 2 * 1, "none, and zero and learned with each count: one batch each, of both seeds"
    report = json.loads((tmp_path / "demo" / "grid.json").read_text())
    alone = ["name=alone", "seed=6", "evaluation.thoughts=3", "evaluation.partition=zero3"]
    make = Grid.of([*overrides[:-1], "seeds=6"]).cells(RECIPE)[0].recipe
    folder = make_adapter(tmp_path / "alone" / "checkpoints" / "step-1", make, step=1)
    assert evaluate.main([str(folder), f"output_dir={tmp_path}", "evaluation.outputs=null", *alone]) == 0
    own = json.loads((tmp_path / "alone" / "report.json").read_text())
    for name, row in report["cells"][-1]["conditions"].items():
        assert row["loss"] == pytest.approx(own["conditions"][name]["loss"]["per_token"], rel=1e-6)
        assert row["accuracy"] == own["conditions"][name]["accuracy"]


def test_adapters_of_another_task_are_evaluated_as_they_are(seeds, tmp_path, scribe, capfd):
    overrides, trained = seeds
    other = ["task.name=date_understanding", f"task.test={tmp_path}/dates.json"]
    dates = [{"input": f"Day {n}?", "target_scores": {"May 2": 1, "May 3": 0}} for n in range(6)]
    (tmp_path / "dates.json").write_text(json.dumps(dates))
    wanted = [text for text in overrides if not text.startswith("task.")]
    assert evaluate.main([RECIPE, *wanted, *other]) == 2
    assert "train first: softcot-ds train" in (said := capfd.readouterr().err)
    assert "name=demo-seed5 seed=5" in said
    assert trained == []


@pytest.mark.parametrize(
    ("served", "names"), [("True", ["train-demo-seed1", "train-demo-seed2"]), ("False", [None, None])]
)
def test_only_in_the_store_of_torchruns_agent_trainings_meet_under_names(monkeypatch, tmp_path, served, names):
    stand_in(monkeypatch, tmp_path, 'echo "${SOFTCOT_MEETING-none}" >>met')
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", served)
    for cell in Grid.of([f"output_dir={tmp_path}", "seeds=1..2"]).cells(RECIPE):
        apart.run_apart("train", cell)
    assert (tmp_path / "met").read_text().split() == [name or "none" for name in names]


def test_ranks_that_meet_under_a_name_do_not_see_what_others_left_in_the_store(monkeypatch):
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": agent.port}
    for name, value in (place | {"TORCHELASTIC_USE_AGENT_STORE": True}).items():
        monkeypatch.setenv(name, str(value))
    assert _met_apart(timedelta(seconds=5)) == {}
    for name in ("demo-seed1", "demo-seed2"):
        monkeypatch.setenv(MEETING, name)
        met = _met_apart(timedelta(seconds=5))
        assert (met["rank"], met["world_size"]) == (0, 1)
        assert not met["store"].check(["left"])
        met["store"].set("left", name)
    assert agent.get("demo-seed1/left") == b"demo-seed1"


def stand_in(monkeypatch, tmp_path, script):
    """A shell script in place of the process that would train."""
    path = tmp_path / "trains"
    path.write_text(f"#!/bin/sh\ncd {tmp_path}\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(apart.sys, "executable", str(path))
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(("ends", "code"), [("exit 3", 3), ("kill -9 $$", 137)])
def test_a_training_that_fails_ends_the_command_as_itself(monkeypatch, tmp_path, ends, code):
    stand_in(monkeypatch, tmp_path, f'echo "$@" >>asked; {ends}')
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([RECIPE, f"output_dir={tmp_path}", "seeds=1..2"])
    assert stopped.value.code == code
    (asked,) = (tmp_path / "asked").read_text().splitlines()
    assert asked.startswith(f"-m softcot_ds.train {RECIPE} output_dir={tmp_path} name=demo-seed1 seed=1 ")


@pytest.mark.parametrize("reached", [True, False])
def test_a_signal_to_stop_reaches_the_training_once_and_is_waited_for(monkeypatch, tmp_path, reached):
    """Whether it went to all processes, as a terminal's does, or to the command alone."""
    stand_in(
        monkeypatch, tmp_path, 'trap "echo x >>signals; exit 143" TERM; echo $$ >pid; while :; do sleep 0.05; done'
    )
    monkeypatch.setattr(apart, "_PATIENCE_S", 0.3)

    def stop():
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.02)
        if reached:
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    assert evaluate.main([RECIPE, f"output_dir={tmp_path}", "seeds=1..2"]) == 143
    thread.join()
    assert (tmp_path / "signals").read_text() == "x\n"
