"""Date Understanding of BIG-bench (Srivastava et al., arXiv:2206.04615), to evaluate adapters of other tasks on.

Three formats are read: BIG-bench's task.json, whose options are put into an order of our own, since the correct one
stands first in 364 of 369; the same on the hub (``inputs``, ``multiple_choice_targets``, ``multiple_choice_scores``);
and BIG-bench Hard's, whose options have an order and letters.
"""

import hashlib
import re
from collections.abc import Mapping

from softcot_ds.errors import SoftCoTError
from softcot_ds.tasks.base import DataTask, Problem, Sizes, boxed, with_options, without_labels
from softcot_ds.tasks.kinds import KINDS
from softcot_ds.tasks.options import LETTERS
from softcot_ds.tasks.records import Record, Types

_OPTIONS = re.compile(r"\s*\nOptions:\s*\n(?=\(A\))")
_FRAME = re.compile(r"\A\s*Q:\s*|\s*\n\s*A:\s*\Z")


class DateUnderstanding(DataTask):
    """Records with ``input`` and ``target_scores``, or ``input`` and ``target``, a letter."""

    published = "lukaemon/bbh"
    subset = "date_understanding"
    has_training_data = False
    sizes = Sizes(0, 250, 82, (131, 154), (9, 9), (203, 226), 300)
    required: Mapping[str, Types] = {}
    kind = KINDS["option"]

    def problem(self, record: Record) -> Problem:
        question = record.get("input", record.get("inputs"))
        if not isinstance(question, str) or not question.strip():
            raise SoftCoTError(f"'input' is missing or no text; found {sorted(record)}")
        if "target" in record:
            question, options, answer = _lettered(question, record["target"])
        else:
            question, options, answer = _scored(_FRAME.sub("", question).strip(), _scores(record))
        return Problem(with_options(question, options), "", answer, tuple(options))

    def target(self, problem: Problem) -> str:
        return boxed(problem.reasoning, problem.answer)


def _lettered(text: str, target: object) -> tuple[str, list[str], str]:
    """Question, options and correct letter of a record of BIG-bench Hard."""
    parts = _OPTIONS.split(text)
    options = without_labels(parts[1].splitlines()) if len(parts) == 2 else None
    if not options:
        raise SoftCoTError("'input' does not end in 'Options:' and lines '(A) ...', '(B) ...' and so on")
    letter = target.strip("() ") if isinstance(target, str) else ""
    if len(letter) != 1 or letter not in LETTERS[: len(options)]:
        raise SoftCoTError(f"'target' is {target!r}, which is none of the options' letters, such as '(A)'")
    return parts[0].strip(), options, letter


def _scores(record: Record) -> dict[str, object]:
    scores = record.get("target_scores")
    if "multiple_choice_targets" in record:
        targets, values = record["multiple_choice_targets"], record.get("multiple_choice_scores")
        are_lists = isinstance(targets, list) and isinstance(values, list) and len(targets) == len(values)
        if are_lists and all(isinstance(text, str) for text in targets):
            scores = dict(zip(targets, values, strict=True))
    if not isinstance(scores, dict) or not all(isinstance(text, str) for text in scores):
        raise SoftCoTError(f"there is neither 'target_scores' nor 'target'; found {sorted(record)}")
    return scores


def _scored(question: str, scores: dict[str, object]) -> tuple[str, list[str], str]:
    """Question, options and correct letter of a record of BIG-bench, the options by a hash: seeded by the question."""
    if list(scores.values()).count(1) != 1 or not 2 <= len(scores) <= len(LETTERS):
        raise SoftCoTError(f"not one of 2 to {len(LETTERS)} options has the score 1; found {scores}")
    options = sorted(
        scores, key=lambda option: hashlib.sha256(f"{question}\0{option}".encode("utf-8", "surrogatepass")).digest()
    )
    return question, options, LETTERS[[scores[option] for option in options].index(1)]
