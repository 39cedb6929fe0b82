"""Tree of Thoughts, breadth first (Yao et al. 2023, arXiv:2305.10601): ``evaluation.strategy=tree``.

A state is the beginning of an answer, which the base goes on with in its own turn: so prompt and thoughts stand as they
do for a single answer, and as they were trained. In each step every beginning that was kept is gone on with in several
ways, the base judges them, and the best are kept: for all problems at once.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import fsum

from softcot_ds.evaluation.conditions import Posed
from softcot_ds.evaluation.judging import Draft, Rounds, listed
from softcot_ds.evaluation.strategies import Answer, Ask, Reply
from softcot_ds.evaluation_config import EvaluationConfig
from softcot_ds.strategy_config import TreeConfig, Wording
from softcot_ds.tasks import Task

_BULLET = re.compile(r"^\s*(?:[-*•]|\(?\d{1,2}[.):])\s+")


def tree(ask: Ask, problems: Posed, task: Task, settings: EvaluationConfig) -> list[Answer]:
    """The answer at the end of the best branch.

    The same text is judged once, however often it was made. Of beginnings that are judged alike, what was made more
    often is better, then what goes on from the better one, then the earlier draw: nothing depends on which reply is
    there first. A judgement in which nothing can be read counts nothing, and the share of those is reported. What is
    kept whatever is said of it is not judged. A beginning that fills the context ends there, cut; a judgement for which
    there is no room is one that cannot be read.
    """
    rounds, config = Rounds(ask, problems, settings), settings.tree
    words = config.words
    kept = [[Draft(number)] for number in range(len(problems.prompts))]
    levels: list[list[list[dict]]] = [[] for _ in kept]
    stuck = False
    for step in range(1, config.depth + 1):
        is_last = step == config.depth
        if stuck and not is_last:
            continue
        grown = _grown(rounds, kept, config, words, step)
        best = _judged(rounds, grown, config, words, step, 1 if is_last else config.breadth)
        stuck = [*map(_texts, best)] == [*map(_texts, kept)]
        for level, of_problem in zip(levels, best, strict=True):
            level.append([draft.told() for draft in of_problem])
        kept = [of_problem[: 1 if is_last else config.breadth] for of_problem in best]
    return [rounds.answer(drafts[0], task, steps=level) for drafts, level in zip(kept, levels, strict=True)]


def _texts(drafts: Sequence[Draft]) -> list[str]:
    return [draft.text for draft in drafts]


def _grown(
    rounds: Rounds, kept: Sequence[Sequence[Draft]], config: TreeConfig, words: Wording, step: int
) -> list[list[Draft]]:
    """By problem, what the beginnings become in one step. One that has ended stays as it is, and so does one for which
    no step is proposed."""
    is_last = step == config.depth
    sample = is_last or config.generate == "sample"
    then = "" if sample else words("propose", count=config.candidates)
    going = [draft for drafts in kept for draft in drafts if not draft.ended]
    asked = [(draft.problem, rounds.problems.again(draft.problem, draft.text, then)) for draft in going]
    # Greedily decoded, all samples of a beginning are the same.
    count = config.candidates if sample and rounds.settings.temperature else 1
    longest = rounds.settings.max_new_tokens if is_last else config.step_tokens * (1 if sample else config.candidates)
    replies = rounds.replies(f"step {step}", asked, count, longest)
    children: dict[Draft, list[Draft]] = {}
    for draft, told in zip(going, replies, strict=True):
        if not told:
            children[draft] = [replace(draft, ended=True, cut=True)]
        elif is_last:
            children[draft] = [replace(draft, text=draft.text + one.text, ended=True, cut=one.cut) for one in told]
        elif sample:
            children[draft] = [_with_line(draft, one) for one in told]
        else:
            children[draft] = [
                replace(draft, text=f"{draft.text}{line}\n") for line in _lines(told[0].text)[: config.candidates]
            ]
    return [[child for draft in drafts for child in children.get(draft) or [draft]] for drafts in kept]


def _with_line(draft: Draft, reply: Reply) -> Draft:
    """A beginning with the first line that the base went on with; it has ended if there is nothing behind that."""
    begun = len(reply.text) - len(reply.text.lstrip())
    end = reply.text.find("\n", begun)
    if end < 0:
        return replace(draft, text=draft.text + reply.text, ended=not reply.cut)
    ended = not reply.cut and not reply.text[end:].strip()
    return replace(draft, text=draft.text + reply.text[: end + 1], ended=ended)


def _lines(text: str) -> list[str]:
    """The lines of a list, without numbers or dots in front."""
    return [line for line in (_BULLET.sub("", line).strip() for line in text.splitlines()) if line]


def _judged(
    rounds: Rounds, grown: Sequence[Sequence[Draft]], config: TreeConfig, words: Wording, step: int, keep: int
) -> list[list[Draft]]:
    """By problem its beginnings, each once and with its score, the best first."""
    written = [[draft for draft in drafts if draft.text.strip()] or drafts for drafts in grown]
    times = [Counter(drafts) for drafts in written]  # in the order in which they stand
    judged = [[*found] for found in times if len(found) > keep]
    judge = _votes if config.judge == "vote" else _values
    scores = judge(rounds, f"judgement {step}", judged, config, words)
    return [
        sorted(
            (replace(draft, score=scores.get(draft, 0.0)) for draft in found),
            key=lambda draft: (-draft.score, -found[draft]),
        )
        for found in times
    ]


def _votes(
    rounds: Rounds, what: str, judged: Sequence[Sequence[Draft]], config: TreeConfig, words: Wording
) -> dict[Draft, float]:
    """How many votes each beginning has, among those of its problem."""
    asked = []
    for drafts in judged:
        then = words("vote", answers=listed(drafts), count=len(drafts))
        asked.append((drafts[0].problem, rounds.problems.again(drafts[0].problem, then=then)))
    numbers = [range(1, len(drafts) + 1) for drafts in judged]
    told = rounds.judgements(what, asked, config.judgements, config.judge_tokens, numbers)
    return {
        draft: float(votes.count(number))
        for drafts, votes in zip(judged, told, strict=True)
        for number, draft in enumerate(drafts, 1)
    }


def _values(
    rounds: Rounds, what: str, judged: Sequence[Sequence[Draft]], config: TreeConfig, words: Wording
) -> dict[Draft, float]:
    """What each beginning is worth: the sum of what is said of it."""
    drafts = [draft for some in judged for draft in some]
    then = words("value", words=", ".join(config.values))
    asked = [(draft.problem, rounds.problems.again(draft.problem, draft.text, then)) for draft in drafts]
    told = rounds.judgements(what, asked, config.judgements, config.judge_tokens, [config.values] * len(drafts))
    return {draft: fsum(values) for draft, values in zip(drafts, told, strict=True)}
