"""What a model's tokens look like to it: asked of its embedding module, whatever that does with its table.

V vocabulary, D base width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from softcot_ds.models.partition import gathered

_ROWS = 4096
"""Rows of the table that are compared at a time."""


@contextmanager
def whole_embedding(embedding: nn.Module) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """What embeds tokens, (..., ids) to (..., ids, D), its weights gathered once for all calls within the context.

    All ranks enter it together. Unlike a call of the module it may be used before DeepSpeed has the model.
    """
    with gathered(*embedding.parameters()):
        yield embedding.forward  # without the hooks, which would let the weights go after each call


def device_of(embedding: nn.Module) -> torch.device:
    """Where token ids must be for this module."""
    return next(embedding.parameters()).device


@torch.no_grad()
def table_scale(embedding: nn.Module) -> float | None:
    """The number, mostly 1, that the module multiplies its table's rows with; None where it does anything else.

    No list of families: every row is looked up and compared, bit for bit. The weights must not be partitioned.
    """
    table = getattr(embedding, "weight", None)
    if not isinstance(table, torch.Tensor) or table.ndim != 2 or not table.is_floating_point():
        return None
    scale = None
    for ids in torch.arange(len(table), device=table.device).split(_ROWS):
        rows, found = table[ids], embedding(ids[None])[0]
        if found.shape != rows.shape or found.dtype != rows.dtype:
            return None
        if scale is None:
            scale = _common_factor(rows, found)
        if scale is None or not torch.equal(rows * scale, found):
            return None
    return None if scale is None else scale.item()


def _common_factor(rows: torch.Tensor, found: torch.Tensor) -> torch.Tensor | None:
    """The scalar with ``rows * scalar == found``, rounded as the fused kernel does: to float32, then to their dtype."""
    largest = rows.flatten().abs().topk(min(64, rows.numel())).indices
    ratios = (found.flatten()[largest] / rows.flatten()[largest]).float().to(rows.dtype)
    return next((ratio for ratio in ratios.unique() if torch.equal(rows * ratio, found)), None)
