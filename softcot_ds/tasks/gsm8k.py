"""GSM8K, grade-school mathematics (Cobbe et al., arXiv:2110.14168)."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from softcot_ds.errors import SoftCoTError
from softcot_ds.tasks.base import Problem, Task, read_json_lines

_CALCULATOR = re.compile(r"<<[^<>]*>>")
_ANSWER = re.compile(r"\n?####[ \t]*(?P<answer>\S[^\n]*)\s*$")


class GSM8K(Task):
    """JSON lines with ``question`` and ``answer``; the answer ends in a line ``#### NUMBER``."""

    def read(self, split: Literal["train", "test"]) -> list[Problem]:
        source = getattr(self.config, split)
        problems = []
        for where, record in self._records(source, split):
            match = _ANSWER.search(record["answer"])
            if match is None:
                raise SoftCoTError(f"{where}: 'answer' does not end in a line '#### NUMBER'")
            if self.extract(match["answer"]) is None:
                raise SoftCoTError(f"{where}: the answer {match['answer']!r} after '####' is not a number")
            if not record["question"].strip():
                raise SoftCoTError(f"{where}: 'question' is empty")
            # The <<3*4=12>> annotations were made for a calculator that our models do not have.
            reasoning = _CALCULATOR.sub("", record["answer"][: match.start()]).strip()
            problems.append(Problem(record["question"].strip(), reasoning, match["answer"].strip()))
        return problems

    def target(self, problem: Problem) -> str:
        return f"{problem.reasoning}\n#### {problem.answer}"

    def _records(self, source: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        required = {"question": str, "answer": str}
        if Path(source).is_file():
            for number, record in read_json_lines(Path(source), required):
                yield f"{source}:{number}", record
            return
        from datasets import load_dataset  # slow to import, and not needed for a local file

        try:
            records = load_dataset(source, "main", split=split)
        except Exception as error:  # the library raises a dozen kinds for one cause: it cannot get the data set
            raise SoftCoTError(
                f"task.{split}: cannot load {source!r} from the hub ({type(error).__name__}: {error}); "
                "check the name and the network, or name a local JSON-lines file"
            ) from error
        for number, record in enumerate(records):
            if not required.keys() <= record.keys():
                raise SoftCoTError(f"{source}: record {number} has {sorted(record)}, expected {sorted(required)}")
            yield f"{source} record {number}", record
