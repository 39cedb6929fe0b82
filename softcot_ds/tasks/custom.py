"""Data of one's own, without Python: the recipe says what its records' keys are called and what an answer is."""

from typing import Any

from softcot_ds.errors import SoftCoTError
from softcot_ds.recipe import TaskConfig
from softcot_ds.tasks.base import DataTask, Problem, boxed, with_options
from softcot_ds.tasks.kinds import KINDS
from softcot_ds.tasks.options import LETTERS
from softcot_ds.tasks.records import Record

_ANSWERS = {"number": (str, int, float), "option": (str,), "yes_no": (str, bool), "text": (str,)}
"""Types of an answer's value, by kind."""


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
        reasoning = steps if isinstance(steps, str) else "\n".join(steps)
        options = tuple(text.strip() for text in record[fields.options]) if fields.options else ()
        if fields.options and not 2 <= len(options) <= len(LETTERS):
            raise SoftCoTError(f"{fields.options!r} has {len(options)} options; 2 to {len(LETTERS)} can be chosen from")
        answer = _in_words(record[fields.answer]).strip()
        read = self.under("ours").extract(answer, options=options)
        if read is None:
            kind = self.kind.words
            raise SoftCoTError(f"{fields.answer!r} is {answer!r}, which is not a {kind}; write one {kind}")
        return Problem(with_options(question, options), reasoning.strip(), read if options else answer, options)

    def target(self, problem: Problem) -> str:
        return boxed(problem.reasoning, problem.answer)


def _in_words(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
