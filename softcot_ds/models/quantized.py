"""Frozen linear layers held in 8 or 4 bits, and computed with in the model's dtype.

Each 64 weights of a row share what scales them. In 8 bits that is a smallest value m and a step s: they are stored as
q = round((w - m) / s), 0 to 255, and what is multiplied with is m + q s. In 4 bits it is their largest absolute value,
and of the 16 levels of NF4 (QLoRA, arXiv:2305.14314) each takes the nearest; bitsandbytes makes them and unmakes them.
Values are made anew for each product, forward and backward, and none is kept: no more than one layer's are there at a
time, with checkpointing or without.

A layer's weight is then one flat tensor (its bytes, then what scales each group) that passes for one of the model's
dtype. So whatever moves weights, ZeRO-3 among it, moves a half or a quarter as many bytes and need not know.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from softcot_ds.errors import SoftCoTError

_GROUP = 64
"""Weights that share what scales them: neighbours in a row."""
_LEVELS = 255
_SCALES = {8: 2, 4: 1}
"""Numbers of the model's dtype that scale a group: with 16 bits for each, 8.5 and 4.25 bits a weight. To hold those of
4 bits in 8 bits again, as QLoRA does, would save 0.12 bits more."""


@dataclass(frozen=True)
class FewBits:
    """The layers of a model that are held in few bits."""

    bits: int
    """8 or 4."""
    vocabulary: int
    """Of the model."""

    def holds(self, module: nn.Module) -> bool:
        """Whether a module is one: a linear layer, but not the head, whose rounding is seen at once."""
        linear = type(module) is nn.Linear
        return linear and module.in_features % _GROUP == 0 and module.out_features != self.vocabulary

    def check(self, model: PreTrainedModel, name: str, device: torch.device) -> None:
        """Raises SoftCoTError where a model cannot be held so. It may have no values.

        That is where most of its weights would stay as they are, or 4 bits lack their library on the device.
        """
        held = sum(layer.weight.numel() for layer in model.modules() if self.holds(layer))
        around = {id(part.weight) for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part}
        inside = sum(weight.numel() for weight in model.parameters() if id(weight) not in around)
        if held < inside / 2:
            raise SoftCoTError(
                f"backbone.bits={self.bits} would hold {held / inside:.0%} of the weights of {name} in so few bits: "
                f"the others are in no linear layers (experts, say), or in such as {_GROUP} inputs do not divide; set "
                "backbone.bits=16"
            )
        if self.bits == 8:
            return
        try:
            unpack(pack(torch.ones(1, _GROUP, device=device), self.bits), (1, _GROUP), self.bits)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # not installed; or without what it has compiled for this device
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise SoftCoTError(
                f"backbone.bits={self.bits} needs bitsandbytes, which does not work here: {reason}. Install it with "
                "pip install 'bitsandbytes>=0.50.2,<0.51', or set backbone.bits=8"
            ) from error

    def quantize(self, model: nn.Module, device: torch.device) -> None:
        """Hold a loaded model's layers so. Their weights move to ``device`` one by one for that."""
        for layer in model.modules():
            if self.holds(layer):
                layer.weight.data = pack(layer.weight.data.to(device), self.bits)
                layer.forward = partial(_forward, layer, self.bits)

    def prepare(self, module: nn.Module) -> None:
        """Make a module without values, if it is one of the layers, one whose weight is packed when it is loaded."""
        if not self.holds(module):
            return
        size = module.weight.numel() * packed_bytes(self.bits, module.weight.element_size())
        module.weight.data = module.weight.data.new_empty(round(size / module.weight.element_size()))
        module.forward = partial(_forward, module, self.bits)
        module._load_from_state_dict = partial(_load, module, self.bits, module._load_from_state_dict)


