"""The file of solutions that the base wrote itself, to be trained on in the place of the data's own.

JSON lines. The first says what made the file and how many lines follow; each other one is of a training problem, in
their order, also where no solution of it was right. Each line ends with a checksum over itself and that of the line
before, so that a file that was cut, edited or put together is refused.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from softcot_ds import __version__
from softcot_ds.errors import SoftCoTError
from softcot_ds.files import cannot_write, content_digest, write_atomically
from softcot_ds.tasks.records import Record, read_json_lines

REMEDY = "move it away and make it again: softcot-ds targets RECIPE"
_FORMAT = 2
_CHECKSUM = "sha256"


@dataclass(frozen=True)
class Solved:
    """What the base made of a training problem."""

    id: str
    samples: int
    """How often it was asked."""
    solutions: list[str]
    """Right ones, no two the same; perhaps none."""


@dataclass(frozen=True)
class OwnShare:
    """How much of the training data the base wrote itself."""

    problems: int
    """Training problems, before any was left out for want of a solution."""
    solved: int
    """Those that the base has a solution of."""
    solutions: int
    otherwise: str
    """What becomes of the others: the recipe's ``targets.otherwise``."""
    condition: str
    """Under which the base was asked."""
    base: str
    """The model that wrote them."""
    fingerprint: str
    """Of its weights."""

    def words(self) -> str:
        """A sentence for a report."""
        others = {"gold": "the data's own for the others", "leave_out": "the others left out"}[self.otherwise]
        return (
            f"{self.solutions:,} solutions by the base itself (condition {self.condition}) for {self.solved:,} of "
            f"{self.problems:,} training problems, {others}"
        )


@dataclass(frozen=True)
class OwnTargets:
    """What such a file holds."""

    made_from: dict[str, Any]
    """All that decided the solutions, JSON values."""
    problems: list[Solved]

    @property
    def solved(self) -> int:
        """How many problems have a solution."""
        return sum(bool(one.solutions) for one in self.problems)

    @property
    def condition(self) -> str:
        """Under which the base was asked."""
        return self.made_from["settings"]["condition"]

    @property
    def base(self) -> str:
        """The model that wrote them."""
        return self.made_from["base"]["model"]

    @property
    def fingerprint(self) -> str:
        """Of its weights."""
        return self.made_from["base"]["fingerprint"]

    def write(self, path: Path) -> None:
        """Raises SoftCoTError when it cannot be written."""
        header = {
            "format": _FORMAT,
            "made_from": self.made_from,
            "problems": len(self.problems),
            "solved": self.solved,
            "version": __version__,
        }
        lines, before = [], ""
        for record in (header, *map(asdict, self.problems)):
            before = _checksum(record, before)
            lines.append(json.dumps(record | {_CHECKSUM: before}) + "\n")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, "".join(lines))
        except OSError as error:
            raise cannot_write(path, error, "what was decoded is kept", "name another file in task.targets") from error

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises SoftCoTError when there is none, or it is not as it was written; names file and line."""
        if not path.is_file():
            raise SoftCoTError(f"task.targets: no file {path.absolute()}; make it with: softcot-ds targets RECIPE")
        try:
            (_, header), *lines = _sealed(path)
            if len(lines) != header["problems"]:
                raise SoftCoTError(
                    f"{path}: the file ends after {len(lines)} problems, and its first line says {header['problems']}"
                )
        except SoftCoTError as error:
            raise SoftCoTError(f"{error}; {REMEDY}") from error
        problems = [Solved(one["id"], one["samples"], one["solutions"]) for _, one in lines]
        return cls(header["made_from"], problems)


def _sealed(path: Path) -> Iterator[tuple[str, Record]]:
    """The records of a file, each behind its place. Raises SoftCoTError at the first that is not as it was written."""
    before = ""
    for where, record in read_json_lines(path):
        is_first, written = not before, record.get("format")
        if is_first and isinstance(written, int) and written != _FORMAT:
            raise SoftCoTError(
                f"{where}: a file of targets in format {written}, of another version of softcot-ds; this one reads "
                f"format {_FORMAT}"
            )
        found = record.pop(_CHECKSUM, None)
        before = _checksum(record, before)
        if found != before or (is_first and written != _FORMAT):
            raise SoftCoTError(
                f"{where}: the first line is not that of a file of targets, or was edited"
                if is_first
                else f"{where}: damaged, edited, or not the line that was written after the one before"
            )
        yield where, record


def _checksum(record: Record, before: str) -> str:
    return content_digest([before, record])
