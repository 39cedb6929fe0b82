"""The journal of a run's attempts, and what it says about a restart."""

import shutil
from pathlib import Path

import pytest

from softcot_ds import slurm
from softcot_ds.errors import SoftCoTError
from softcot_ds.recipe import Recipe, load_recipe, parse_recipe
from softcot_ds.run_dir import (
    MARKER,
    Attempt,
    Journal,
    checkpoints,
    latest_checkpoint,
    load_for_evaluation,
    names_another_task,
    recipe_and_adapter,
    saved_step,
    stuck_at,
)
from softcot_ds.slurm import REQUEUE

ROOT = Path(__file__).parents[1]


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Recipe:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    overrides = [f"output_dir={tmp_path}", "training.steps=100", "training.max_restarts=3"]
    return load_recipe(ROOT / "recipes/word_problems.yaml", overrides)


def save(recipe: Recipe, step: int | str) -> None:
    folder = recipe.run_dir / "checkpoints" / f"step-{step}"
    folder.mkdir(parents=True)
    (folder / MARKER).touch()


def attempt(recipe: Recipe, saved: int, code: int, stopped_by: str = "", preempted: bool = False) -> int:
    """Begin, save a checkpoint, stop, end; returns the verdict."""
    slurm.begin("train", recipe)
    if saved > saved_step(recipe.run_dir):
        save(recipe, saved)
    if stopped_by:
        Journal(recipe.run_dir).add("stop", signal=stopped_by, step=saved)
    return slurm.end("train", code, recipe, preempted)[0]


def test_only_complete_checkpoints_count_and_in_their_order(recipe):
    assert (saved_step(recipe.run_dir), latest_checkpoint(recipe.run_dir)) == (0, None)
    for step in (8, 100, 20):
        save(recipe, step)
    (recipe.run_dir / "checkpoints/step-900").mkdir()
    for name in ("step-100-best", "step-100 (copy)", "step-0100", "step-٣", "step-+9", "step-1e3", "step-", "step-9\n"):
        save(recipe, name.removeprefix("step-"))
    (recipe.run_dir / "checkpoints/step-5").touch()
    assert [path.name for path in checkpoints(recipe.run_dir)] == ["step-8", "step-20", "step-100"]
    assert saved_step(recipe.run_dir) == 100


def test_checkpoints_that_cannot_be_listed_are_not_none(recipe):
    recipe.run_dir.mkdir()
    (recipe.run_dir / "checkpoints").touch()
    with pytest.raises(SoftCoTError, match=r"cannot read .*checkpoints"):
        latest_checkpoint(recipe.run_dir)


def test_directory_of_a_run_stands_for_its_newest_checkpoint(recipe):
    run = str(recipe.run_dir)
    recipe.run_dir.mkdir()
    with pytest.raises(SoftCoTError, match=f"{run} is no complete checkpoint"):
        recipe_and_adapter(run, [])
    for step in (100, 20):
        save(recipe, step)
        folder = recipe.run_dir / f"checkpoints/step-{step}"
        (folder / "recipe.yaml").write_text(recipe.to_yaml())
        shutil.copy(ROOT / "softcot_ds/tasks/word_problems.yaml", folder / "prompts.yaml")
    (recipe.run_dir / "checkpoints/step-20/recipe.yaml").write_text("not this one")
    newest = recipe.run_dir / "checkpoints/step-100"
    found, adapter = recipe_and_adapter(run, ["evaluation.batch_size=3"])
    assert (found, adapter) == recipe_and_adapter(str(newest), ["evaluation.batch_size=3"])
    assert adapter == newest
    assert (found.evaluation.batch_size, found.task.prompts) == (3, newest / "prompts.yaml")
    assert load_for_evaluation(run, []).task.prompts == newest / "prompts.yaml"
    assert names_another_task(run, ["task.name=gsm8k"])


@pytest.mark.parametrize(
    ("code", "stopped_by", "preempted", "verdict"),
    [
        (138, "SIGUSR1", False, REQUEUE),  # notice of the time limit
        (1, "SIGUSR1", False, REQUEUE),  # the same, and a launcher that changed the code
        (138, "", False, REQUEUE),  # notice while the model was being loaded
        (247, "", False, REQUEUE),  # a rank was killed
        (0, "", False, REQUEUE),  # the launcher was killed, and its own launcher says 0
        (3, "", False, REQUEUE),  # a rank did not answer
        (2, "", False, 2),  # a mistake, or a full disk
        (1, "SIGTERM", False, 1),  # scancel
        (1, "SIGTERM", True, REQUEUE),  # preempted
        (130, "", False, 130),  # Ctrl-C
    ],
)
def test_end_requeues_what_can_go_on(recipe, code, stopped_by, preempted, verdict):
    assert attempt(recipe, saved=20, code=code, stopped_by=stopped_by, preempted=preempted) == verdict