def _load(layer: nn.Linear, bits: int, load: Any, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    weight = state[f"{prefix}weight"].to(layer.weight.device, layer.weight.dtype)
    load(state | {f"{prefix}weight": pack(weight, bits)}, prefix, *rest)


def packed_bytes(bits: int, itemsize: int) -> float:
    """What a weight takes in 8 or 4 bits, with its part of what scales it, which is of ``itemsize`` bytes each."""
    return bits / 8 + _SCALES[bits] * itemsize / _GROUP


def pack(weight_OI: torch.Tensor, bits: int) -> torch.Tensor:
    """A matrix (O, I) in 8 or 4 bits, as one flat tensor of its dtype."""
    bytes_N, *scales_G = (_pack_8 if bits == 8 else _pack_4)(weight_OI.reshape(-1, _GROUP))
    return torch.cat([bytes_N.view(weight_OI.dtype), *(scale_G.to(weight_OI.dtype) for scale_G in scales_G)])


def unpack(packed: torch.Tensor, shape: Iterable[int], bits: int) -> torch.Tensor:
    """The matrix (O, I) that ``pack`` made flat, each value rounded to the dtype once."""
    groups = torch.Size(shape).numel() // _GROUP
    size = groups * _GROUP * bits // 8 // packed.element_size()
    bytes_GN, scales_KG1 = packed[:size].view(torch.uint8).view(groups, -1), packed[size:].view(-1, groups, 1)
    return (_unpack_8 if bits == 8 else _unpack_4)(bytes_GN, *scales_KG1).view(*shape)


def _pack_8(groups_GN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lowest_G1 = groups_GN.amin(dim=1, keepdim=True)
    # The step as it is stored: rounding of the step is then none of the values.
    step_G1 = ((groups_GN.amax(dim=1, keepdim=True).float() - lowest_G1.float()) / _LEVELS).to(groups_GN.dtype)
    divisor_G1 = torch.where(step_G1 == 0, 1, step_G1).float()
    levels_GN = ((groups_GN.float() - lowest_G1.float()) / divisor_G1).round_().clamp_(0, _LEVELS)
    return levels_GN.to(torch.uint8).flatten(), lowest_G1.flatten(), step_G1.flatten()


def _unpack_8(levels_GN: torch.Tensor, lowest_G1: torch.Tensor, step_G1: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(lowest_G1, levels_GN.to(step_G1.dtype), step_G1)


def _pack_4(groups_GN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    pairs_N1, state = _bitsandbytes().quantize_4bit(groups_GN, blocksize=_GROUP, quant_type="nf4")
    return pairs_N1.flatten(), state.absmax


def _unpack_4(pairs_GN: torch.Tensor, largest_G1: torch.Tensor) -> torch.Tensor:
    functional = _bitsandbytes()
    state = functional.QuantState(
        absmax=largest_G1.flatten().float(),
        shape=torch.Size((len(pairs_GN), _GROUP)),
        dtype=largest_G1.dtype,
        blocksize=_GROUP,
        quant_type="nf4",
    )
    return functional.dequantize_4bit(pairs_GN.view(-1, 1), state)


@cache
def _bitsandbytes() -> Any:
    # Where a processor knows bfloat16 it looks for a kernel that nothing here uses, and warns that there is none.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from bitsandbytes import functional  # takes seconds

    return functional


def _forward(layer: nn.Linear, bits: int, states: torch.Tensor) -> torch.Tensor:
    return _Product.apply(states, layer.weight, layer.bias, (layer.out_features, layer.in_features), bits)


class _Product(torch.autograd.Function):
    """``states @ weight.T + bias`` for a frozen weight in few bits."""

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, packed: nn.Parameter, bias: Any, shape: tuple[int, int], bits: int
    ) -> torch.Tensor:
        # By name, not by value: what ZeRO-3 gathered goes, and is gathered again for the backward pass.
        ctx.packed, ctx.shape, ctx.bits = packed, shape, bits
        return nn.functional.linear(states, unpack(packed.data, shape, bits), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        return gradient @ unpack(ctx.packed.data, ctx.shape, ctx.bits), None, None, None, None
