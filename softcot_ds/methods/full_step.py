"""One pass over whole rows with gradient, logits everywhere: what methods share that do not, or cannot, do less.

B batch, S positions, X those of the longest row, T thoughts, R suffix and target tokens, K supervised tokens, D base
width, V vocabulary.
"""

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def checkpoint_layers(base: PreTrainedModel) -> None:
    """Have the layers computed again in the backward pass instead of keeping their activations."""
    # transformers' own switch does nothing outside of training mode, which would bring dropout.
    for layer in base.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def full_logits(
    base: PreTrainedModel,
    embeds_BSD: torch.Tensor,
    prefix_mask_BL: torch.Tensor,
    predict_at_K: torch.Tensor,
    longest: int,
) -> torch.Tensor:
    """(K, V) logits of one pass over whole rows.

    Padding goes behind the end of each row, where no causal model sees it, attention or not: so the model is given
    nothing but embeddings, no mask that it might ignore and no positions that it might count otherwise.

    Args:
        embeds_BSD: the prefix padded on the left.
        prefix_mask_BL: bool, False on padding.
        predict_at_K: int64 indices into the flattened (B, T+R) thoughts and suffix.
        longest: X, positions of the longest row.
    """
    prefix_length, length = prefix_mask_BL.shape[1], embeds_BSD.shape[1]
    padding_B = prefix_length - prefix_mask_BL.sum(dim=1)
    order_BX = (torch.arange(longest, device=embeds_BSD.device) + padding_B[:, None]) % length
    rows_BXD = embeds_BSD.take_along_dim(order_BX[:, :, None], dim=1)
    logits_BXV = base(inputs_embeds=rows_BXD, use_cache=False).logits
    row_K, column_K = predict_at_K // (length - prefix_length), predict_at_K % (length - prefix_length)
    return logits_BXV[row_K, column_K + prefix_length - padding_B[row_K]]
