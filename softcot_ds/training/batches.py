"""The training data as each rank's micro-batches."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Literal, Protocol

import torch

from softcot_ds.data.batches import Batch, collate, cut_by_tokens, cut_evenly, global_batches, order_by_prefix
from softcot_ds.data.examples import Example
from softcot_ds.distributed import DataRanks, device
from softcot_ds.errors import SoftCoTError
from softcot_ds.methods.base import Method
from softcot_ds.recipe import Recipe, TrainingConfig
from softcot_ds.thoughts.reader import ThoughtReader


class MakeBatch(Protocol):
    """``read_batch`` of what a run has."""

    def __call__(self, examples: Sequence[Example], *, draw: str | None = None) -> Batch: ...


def read_batch(
    examples: Sequence[Example], reader: ThoughtReader, pad_id: int, model: Method, draw: str | None = None
) -> Batch:
    """Examples as a batch for ``model``, with their thoughts, on the CPU.

    Args:
        draw: what the random numbers of each example depend on, beside its problem; None where none are drawn.
    """
    batch = collate(examples, pad_id, model.num_shared, model.number)
    batch.thoughts = reader.read(examples)
    if draw is not None:
        batch.kept = model.dropout([f"{draw}/{example.problem.id}" for example in examples], batch)
    return batch


def check_micro_batches(examples: Sequence[Example], config: TrainingConfig, ranks: DataRanks) -> None:
    """Raises SoftCoTError where ``micro_batches`` cannot cut a global batch for so many ranks."""
    needed = ranks.count * (1 if config.micro_batch_tokens else accumulation_steps(config, ranks))
    if config.global_batch_size < needed:
        raise SoftCoTError(
            f"training.global_batch_size {config.global_batch_size} does not feed {ranks.count} ranks; "
            "raise it or use fewer ranks"
        )
    longest = max(examples, key=lambda example: example.length)
    if config.micro_batch_tokens and longest.length > config.micro_batch_tokens:
        raise SoftCoTError(
            f"training.micro_batch_tokens {config.micro_batch_tokens:,} does not hold problem {longest.problem.id} of "
            f"{longest.length:,} tokens; raise it, or leave out long problems with task.max_tokens"
        )


def seed_draws(seed: int, step: int, micro_batch: int) -> None:
    """Have torch's random numbers follow from the run's seed and from which micro-batch of which step comes next, over
    all ranks: what is drawn depends on neither their number nor what was drawn before."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{step}/{micro_batch}".encode()).digest()[:8]))


def accumulation_steps(config: TrainingConfig, ranks: DataRanks) -> int:
    """Micro-batches per rank and optimizer step, where they are cut by number."""
    return -(-config.global_batch_size // (config.micro_batch_size * ranks.count))


def micro_batches(
    batch: list[int], examples: Sequence[Example], config: TrainingConfig, ranks: DataRanks
) -> list[list[int]]:
    """This rank's micro-batches of a global batch; each rank has as many."""
    ordered = order_by_prefix(batch, examples)
    if config.micro_batch_tokens:
        parts = cut_by_tokens(ordered, examples, config.micro_batch_tokens, ranks.count)
    else:
        parts = cut_evenly(ordered, accumulation_steps(config, ranks) * ranks.count)
    return parts[ranks.number :: ranks.count]


@dataclass(frozen=True)
class GlobalBatch:
    """What an optimizer step is taken on."""

    indices: list[int]
    """Of its examples."""
    sizes: dict[Literal["tokens", "problems"], int]
    """What losses are means over: its supervised tokens and its problems, of all ranks."""
    micro_batches: list[Callable[[], Batch]]
    """What makes this rank's micro-batches, each for the pass that follows; each rank has as many."""


def training_batches(
    examples: Sequence[Example],
    make_batch: MakeBatch,
    recipe: Recipe,
    ranks: DataRanks,
    start: int,
    example_at: Callable[[Example, int], Example] = lambda example, step: example,
) -> Iterator[GlobalBatch]:
    """Of each optimizer step after step ``start``.

    Args:
        example_at: an example as it is read in an optimizer step.
    """
    on_gpu = device().type == "cuda"

    def make(step: int, read: Sequence[Example], micro_batch: int) -> Batch:
        # Whatever rank makes it, and however often the run was interrupted before.
        seed_draws(recipe.seed, step, micro_batch)  # of the pass that follows
        made = make_batch(read, draw=f"{recipe.seed}/{step}")
        return made.pin_memory() if on_gpu else made  # a copy to the GPU does not wait then for the work before it

    lengths = [example.length for example in examples]
    batches = islice(global_batches(lengths, recipe.training.global_batch_size, recipe.seed), start, None)
    for step, indices in enumerate(batches, start + 1):
        read = [example_at(examples[index], step) for index in indices]
        mine = micro_batches(list(range(len(read))), read, recipe.training, ranks)
        yield GlobalBatch(
            indices,
            {"tokens": sum(len(example.target_ids) for example in read), "problems": len(read)},
            [
                partial(make, step, [read[place] for place in places], number * ranks.count + ranks.number)
                for number, places in enumerate(mine)
            ],
        )
