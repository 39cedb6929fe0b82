"""What a task is."""

import copy
import hashlib
import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, Self

from softcot_ds.errors import SoftCoTError
from softcot_ds.recipe import TaskConfig
from softcot_ds.tasks.kinds import KINDS, Kind
from softcot_ds.tasks.options import LETTERS
from softcot_ds.tasks.records import Record, Types, read_records
from softcot_ds.values import UNPUBLISHED_SCHEME

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Problem:
    """One question with its reference solution."""

    question: str
    """As the models read it, with its options where it has some."""
    reasoning: str
    """The worked solution without the final answer; what the base is trained to write before the answer."""
    answer: str
    """The correct answer in its canonical form."""
    options: tuple[str, ...] = ()
    """The texts of the options of A, B, and so on; the answer is a letter then."""

    @property
    def id(self) -> str:
        """The same in every run, whatever the order or the split of the data."""
        return hashlib.sha256(self.question.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Sizes:
    """How many problems a data set has as it is published, and how long they are in the wording of its task: tokens of
    Qwen2.5's tokenizer, on average and at most."""

    train: int
    """0 where there is no training data."""
    test: int
    instructions: int
    """What all prompts of the base begin with."""
    question: tuple[int, int]
    """The rest of the prompt before the thoughts."""
    target: tuple[int, int]
    assistant: tuple[int, int]
    """What the assistant reads, the thoughts apart."""
    tokens: int
    """Different ones in all that the base reads."""
    validation: int = 0
    """0 where there is no validation data."""


def check_question(question: str) -> None:
    """Raises SoftCoTError when there is nothing to answer, or what is no text."""
    if not question.strip():
        raise SoftCoTError("the question is empty; write one")
    if "\0" in question:
        raise SoftCoTError(f"the question {question!r} holds a NUL character; write text")
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise SoftCoTError(f"the question {question!r} is not UTF-8 text: {error.reason}") from error


class Task(ABC):
    """Records, target text, answer extraction, grading and wording.

    A subclass says where its problems come from, what is to be written, and of what kind an answer is.
    """

    most_generated: ClassVar[int | None] = None
    """How many problems of a split it makes at most, where it makes them; None where they are read from data."""
    published: ClassVar[str | None] = None
    """The data set of the hub that is meant where a recipe names no data."""
    has_training_data: ClassVar[bool] = True
    """False for a task that there is only test data of."""
    is_described_by_recipe: ClassVar[bool] = False
    """Whether ``task.fields``, ``task.answer`` and ``task.prompts`` say what its records, answers and wording are."""
    sizes: ClassVar[Sizes | None] = None
    """Of what is published, for plans where the data does not lie here; None where it is the user's own, or made."""
    kind: Kind = KINDS["number"]
    step_begins: ClassVar[re.Pattern[str]] = re.compile(r"(?<=\n)(?=[^\S\n]*\S)")
    """Between two steps of a worked solution: here a step is a line."""

    def __init__(self, config: TaskConfig) -> None:
        self.config = config
        self.rule: str = config.metric_rule
        self.notes: list[str] = []
        """What was left out of the data, and why; to be printed."""

    @property
    def prompt_file(self) -> Path:
        """The user's prompt file, or the one beside the task's module, of the same name.

        Raises:
            SoftCoTError: there is none.
        """
        own = Path(inspect.getfile(type(self))).with_suffix(".yaml")
        if self.config.prompts is None and not own.is_file():
            raise SoftCoTError(f"task {self.config.name} has no wording: write {own}, or name a file in task.prompts")
        return self.config.prompts or own

    @property
    def trains(self) -> bool:
        """Whether there is something to train on; without, adapters are evaluated that have been trained already."""
        train = self.config.train or UNPUBLISHED_SCHEME
        return not train.startswith(UNPUBLISHED_SCHEME) or self.most_generated is not None

    @property
    def validation_stayed(self) -> bool:
        """Whether the validation data stayed where the adapter was trained; who evaluates it does without."""
        return (self.config.validation or "").startswith(UNPUBLISHED_SCHEME)

    def require_training(self) -> None:
        """Raises SoftCoTError where there is nothing to train on, or to validate with."""
        if self.validation_stayed and self.config.validation_problems:
            raise stayed(self.config.validation, "validation", "train")
        if not self.trains:
            name = self.config.name
            remedy = (
                "name some in task.train, or evaluate an adapter of another task on it"
                if self.has_training_data
                else "train on another task, and evaluate its adapter on this one"
            )
            raise SoftCoTError(
                f"there is no training data for {name}; {remedy}: softcot-ds evaluate ADAPTER task.name={name}"
            )

    @abstractmethod
    def read(self, split: Split) -> list[Problem]:
        """All problems of a split, in a fixed order. Validation is one only where the recipe names data for it.

        Raises:
            SoftCoTError: the data is missing or malformed; names the file and the line.
        """

    @abstractmethod
    def target(self, problem: Problem) -> str:
        """The text that the base is trained to write: reasoning, then the answer."""

    def steps(self, problem: Problem) -> list[str]:
        """The steps of the worked solution, which put together are all of it; none where it has none."""
        return [step for step in self.step_begins.split(problem.reasoning) if step.strip()]

    def rest(self, problem: Problem, skipped: int | None) -> str:
        """``target`` without the first steps; without all of them where ``skipped`` is None."""
        steps = self.steps(problem)
        left = [] if skipped is None else steps[skipped:]
        return self.target(replace(problem, reasoning="".join(left)))

    def under(self, rule: str) -> Self:
        """The same task, whose answers are found by the rule of this name."""
        other = copy.copy(self)
        other.rule = rule
        return other

    def extract(self, output: str, cut: bool = False, options: Sequence[str] = ()) -> str | None:
        """The answer that an output gives, in canonical form, or None when it cannot be parsed.

        A reference answer alone is read by it too (``check``), so that both are read by one rule.

        Args:
            output: what the model wrote, without its stop token.
            cut: the output ended at the limit of new tokens. Its last number may be anything, so only an answer that
                was announced, and is complete, counts.
            options: of the problem.
        """
        return self.kind.rule(self.rule)(output, cut, options)

    def is_correct(self, answer: str | None, problem: Problem) -> bool:
        """Whether an extracted answer is the reference's: what our rule reads in the text that the base is trained to
        write. An unparsed answer is wrong."""
        return answer is not None and answer == self._read(self.target(problem), problem)

    def solves(self, output: str, problem: Problem) -> bool:
        """Whether a whole output gives the correct answer, by our rule."""
        return self.is_correct(self._read(output, problem), problem)

    def check(self, problem: Problem) -> None:
        """For problems from data: there is a question, and what the base is trained to write is graded as right.

        Raises:
            SoftCoTError: the answer alone, and the text that ends in it, are not read as the same.
        """
        if not problem.question:
            raise SoftCoTError("'question' is empty")
        check_question(problem.question)  # with its options
        kind = self.kind.words
        reference, written = self._read(problem.answer, problem), self._read(self.target(problem), problem)
        if reference is None:
            raise SoftCoTError(f"the answer {_shown(problem.answer)} is not a {kind}; write one {kind}")
        if written != reference:
            found = f"no {kind}" if written is None else _shown(written)
            raise SoftCoTError(
                f"the answer {_shown(problem.answer)} is read as {_shown(reference)}, but the solution that "
                f"ends in it as {found}; write one {kind} as the answer and announce none before it"
            )

    def _read(self, text: str, problem: Problem) -> str | None:
        return self.under("ours").extract(text, options=problem.options)


class DataTask(Task):
    """A task whose problems are records, of a file or of the hub."""

    subset: ClassVar[str | None] = None
    """Of the published data set."""
    required: Mapping[str, Types]
    """Keys that every record has, with the types of their values."""
    why_left_out: ClassVar[str] = ""
    """What is the matter with the records that are left out, where some are."""

    @abstractmethod
    def problem(self, record: Record) -> Problem | None:
        """What a record says; None for one that is left out.

        Raises:
            SoftCoTError: what is wrong with it, without its place.
        """

    def read(self, split: Split) -> list[Problem]:
        """See ``Task``. Where the recipe names no test data, a fifth of the training data is it."""
        problems, left_out = [], 0
        cut_from_train = None if split == "validation" else self.config.test_from_train
        for where, record in self.records("train" if cut_from_train else split):
            try:
                problem = self.problem(record)
                if problem is None:
                    left_out += 1
                    continue
                self.check(problem)
                problems.append(problem)
            except SoftCoTError as error:
                raise SoftCoTError(f"{where}: {error}") from error
        if left_out:
            total = left_out + len(problems)
            self.notes.append(
                f"{left_out} of {total} records of {self._source(split)} are left out: {self.why_left_out}"
            )
        return problems if cut_from_train is None else _part(problems, split, cut_from_train)

    def records(self, split: Split) -> Iterator[tuple[str, Record]]:
        """Records with the place where each stands, checked for what is ``required``."""
        source = self._source(split)
        hub_split = getattr(self.config, f"{split}_split")
        return read_records(source, split, self.required, self.config.subset or self.subset, hub_split)

    def _source(self, split: Split) -> str:
        source = getattr(self.config, "train" if split == "test" and self.config.test_from_train else split)
        assert source is not None  # the recipe has seen to it
        if source.startswith(UNPUBLISHED_SCHEME):
            raise stayed(source, split, "evaluate")
        return source


def stayed(source: str | None, split: Split, purpose: str) -> SoftCoTError:
    """Of data that was not sent along with an adapter."""
    return SoftCoTError(
        f"{source}: this data stayed where the adapter was trained; name some in task.{split}, a file or a data set of "
        f"the hub, to {purpose} it"
    )


def _part(problems: list[Problem], split: str, by: Literal["order", "content"]) -> list[Problem]:
    """Four fifths for training, the rest for test: the first ones, or those that a hash of the question chooses."""
    if by == "order":
        first = len(problems) * 4 // 5
        return problems[:first] if split == "train" else problems[first:]

    def is_test(problem: Problem) -> bool:
        return hashlib.sha256(b"test" + " ".join(problem.question.lower().split()).encode()).digest()[0] < 256 / 5

    return [problem for problem in problems if is_test(problem) == (split == "test")]


def with_options(question: str, options: Sequence[str]) -> str:
    """A question as the models read it, its options in lines of their own."""
    lines = [f"({letter}) {text}" for letter, text in zip(LETTERS, options, strict=False)]
    return "\n".join([question, "Options:", *lines]) if lines else question


_LABEL = re.compile(r"\s*\(?([A-Z])\s*[).:]\s*")


def without_labels(options: Sequence[str]) -> list[str] | None:
    """The texts of options that carry "A)", "(A)", "A." or "A:", "B)", and so on, in order; None where not all do."""
    labels = [_LABEL.match(option) for option in options]
    if "".join(label[1] if label else "?" for label in labels) != LETTERS[: len(options)]:
        return None
    return [option[label.end() :].strip() for option, label in zip(options, labels, strict=True) if label]


def boxed(reasoning: str, answer: str) -> str:
    """What the base is trained to write where a data set has no ending of its own: the answer in a box."""
    return f"{reasoning}\nThe answer is \\boxed{{{answer}}}.".lstrip("\n")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 100 else text[:100] + "...")
