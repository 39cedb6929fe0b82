"""The generated problems asked as a choice and as a claim, against a solver that reads the text alone."""

import json
import re
from collections import Counter

import pytest
from forked import run_forked
from launch import ROOT
from scipy.stats import binomtest, chisquare
from test_pair import counts_of, read

from softcot_ds.errors import SoftCoTError
from softcot_ds.evaluation.run import evaluate
from softcot_ds.experiment import Experiment
from softcot_ds.pair.world import Choice, Claim, generate, split_of
from softcot_ds.recipe import load_recipe
from softcot_ds.run_dir import recipe_and_adapter
from softcot_ds.task_config import TaskConfig
from softcot_ds.tasks import make_task

NAMES = ("word_choices", "word_claims")
ENDS = {"word_choices": list("ABCD"), "word_claims": ["yes", "no"]}


def task_of(name, train=1, test=1):
    return make_task(TaskConfig(name=name, train_problems=train, test_problems=test))


def answer_of(question):
    """The right answer, from the text alone."""
    *offered, story = question.split("\n")
    *_, count = counts_of(*read(story))
    if len(offered) == 1:
        claimed = re.fullmatch(r"\(yes or no\) (\d+)", offered[0])[1]
        return "yes" if int(claimed) == count else "no"
    options = dict(re.fullmatch(r"\(([A-D])\) (\d+)", line).groups() for line in offered)
    assert list(options) == list("ABCD")
    assert len(set(options.values())) == 4
    assert all(0 < int(option) < 100 for option in options.values())
    (letter,) = [letter for letter, option in options.items() if int(option) == count]
    return letter


@pytest.mark.parametrize("name", NAMES)
def test_answers_follow_from_the_text(name):
    task = task_of(name, train=300, test=300)
    for split in ("train", "test"):
        for problem in task.read(split):
            assert problem.answer == answer_of(problem.question)
            offered = re.findall(r"^\([A-D]\) (\d+)$", problem.question, re.MULTILINE)
            assert list(problem.options) == offered
            assert len(offered) == (4 if name == "word_choices" else 0)


@pytest.mark.slow
def test_right_options_stand_at_every_place_as_often_and_half_of_the_claims_are_true():
    problems = generate("train", 1000, seed=1)
    letters = Counter(Choice(problem).answer for problem in problems)
    assert set(letters) == set("ABCD")
    assert chisquare(list(letters.values())).pvalue > 0.01
    words = Counter(Claim(problem).answer for problem in problems)
    assert set(words) == {"yes", "no"}
    assert binomtest(words["yes"], 1000).pvalue > 0.01


def test_what_is_offered_beside_the_answer_is_what_a_verb_taken_for_another_gives():
    frames = (("add", "take", "skip"), ("double", "halve"))
    alone = 0
    for problem in generate("test", 300, seed=0):
        start, events = read(problem.question)
        *_, right = counts_of(start, events)
        misread = set()
        for place, (operation, number) in enumerate(events):
            (frame,) = (frame for frame in frames if operation in frame)
            for other in frame:
                *_, count = counts_of(start, (*events[:place], (other, number), *events[place + 1 :]))
                misread.add(count)
        misread = {count for count in misread if 0 < count < 100 and count % 10 != right % 10}
        assert problem.misreadings == sorted(misread)
        wrong = set(Choice(problem).options) - {right}
        assert wrong <= misread or wrong > misread
        assert all(abs(count - right) < 10 for count in wrong - misread)
        assert Claim(problem).count in {right, *wrong}
        alone += wrong <= misread
    assert alone > 200


@pytest.mark.parametrize("name", NAMES)
def test_they_are_the_same_in_every_run_and_no_story_is_in_both_splits(name):
    task = task_of(name, train=400, test=100)
    train, test = task.read("train"), task.read("test")
    assert (train, test) == (task.read("train"), task.read("test"))
    assert task_of(name, train=40).read("train") == train[:40]
    stories = [{read(problem.question.split("\n")[-1]) for problem in part} for part in (train, test)]
    assert not stories[0] & stories[1]
    assert {split_of(story) for story in stories[0]} == {"train"}
    assert {split_of(story) for story in stories[1]} == {"test"}


@pytest.mark.parametrize(
    ("name", "rule"), [("word_choices", "ours"), ("word_claims", "ours"), ("word_claims", "reference")]
)
def test_what_the_base_is_trained_to_write_is_read_by_each_rule_that_there_is(name, rule):
    task = task_of(name, test=100).under(rule)
    for problem in task.read("test"):
        assert task.extract(task.target(problem), options=problem.options) == problem.answer
        for other in set(ENDS[name]) - {problem.answer}:
            said = f"{problem.reasoning} answer : {other}"
            assert task.extract(said, options=problem.options) == other
            assert not task.solves(said, problem)


def test_the_references_rule_is_refused_where_it_finds_letters_and_the_base_writes_numbers():
    with pytest.raises(SoftCoTError, match="the reference has no rule for the answers of word_choices; set ours"):
        make_task(TaskConfig(name="word_choices", train_problems=1, test_problems=1, metric_rule="reference"))


SMALL = [
    "task.train_problems=24",
    "task.validation_problems=8",
    "task.test_problems=8",
    "training.steps=2",
    "training.warmup_steps=0",
    "training.global_batch_size=16",
    "evaluation.batch_size=36",
]


@pytest.mark.distributed
def test_every_way_of_evaluation_runs_on_their_recipes(tmp_path):
    """Who is right says the text of each question."""
    paths = {name: ROOT / f"recipes/{name}.yaml" for name in NAMES}
    places = [f"output_dir={tmp_path}", f"cache.path={tmp_path}/cache", *SMALL]
    run_forked(1, "train_worker", *(word for path in paths.values() for word in (path, " ".join(places))))
    for name, path in paths.items():
        recipe = load_recipe(path, places)
        right = {one.problem.id: answer_of(one.problem.question) for one in Experiment(recipe).splits.test}
        checkpoint = str(recipe.run_dir / "checkpoints/step-2")
        few = "evaluation.conditions=[learned,none]"
        for settings in (["evaluation.samples=3", "evaluation.temperature=0.7"], ["evaluation.read=options"]):
            before = set(recipe.run_dir.glob("evaluation/*"))
            evaluate(*recipe_and_adapter(checkpoint, [few, *settings]))
            (folder,) = set(recipe.run_dir.glob("evaluation/*")) - before
            for condition in ("learned", "none"):
                rows = [json.loads(line) for line in (folder / f"{condition}.jsonl").read_text().splitlines()]
                assert {row["id"] for row in rows} == set(right)
                assert all(row["loss"] > 0 for row in rows)
                samples = [(right[row["id"]], sample) for row in rows for sample in row.get("samples", [row])]
                for answer, sample in samples:
                    assert sample["answer"] in (*ENDS[name], None)
                    assert sample["correct"] == (sample["answer"] == answer)
