"""The kinds of answers: how each is found in an output, by our rule and by the reference implementation's.

Whatever the rule, an answer is a canonical string: equal answers are equal strings, so that they can be compared, and
votes counted.

The reference's rules do what the code of SoftCoT's paper (xuyige/SoftCoT) does. They are there to compare with its
numbers; their faults are its own.
"""

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

from softcot_ds.tasks.answers import extract_number
from softcot_ds.tasks.numerals import plain
from softcot_ds.tasks.options import LETTERS, extract_option
from softcot_ds.tasks.outputs import NEXT_PROBLEM, after_thinking, boxes
from softcot_ds.tasks.yes_no import extract_yes_no


class Find(Protocol):
    """A rule."""

    def __call__(self, text: str, cut: bool = False, options: Sequence[str] = ()) -> str | None:
        """The answer that a text gives, in canonical form, or None.

        Args:
            cut: the text ended at the limit of new tokens.
            options: the texts of the question's options, of A, B, and so on; empty where it has none.
        """


@dataclass(frozen=True)
class Kind:
    """A kind of answer."""

    words: str
    """What it is called in messages: "write one ..."."""
    ours: Find
    reference: Find | None = None
    """None where the reference has no such task."""
    options: Callable[[Sequence[str]], Sequence[str]] = lambda options: ()
    """From the texts of a question's options to the answers that can be chosen from; none where it is free."""

    def rule(self, name: str) -> Find:
        """By its name in ``task.metric_rule``."""
        found = {"ours": self.ours, "reference": self.reference}[name]
        assert found is not None
        return found

    @property
    def rules(self) -> list[str]:
        """The names of those that there are."""
        return ["ours", "reference"] if self.reference else ["ours"]


def _number(text: str, cut: bool = False, options: Sequence[str] = ()) -> str | None:
    number = extract_number(text, cut)
    return None if number is None else str(number)


_ANNOUNCED = re.compile(
    r"(?:####(?!#)|\banswer\b(?:[\s*_]*[:=]|[^.!?\n:=]{0,60}?\b(?:is|would be)\b:?)[\s*_]*|<answer>)\s*", re.IGNORECASE
)
_TEXT_ENDS = re.compile(r"\n|(?<!\b[A-Z]\.[A-Z])(?<!\b(?:Mr|Ms|Dr|St))(?<!\bMrs)[.!?](?=\s|$)|</answer>")


def _text(text: str, cut: bool = False, options: Sequence[str] = ()) -> str | None:
    r"""What stands in the last box, else after the last "answer is", "Answer:" or "####" up to the end of its sentence
    or line; of an output of one line without any of these, the line. In small letters, without punctuation around it.

    Of an output that was ``cut`` only what is announced counts, and does not end with it.
    """
    text = after_thinking(text)
    found = [(stop, text[start:stop]) for start, stop in boxes(text)]
    if not found:
        ends = [*(ending.start() for ending in _TEXT_ENDS.finditer(text)), len(text)]
        for mark in _ANNOUNCED.finditer(text):
            stop = ends[bisect_left(ends, mark.end())]
            found.append((stop, text[mark.end() : stop]))
    if found and (following := NEXT_PROBLEM.search(text, found[0][0])):
        found = [one for one in found if one[0] <= following.start()]
    if cut:
        found = [one for one in found if one[0] < len(text.rstrip())]
    elif not found and "\n" not in text.strip():
        found = [(0, text)]
    return (_same_text(found[-1][1]) or None) if found else None


def _same_text(text: str) -> str:
    text = unicodedata.normalize("NFKC", plain(text.replace("*", ""))).casefold()
    return " ".join(text.split()).strip(" .,;:!?\"'()[]{}$`")


# ---------------------------------------------------------------------------------------------- the reference's rules


def _last_number(text: str, cut: bool = False, options: Sequence[str] = ()) -> str | None:
    """The last number anywhere, without its sign: so no negative answer is ever right."""
    found = re.findall(r"\d+(?:\.\d+)?", text.replace(",", ""))
    return str(Fraction(found[-1])) if found and len(found[-1]) <= 1000 else None


def _last_letter(text: str, cut: bool = False, options: Sequence[str] = ()) -> str | None:
    """The last letter from a to f that stands alone in the text in small letters: the article "a" too."""
    found = re.findall(r"\b[a-f]\b", text.lower())
    return found[-1].upper() if found else None


def _last_yes_no(text: str, cut: bool = False, options: Sequence[str] = ()) -> str | None:
    """The last "yes" or "no", whatever it is about."""
    found = re.findall(r"\b(?:yes|no)\b", text.lower())
    return found[-1] if found else None


KINDS = {
    "number": Kind("number", _number, _last_number),
    "option": Kind("letter of an option", extract_option, _last_letter, lambda options: LETTERS[: len(options)]),
    "yes_no": Kind("yes or no", extract_yes_no, _last_yes_no, lambda options: ("yes", "no")),
    "text": Kind("text", _text),
}
"""``task.answer`` of a task of one's own."""
