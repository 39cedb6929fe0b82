"""Graph of Thoughts (Besta et al. 2024, arXiv:2308.09687): ``evaluation.strategy=graph``.

What is worked on are whole answers, and the recipe says what is done with them: a list of operations, each of which
works on what comes out of some before it. Each operation is one round with all problems.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from softcot_ds.data.prompts import BasePrompt
from softcot_ds.evaluation.conditions import Posed
from softcot_ds.evaluation.judging import Draft, Rounds, listed
from softcot_ds.evaluation.strategies import Answer, Ask
from softcot_ds.evaluation_config import EvaluationConfig
from softcot_ds.strategy_config import GraphConfig, Operation, Wording
from softcot_ds.tasks import Task

Drafts = list[list[Draft]]
"""By problem, the answers that go into an operation or come out of it."""


def graph(ask: Ask, problems: Posed, task: Task, settings: EvaluationConfig) -> list[Answer]:
    """What comes out of the last operation.

    An answer's score is the mean of those that can be read, and 0 where none can; the share of those that cannot is
    reported. Of equal scores the earlier answer is the better one: in the order of the operations that wrote them, then
    of the draws. Where a prompt with answers in it leaves no room, or nothing is written, an answer stays as it is: the
    best one of those that were to be merged.
    """
    rounds, config = Rounds(ask, problems, settings), settings.graph
    work = _Work(rounds, config, config.words)
    done: list[Drafts] = []
    for number, operation in enumerate(config.plan, 1):
        taken = [
            [draft for source in operation.of for draft in done[source][problem]]
            for problem in range(len(problems.prompts))
        ]
        done.append(_WORK[operation.do](work, f"operation {number} ({operation.do})", operation, taken))
    return [
        rounds.answer(
            done[-1][problem][0],
            task,
            operations=[
                {"do": operation.do, "answers": [draft.told() for draft in drafts[problem]]}
                for operation, drafts in zip(config.plan, done, strict=True)
            ],
        )
        for problem in range(len(problems.prompts))
    ]


@dataclass(frozen=True)
class _Work:
    """The operations, by their names in a recipe: from what goes in to what comes out."""

    rounds: Rounds
    config: GraphConfig
    words: Wording

    def generate(self, what: str, operation: Operation, taken: Drafts) -> Drafts:
        prompts = list(enumerate(self.rounds.problems.prompts))
        return self._written(what, prompts, operation.count, [[] for _ in prompts])

    def score(self, what: str, operation: Operation, taken: Drafts) -> Drafts:
        then = self.words("score", best=self.config.best)
        drafts = [draft for of_problem in taken for draft in of_problem]
        written = [draft for draft in drafts if draft.text.strip()]
        asked = [(draft.problem, self._again(draft, then)) for draft in written]
        known = [range(self.config.best + 1)] * len(asked)
        told = self.rounds.judgements(what, asked, operation.count, self.config.judge_tokens, known)
        scores = {draft: fmean(numbers or [0]) for draft, numbers in zip(written, told, strict=True)}
        return [[replace(draft, score=scores.get(draft, 0.0)) for draft in of_problem] for of_problem in taken]

    def keep(self, what: str, operation: Operation, taken: Drafts) -> Drafts:
        return [_best_first(drafts)[: operation.count] for drafts in taken]

    def aggregate(self, what: str, operation: Operation, taken: Drafts) -> Drafts:
        asked = []
        for problem, drafts in enumerate(taken):
            then = self.words("aggregate", answers=listed(drafts), count=len(drafts))
            asked.append((problem, self.rounds.problems.again(problem, then=then)))
        return self._written(what, asked, operation.count, [_best_first(drafts)[:1] for drafts in taken])

    def improve(self, what: str, operation: Operation, taken: Drafts) -> Drafts:
        then = self.words("improve")
        drafts = [draft for of_problem in taken for draft in of_problem]
        asked = [(draft.problem, self._again(draft, then)) for draft in drafts]
        better = iter(self._written(what, asked, operation.count, [[draft] for draft in drafts]))
        return [[draft for _ in of_problem for draft in next(better)] for of_problem in taken]

    def _again(self, draft: Draft, then: str) -> BasePrompt:
        return self.rounds.problems.again(draft.problem, draft.text, then)

    def _written(self, what: str, asked: Sequence[tuple[int, BasePrompt]], count: int, otherwise: Drafts) -> Drafts:
        """The answers that the base writes after each prompt; where it writes none, others."""
        told = self.rounds.replies(what, asked, count, self.rounds.settings.max_new_tokens)
        return [
            [Draft(problem, one.text, True, one.cut) for one in replies if one.text.strip() or not others] or others
            for (problem, _), replies, others in zip(asked, told, otherwise, strict=True)
        ]


def _best_first(drafts: Sequence[Draft]) -> list[Draft]:
    return sorted(drafts, key=lambda draft: -draft.score)


_WORK = {
    "generate": _Work.generate,
    "score": _Work.score,
    "keep": _Work.keep,
    "aggregate": _Work.aggregate,
    "improve": _Work.improve,
}
