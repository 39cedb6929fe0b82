"""Targets in the base's own words: what is kept of what it writes, the file, and training on it."""

import random
import re
from dataclasses import replace
from itertools import cycle

import pytest
from forked import run_forked
from launch import ONLINE, ROOT

from softcot_ds.adapter import adapter_config
from softcot_ds.chain import Submission
from softcot_ds.data.targets import OwnTargets, Solved
from softcot_ds.errors import SoftCoTError
from softcot_ds.evaluation import decoder
from softcot_ds.evaluation.report import table
from softcot_ds.evaluation.run import evaluate
from softcot_ds.evaluation.targets import make_targets
from softcot_ds.experiment import Experiment
from softcot_ds.models.backbone import weights_fingerprint
from softcot_ds.models.decoding import Output, Sampling
from softcot_ds.recipe import load_recipe
from softcot_ds.run_dir import recipe_and_adapter
from softcot_ds.submit import submit
from softcot_ds.training.resume import agreed_start

SIZES = ["task.train_problems=16", "task.validation_problems=4", "task.test_problems=4", *ONLINE]
DECODE = ["evaluation.batch_size=1", "evaluation.max_new_tokens=40", "evaluation.text_max_tokens=6"]


def make_recipe(tmp_path, *overrides):
    places = [f"output_dir={tmp_path}", f"task.targets={tmp_path}/own/targets.jsonl"]
    return load_recipe(ROOT / "recipes/word_problems.yaml", [*places, *SIZES, *DECODE, *overrides])


def gold(recipe):
    return Experiment(recipe.on_gold()).splits.train


KINDS = ("always", "sometimes", "never", "cut", "control", "long")


class Solver:
    """Stands in for decoding: solves each training problem as its kind says, and notes the kinds of each batch."""

    def __init__(self):
        self.asked = []

    def use(self, recipe):
        self.experiment = Experiment(recipe.on_gold())
        examples = self.experiment.splits.train
        self.kinds = {example.problem.id: kind for example, kind in zip(examples, cycle(KINDS), strict=False)}
        ask = self.experiment.base_prompts.without_thoughts
        self.by_prompt = {tuple(ask(example.problem.question).prefix_ids): example for example in examples}
        return recipe

    def __call__(self, model, prompts, thoughts, stop_ids, sampling, table, batch_size, seeds, samples, drafter):
        assert thoughts is None
        assert sampling == Sampling(40, 0.7)
        examples = [self.by_prompt[tuple(prompt.prefix_ids)] for prompt in prompts]
        self.asked.append([self.kinds[example.problem.id] for example in examples])
        return [self.write(example, seed) for example, seed in zip(examples, seeds, strict=True)]

    def write(self, example, seed):
        kind, answer = self.kinds[example.problem.id], example.problem.answer
        number = random.Random(seed).randrange(10**6)
        right = kind not in ("never", "sometimes") or (kind == "sometimes" and number % 2)
        text = f"so {number} answer {answer if right else int(answer) + 1} .\n"
        text = {"control": "<|user|> ", "long": "so " * 600}.get(kind, "") + text
        ids = self.experiment.base_tokenizer.encode(text, add_special_tokens=False)
        return Output(ids, cut=kind == "cut")


@pytest.fixture
def solver(scribe, monkeypatch):
    solver = Solver()
    monkeypatch.setattr(decoder, "decode", solver)
    return solver


def test_what_is_right_is_kept_and_who_has_enough_is_not_asked_again(tmp_path, solver):
    recipe = solver.use(make_recipe(tmp_path, "targets.samples=3"))
    make_targets(recipe)
    own = OwnTargets.read(recipe.task.targets_file)
    assert [one.id for one in own.problems] == [example.problem.id for example in gold(recipe)]
    answers = {example.problem.id: example.problem.answer for example in gold(recipe)}
    for one in own.problems:
        kind = solver.kinds[one.id]
        if kind == "always":
            assert (one.samples, len(one.solutions)) == (1, 1)
        elif kind == "sometimes":
            assert one.samples == 3 or len(one.solutions) == 1
        else:
            assert (one.samples, one.solutions) == (3, []), kind
        for text in one.solutions:
            assert re.fullmatch(rf"so \d+ answer {' ?'.join(answers[one.id])} \.", text)
    assert sum(batch.count("always") for batch in solver.asked) == list(solver.kinds.values()).count("always")


