"""The training data as each rank's micro-batches."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice

from softcot_ds.data.batches import Batch, collate, cut_by_tokens, cut_evenly, global_batches, order_by_prefix
from softcot_ds.data.examples import Example
from softcot_ds.distributed import DataRanks, device
from softcot_ds.errors import SoftCoTError
from softcot_ds.methods.base import Method
from softcot_ds.recipe import Recipe, TrainingConfig
from softcot_ds.thoughts.reader import ThoughtReader

MakeBatch = Callable[[Sequence[Example]], Batch]


def read_batch(examples: Sequence[Example], reader: ThoughtReader, pad_id: int, model: Method) -> Batch:
    """Examples as a batch for ``model``, with their thoughts, on the CPU."""
    batch = collate(examples, pad_id, model.num_shared, model.number)
    batch.thoughts = reader.read(examples)
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


def training_batches(
    examples: Sequence[Example], make_batch: MakeBatch, recipe: Recipe, ranks: DataRanks, start: int
) -> Iterator[tuple[list[int], list[Callable[[], Batch]]]]:
    """For each optimizer step after step ``start``: its global batch, as indices of examples, and what makes this
    rank's micro-batches of it, of which each rank has as many."""
    on_gpu = device().type == "cuda"

    def make(indices: list[int]) -> Batch:
        made = make_batch([examples[index] for index in indices])
        return made.pin_memory() if on_gpu else made  # a copy to the GPU does not wait then for the work before it

    lengths = [example.length for example in examples]
    for batch in islice(global_batches(lengths, recipe.training.global_batch_size, recipe.seed), start, None):
        mine = micro_batches(batch, examples, recipe.training, ranks)
        yield batch, [partial(make, indices) for indices in mine]
