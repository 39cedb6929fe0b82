"""What a task is."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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


def read_json_lines(path: Path, required: dict[str, type]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Records of a JSON-lines file with their line numbers, each holding the ``required`` keys.

    Raises:
        SoftCoTError: names the file and the first bad line: empty, not JSON, a key missing or of the wrong type.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SoftCoTError(f"cannot read {path.absolute()}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SoftCoTError(f"{path}: byte {error.start}: not UTF-8 text; JSON lines are UTF-8") from error
    # Not splitlines: it also splits at characters that may stand inside a JSON string, such as U+2028.
    lines = text.removesuffix("\n").split("\n") if text else []
    if not lines:
        raise SoftCoTError(f"{path}: the file is empty")
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        if not line.strip():
            raise SoftCoTError(f"{where}: empty line; every line holds one JSON object")
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise SoftCoTError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
        except (ValueError, RecursionError) as error:  # thousands of digits or of brackets
            raise SoftCoTError(f"{where}: not JSON that Python reads: {error}") from error
        if not isinstance(record, dict):
            raise SoftCoTError(f"{where}: expected a JSON object, found {type(record).__name__}")
        for key, kind in required.items():
            if key not in record:
                raise SoftCoTError(f"{where}: the key {key!r} is missing; found {sorted(record)}")
            if not isinstance(record[key], kind):
                raise SoftCoTError(f"{where}: {key!r} is {type(record[key]).__name__}, expected {kind.__name__}")
            if kind is str and not _is_unicode(record[key]):
                raise SoftCoTError(f"{where}: {key!r} holds half of a surrogate pair, which is no character")
        yield number, record


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
