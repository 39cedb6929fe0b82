"""What answers cost: tokens that are read and written for them, and the seconds that it takes.

Tokens are counted from what was asked and written, seconds are measured where the work is done and kept with the
outputs: so an evaluation that was interrupted, or done before, tells the same as any other.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any, Self

from softcot_ds.data.prompts import BasePrompt
from softcot_ds.evaluation.jobs import Job
from softcot_ds.models.decoding import Output
from softcot_ds.models.reading import read_once


@dataclass(frozen=True)
class Spent:
    """For all problems together."""

    read: float = 0
    """Tokens and thoughts of prompts. What several have in common is counted once where it is read once."""
    written: float = 0
    """Tokens; the one that ends an output is among them."""
    seconds: float = 0.0
    """Of a rank, or of all ranks that worked on the same part. Those that waited for others are not counted, nor is
    loading a model."""

    def __add__(self, other: Self) -> Self:
        return type(self)(self.read + other.read, self.written + other.written, self.seconds + other.seconds)

    @classmethod
    def on(cls, job: Job[Output], prompts: Sequence[BasePrompt], num_thoughts: int) -> Self:
        """A job that is done.

        Args:
            prompts: of the job; none where they were read for another draw.
            num_thoughts: in each prompt.
        """
        written = sum(len(output.token_ids) + (not output.cut) for output in job.results or ())
        return cls(tokens_read(prompts, num_thoughts, job.batches if prompts else []), written, job.seconds)


def tokens_read(prompts: Sequence[BasePrompt], num_thoughts: int, batches: Sequence[Sequence[int]]) -> int:
    """Tokens and thoughts that are read before anything is written: what all prompts of a batch begin with once, the
    rest of each prompt once.

    A model whose rows do not share what they begin with (``models.decoding``) reads more.

    Args:
        batches: the indices of each batch's prompts.
    """
    total = 0
    for batch in batches:
        some = [prompts[index] for index in batch]
        shared = len(read_once(some, num_thoughts > 0))
        total += sum(len(one.prefix_ids) + num_thoughts + len(one.suffix_ids) - shared for one in some) + shared
    return total


@dataclass(frozen=True)
class Round:
    """What one sample's strategy was told in one job."""

    key: str
    """The job's."""
    spent: Spent
    along: bool
    """Its prompts were read along with those of an earlier sample, which asked the same at first."""


def together(samples: Sequence[Sequence[Round]]) -> Spent:
    """What all samples cost: work that serves several is counted once."""
    rounds: dict[str, Spent] = {}
    for one in (one for sample in samples for one in sample):
        rounds.setdefault(one.key, replace(one.spent, read=0) if one.along else one.spent)
    return reduce(add, rounds.values(), Spent())


def per_problem(base: Spent, assistant: Spent, num_problems: int) -> dict[str, Any]:
    """For a report. What the assistant does is counted apart: it reads a question once for its states, and is asked
    once for its words. Its seconds are known of words alone: states may come from a cache.

    Args:
        base: what the base's answers cost, of which the accuracy is told.
        assistant: what its thoughts or its words cost.
    """
    spent = {"read": base.read, "written": base.written}
    spent |= {"assistant_read": assistant.read, "assistant_written": assistant.written}
    spent |= {"assistant_seconds": assistant.seconds} if assistant.written else {}
    return {
        "tokens_per_problem": (base.read + base.written) / num_problems,
        "seconds_per_problem": base.seconds / num_problems,
        "spent_per_problem": {name: value / num_problems for name, value in spent.items()},
    }


def of_drafts(outputs: Iterable[Output], count: int) -> dict[str, Any]:
    """For a report: what became of ``count`` tokens that the assistant has drafted for each pass of the base."""
    passes = tokens = drafted = accepted = 0
    for output in outputs:
        passes, drafted, accepted = passes + output.passes, drafted + output.drafted, accepted + output.accepted
        tokens += len(output.token_ids) + (not output.cut)
    share = accepted / drafted if drafted else None
    return {"drafts": {"tokens": count, "tokens_per_pass": tokens / passes, "accepted": share}}


def alone(samples: Sequence[Sequence[Round]]) -> Spent:
    """What one of the samples costs on average, by itself: its prompts are read for it. The seconds of work that was
    done for several at once are divided among them."""
    total = reduce(add, (one.spent for sample in samples for one in sample), Spent())
    count = len(samples)
    return Spent(total.read / count, total.written / count, total.seconds / count)
