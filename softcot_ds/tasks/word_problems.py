"""The generated word problems of the embedded pair, asked in three ways: for the number, as a choice, as a claim.

The wording of all three is word_problems.yaml: what is offered is part of the question.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from softcot_ds.pair.world import ORDINALS, Choice, Claim, WordProblem, generate
from softcot_ds.tasks.base import Problem, Split, Task
from softcot_ds.tasks.kinds import KINDS, Kind
from softcot_ds.tasks.options import LETTERS

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
    step_begins = re.compile(rf"(?<= )(?=(?:{'|'.join(ORDINALS)}|now)\b)")
    announces = "answer"
    """What the base writes before the answer."""

    def read(self, split: Split) -> list[Problem]:
        count = self.config.train_problems if split == "train" else self.config.test_problems
        return [self.ask(problem) for problem in generate(split, count, seed=_SEEDS[split])]

    def ask(self, problem: WordProblem) -> Problem:
        """A problem of the world in the way of this task."""
        return Problem(problem.question, problem.steps, str(problem.answer))

    def target(self, problem: Problem) -> str:
        return f"{problem.reasoning} {self.announces} {problem.answer}".lstrip()


class WordChoices(WordProblems):
    """The same problems, each with four numbers to choose from; the base writes one of them, read as its letter."""

    kind = replace(KINDS["option"], reference=None)  # it finds letters alone, and the base writes none

    def ask(self, problem: WordProblem) -> Problem:
        choice = Choice(problem)
        return Problem(choice.question, problem.steps, choice.answer, tuple(map(str, choice.options)))

    def target(self, problem: Problem) -> str:
        number = problem.options[LETTERS.index(problem.answer)]
        return super().target(replace(problem, answer=number))


class WordClaims(WordProblems):
    """The same problems, each with a number of which is asked whether it is the answer."""

    kind = KINDS["yes_no"]
    announces = "answer :"

    def ask(self, problem: WordProblem) -> Problem:
        claim = Claim(problem)
        return Problem(claim.question, claim.steps, claim.answer)