def test_several_of_a_problem_differ_and_share_what_the_assistant_says(tmp_path, solver):
    recipe = solver.use(make_recipe(tmp_path, "targets.samples=3", "targets.per_problem=2"))
    make_targets(recipe)
    splits = Experiment(recipe).splits
    solutions = {one.id: one.solutions for one in OwnTargets.read(recipe.task.targets_file).problems}
    assert {len(set(texts)) for texts in solutions.values()} >= {0, 2}
    base = Experiment(recipe).base_prompts
    expected = []
    for example in gold(recipe):
        texts = solutions[example.problem.id]
        expected += [replace(example, target_ids=base.target_ids(text)) for text in texts] or [example]
    assert splits.train == expected
    assert (splits.validation, splits.test) == (
        Experiment(recipe.on_gold()).splits.validation,
        Experiment(recipe.on_gold()).splits.test,
    )
    assert splits.own.problems == 12
    assert splits.own.solved == sum(map(bool, solutions.values()))
    assert splits.own.words() in splits.notes


def test_problems_without_a_solution_are_left_out_where_that_is_wanted_with_the_same_file(tmp_path, solver):
    recipe = solver.use(make_recipe(tmp_path, "targets.samples=1"))
    make_targets(recipe)
    assert len(Experiment(recipe).splits.train) == 12
    without = make_recipe(tmp_path, "targets.samples=1", "targets.otherwise=leave_out")
    calls = len(solver.asked)
    make_targets(without)
    assert len(solver.asked) == calls
    splits = Experiment(without).splits
    assert 0 < len(splits.train) == splits.own.solved < 12
    assert {solver.kinds[example.problem.id] for example in splits.train} <= {"always", "sometimes"}
    assert splits.notes[0].endswith("of 12 training problems, the others left out")


@pytest.mark.parametrize("otherwise", ["gold", "leave_out"])
def test_a_base_that_solves_nothing_has_no_targets(tmp_path, solver, otherwise, monkeypatch):
    recipe = solver.use(make_recipe(tmp_path, "targets.samples=2", f"targets.otherwise={otherwise}"))
    monkeypatch.setattr(solver, "kinds", dict.fromkeys(solver.kinds, "never"))
    for asked in (24, 24):  # what was decoded is kept
        with pytest.raises(SoftCoTError, match=r"solved none of 12 training problems.*task.targets=gold"):
            make_targets(recipe)
        assert sum(map(len, solver.asked)) == asked
    assert not recipe.task.targets_file.exists()


def test_a_finished_file_needs_no_model_and_one_made_otherwise_is_not_written_over(tmp_path, solver, monkeypatch):
    recipe = solver.use(make_recipe(tmp_path))
    make_targets(recipe)
    content = recipe.task.targets_file.read_bytes()
    calls = len(solver.asked)
    make_targets(recipe)
    assert len(solver.asked) == calls
    with pytest.raises(SoftCoTError, match=r"made otherwise: settings is .*'samples': 4.* there and .*'samples': 5"):
        make_targets(make_recipe(tmp_path, "targets.samples=5"))
    with pytest.raises(SoftCoTError, match=r"made otherwise: problems is "):
        make_targets(make_recipe(tmp_path, "task.train_problems=15"))
    assert recipe.task.targets_file.read_bytes() == content