def test_finished_run_is_done(recipe):
    assert attempt(recipe, saved=100, code=0) == 0


def test_epochs_are_done_at_the_step_that_training_counted(recipe):
    values = recipe.model_dump(mode="json")
    in_epochs = parse_recipe({**values, "training": {**values["training"], "steps": None, "epochs": 2}}, [], "test")
    assert attempt(in_epochs, saved=50, code=0) == REQUEUE, "without such a recipe, training has not begun"
    (recipe.run_dir / "recipe.yaml").write_text(recipe.to_yaml())
    assert attempt(in_epochs, saved=99, code=0) == REQUEUE
    assert attempt(in_epochs, saved=100, code=0) == 0


def test_two_attempts_that_end_at_one_step_stop_the_loop(recipe):
    assert attempt(recipe, saved=20, code=1) == REQUEUE
    assert attempt(recipe, saved=20, code=1) == REQUEUE, "once may be chance"
    assert attempt(recipe, saved=20, code=143, preempted=True) == REQUEUE, "no fault of its own"
    assert attempt(recipe, saved=20, code=1) == 1
    _, why = slurm.end("train", 1, recipe)
    assert "two attempts have ended at step 20" in why


def test_progress_keeps_the_loop_going(recipe, monkeypatch):
    for restart, saved in enumerate((20, 20, 40, 40)):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        verdict = attempt(recipe, saved=saved, code=1)
        assert verdict == (REQUEUE if restart < 3 else 1), "the last is one more than max_restarts"


def test_restarts_that_slurm_makes_itself_are_counted_too(recipe, monkeypatch):
    """A dead node leaves no end in the journal: SLURM requeues the job, and the next begin looks."""
    for _ in range(2):
        slurm.begin("train", recipe)
    with pytest.raises(SoftCoTError, match="two attempts have ended at step 0"):
        slurm.begin("train", recipe)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    slurm.begin("train", recipe)  # submitted anew
    monkeypatch.setenv("SLURM_RESTART_COUNT", "4")
    with pytest.raises(SoftCoTError, match=r"restart 4 is one too many \(training.max_restarts=3\)"):
        slurm.begin("train", recipe)


@pytest.mark.parametrize(("code", "verdict"), [(0, 0), (138, REQUEUE), (1, 1), (2, 2), (143, 143)])
@pytest.mark.parametrize("command", ["cache", "evaluate"])
def test_other_commands_come_back_only_for_more_time(recipe, command, code, verdict):
    slurm.begin(command, recipe)
    assert slurm.end(command, code, recipe)[0] == verdict


def test_line_that_was_cut_short_does_not_hide_others(tmp_path):
    journal = Journal(tmp_path)
    journal.add("begin", job="1", step=0)
    with (tmp_path / "attempts.jsonl").open("a") as file:
        file.write('{"event": "end", "st')
    journal.add("begin", job="1", step=30)
    assert journal.attempts("1", saved=50) == [Attempt("1", 0, 30), Attempt("1", 30, 50)]


def test_stuck_needs_two_attempts_without_progress():
    assert stuck_at([]) is None
    assert stuck_at([Attempt("1", 0, 0)]) is None
    assert stuck_at([Attempt("1", 0, 20), Attempt("1", 20, 20)]) is None
    assert stuck_at([Attempt("1", 0, 20), Attempt("1", 20, 20), Attempt("1", 20, 20)]) == 20


def test_preempted_attempts_are_not_stuck():
    failed, preempted = Attempt("1", 20, 20), Attempt("1", 20, 20, preempted=True)
    assert stuck_at([preempted] * 5) is None
    assert stuck_at([failed, preempted]) is None
    assert stuck_at([failed, preempted, failed]) == 20, "nothing between them got further"
    assert stuck_at([failed, Attempt("1", 20, 24, preempted=True), Attempt("1", 24, 24)]) is None


def test_lines_that_say_nothing_are_passed_over(tmp_path):
    journal = Journal(tmp_path)
    journal.add("begin", job="1", step=0)
    nonsense = [
        b"\x80\x81",
        b"null",
        b"[1]",
        b"{}",
        b'{"event": []}',
        b'{"event": "end"}',
        b'{"event": "end", "step": "4"}',
        b'{"event": "end", "step": 4, "preempted": "no"}',
    ]
    with (tmp_path / "attempts.jsonl").open("ab") as file:
        file.write(b"\n".join([*nonsense, b'{"event": "begin", "job": 7, "step": 9}', b""]))
    journal.add("end", step=20, code=1)
    assert journal.attempts("1", saved=50) == [Attempt("1", 0, 20)]


def test_journal_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "attempts.jsonl").mkdir()
    with pytest.raises(SoftCoTError, match=r"cannot read .*attempts.jsonl: Is a directory; mend that"):
        Journal(tmp_path).attempts("1", saved=0)
