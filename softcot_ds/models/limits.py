"""How far ahead DeepSpeed gathers partitioned weights: its limits, in elements, from the sizes of a model's layers.

ZeRO-3 notes in which order a step asks for weights, and gathers along that list from then on. At each of its hooks
(a layer's, or a module's outside of the layers) it first gathers what is missing of the weights asked for, then the
next ones of the list:

- ``stage3_prefetch_bucket_size``: until this many are under way. Less than a layer, and the rest of the next one is
  gathered when it is asked for, with nothing to hide behind
- ``stage3_max_live_parameters``: while fewer than this many are gathered, the layer at work among them. Less than two
  layers, and the next one waits for its turn
- ``stage3_max_reuse_distance``: weights that are asked for again within this many stay. The last layer's are, as soon
  as the head has run, and with the head there is mostly no room to gather them a second time

The last weight that is asked for may exceed a limit, however large it is: so the head, one weight, needs no room in
them. More than a layer ahead would hide nothing more: a layer's gather is either faster than a layer's work, or the
network is the bound.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Gathers:
    """What of one model comes and goes, in elements over all ranks together."""

    layers: tuple[tuple[int, ...], ...]
    """The weights that are gathered at one hook, for each in the order of use. Table and head are not among them."""
    table: int
    """Of the token embeddings."""
    head: int

    @property
    def sums(self) -> list[int]:
        """Elements of each layer."""
        return [sum(layer) for layer in self.layers]

    @property
    def largest_weight(self) -> int:
        """Of the layers."""
        return max((weight for layer in self.layers for weight in layer), default=0)


@dataclass(frozen=True)
class Limits:
    """DeepSpeed's three limits, elements."""

    prefetch: int
    live: int
    reuse: int


def derive(models: Sequence[Gathers]) -> Limits:
    """The smallest limits with which each layer is gathered before it is asked for.

    Args:
        models: all that run in one step.
    """
    sums = [layer for model in models for layer in model.sums] or [1]  # 0 would switch gathering ahead off
    # The list of weights ends where the next step begins, and one model's last layer comes before another's first.
    neighbours = zip(sums, sums[1:] + sums[:1], strict=True)
    # Between a last layer's forward and backward pass lies the head, beside less than a layer of norms. A distance of
    # both is reached there, and not one layer earlier.
    reuse = max(model.head + min(model.sums, default=0) for model in models)
    return Limits(max(sums), max(map(sum, neighbours)), reuse)


def most_gathered(models: Sequence[Gathers], limits: Limits) -> int:
    """Elements that are gathered at a time, at most, under any limits."""
    live = limits.live if limits.prefetch else 0
    bounds = [sum(model.table for model in models)]
    for model in models:
        last = [*zip(accumulate(reversed(model.sums)), reversed(model.sums), strict=True)]
        # Beside the head: the last layers, as many as leave room to ask for it, or are asked for again soon enough.
        beside = [total for total, layer in last if total < live or total - layer + model.head < limits.reuse]
        bounds += [*model.sums, model.head + max(beside, default=0)]
        if live:
            bounds.append(live - 1 + model.largest_weight)
    return max(bounds)


def buffers(model: Gathers, limits: Limits, ranks: int) -> tuple[int, int]:
    """How many buffers, and of how many elements each, a rank needs to read its share of the weights from NVMe.

    Each weight keeps its buffer from before it is gathered until it is let go: as many as are live, a layer's that are
    read meanwhile, table and head.
    """
    weights = [weight for layer in model.layers for weight in layer]
    room = limits.live - 1 + model.largest_weight
    live = start = total = 0
    for stop, weight in enumerate(weights, 1):
        total += weight
        while total > room:
            total -= weights[start]
            start += 1
        live = max(live, stop - start)
    largest = max(model.largest_weight, model.table, model.head)
    return live + max(map(len, model.layers), default=0) + 2, -(-largest // ranks)