def test_interrupted_it_goes_on_and_writes_what_it_would_have_written(tmp_path, solver):
    recipe = solver.use(make_recipe(tmp_path))
    make_targets(recipe)
    whole = recipe.task.targets_file.read_bytes()
    batches = len(solver.asked)
    recipe.task.targets_file.unlink()
    parts = sorted(recipe.run_dir.glob("outputs/*/*.batches"))
    text = parts[-1].read_text()
    parts[-1].write_text(text[: len(text) // 3])  # killed within a round
    make_targets(recipe)
    assert recipe.task.targets_file.read_bytes() == whole
    assert 0 < len(solver.asked) - batches < batches


def edited(number, old, new):
    def edit(lines):
        assert old in lines[number]
        return [*lines[:number], lines[number].replace(old, new, 1), *lines[number + 1 :]]

    return edit


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (edited(2, '"samples": ', '"samples": 1'), r"targets.jsonl:3: damaged, edited"),
        (edited(0, '"problems": 12', '"problems": 11'), r"targets.jsonl:1: the first line is not"),
        (
            edited(0, '"format": 2', '"format": 1'),
            r"targets.jsonl:1: a file of targets in format 1, of another version",
        ),
        (edited(0, '"format": 2', '"format": "2"'), r"targets.jsonl:1: the first line is not"),
        (lambda lines: lines[:-1], r"targets.jsonl: the file ends after 11 problems, and its first line says 12"),
        (lambda lines: lines[:1], r"targets.jsonl: the file ends after 0 problems"),
        (lambda lines: [*lines[:5], lines[5][:30]], r"targets.jsonl:6: not JSON"),
        (lambda lines: [*lines[:4], lines[3], *lines[5:]], r"targets.jsonl:5: damaged, edited, or not the line"),
        (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], r"targets.jsonl:2: damaged"),
        (lambda lines: lines[1:], r"targets.jsonl:1: the first line is not"),
        (lambda lines: [*lines, "", lines[-1]], r"targets.jsonl:14: empty line"),
        (lambda lines: [], r"targets.jsonl: the file is empty"),
        (lambda lines: ['{"question": "a", "answer": "b"}'], r"targets.jsonl:1: the first line is not"),
    ],
)
def test_a_damaged_file_is_refused_with_file_and_line(tmp_path, damage, said):
    recipe = make_recipe(tmp_path)
    write_for(recipe)
    path = recipe.task.targets_file
    path.write_text("".join(line + "\n" for line in damage(path.read_text().splitlines())))
    with pytest.raises(SoftCoTError, match=said + ".*; move it away and make it again: softcot-ds targets RECIPE"):
        _ = Experiment(recipe).splits


def write_for(recipe, text="so it is answer {}", **changed):
    """A file of targets, a solution of every second problem."""
    examples = gold(recipe)
    texts = [text.format(changed.get("answer", example.problem.answer)) for example in examples]
    problems = [
        Solved(e.problem.id, 1, [t] if i % 2 else []) for i, (e, t) in enumerate(zip(examples, texts, strict=True))
    ]
    base = {"model": changed.get("model", recipe.base.model)}
    base["fingerprint"] = weights_fingerprint(recipe.base.model_copy(update=base))
    made_from = {"base": base, "settings": recipe.targets.model_dump(mode="json")}
    OwnTargets(made_from, problems[: changed.get("first", 100)]).write(recipe.task.targets_file)


def test_a_file_of_other_problems_or_answers_is_refused(tmp_path):
    recipe = make_recipe(tmp_path)
    with pytest.raises(SoftCoTError, match=r"no file .*targets.jsonl; make it with: softcot-ds targets RECIPE"):
        _ = Experiment(recipe).splits
    write_for(recipe, first=11)
    with pytest.raises(SoftCoTError, match="is of other problems: it lacks "):
        _ = Experiment(recipe).splits
    write_for(recipe, answer=123456)
    with pytest.raises(SoftCoTError, match=r"does not give the answer '.*'; it ends with 'so it is answer 123456'"):
        _ = Experiment(recipe).splits
    write_for(recipe)
    fewer = make_recipe(tmp_path, "task.validation_problems=8")
    own = Experiment(fewer).splits.own
    assert (own.problems, own.solved < 6) == (8, True), "a part of the problems is a training of its own"


