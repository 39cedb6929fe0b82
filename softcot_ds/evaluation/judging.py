"""What strategies that search have in common: answers on their way, rounds of questions about them, and what is read in
the base's judgements of its own answers.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from softcot_ds.data.prompts import BasePrompt
from softcot_ds.evaluation.conditions import Posed
from softcot_ds.evaluation.strategies import Answer, Ask, Reply
from softcot_ds.evaluation_config import EvaluationConfig
from softcot_ds.models.decoding import Sampling
from softcot_ds.tasks import Task

_NUMBER = re.compile(r"(?<![\w.,/-])(\d{1,6})(?!\w|[.,/]\d)")
_ANNOUNCED = re.compile(
    r"\b(?:best|number|choice|choose|option|solution|score)\b[^\d\n]{0,30}?(?<![.,/-])(\d{1,6})(?!\w|[.,]\d)"
)
_OUT_OF = re.compile(r"(?<=\d)\s*(?:/|out\s+of)\s*\d+")


@dataclass(frozen=True)
class Draft:
    """An answer to a problem, as far as it is written."""

    problem: int
    text: str = ""
    ended: bool = False
    """Nothing more is written behind it."""
    cut: bool = False
    """It ended at a limit of tokens."""
    score: float = field(default=0.0, compare=False)
    """What the last judgement of it says; the same text is the same draft."""

    def told(self) -> dict[str, Any]:
        """For the records."""
        return {"text": self.text, "score": self.score}


class Rounds:
    """Rounds of one strategy. Each has random numbers of its own."""

    def __init__(self, ask: Ask, problems: Posed, settings: EvaluationConfig) -> None:
        self.problems = problems
        self.settings = settings
        self._ask = ask
        self._draw = 0
        self._judgements = [[0, 0] for _ in problems.prompts]

    def replies(
        self, what: str, asked: Sequence[tuple[int, BasePrompt]], count: int, max_new_tokens: int
    ) -> list[list[Reply]]:
        """The base's replies to each prompt; none to one that leaves no room for any. A problem's own prompt is refused
        then, as under every strategy.

        Args:
            what: the round is about, for progress.
            asked: prompts, each with the number of its problem.
            count: replies to each.
        """
        own = self.problems.prompts
        fits = [
            number
            for number, (problem, prompt) in enumerate(asked)
            if self.problems.room(prompt) > 0 or prompt == own[problem]
        ]
        found: list[list[Reply]] = [[] for _ in asked]
        if not fits:
            return found
        owners = [asked[number][0] for number in fits]
        thoughts = self.problems.thoughts and self.problems.thoughts.picked(owners)
        sampling = replace(Sampling.of(self.settings), max_new_tokens=max_new_tokens)
        prompts = [asked[number][1] for number in fits]
        replies = self._ask(f"{self.problems.name} {what}", prompts, thoughts, sampling, self._draw, count)
        self._draw += count
        for place, number in enumerate(fits):
            found[number] = replies[place * count : (place + 1) * count]
        return found

    def judgements(
        self,
        what: str,
        asked: Sequence[tuple[int, BasePrompt]],
        count: int,
        max_new_tokens: int,
        read: Sequence[Mapping[str, Any] | Collection[int]],
    ) -> list[list[Any]]:
        """What is read in the replies to each prompt, without those in which nothing is.

        Args:
            read: for each prompt what can be said: words with what they mean, or whole numbers.
        """
        told = self.replies(what, asked, count, max_new_tokens)
        found = []
        for (problem, _), replies, known in zip(asked, told, read, strict=True):
            find = _word if isinstance(known, Mapping) else _number
            said = [find(reply.text, known) for reply in replies]
            found.append([one for one in said if one is not None])
            self._judgements[problem][0] += count
            self._judgements[problem][1] += count - len(found[-1])
        return found

    def answer(self, draft: Draft, task: Task, **details: Any) -> Answer:
        """The answer that a draft gives, with what the records say of how it was reached."""
        asked, unread = self._judgements[draft.problem]
        value = task.extract(draft.text, draft.cut, self.problems.options[draft.problem])
        counts = {"judgements": asked, "unread_judgements": unread}
        return Answer(value, Reply(draft.text, draft.cut), counts | details)


def listed(drafts: Sequence[Draft]) -> str:
    """Answers with their numbers, to be shown to the base."""
    return "\n\n".join(f"Number {number}:\n{draft.text.strip()}" for number, draft in enumerate(drafts, 1))


def _word(text: str, values: Mapping[str, Any]) -> Any | None:
    """What the last line that has one of these words means, capitals or not; None where there is none, where it has
    several, or where it denies one ("not sure")."""
    known = {word.casefold(): value for word, value in values.items()}
    pattern = re.compile(rf"(\bnot\s+|n't\s+)?\b({'|'.join(map(re.escape, known))})\b")
    for line in reversed(text.casefold().splitlines()):
        if found := {(bool(denied), word) for denied, word in pattern.findall(line)}:
            (denied, word), *others = found
            return None if denied or others else known[word]
    return None


def _number(text: str, known: Collection[int]) -> int | None:
    """The last of these numbers that is announced ("best is number 2", "score: 7"); else the only one in the text.
    "7/10" and "7 out of 10" are 7. None where there is none, or where several stand there without a word."""
    text = _OUT_OF.sub("", text.casefold())
    announced = [int(digits) for digits in _ANNOUNCED.findall(text)]
    found = [number for number in announced if number in known][-1:] or {
        int(digits) for digits in _NUMBER.findall(text)
    }
    return next(iter(found)) if len(found) == 1 and {*found} <= {*known} else None
