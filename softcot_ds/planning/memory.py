"""Bytes on a GPU of what a training holds, from the sizes of its models."""

GIB = 2**30
STATES = 12
"""Bytes of a trained weight's copy and two moments in float32."""
GRADIENT = 4
"""Bytes of a trained weight's gradient: it is summed in float32."""


def trained_bytes(elements: int, itemsize: int, ranks: int, stage: int) -> float:
    """What is trained, on each of ``ranks``: weights, gradients, float32 copy and moments.

    Args:
        itemsize: bytes of a weight as it is computed with.
        stage: of ZeRO, from 1 on: all split copy and moments, from 2 on gradients too.
    """
    return elements * (itemsize + STATES / ranks + GRADIENT / (ranks if stage >= 2 else 1))


def shared_bytes(total: int, small: int, ranks: int, weight_bytes: float) -> float:
    """Frozen weights on each of the ranks that hold one copy between them; small ones are whole on all.

    Args:
        total: elements, those of the ``small`` weights among them.
        weight_bytes: of an element.
    """
    return weight_bytes * ((total - small) / ranks + small)