def test_solutions_by_another_model_are_not_its_own(tmp_path):
    recipe = make_recipe(tmp_path)
    recipe.run_dir.mkdir()
    write_for(recipe, model=recipe.assistant.model)
    with pytest.raises(SoftCoTError, match=r"solutions by package:pair/assistant .* package:pair/base holds other"):
        agreed_start(Experiment(recipe))
    assert not (recipe.run_dir / "recipe.yaml").exists()
    write_for(recipe)
    assert agreed_start(Experiment(recipe)) is None


def test_what_is_wrong_with_a_recipe_is_said(tmp_path):
    wrong = ["targets.samples=2", "targets.per_problem=3", "targets.temperature=0", f"task.targets={tmp_path}"]
    with pytest.raises(SoftCoTError, match="3 mistakes") as error:
        make_recipe(tmp_path, *wrong)
    for text in ("is more than targets.samples=2", "all of targets.samples=2 would be the same", "is a folder"):
        assert text in str(error.value)
    with pytest.raises(SoftCoTError, match=r"task.targets is gold; name the file"):
        make_targets(make_recipe(tmp_path, "task.targets=gold"))


def test_other_targets_are_another_run_by_content_not_by_path(tmp_path):
    recipe = make_recipe(tmp_path)
    write_for(recipe)
    moved = make_recipe(tmp_path, f"task.targets={tmp_path}/moved.jsonl")
    recipe.task.targets_file.rename(moved.task.targets_file)
    first = adapter_config(Experiment(moved)).training_data
    write_for(recipe)
    assert adapter_config(Experiment(recipe)).training_data == first
    write_for(recipe, text="it must be answer {}")
    assert adapter_config(Experiment(recipe)).training_data != first
    assert adapter_config(Experiment(recipe.on_gold())).training_data != first


@pytest.mark.slow
def test_submit_makes_them_first_where_they_are_missing(tmp_path, capsys):
    epochs = ["training.steps=null", "training.epochs=2", "training.global_batch_size=4", "training.micro_batch_size=4"]
    recipe = make_recipe(
        tmp_path, "thoughts.source=cache", f"cache.path={tmp_path}/cache", "training.warmup_steps=0", *epochs
    )
    submit(recipe, Submission(["--nodes=1"], dry_run=True))
    shown = capsys.readouterr().out
    assert re.findall(r"job-name=demo-(\w+)", shown) == ["targets", "cache", "train", "evaluate"]
    assert shown.endswith(recipe.to_yaml()), "nobody knows yet how many targets an epoch has"
    write_for(recipe)
    submit(recipe, Submission(["--nodes=1"], dry_run=True))
    shown = capsys.readouterr().out
    assert re.findall(r"job-name=demo-(\w+)", shown) == ["cache", "train", "evaluate"]
    assert "for 6 of 12 training problems, the data's own for the others: no job" in shown
    assert (f"targets: {recipe.task.targets}" in shown, "steps: 6" in shown) == (True, True)


@pytest.mark.distributed
def test_training_on_them_and_its_report(tmp_path, scribe):
    """Evaluation needs the file no more."""
    steps = [
        "training.steps=2",
        "training.warmup_steps=0",
        "training.global_batch_size=4",
        "training.micro_batch_size=4",
    ]
    recipe = make_recipe(tmp_path, *steps, "evaluation.conditions=[none]")
    write_for(recipe)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    run_forked(1, "softcot_ds.train", tmp_path / "recipe.yaml")
    recipe.task.targets_file.unlink()
    report = evaluate(*recipe_and_adapter(str(tmp_path / "recipe.yaml"), []))
    assert report["train"]["own_targets"] == {
        "problems": 12, "solved": 6, "solutions": 6, "otherwise": "gold", "condition": "none",
        "base": "package:pair/base", "fingerprint": weights_fingerprint(recipe.base),
    }  # fmt: skip
    assert "trained on 6 solutions by the base itself (condition none) for 6 of 12 training problems" in table(report)
