"""GSM8K, grade-school mathematics (Cobbe et al., arXiv:2110.14168)."""

import re
from typing import Literal

from softcot_ds.errors import SoftCoTError
from softcot_ds.tasks.base import Problem, Task
from softcot_ds.tasks.records import read_records

_CALCULATOR = re.compile(r"<<[^<>]*>>")
_ANSWER = re.compile(r"\n?####[^\S\n]*(?P<answer>\S[^\n]*)\s*$")


class GSM8K(Task):
    """JSON lines with ``question`` and ``answer``; the answer ends in a line ``#### NUMBER``."""

    def read(self, split: Literal["train", "test"]) -> list[Problem]:
        source = getattr(self.config, split)
        problems = []
        for where, record in read_records(source, split, {"question": str, "answer": str}, subset="main"):
            match = _ANSWER.search(record["answer"])
            if match is None:
                raise SoftCoTError(f"{where}: 'answer' does not end in a line '#### NUMBER'")
            # The <<3*4=12>> annotations were made for a calculator that our models do not have.
            reasoning = _CALCULATOR.sub("", record["answer"][: match.start()]).strip()
            problem = Problem(record["question"].strip(), reasoning, match["answer"].strip())
            self.check(problem, where)
            problems.append(problem)
        return problems

    def target(self, problem: Problem) -> str:
        return f"{problem.reasoning}\n#### {problem.answer}"
