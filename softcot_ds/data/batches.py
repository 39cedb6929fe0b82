"""From examples to batches.

Which examples make up a global batch depends on the seed alone, never on the number of ranks: a run that resumes on
another number of ranks continues the same curve.
"""

import random
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from softcot_ds.data.examples import Example
from softcot_ds.data.prompts import AssistantInput
from softcot_ds.errors import SoftCoTError
from softcot_ds.recipe import Recipe, parse_recipe


def global_batches(lengths: Sequence[int], batch_size: int, seed: int) -> Iterator[list[int]]:
    """Endless global batches: lists of ``batch_size`` indices of examples, lengths alike within a batch.

    Each epoch is a new permutation. Windows of 50 batches are sorted by length, cut into batches and the batches
    shuffled, so that a batch holds little padding while the order stays random. What does not fill a batch at the end
    of an epoch, the permutation's last, is left for other epochs' permutations to bring up.
    """
    num_taken = batch_size * steps_per_epoch(len(lengths), batch_size)
    epoch = 0
    while True:
        rng = random.Random(f"{seed}/{epoch}")
        # Cut before sorting: the longest examples would be left out otherwise, of few problems in every epoch.
        order = rng.sample(range(len(lengths)), num_taken)
        batches = []
        for start in range(0, len(order), 50 * batch_size):
            window = sorted(order[start : start + 50 * batch_size], key=lambda index: lengths[index])
            batches += [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
        rng.shuffle(batches)
        yield from batches
        epoch += 1


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """The global batches of an epoch. Raises SoftCoTError where there are too few examples for one."""
    if num_examples < batch_size:
        raise SoftCoTError(
            f"training.global_batch_size {batch_size} is larger than the {num_examples} training problems; "
            "lower it or add data"
        )
    return num_examples // batch_size


def in_steps(recipe: Recipe, num_examples: int) -> Recipe:
    """The recipe with ``training.steps`` in the place of ``training.epochs`` of so many training examples.

    Raises:
        SoftCoTError: there are too few examples for a global batch; or too few steps for what else the recipe says.
    """
    config = recipe.training
    if config.epochs is None:
        return recipe
    steps = config.epochs * steps_per_epoch(num_examples, config.global_batch_size)
    values = recipe.model_dump(mode="json")
    values["training"] |= {"epochs": None, "steps": steps}
    return parse_recipe(values, [], f"{config.epochs} epochs of {num_examples:,} training problems")


def order_by_prefix(batch: list[int], examples: Sequence[Example]) -> list[int]:
    """A global batch in the order of its examples' prefixes.

    It holds examples of one length, so neighbours are then alike in both parts, and so in what each is padded to.
    """
    return sorted(batch, key=lambda index: len(examples[index].prefix_ids))


def cut_evenly(batch: list[int], parts: int) -> list[list[int]]:
    """Parts whose sizes differ by one at most; neighbours stay together.

    Requires ``len(batch) >= parts``: an empty micro-batch would leave a rank out of a collective call.
    """
    bounds = [len(batch) * part // parts for part in range(parts + 1)]
    return [batch[start:stop] for start, stop in pairwise(bounds)]


def cut_by_tokens(batch: list[int], examples: Sequence[Example], tokens: int, ranks: int) -> list[list[int]]:
    """Parts of at most ``tokens`` tokens, thoughts and padding included: the fewest that are a multiple of ``ranks``.

    Neighbours stay together, and the largest part is as small as it can be. Parts are larger where there would be more
    of them than examples otherwise. Requires that no example has more tokens, and ``len(batch) >= ranks``.
    """

    def fill(limit: int) -> list[list[int]]:
        parts, longest = [], (0, 0)
        for index in batch:
            prefix = len(examples[index].prefix_ids)
            rest = examples[index].length - prefix
            grown = max(longest[0], prefix), max(longest[1], rest)
            if parts and (len(parts[-1]) + 1) * sum(grown) <= limit:
                parts[-1].append(index)
                longest = grown
            else:
                parts.append([index])
                longest = prefix, rest
        return parts

    count = min(-(-len(fill(tokens)) // ranks), len(batch) // ranks) * ranks
    enough = len(batch) * 2 * max(examples[index].length for index in batch)
    parts = fill(bisect_left(range(enough), True, key=lambda limit: len(fill(limit)) <= count))
    while len(parts) < count:
        most = max(range(len(parts)), key=lambda part: len(parts[part]))
        parts[most : most + 1] = cut_evenly(parts[most], 2)
    return parts


@dataclass
class Batch:
    """Examples as padded tensors. B examples, prefix padded left to L, suffix and target padded right to R.

    The prefix may lack tokens that all examples share. Between prefix and suffix stand T thoughts. K tokens are
    supervised.
    """

    prefix_ids: torch.Tensor
    """(B, L) int64, as ``collate`` was told to number tokens."""
    prefix_mask: torch.Tensor
    """(B, L) bool, False on padding."""
    suffix_ids: torch.Tensor
    """(B, R) int64, numbered likewise: the rest of the prompt and the target."""
    suffix_mask: torch.Tensor
    """(B, R) bool, False on padding."""
    predict_at: torch.Tensor
    """(K,) int64: positions that predict a supervised token, in the flattened (B, T+R) thoughts and suffix."""
    targets: torch.Tensor
    """(K,) int64: the ids of the supervised tokens."""
    assistant: list[AssistantInput]
    """What the assistant reads for each example."""
    longest: int
    """Positions of the longest example, shared tokens and thoughts included."""
    thoughts: torch.Tensor | None = None
    """(B, T, P) the assistant's states, or (B, C, T, P) in C chains; None where none are read (online, static)."""
    kept: torch.Tensor | None = None
    """(B, C, T, D) bool: what a dropout leaves of copies of the thoughts; None where nothing is drawn."""
    num_reasoning: list[int] = field(default_factory=list)
    """Of each example, see ``Example``."""

    @property
    def num_tokens(self) -> int:
        """Base tokens without padding, thoughts and shared tokens; call it before the batch moves to a GPU."""
        return int(self.prefix_mask.sum() + self.suffix_mask.sum())

    def to(self, device: torch.device) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def repeated(self, chains: int) -> "Batch":
        """Each example so many times, one after another, without thoughts: rows that differ in these alone.

        The supervised tokens are those of the first row of each example, then those of the second, and so on.
        """
        columns = len(self.assistant[0].positions) + self.suffix_ids.shape[1]
        row_K, column_K = self.predict_at // columns, self.predict_at % columns
        chain_C1 = torch.arange(chains, device=row_K.device)[:, None]
        return Batch(
            *(
                rows.repeat_interleave(chains, dim=0)
                for rows in (self.prefix_ids, self.prefix_mask, self.suffix_ids, self.suffix_mask)
            ),
            ((row_K * chains + chain_C1) * columns + column_K).flatten(),
            self.targets.repeat(chains),
            [item for item in self.assistant for _ in range(chains)],
            self.longest,
        )

    def pin_memory(self) -> "Batch":
        """The same in page-locked memory."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        return Batch(
            **{name: change(value) if isinstance(value, torch.Tensor) else value for name, value in vars(self).items()}
        )


def token_ids(examples: Sequence[Example], pad_id: int) -> set[int]:
    """All that batches of these examples hold."""
    found = {pad_id}
    for example in examples:
        found.update(example.prefix_ids, example.suffix_ids, example.target_ids)
    return found


def collate(
    examples: Sequence[Example],
    pad_id: int,
    num_shared: int = 0,
    number: Callable[[torch.Tensor], torch.Tensor] = lambda ids: ids,
) -> Batch:
    """Pad examples into a batch (on the CPU, without thoughts), without the first ``num_shared`` tokens of each.

    Args:
        number: what stands in the batch for token ids that the base is to read.
    """
    prefix_ids, prefix_mask = pad([e.prefix_ids[num_shared:] for e in examples], pad_id, side="left")
    suffix_ids, suffix_mask = pad([e.suffix_ids + e.target_ids for e in examples], pad_id, side="right")
    num_thoughts = len(examples[0].assistant.positions)
    width = num_thoughts + suffix_ids.shape[1]
    predict_at = [
        # The token before the target's first predicts it: the last of the prompt, or the last thought.
        row * width + num_thoughts + len(example.suffix_ids) - 1 + offset
        for row, example in enumerate(examples)
        for offset in range(len(example.target_ids))
    ]
    return Batch(
        number(prefix_ids),
        prefix_mask,
        number(suffix_ids),
        suffix_mask,
        torch.tensor(predict_at, dtype=torch.int64),
        torch.tensor([token for example in examples for token in example.target_ids], dtype=torch.int64),
        [example.assistant for example in examples],
        max(example.length for example in examples),
        num_reasoning=[example.num_reasoning for example in examples],
    )


def pad(rows: Sequence[Sequence[int]], value: int, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids as an (B, longest) int64 tensor and its bool mask, False on padding."""
    width = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), width), value, dtype=torch.int64)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for index, row in enumerate(rows):
        columns = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, columns] = torch.tensor(row, dtype=torch.int64)
        mask[index, columns] = True
    return ids, mask
