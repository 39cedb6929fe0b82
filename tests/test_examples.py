"""Splits without overlap."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softcot_ds.data.examples import ContextLimits, load_splits, others
from softcot_ds.data.prompts import AssistantInput, BasePrompt
from softcot_ds.errors import SoftCoTError
from softcot_ds.recipe import TargetsConfig, TaskConfig
from softcot_ds.tasks import Problem


class Letters:
    """Stands in for both models' prompts: a token per character."""

    def __init__(self, count: int = 2) -> None:
        self.count = count

    def thoughts_input(self, example_id: str, question: str) -> AssistantInput:
        ids = [ord(letter) for letter in question]
        return AssistantInput(example_id, ids + [0] * self.count, list(range(len(ids), len(ids) + self.count)))

    def with_thoughts(self, question: str) -> BasePrompt:
        return BasePrompt([ord(letter) for letter in question], [1])

    def target_ids(self, target: str) -> list[int]:
        return [ord(letter) for letter in target] + [2]


class Given:
    """A task with the problems that a test wants."""

    def __init__(self, train: list[str] | None, test: list[str], validation: list[str]) -> None:
        self.trains, self.notes, self.validation_stayed = train is not None, [], False
        self.problems = {
            "train": [Problem(question, "r", str(i)) for i, question in enumerate(train or [])],
            "validation": [Problem(question, "r", str(i)) for i, question in enumerate(validation)],
            "test": [Problem(question, "r", str(i)) for i, question in enumerate(test)],
        }

    def read(self, split):
        return self.problems[split]

    def target(self, problem):
        return problem.answer


def split(train, test=("t",), count=2, limits=(100, 100), own=None, **config):
    """The splits of a task with these problems; ``own`` are validation problems of their own."""
    values = {"name": "gsm8k", "train": "a/b", "test": "a/b", "validation_problems": 0} | config
    if own is not None:
        values["validation"] = "a/b"
    task, letters = Given(train, list(test), own or []), Letters(count)
    return load_splits(task, TaskConfig(**values), TargetsConfig(), letters, letters, ContextLimits(*limits))


def questions(examples) -> list[str]:
    return [example.problem.question for example in examples]


NAMES = [f"question {first}{second}" for first in "abcde" for second in "abcdef"]


def test_validation_is_cut_from_training_and_nothing_overlaps():
    splits = split(NAMES, ["t 1", "t 2"], validation_problems=7)
    parts = [set(questions(part)) for part in (splits.train, splits.validation, splits.test)]
    assert [len(part) for part in parts] == [23, 7, 2]
    assert parts[0] | parts[1] == set(NAMES)
    assert not parts[0] & parts[1]
    assert splits.notes == []


def test_validation_data_of_its_own_is_neither_trained_on_nor_cut():
    splits = split(NAMES, ["t"], own=["v 1", "v 1", NAMES[3].upper(), "T", "v 2"], validation_problems=3)
    assert questions(splits.train) == [name for name in NAMES if name != NAMES[3]]
    assert questions(splits.validation) == ["v 1", NAMES[3].upper(), "v 2"]
    assert splits.notes == [
        "1 of 5 validation problems ask what an earlier one asks, 1 of them with another answer; left out, such as "
        "'v 1'",
        "1 validation problems are in the test data too; left out",
        "1 training problems are in the validation data too; left out",
    ]
    few = split(NAMES, ["t"], own=[NAMES[3], NAMES[4]], validation_problems=1)
    assert questions(few.validation) == [NAMES[3]]
    assert not {NAMES[3], NAMES[4]} & set(questions(few.train))  # what is validated does not depend on how much of it
    assert len(split(NAMES, own=NAMES, validation_problems=0).train) == len(NAMES)
    with pytest.raises(SoftCoTError, match=r"task\.validation: a/b has no problem that the test data has not"):
        split(NAMES, ["t"], own=["T"], validation_problems=1)


def test_validation_that_is_nearer_to_training_than_the_test_is_is_named():
    """AQuA's and ASDiv-Aug's training problems were multiplied by other numbers and not their test problems."""
    copies = [f"{name} has {number} pens of 1,{number}50.5 g" for name in ("a", "b", "c") for number in range(10)]
    (note,) = split(copies, ["d has 1 pen", "e", "a has 2 pens of 3 g"], validation_problems=8).notes
    assert note.startswith(
        "8 of 8 validation problems are training problems with other numbers, of test problems 1 of 3"
    )
    assert note.endswith("task.validation")
    assert split(copies, ["a has 99 pens of 7 g"], validation_problems=8).notes == []  # all of it is such data
    assert split(copies, ["d"], own=["d has 2 pens"], validation_problems=8).notes == []
    assert split(copies, ["d"]).notes == []


