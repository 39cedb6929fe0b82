"""What the fused kernel computes, in eager PyTorch: the path on a CPU, the truth in tests, the baseline in benchmarks.

Shapes: B batch, S base-model tokens, T thoughts, P assistant width, D base width, V vocabulary.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F


@lru_cache
def round_scale(embed_scale, dtype):
    """The embedding scale as transformers' Gemma applies it: to float32, then to the dtype of the table."""
    return torch.tensor(embed_scale, dtype=torch.float32).to(dtype).item()


def thought_embedding(hidden, weight, bias, token_ids, table, slot=None, embed_scale=1.0):
    """`tokens[:slot] ; thoughts ; tokens[slot:]` for each row, differentiable in hidden, weight, bias and table.

    Args:
        hidden: (B, T, P) assistant hidden states.
        weight: (D, P); cast to hidden's dtype for the product.
        bias: (D,) or None; cast likewise.
        token_ids: (B, S) int64 or int32.
        table: (V, D) the base model's embedding table.
        slot: (B,) int, in 0..S: how many tokens precede the thoughts. None is 0 for every row.
        embed_scale: multiplies token rows, never thoughts.

    Returns:
        (B, S + T, D) in table's dtype.
    """
    (B, S), T = token_ids.shape, hidden.shape[1]
    tokens = F.embedding(token_ids, table)
    if embed_scale != 1.0:
        tokens = tokens * round_scale(embed_scale, table.dtype)
    bias = None if bias is None else bias.to(hidden.dtype)
    thoughts = F.linear(hidden, weight.to(hidden.dtype), bias).to(table.dtype)
    rows = torch.cat([thoughts, tokens], dim=1)
    if slot is None:
        return rows
    position = torch.arange(S + T, device=rows.device).expand(B, -1)
    slot = slot[:, None]
    before, after = position < slot, position >= slot + T
    source = torch.where(before, position + T, torch.where(after, position, position - slot))
    return rows[torch.arange(B, device=rows.device)[:, None], source]


def weight_grads(grad, hidden, slot, weight_dtype, bias_dtype):
    """Gradients of weight (D, P) and of bias (D,), summed in at least float32; the second is empty without a bias."""
    sum_dtype = torch.promote_types(hidden.dtype, torch.float32)
    rows = _thought_rows(grad, slot, hidden.shape[1]).flatten(0, 1).to(hidden.dtype).to(sum_dtype)
    weight_grad = (rows.mT @ hidden.flatten(0, 1).to(sum_dtype)).to(weight_dtype)
    bias_grad = grad.new_empty(0) if bias_dtype is None else rows.sum(0).to(bias_dtype)
    return weight_grad, bias_grad


def hidden_grad(grad, weight, slot, T, hidden_dtype):
    """Gradient of hidden, (B, T, P)."""
    rows = _thought_rows(grad, slot, T).to(hidden_dtype)
    return rows @ weight.to(hidden_dtype)


def _thought_rows(grad, slot, T):
    if slot is None:
        return grad[:, :T]
    rows = torch.arange(grad.shape[0], device=grad.device)[:, None]
    return grad[rows, slot[:, None] + torch.arange(T, device=grad.device)]
