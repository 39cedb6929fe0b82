"""How an answer is reached: what is asked of the base, in how many rounds, and which answer its replies give.

A strategy is a plain function, the same under every condition: what stands for the thoughts is given to it. Each
round is one call of ``ask`` with all problems, whose replies are kept on disk: an interrupted evaluation goes on where
it was, and they are the same on any number of ranks. So a strategy depends on nothing but its arguments; it is run more
than once, for each rule by which answers are found. To add one: a function here or in a module of its own, and a line
in choices.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from softcot_ds.data.prompts import BasePrompt
from softcot_ds.evaluation.conditions import Posed
from softcot_ds.evaluation.jobs import Thoughts
from softcot_ds.evaluation_config import EvaluationConfig
from softcot_ds.models.decoding import Sampling
from softcot_ds.tasks import Task


@dataclass(frozen=True)
class Reply:
    """What the base wrote after one prompt."""

    text: str
    cut: bool
    """It ended at the limit of tokens, not by itself."""


@dataclass(frozen=True)
class Answer:
    """What a strategy makes of the replies to one problem."""

    value: str | None
    """In the task's canonical form, to be graded; None when no reply gives one."""
    reply: Reply
    """The one that it stands in, for the records."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """How it was reached, for the records: JSON values. ``judgements`` and ``unread_judgements``, where the base judges
    itself, are how many of its words were asked for, and how many of them were none of those that can be read: a report
    has their sums."""


class Ask(Protocol):
    """One round of questions to the base."""

    def __call__(
        self,
        name: str,
        prompts: Sequence[BasePrompt],
        thoughts: Thoughts | None,
        sampling: Sampling,
        draw: int = 0,
        count: int = 1,
    ) -> list[Reply]:
        """The base's replies, all to the first prompt, then to the next, on every rank. All ranks ask the same.

        Args:
            name: of the round, for progress and messages; begin it with the problems' own.
            thoughts: those of the prompt of the same index; None where the prompts have no room for any.
            draw: one number for each of several rounds that would else be the same: sampled, each has random numbers
                of its own. Greedily decoded, all of them give the same.
            count: replies to each prompt, which is read once for them: the draws from ``draw`` on.

        Raises:
            SoftCoTError: a prompt does not fit the base, or the ranks do not ask the same.
        """


def single(ask: Ask, problems: Posed, task: Task, settings: EvaluationConfig) -> list[Answer]:
    """The answer that stands in what is written after the prompt."""
    replies = ask(problems.name, problems.prompts, problems.thoughts, Sampling.of(settings))
    return [
        Answer(task.extract(reply.text, reply.cut, options), reply)
        for reply, options in zip(replies, problems.options, strict=True)
    ]
