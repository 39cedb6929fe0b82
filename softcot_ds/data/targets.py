"""The file of solutions that the base wrote itself, to be trained on in the place of the data's own.

JSON lines. The first says what made the file and how many lines follow; each other one is of a training problem, in
their order, also where no solution of it was right. Each line ends with a checksum over itself and the first one, so
that a file that was cut, edited or put together is refused.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from softcot_ds import __version__
from softcot_ds.errors import SoftCoTError
from softcot_ds.files import cannot_write, content_digest, write_atomically
from softcot_ds.tasks.records import read_json_lines

REMEDY = "move it away and make it again: softcot-ds targets RECIPE"
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
    """See ``OwnTargets``."""
    condition: str
    """See ``OwnTargets``."""

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
    otherwise: str
    """What becomes of problems without a solution: gold (the data's own is trained on) or leave_out."""
    problems: list[Solved]

    @property
    def solved(self) -> int:
        """How many problems have a solution."""
        return sum(bool(one.solutions) for one in self.problems)

    @property
    def condition(self) -> str:
        """Under which the base was asked."""
        return self.made_from["settings"]["condition"]

    def write(self, path: Path) -> None:
        """Raises SoftCoTError when it cannot be written."""
        header = _sealed({
            "format": 1,
            "made_from": self.made_from,
            "otherwise": self.otherwise,
            "problems": len(self.problems),
            "solved": self.solved,
            "version": __version__,
        })  # fmt: skip
        lines = [header, *(_sealed(asdict(one), header[_CHECKSUM]) for one in self.problems)]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:
            raise cannot_write(path, error, "what was decoded is kept", "name another file in task.targets") from error

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises SoftCoTError when there is none, or it is not as it was written; names file and line."""
        if not path.is_file():
            raise SoftCoTError(f"task.targets: no file {path.absolute()}; make it with: softcot-ds targets RECIPE")
        (where, header), *lines = read_json_lines(path)
        if not _is_sealed(header) or header.get("format") != 1:
            raise SoftCoTError(f"{where}: the first line is not that of a file of targets, or was edited; {REMEDY}")
        for where, record in lines:
            if not _is_sealed(record, header[_CHECKSUM]):
                raise SoftCoTError(f"{where}: damaged, edited, or of another file of targets; {REMEDY}")
        if len(lines) != header["problems"]:
            raise SoftCoTError(
                f"{where}: the file ends after {len(lines)} problems, and its first line says {header['problems']}; "
                f"{REMEDY}"
            )
        problems = [Solved(one["id"], one["samples"], one["solutions"]) for _, one in lines]
        return cls(header["made_from"], header["otherwise"], problems)


def _sealed(record: dict[str, Any], header: str = "") -> dict[str, Any]:
    """With a checksum over it and the checksum of the first line."""
    return record | {_CHECKSUM: content_digest([header, record])}


def _is_sealed(record: dict[str, Any], header: str = "") -> bool:
    rest = {key: value for key, value in record.items() if key != _CHECKSUM}
    return record == _sealed(rest, header)
