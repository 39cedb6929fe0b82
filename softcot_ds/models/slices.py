"""Models in slices: each rank of a group holds a part of every layer, and activations move instead of weights.

transformers has a plan for most families and reads a rank's part straight from the files; PyTorch's DTensor says of a
weight what part of which whole it is. A plan may be wrong or not fit the number of ranks, and what it makes of a model
may agree with itself all the same. So it is tried first, on a small model of the same configuration, against the whole.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, DistributedConfig, PreTrainedConfig, PreTrainedModel
from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard
from transformers.distributed.tensor_parallel import get_kv_heads_per_rank
from transformers.initialization import no_tie_weights
from transformers.utils import logging as transformers_logging

from softcot_ds.distributed import device, from_all_ranks, lost_rank, world_size
from softcot_ds.models.quantized import FewBits
from softcot_ds.models.toy import layer_configs, make_toy, said, says_the_same, toy_config

_MOST_HELD = 1.5
"""What a rank may hold at most, in shares of 1/N: some plans leave the larger part of a model whole."""


_LOCAL = ("colwise", "rowwise")
"""Styles of a plan whose layers compute with plain tensors here."""


class _Groups(DistributedConfig):
    """Several groups of ranks, each of which holds a copy of the model in slices.

    transformers would take several of them for replicas that FSDP keeps alike. Frozen weights are alike anyway.
    """

    @property
    def dp_size(self) -> int:
        return 1


def _sliced_over(ranks: int) -> DistributedConfig:
    """What makes ``from_pretrained`` load slices, one of a model for each of ``ranks`` neighbouring ranks."""
    return _Groups(tp_size=ranks, dp_replicate_size=world_size() // ranks)


def slice_of(parameter: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a weight; all of it where it is not sliced."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def is_sliced(parameter: torch.Tensor) -> bool:
    """Whether the weight is one of which each rank of a group holds another part."""
    return isinstance(parameter, DTensor) and not all(placement.is_replicate() for placement in parameter.placements)


def read_slices(ranks: int, from_pretrained: Callable[..., Any], quantized: FewBits | None = None) -> Any:
    """What ``from_pretrained`` returns, a model with its loading report, the model in slices over each ``ranks`` ranks.

    All ranks call it together. The model must have been found fit by ``why_not_sliced``.

    Args:
        quantized: the layers to be held in few bits, once they are loaded.
    """
    with _quiet():
        model, info = from_pretrained(distributed_config=_sliced_over(ranks))
    _compute_locally(model, quantized)
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            # DeepSpeed's own mark of weights that differ between ranks: it gives everyone rank 0's of all others.
            parameter.ds_optim_param = True
    # DeepSpeed moves all modules to the device where this one is, which PyTorch cannot do with DTensors in use.
    model._apply = lambda *_, **__: model
    return model, info


def _compute_locally(model: PreTrainedModel, quantized: FewBits | None) -> None:
    """Have the linear layers of a plan compute with plain tensors, and sum each gradient once.

    transformers has DTensor look through every product where gradients flow, and sums the gradient of what queries,
    keys and values read for each of them: a pass and its backward pass took four times as long on toys, and five sums
    of activations a layer where two do.
    """
    group = next((p.device_mesh.get_group() for p in model.parameters() if isinstance(p, DTensor)), None)
    shared = _Shared(group)
    for name, module in model.named_modules():
        few = quantized is not None and quantized.holds(module)
        style = model.tp_plan.get(replace_layer_number_by_wildcard(name))
        if type(module) is nn.Linear and isinstance(module.weight, DTensor) and style in _LOCAL:
            product = _own_part(module)
            if few:
                quantized.quantize(product, product.weight.device)
                module.weight = product.weight
                module.weight.ds_optim_param = True  # as of other slices, see read_slices
            bias = None if module.bias is None else slice_of(module.bias).detach()
            if style == "colwise":
                product.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
                module.forward = partial(_columns, shared, product)
            else:
                module.forward = partial(_rows, group, product, bias)
        elif few:
            module.weight = _own_part(module).weight
            quantized.quantize(module, module.weight.device)


def _own_part(module: nn.Linear) -> nn.Linear:
    """A layer of what this rank holds of a layer's weight, in the same memory, and no bias."""
    weight = slice_of(module.weight).detach()
    part = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    part.weight = nn.Parameter(weight, requires_grad=False)
    return part


def _columns(shared: "_Shared", product: nn.Linear, states: torch.Tensor) -> torch.Tensor:
    """This rank's columns of a product with the whole of ``states``."""
    return product(shared(states))


