"""liger-kernel's RMS norm, rotary embedding and SwiGLU in the layers of one frozen model.

Each is one kernel in the place of several operations, and less is kept for the backward pass.

liger-kernel's own way to patch a model changes transformers' module of its family with it, and so every other model in
the process: the assistant's states would no longer be those of the cache. So the kernels are put into the modules of
one model here. No list of families says into which. A norm or a feed-forward part gets one where result and gradient
stay what they were but for rounding, tried with its own weights; then a toy of the same configuration shows whether all
of them together, rotary embeddings among them, change nothing.
"""

import copy
import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from softcot_ds.distributed import agreed, device
from softcot_ds.models.loss import runs_liger
from softcot_ds.models.partition import gathered, whole_shape
from softcot_ds.models.toy import make_toy, said, says_the_same, toy_config
from softcot_ds.progress import count

_ROPE = "apply_rotary_pos_emb"
"""What transformers' attention layers call it."""
_ROWS = 8
_Forward = Callable[[nn.Module, torch.Tensor], torch.Tensor]


def fuse_layers(model: PreTrainedModel) -> str | None:
    """Give a loaded frozen model's modules the kernels that fit them. All ranks call it together.

    Before DeepSpeed has the model. Nothing is done where liger-kernel does not run.

    Returns:
        What was done, or why nothing was, for people; None where liger-kernel does not run.
    """
    if not runs_liger(device(), model.dtype):
        return None
    reason = None
    for rope in (True, False):
        reason = agreed(_why_not(model, rope))
        if reason is None and (counts := _fuse(model, rope)):
            parts = ", ".join(count(number, part) for part, number in sorted(counts.items()))
            return f"liger-kernel computes {parts} of the base"
    return f"liger-kernel computes no layers of the base: {reason or 'with its weights, more than rounding changes'}"


def _why_not(model: PreTrainedModel, rope: bool) -> str | None:
    """Why a toy of the model's configuration does not take the kernels."""
    try:
        toy = make_toy(toy_config(model.config)).to(device())
        fused = copy.deepcopy(toy)
        if not _fuse(fused, rope):
            return f"no norm, rotary embedding or SwiGLU of {model.config.model_type} is one of its kind"
        if says_the_same(said(fused), said(toy)):
            return None
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # each family has its own, and so have Triton's compiler, driver and interpreter
        return f"a trial ended in {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    return f"a small {model.config.model_type} with its kernels computes something else"


def _fuse(model: PreTrainedModel, rope: bool) -> Counter[str]:
    """Replace what fits; of each part, how many."""
    chosen: dict[str, tuple[str, _Forward] | None] = {}
    counts: Counter[str] = Counter()
    for module in model.get_decoder().modules():
        if "forward" in vars(module):  # a rank's slice, or 8 bits: it is replaced already
            continue
        kind = f"{type(module)} {module}"  # with its shapes and settings
        if kind not in chosen:
            chosen[kind] = _closest(module, model.dtype) or (_with_rope(module) if rope else None)
        if (found := chosen[kind]) is not None:
            part, forward = found
            module.forward = partial(forward, module)
            counts[part] += 1
    return counts


def _candidates(module: nn.Module) -> Iterator[tuple[str, _Forward]]:
    from liger_kernel.ops import LigerRMSNormFunction, LigerSiLUMulFunction

    if len(inspect.signature(module.forward).parameters) != 1:
        return
    if [name for name, _ in module.named_parameters()] == ["weight"] and len(whole_shape(module.weight)) == 1:
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        for offset, casting in ((0.0, "llama"), (0.0, "gemma"), (1.0, "gemma")):
            if epsilon is not None:  # not in place: a residual connection may read the same gradient
                yield (
                    "norm",
                    lambda norm, x, offset=offset, casting=casting: LigerRMSNormFunction.apply(
                        x, norm.weight, epsilon, offset, casting, False
                    ),
                )
    if {"gate_proj", "up_proj", "down_proj"} <= {name for name, _ in module.named_children()}:
        yield "SwiGLU", lambda mlp, x: mlp.down_proj(LigerSiLUMulFunction.apply(mlp.gate_proj(x), mlp.up_proj(x)))


def _closest(module: nn.Module, dtype: torch.dtype) -> tuple[str, _Forward] | None:
    """Of what may replace a module's forward, what is nearest to it, but for rounding the same; None if nothing is."""
    candidates = list(_candidates(module))
    if not candidates:
        return None
    weights = list(module.parameters())
    width = module.gate_proj.in_features if hasattr(module, "gate_proj") else whole_shape(module.weight)[0]
    x = torch.randn(_ROWS, width, generator=torch.Generator().manual_seed(0)).to(device(), dtype)
    with gathered(*weights):
        truth, *found = (_run(forward, x) for forward in (module.forward, *(partial(f, module) for _, f in candidates)))
    errors = [_error(results, truth) for results in found]
    best = min(range(len(candidates)), key=errors.__getitem__)
    return candidates[best] if errors[best] <= 4 * torch.finfo(dtype).eps else None


def _run(forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> list[torch.Tensor] | None:
    """The result, and a gradient: not of its squares, whose sum is the same for a norm whatever it reads. None where
    it does not run: a part that wants something else, a kernel that does not compile."""
    try:
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            result = forward(x)
            return [result.detach(), *torch.autograd.grad(result, [x], [x.detach().flip(0)])]
    except torch.OutOfMemoryError:
        raise  # says nothing about the module
    except Exception:  # each family has its own, and so have Triton's compiler, driver and interpreter
        return None


def _error(found: list[torch.Tensor] | None, truth: list[torch.Tensor] | None) -> float:
    """Of result and gradient, relative, the larger one."""
    if found is None or truth is None:
        return math.inf
    return max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(found, truth, strict=True))


def _with_rope(module: nn.Module) -> tuple[str, _Forward] | None:
    """The forward of an attention layer, as it is but for the function that rotates; None where it calls none."""
    forward = type(module).forward
    if not isinstance(forward, FunctionType) or _ROPE not in forward.__code__.co_names:
        return None
    scope = forward.__globals__ | {_ROPE: _rotate}
    own = FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
    own.__kwdefaults__ = forward.__kwdefaults__
    return "rotary embedding", own


def _rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    from liger_kernel.ops import LigerRopeFunction

    return LigerRopeFunction.apply(q, k, cos, sin)
