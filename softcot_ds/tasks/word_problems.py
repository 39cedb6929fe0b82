"""The generated word problems of the embedded pair."""

import re
from collections.abc import Sequence
from typing import Literal

from softcot_ds.pair.world import generate
from softcot_ds.tasks.base import Problem, Task
from softcot_ds.tasks.kinds import Kind

_ANSWER = re.compile(r"answer\s+(-?\d(?:\s?\d){0,99})")
_SEEDS = {"train": 1, "test": 2}


def _after_answer(text: str, cut: bool = False, options: Sequence[str] = ()) -> str | None:
    """The number after the last ``answer``; the steps before it are full of other numbers.

    Of an output that was ``cut``, digits at its very end are no number yet: the next token may have been a digit.
    """
    answers = _ANSWER.findall(text.rstrip("0123456789 \n") if cut else text)
    return str(int("".join(answers[-1].split()))) if answers else None


class WordProblems(Task):
    """Arithmetic stories; training and test problems differ in their numbers and operations (see pair/world.py)."""

    most_generated = 100_000  # they take a second for some thousands, and there are not endlessly many different ones
    kind = Kind("number", _after_answer)

    def read(self, split: Literal["train", "test"]) -> list[Problem]:
        count = self.config.train_problems if split == "train" else self.config.test_problems
        return [
            Problem(problem.question, problem.reasoning.removesuffix(f"answer {problem.answer}"), str(problem.answer))
            for problem in generate(split, count, seed=_SEEDS[split])
        ]

    def target(self, problem: Problem) -> str:
        return f"{problem.reasoning}answer {problem.answer}"