def _rows(group: Any, product: nn.Linear, bias: torch.Tensor | None, states: torch.Tensor) -> torch.Tensor:
    """The whole of a product, on every rank, from each one's columns of ``states``."""
    whole = _Sum.apply(product(states), group)
    return whole if bias is None else whole + bias


class _Shared:
    """Marks what ranks read together: its gradient is the sum over them, whoever reads it after the first."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        if not (torch.is_grad_enabled() and states.requires_grad):
            return states
        if self._last is None or self._last[0] is not states:
            self._last = states, _SumGradient.apply(states, self)
        return self._last[1]

    def sum(self, gradient: torch.Tensor) -> torch.Tensor:
        """The whole gradient of what was marked, from each rank's part of it. Nobody reads it any more."""
        self._last = None
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=self._group)
        return gradient


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, shared: _Shared) -> torch.Tensor:
        ctx.shared = shared
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.shared.sum(gradient), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.mark_dirty(part)
        dist.all_reduce(part, group=group)
        return part

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers warns of every weight that its plan leaves whole."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def why_not_sliced(config: PreTrainedConfig, ranks: int, quantized: FewBits | None = None) -> str | None:
    """Why a model of this configuration cannot be held in slices by groups of ``ranks``; None when it can.

    All ranks call it together, which takes a second or two, and get the same answer. No weight is read.

    Args:
        quantized: the layers to be held in few bits.
    """
    reasons = from_all_ranks(_why_no_plan(config, ranks, quantized))
    if not any(reasons):  # the ranks must agree before they try together
        reasons = from_all_ranks(_why_toy_fails(config, ranks))
    return next((reason for reason in reasons if reason is not None), None)


def _why_no_plan(config: PreTrainedConfig, ranks: int, quantized: FewBits | None) -> str | None:
    with torch.device("meta"), no_tie_weights():  # as it is when its weights are read
        model = AutoModelForCausalLM.from_config(config)
    if not model.tp_plan:
        return f"transformers has no plan for slices of {config.model_type}"
    text = config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads"):
        for heads in {getattr(layer, name, None) for layer in layer_configs(text, 1)} - {None}:
            if get_kv_heads_per_rank(model.tp_plan, heads, ranks) is None:
                return f"{ranks} ranks do not divide its {name.removeprefix('num_').replace('_', ' ')}, {heads}"
    whole = sum(parameter.numel() for parameter in model.parameters())
    # Of table and head a rank may hold less than another.
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    ends = [name for name, module in model.named_modules() if any(module is end for end in ends)]
    with _quiet():
        groups, _, mesh = type(model).prepare_distribute_model(_sliced_over(ranks))
        model = type(model).maybe_distribute_model(model, groups, mesh)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if isinstance(parameter, DTensor) and name.rpartition(".")[0] not in ends:
            (placement,) = parameter.placements
            parts = ranks * getattr(placement, "split_factor", 1)
            if hasattr(placement, "dim") and parameter.shape[placement.dim] % parts:
                return f"{ranks} ranks do not divide {name} of {tuple(parameter.shape)}"
    for name, module in model.named_modules() if quantized is not None else ():
        if quantized.holds(module) and is_sliced(module.weight):
            style = model.tp_plan.get(replace_layer_number_by_wildcard(name))
            if style not in _LOCAL or not quantized.holds(_own_part(module)):
                return f"{ranks} ranks cannot hold their slices of {name} ({style}) in {quantized.bits} bits"
    held = sum(slice_of(parameter).numel() for parameter in parameters.values())
    if held * ranks > _MOST_HELD * whole:
        return f"transformers' plan leaves {held / whole:.0%} of {config.model_type} on each of {ranks} ranks"
    return None


def _why_toy_fails(config: PreTrainedConfig, ranks: int) -> str | None:
    """Compare a toy in slices with the whole toy: logits and the gradient with respect to the embeddings."""
    try:
        whole = make_toy(toy_config(config, ranks))
        whole.should_save_on_this_rank = bool  # on each, not on rank 0 alone: nodes share no temporary folders
        with tempfile.TemporaryDirectory() as folder:
            whole.save_pretrained(folder)
            load = partial(AutoModelForCausalLM.from_pretrained, folder, dtype=torch.float32, output_loading_info=True)
            sliced, _ = read_slices(ranks, partial(load, attn_implementation=whole.config._attn_implementation))
        found, true = said(sliced), said(whole.to(device()))
    except Exception as error:  # whatever a family's code raises when it meets a part of what it expects
        if isinstance(error, RuntimeError) and lost_rank(error):
            raise
        reason = (str(error).strip() or "no message").splitlines()[0]
        return f"a small model of its configuration in slices ended in {type(error).__name__}: {reason}"
    if says_the_same(found, true):
        return None
    return f"transformers' plan for slices of {config.model_type} computes something else"
