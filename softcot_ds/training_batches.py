"""The training data as each rank's micro-batches."""

from collections.abc import Iterator, Sequence
from itertools import islice

from torch.utils.data import Dataset

from softcot_ds.data import Batch, Example, collate, global_batches, micro_batches, order_by_prefix
from softcot_ds.distributed import rank, world_size
from softcot_ds.recipe import Recipe
from softcot_ds.thought_reader import ThoughtReader


class TrainingBatches(Dataset):
    """The training data as this rank's micro-batches."""

    def __init__(
        self,
        examples: Sequence[Example],
        reader: ThoughtReader,
        pad_id: int,
        num_shared: int,
        recipe: Recipe,
        start: int,
        accumulation: int,
    ) -> None:
        self.examples = examples
        self.reader = reader
        self.pad_id = pad_id
        self.num_shared = num_shared
        self.recipe = recipe
        self.start = start
        self.accumulation = accumulation

    def schedule(self) -> Iterator[list[int]]:
        """The global batches from the first step of this run on."""
        lengths = [example.length for example in self.examples]
        batches = global_batches(lengths, self.recipe.training.global_batch_size, self.recipe.seed)
        return islice(batches, self.start, None)

    def of_this_rank(self) -> "_MicroBatchIndices":
        return _MicroBatchIndices(self)

    def __getitems__(self, indices: list[int]) -> Batch:
        examples = [self.examples[index] for index in indices]
        batch = collate(examples, self.pad_id, self.num_shared)
        batch.thoughts = self.reader.read(examples)
        return batch


class _MicroBatchIndices:
    """Indices of each micro-batch of this rank, for a DataLoader."""

    def __init__(self, batches: TrainingBatches) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._batches.schedule():
            by_prefix = order_by_prefix(batch, self._batches.examples)
            yield from micro_batches(by_prefix, rank(), world_size(), self._batches.accumulation)
