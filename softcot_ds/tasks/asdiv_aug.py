"""ASDiv-Aug (SoftCoT's paper, from ASDiv; Miao et al., arXiv:2106.15772): grade-school mathematics of one step or two.

ASDiv-Aug may not be passed on: it is read from the user's copy, JSON lines like GSM8K's, or from the hub. ASDiv itself
is read too, its XML or its copies on the hub: the formula is the solution.
"""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from softcot_ds.errors import SoftCoTError
from softcot_ds.tasks.base import Problem, Sizes, Split
from softcot_ds.tasks.gsm8k import GSM8K
from softcot_ds.tasks.records import Record, check_value

_ASDIV = {"body": str, "question": str, "answer": str, "formula": str}
_UNIT = re.compile(r"\s*\([^()]*\)\s*$")
_ONE_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


class ASDivAug(GSM8K):
    """Records like GSM8K's; or like ASDiv's, with ``body``, ``question``, ``answer`` and ``formula``."""

    published = "xuyige/ASDiv-Aug"
    subset = None
    sizes = Sizes(4183, 1038, 65, (57, 142), (20, 60), (115, 200), 5_000)  # guessed from ASDiv, but for the numbers
    why_left_out = "their answer is not one number"

    def records(self, split: Split) -> Iterator[tuple[str, Record]]:
        path = Path(self._source(split))
        return _xml_records(path) if _is_xml(path) else super().records(split)

    def problem(self, record: Record) -> Problem | None:
        if "body" not in record:
            return super().problem(record)
        if missing := [key for key in _ASDIV if not isinstance(record.get(key), str)]:
            raise SoftCoTError(f"{missing[0]!r} is missing or no text; found {sorted(record)}")
        answer = _UNIT.sub("", record["answer"])
        if not _ONE_NUMBER.fullmatch(answer):
            return None  # a word, a clock, several numbers
        return Problem(f"{record['body'].strip()} {record['question'].strip()}", record["formula"].strip(), answer)


def _is_xml(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(100).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<")


def _xml_records(path: Path) -> Iterator[tuple[str, Record]]:
    """The problems of ASDiv.xml, keys in small letters."""
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise SoftCoTError(f"{path}:{error.position[0]}: not XML: {error.msg.partition(':')[0]}") from error
    except (LookupError, ValueError) as error:  # the encoding that it names
        raise SoftCoTError(f"{path}: not XML that can be read: {error}; save it as UTF-8") from error
    except OSError as error:
        raise SoftCoTError(f"cannot read {path.absolute()}: {error.strerror}") from error
    problems = list(root.iter("Problem"))
    if not problems:
        raise SoftCoTError(f"{path}: an XML file without a Problem; is it ASDiv.xml?")
    for number, problem in enumerate(problems):
        where = f"{path} problem {problem.get('ID', number)}"
        record = {child.tag.lower(): child.text or "" for child in problem}
        for key, kind in _ASDIV.items():
            check_value(where, record, key, kind)
        yield where, record
