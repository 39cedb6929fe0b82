"""Frozen linear layers held in 8 bits, and computed with in the model's dtype.

Each 64 weights of a row share a smallest value m and a step s, and are stored as q = round((w - m) / s), 0 to 255; what
is multiplied with is m + q s. Values are made anew for each product, forward and backward, and none is kept: no more
than one layer's are there at a time, with checkpointing or without.

A layer's weight is then one flat tensor (its bytes, then each group's m and s) that passes for one of the model's
dtype. So whatever moves weights, ZeRO-3 among it, moves half as many bytes and need not know.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from softcot_ds.errors import SoftCoTError

_GROUP = 64
"""Weights that share a smallest value and a step: neighbours in a row. 8.5 bits a weight at 16 bits for both."""
_LEVELS = 255


def can_quantize(module: nn.Module, vocabulary: int) -> bool:
    """Whether a module is a linear layer that 8 bits suit. The head stays as it is: its rounding is seen at once."""
    return type(module) is nn.Linear and module.in_features % _GROUP == 0 and module.out_features != vocabulary


def check_bits(model: PreTrainedModel, wanted: Callable[[nn.Module], bool], name: str) -> None:
    """Raises SoftCoTError where 8 bits would leave most of a model's weights as they are. It may have no values."""
    held = sum(layer.weight.numel() for layer in model.modules() if wanted(layer))
    around = {id(part.weight) for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part}
    inside = sum(weight.numel() for weight in model.parameters() if id(weight) not in around)
    if held < inside / 2:
        raise SoftCoTError(
            f"backbone.bits=8 would hold {held / inside:.0%} of the weights of {name} in 8 bits: the others are in no "
            f"linear layers (experts, say), or in such as {_GROUP} inputs do not divide; set backbone.bits=16"
        )


def quantize(model: nn.Module, wanted: Callable[[nn.Module], bool], device: torch.device) -> None:
    """Hold a loaded model's layers in 8 bits. Their weights move to ``device`` one by one for that."""
    for layer in model.modules():
        if wanted(layer):
            layer.weight.data = pack(layer.weight.data.to(device))
            layer.forward = partial(_forward, layer)


def prepare(layer: nn.Linear) -> None:
    """Make a layer without values one whose weight is packed, when it is loaded."""
    shape, itemsize = layer.weight.shape, layer.weight.element_size()
    size = shape.numel() // itemsize + 2 * shape.numel() // _GROUP
    layer.weight.data = layer.weight.data.new_empty(size)
    layer.forward = partial(_forward, layer)
    layer._load_from_state_dict = partial(_load, layer, layer._load_from_state_dict)


def _load(layer: nn.Linear, load: Any, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    load(
        state | {f"{prefix}weight": pack(state[f"{prefix}weight"].to(layer.weight.device, layer.weight.dtype))},
        prefix,
        *rest,
    )


def pack(weight_OI: torch.Tensor) -> torch.Tensor:
    """A matrix (O, I) in 8 bits, as one flat tensor of its dtype."""
    groups_GN = weight_OI.reshape(-1, _GROUP)
    lowest_G1 = groups_GN.amin(dim=1, keepdim=True)
    # The step as it is stored: rounding of the step is then none of the values.
    step_G1 = ((groups_GN.amax(dim=1, keepdim=True).float() - lowest_G1.float()) / _LEVELS).to(weight_OI.dtype)
    divisor_G1 = torch.where(step_G1 == 0, 1, step_G1).float()
    levels_GN = ((groups_GN.float() - lowest_G1.float()) / divisor_G1).round_().clamp_(0, _LEVELS)
    bytes_N = levels_GN.to(torch.uint8).flatten()
    return torch.cat([bytes_N.view(weight_OI.dtype), lowest_G1.flatten(), step_G1.flatten()])


def unpack(packed: torch.Tensor, shape: Iterable[int]) -> torch.Tensor:
    """The matrix (O, I) that ``pack`` made flat, each value rounded to the dtype once."""
    size = torch.Size(shape).numel()
    groups = size // _GROUP
    levels_GN = packed[: size // packed.element_size()].view(torch.uint8).view(groups, _GROUP).to(packed.dtype)
    lowest_G1, step_G1 = packed[-2 * groups :].view(2, groups, 1)
    return torch.addcmul(lowest_G1, levels_GN, step_G1).view(*shape)


def _forward(layer: nn.Linear, states: torch.Tensor) -> torch.Tensor:
    return _Product.apply(states, layer.weight, layer.bias, (layer.out_features, layer.in_features))


class _Product(torch.autograd.Function):
    """``states @ weight.T + bias`` for a frozen weight in 8 bits."""

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, packed: nn.Parameter, bias: Any, shape: tuple[int, int]
    ) -> torch.Tensor:
        # By name, not by value: what ZeRO-3 gathered goes, and is gathered again for the backward pass.
        ctx.packed, ctx.shape = packed, shape
        return nn.functional.linear(states, unpack(packed.data, shape), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return gradient @ unpack(ctx.packed.data, ctx.shape), None, None, None
