"""What a task is."""

import hashlib
import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from softcot_ds.errors import SoftCoTError
from softcot_ds.recipe import TaskConfig
from softcot_ds.tasks.answers import extract_number


@dataclass(frozen=True)
class Problem:
    """One question with its reference solution."""

    question: str
    reasoning: str
    """The worked solution without the final answer; what the base is trained to write before the answer."""
    answer: str
    """The correct answer in its canonical form."""

    @property
    def id(self) -> str:
        """The same in every run, whatever the order or the split of the data."""
        return hashlib.sha256(self.question.encode()).hexdigest()[:16]


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

    A subclass reads its records and says what is to be written; tasks whose answer is a number share the rest.
    """

    most_generated: ClassVar[int | None] = None
    """How many problems of a split it makes at most, where it makes them; None where they are read from data."""
    kind_of_answer: ClassVar[str] = "number"
    """What ``extract`` finds, in a word for messages."""

    def __init__(self, config: TaskConfig) -> None:
        self.config = config

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

    @abstractmethod
    def read(self, split: Literal["train", "test"]) -> list[Problem]:
        """All problems of a split, in a fixed order.

        Raises:
            SoftCoTError: the data is missing or malformed; names the file and the line.
        """

    @abstractmethod
    def target(self, problem: Problem) -> str:
        """The text that the base is trained to write: reasoning, then the answer."""

    def extract(self, output: str, cut: bool = False) -> str | None:
        """The answer that an output gives, in canonical form, or None when it cannot be parsed.

        A reference answer alone is read by it too (``check``), so that both are read by one rule.

        Args:
            output: what the model wrote, without its stop token.
            cut: the output ended at the limit of new tokens. Its last number may be anything, so only an answer that
                was announced, and is complete, counts.
        """
        number = extract_number(output, cut)
        return None if number is None else str(number)

    def is_correct(self, answer: str | None, problem: Problem) -> bool:
        """Whether an extracted answer is the reference's: what is read in the text that the base is trained to write.
        An unparsed answer is wrong."""
        return answer is not None and answer == self.extract(self.target(problem))

    def check(self, problem: Problem, where: str) -> None:
        """For problems from data: there is a question, and what the base is trained to write is graded as right.

        Raises:
            SoftCoTError: the answer alone, and the text that ends in it, are not read as the same.
        """
        if not problem.question:
            raise SoftCoTError(f"{where}: 'question' is empty")
        kind = self.kind_of_answer
        reference, written = self.extract(problem.answer), self.extract(self.target(problem))
        if reference is None:
            raise SoftCoTError(f"{where}: the answer {_shown(problem.answer)} is not a {kind}; write one {kind}")
        if written != reference:
            found = f"no {kind}" if written is None else _shown(written)
            raise SoftCoTError(
                f"{where}: the answer {_shown(problem.answer)} is read as {_shown(reference)}, but the solution that "
                f"ends in it as {found}; write one {kind} as the answer and announce none before it"
            )


def _shown(text: str) -> str:
    return repr(text if len(text) <= 100 else text[:100] + "...")
