"""What ranks move in a training step, from the sizes of its models and the way that they are held.

Counted as benchmarks/zero3_traffic.py does: the whole of what a collective operation gathers or sums, for each in which
a rank takes part.
"""

from dataclasses import dataclass

from softcot_ds.models.limits import Gathers, derive


@dataclass(frozen=True)
class Traffic:
    """Bytes, and operations that carry them."""

    gathered: float = 0.0
    gathers: int = 0
    summed: float = 0.0
    sums: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(here + there for here, there in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def size(self) -> float:
        return self.gathered + self.summed


def gathered_elements(model: Gathers, resident: int = 0) -> tuple[int, int]:
    """Elements of frozen weights that a forward and a backward pass gather together, and in how many operations.

    The head, and the last layers as far as the reuse distance goes, stay from the one to the other. The table of token
    embeddings is not asked: each rank keeps those of the run's tokens.

    Args:
        resident: layers, from the first on, that are whole on every rank.
    """
    reuse, distance, kept, stay = derive([model]).reuse, model.head, 0, 0
    layers = model.sums[resident:]
    for layer in reversed(layers):
        if distance >= reuse:
            break
        distance, kept, stay = distance + layer, kept + layer, stay + 1
    return 2 * sum(layers) + model.head - kept, 2 * len(layers) - stay + 1


def summed_activations(
    layers: int, width: int, before: int, rest: int, supervised: int, checkpointing: bool
) -> tuple[int, int]:
    """Elements of activations that tensor parallelism sums over the ranks in a step, and in how many operations.

    Twice in each layer, behind attention and behind what follows it: for what stands before the thoughts, forward; for
    the rest forward, backward, and once more where layers are computed again. And once what comes back of the head.

    Args:
        before: positions before the thoughts, over all examples.
        rest: the others.
        supervised: those of them that the head reads in training.
    """
    passes = 3 if checkpointing else 2
    elements = width * (2 * layers * (before + passes * rest) + supervised)
    return elements, 2 * layers * (passes + bool(before)) + bool(supervised)
