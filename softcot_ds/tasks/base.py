"""What a task is."""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from softcot_ds.answers import extract_number
from softcot_ds.errors import SoftCoTError
from softcot_ds.recipe import TaskConfig


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


class Task(ABC):
    """Records, target text, answer extraction, grading and wording.

    A subclass names its prompt file and reads its records; the arithmetic tasks share the rest.
    """

    def __init__(self, config: TaskConfig) -> None:
        self.config = config

    @property
    def prompt_file(self) -> Path:
        """The user's prompt file, or the one beside the task's module, of the same name."""
        return self.config.prompts or Path(__file__).parent / f"{self.config.name}.yaml"

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

        Args:
            output: what the model wrote, without its stop token.
            cut: the output ended at the limit of new tokens. Its last number may be anything, so only an answer that
                was announced, and is complete, counts.
        """
        number = extract_number(output, cut)
        return None if number is None else str(number)

    def is_correct(self, answer: str | None, problem: Problem) -> bool:
        """Whether an extracted answer equals the reference. An unparsed answer is wrong."""
        return answer is not None and answer == self.extract(problem.answer)

    def refuse_misread(self, problem: Problem, where: str) -> None:
        """One rule for references and outputs: what the base is trained to write must be graded as right.

        Raises:
            SoftCoTError: the answer alone, and the text that ends in it, are not read as the same number.
        """
        reference, written = self.extract(problem.answer), self.extract(self.target(problem))
        if reference is None:
            raise SoftCoTError(f"{where}: the answer {_shown(problem.answer)} is not a number; write one number")
        if written != reference:
            found = "no number" if written is None else _shown(written)
            raise SoftCoTError(
                f"{where}: the answer {_shown(problem.answer)} is read as {_shown(reference)}, but the solution that "
                f"ends in it as {found}; write one number as the answer and announce none before it"
            )


def _shown(text: str) -> str:
    return repr(text if len(text) <= 100 else text[:100] + "...")
