"""The training data as each rank's micro-batches."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from softcot_ds.data.batches import Batch, collate, global_batches, micro_batches, order_by_prefix
from softcot_ds.data.examples import Example
from softcot_ds.distributed import DataRanks, device
from softcot_ds.methods.soft_thoughts import SoftCoT
from softcot_ds.recipe import Recipe
from softcot_ds.thoughts.reader import ThoughtReader

MakeBatch = Callable[[Sequence[Example]], Batch]


def read_batch(examples: Sequence[Example], reader: ThoughtReader, pad_id: int, model: SoftCoT) -> Batch:
    """Examples as a batch for ``model``, with their thoughts, on the CPU."""
    batch = collate(examples, pad_id, model.num_shared, model.number)
    batch.thoughts = reader.read(examples)
    return batch


def training_batches(
    examples: Sequence[Example],
    make_batch: MakeBatch,
    recipe: Recipe,
    ranks: DataRanks,
    accumulation: int,
    start: int,
) -> Iterator[tuple[list[int], Iterator[Batch]]]:
    """For each optimizer step after step ``start``: its global batch, as indices of examples, and this rank's
    ``accumulation`` micro-batches of it, each made when it is asked for."""
    on_gpu = device().type == "cuda"  # from pinned memory, a copy to the GPU does not wait for the work before it
    lengths = [example.length for example in examples]
    for batch in islice(global_batches(lengths, recipe.training.global_batch_size, recipe.seed), start, None):
        mine = micro_batches(order_by_prefix(batch, examples), ranks.number, ranks.count, accumulation)
        made = (make_batch([examples[index] for index in indices]) for indices in mine)
        yield batch, (micro.pin_memory() for micro in made) if on_gpu else made
