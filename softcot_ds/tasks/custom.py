"""Data of one's own, without Python: the recipe says what its records' keys are called and what an answer is."""

import re
from collections.abc import Sequence
from typing import Any

from softcot_ds.errors import SoftCoTError
from softcot_ds.recipe import TaskConfig
from softcot_ds.tasks.base import DataTask, Problem, boxed, with_options, without_labels
from softcot_ds.tasks.kinds import KINDS
from softcot_ds.tasks.options import LETTERS
from softcot_ds.tasks.records import Record

_ANSWERS = {"number": (str, int, float), "option": (str, int), "yes_no": (str, bool), "text": (str,)}
"""Types of an answer's value, by kind."""
_LETTER = re.compile(r"\(?([A-Z])[).:]?", re.IGNORECASE)


class Custom(DataTask):
    """See ``task.fields`` and ``task.answer``."""

    is_described_by_recipe = True

    def __init__(self, config: TaskConfig) -> None:
        super().__init__(config)
        assert config.fields is not None  # the recipe has seen to it
        assert config.answer is not None
        self.kind = KINDS[config.answer]
        self._fields = config.fields
        kinds = {"question": str, "answer": _ANSWERS[config.answer], "reasoning": (str, list), "options": list}
        keys = config.fields.model_dump(exclude_none=True)
        self.required = {key: kinds[name] for name, key in keys.items()}

    def problem(self, record: Record) -> Problem:
        fields = self._fields
        question = record[fields.question].strip()
        if not question:
            raise SoftCoTError(f"{fields.question!r} is empty")
        steps = record[fields.reasoning] if fields.reasoning else ""
        reasoning = (steps if isinstance(steps, str) else "\n".join(steps)).strip()
        value = record[fields.answer]
        if fields.options:
            options = _options(fields.options, record[fields.options])
            letter = _letter(fields.answer, value, list(zip(options, record[fields.options], strict=True)))
            return Problem(with_options(question, options), reasoning, letter, options)
        answer = _in_words(value).strip()
        if self.under("ours").extract(answer) is None:
            kind = self.kind.words
            raise SoftCoTError(f"{fields.answer!r} is {answer!r}, which is not a {kind}; write one {kind}")
        return Problem(question, reasoning, answer)

    def target(self, problem: Problem) -> str:
        return boxed(problem.reasoning, problem.answer)


def _options(key: str, texts: Sequence[str]) -> tuple[str, ...]:
    """The options of a record, without labels that they carry.

    Raises:
        SoftCoTError: they cannot be chosen from by a letter.
    """
    options = tuple(without_labels(texts) or (text.strip() for text in texts))
    if not 2 <= len(options) <= len(LETTERS):
        raise SoftCoTError(f"{key!r} has {len(options)} options; 2 to {len(LETTERS)} can be chosen from")
    for number, text in enumerate(options):
        if not text:
            raise SoftCoTError(f"{key!r}: the option {LETTERS[number]} is empty")
        if len(text.splitlines()) > 1:
            raise SoftCoTError(f"{key!r}: the option {LETTERS[number]} is of several lines; write each in one")
        if (first := options.index(text)) < number:
            raise SoftCoTError(f"{key!r}: the options {LETTERS[first]} and {LETTERS[number]} are both {text!r}")
    return options


def _letter(key: str, value: str | int, options: Sequence[tuple[str, str]]) -> str:
    """The letter of the option that an answer names: by its letter, by its position, an integer from 0, or by its text,
    without its label or with it.

    Raises:
        SoftCoTError: it names none, or two.
    """
    letters = LETTERS[: len(options)]
    text, label = str(value).strip(), _LETTER.fullmatch(str(value).strip())
    named = {letters[value]} if value in range(len(options)) else {label[1].upper()} & {*letters} if label else set()
    named |= {letter for letter, texts in zip(letters, options, strict=True) if text in map(str.strip, texts)}
    if len(named) > 1:
        by = "position" if isinstance(value, int) else "letter"
        other = "letter" if isinstance(value, int) else "position, an integer from 0"
        raise SoftCoTError(f"{key!r} is {value!r}, the {by} of one option and the text of another; write its {other}")
    if not named:
        raise SoftCoTError(
            f"{key!r} is {value!r}, which is no option: neither a letter from A to {letters[-1]}, nor a position, an "
            f"integer from 0 to {len(letters) - 1}, nor the text of one"
        )
    return named.pop()


def _in_words(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