def test_without_training_data_there_are_test_problems_alone():
    splits = split(None, ["t 1", "t 2", "t 3"], validation_problems=7, test_problems=2)
    assert (splits.train, splits.validation) == ([], [])
    assert questions(splits.test) == ["t 1", "t 2"]


def test_training_keeps_the_order_of_the_file():
    train = questions(split(NAMES, validation_problems=7).train)
    assert train == [name for name in NAMES if name in train]


def test_more_or_reordered_data_moves_no_problem_from_validation_to_training():
    before = split(NAMES, validation_problems=7)
    after = split([*reversed(NAMES), "one more"], validation_problems=8)
    assert set(questions(before.validation)) <= set(questions(after.validation)) | {"one more"}
    assert not set(questions(before.validation)) & set(questions(after.train))


def test_training_problems_that_are_in_the_test_data_are_left_out_and_counted():
    splits = split(["a", "B  c", "d"], ["b C\n", "a", "x"])
    assert questions(splits.train) == ["d"]
    assert questions(splits.test) == ["b C\n", "a", "x"]
    assert splits.notes == ["2 training problems are in the test data too; left out"]


def test_problems_beyond_test_problems_are_kept_out_of_training_too():
    assert questions(split(["a", "b", "c"], ["x", "a"], test_problems=1).train) == ["b", "c"]


def test_repeated_questions_count_once_the_first_time():
    splits = split(["a", "b", " A ", "b"], ["t", "T", "u"])
    assert questions(splits.train) == ["a", "b"]
    assert [example.problem.answer for example in splits.train] == ["0", "1"]
    assert questions(splits.test) == ["t", "u"]
    assert splits.notes == [
        "1 of 3 test problems ask what an earlier one asks, 1 of them with another answer; left out, such as 'T'",
        "2 of 4 training problems ask what an earlier one asks, 2 of them with another answer; left out, such as ' A '",
    ]


def test_limits_on_the_numbers_of_problems_are_kept():
    splits = split(NAMES, ["t 1", "t 2", "t 3"], train_problems=5, test_problems=2, validation_problems=4)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (5, 4, 2)


def test_validation_larger_than_the_data_is_refused():
    with pytest.raises(SoftCoTError, match="validation_problems is 3, but there are only 3 training problems"):
        split(["a", "b", "c"], validation_problems=3)


def test_data_without_a_training_problem_is_refused_with_the_reason():
    with pytest.raises(SoftCoTError, match="only 0 training problems"):
        split([])
    with pytest.raises(SoftCoTError, match=r"no training problem is left; .*too long.*left out"):
        split(["a" * 50], max_tokens=20)


def test_long_problems_are_an_error_until_the_recipe_leaves_them_out():
    # question + 2 thoughts + 1 of the prompt's rest + answer and end
    with pytest.raises(SoftCoTError, match=r"1 of 3 train problems are too long: up to 25 of 24 base tokens"):
        split(["a", "b" * 20, "c"], limits=(100, 24))
    assert len(split(["a", "b" * 20, "c"], limits=(100, 25)).train) == 3
    splits = split(["a", "b" * 20, "c"], limits=(100, 100), max_tokens=24)
    assert questions(splits.train) == ["a", "c"]
    assert "1 of 3 train problems are too long" in splits.notes[0]


def test_problems_too_long_for_the_assistant_are_too_long():
    with pytest.raises(SoftCoTError, match=r"up to 22 of 21 assistant tokens; set task.max_tokens=100"):
        split(["a", "b" * 20], limits=(21, 100))
    assert len(split(["a", "b" * 20], limits=(22, 100)).train) == 2
    assert questions(split(["a", "b" * 20], limits=(21, 100), max_tokens=100).train) == ["a"]


@pytest.mark.parametrize("limits", [(8, 100), (100, 8)])
def test_thoughts_wider_than_a_context_are_refused(limits):
    with pytest.raises(SoftCoTError, match=r"8 thoughts do not fit the context .* take fewer: thoughts.count"):
        split(["a"], count=8, limits=limits)


@settings(max_examples=200)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.integers(0, 2**64 - 1))
def test_shuffled_takes_the_thoughts_of_a_question_that_is_another_to_the_assistant(kinds, seed):
    inputs = [AssistantInput(str(index), [kind], [0]) for index, kind in enumerate(kinds)]
    possible = any(
        all(kinds[taken] != kind for taken, kind in zip(order, kinds, strict=True))
        for order in itertools.permutations(range(len(kinds)))
    )
    if not possible:
        with pytest.raises(SoftCoTError, match="problems are the same to the assistant"):
            others(inputs, seed)
        return
    taken = others(inputs, seed)
    assert sorted(taken) == list(range(len(kinds)))
    assert all(kinds[other] != kind for other, kind in zip(taken, kinds, strict=True))
