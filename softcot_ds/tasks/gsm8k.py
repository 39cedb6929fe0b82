"""GSM8K, grade-school mathematics (Cobbe et al., arXiv:2110.14168)."""

import re
from collections.abc import Mapping

from softcot_ds.errors import SoftCoTError
from softcot_ds.tasks.base import DataTask, Problem, Sizes
from softcot_ds.tasks.records import Record, Types

_CALCULATOR = re.compile(r"<<([^<>]*)>>")
_ONLY_CALCULATIONS = re.compile(r"^[^\S\n]*(?:<<[^<>\n]*>>[^\S\n]*)+$", re.MULTILINE)
_ANSWER = re.compile(r"\n?####[^\S\n]*(?P<answer>\S[^\n]*)\s*$")


class GSM8K(DataTask):
    """Records with ``question`` and ``answer``; the answer ends in a line ``#### NUMBER``."""

    published = "openai/gsm8k"
    subset = "main"
    sizes = Sizes(7473, 1319, 54, (66, 218), (91, 342), (132, 284), 14_000)
    required: Mapping[str, Types] = {"question": str, "answer": str}

    def problem(self, record: Record) -> Problem:
        match = _ANSWER.search(record["answer"])
        if match is None:
            raise SoftCoTError("'answer' does not end in a line '#### NUMBER'")
        # The <<3*4=12>> annotations were made for a calculator that our models do not have. They repeat what stands
        # beside them; a line that has nothing else is a step.
        steps = record["answer"][: match.start()]
        steps = _ONLY_CALCULATIONS.sub(lambda line: _CALCULATOR.sub(r"\1", line[0]), steps)
        reasoning = _CALCULATOR.sub("", steps).strip()
        return Problem(record["question"].strip(), reasoning, match["answer"].strip())

    def target(self, problem: Problem) -> str:
        return f"{problem.reasoning}\n#### {problem.answer}".lstrip("\n")
