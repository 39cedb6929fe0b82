"""StrategyQA, questions whose steps are left to the reader (Geva et al., arXiv:2101.02235).

There are no public answers for its test questions: the papers take the last fifth of the published training questions
(``task.test_from_train: order``), or one may have it cut by content.
"""

from collections.abc import Mapping

from softcot_ds.tasks.base import DataTask, Problem, Sizes, boxed
from softcot_ds.tasks.kinds import KINDS
from softcot_ds.tasks.records import Record, Types


class StrategyQA(DataTask):
    """Records with ``question``, ``answer``, true or false, and ``facts``: the solution, which no prompt may show."""

    published = "ChilleD/StrategyQA"
    sizes = Sizes(2061, 229, 77, (24, 42), (56, 148), (84, 102), 13_000)
    required: Mapping[str, Types] = {"question": str, "answer": bool, "facts": (list, str)}
    kind = KINDS["yes_no"]

    def problem(self, record: Record) -> Problem:
        facts = record["facts"] if isinstance(record["facts"], list) else record["facts"].splitlines()
        steps = [" ".join(fact.split()) for fact in facts if fact.strip()]
        reasoning = "\n".join(f"{number}. {step}" for number, step in enumerate(steps, 1))
        return Problem(record["question"].strip(), reasoning, "yes" if record["answer"] else "no")

    def target(self, problem: Problem) -> str:
        return boxed(problem.reasoning, problem.answer)
