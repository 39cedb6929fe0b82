"""What a training step does on a GPU: its operations and the memory that they need, from the step itself, which runs
here on the meta device, where tensors have shapes and no values."""

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import DynamicCache, PreTrainedConfig

from softcot_ds.data.batches import Batch
from softcot_ds.errors import SoftCoTError
from softcot_ds.methods.base import Method, method_class
from softcot_ds.models.backbone import cache_name
from softcot_ds.planning.hardware import Gpu, Reached
from softcot_ds.planning.lengths import Lengths
from softcot_ds.planning.shapes import meta_model, shallow, slice_weights
from softcot_ds.recipe import Recipe

_FEW, _MORE = 2, 4
"""Examples of the two batches that are run: all sizes grow in a straight line from the one to the other and beyond."""


@dataclass(frozen=True)
class Work:
    """A forward and a backward pass over a batch."""

    flops: np.ndarray
    """(operations,) float64, floating-point operations of each that reads or writes memory: views do neither."""
    moved: np.ndarray
    """(operations,) float64, bytes that each reads and writes."""
    activations: float
    """Bytes beside the weights at the step's peak, but for the next."""
    loss: float
    """Bytes that head and cross entropy add."""

    def between(self, other: Self, share: float) -> "Work":
        """On the line from this to another with the same operations; ``share`` 0 is this one, 1 the other."""

        def on_line(here: Any, there: Any) -> Any:
            return here + (there - here) * share

        return Work(
            *(on_line(here, there) for here, there in zip(vars(self).values(), vars(other).values(), strict=True))
        )


@dataclass(frozen=True)
class Layers:
    """The work of a model of many layers, from two of its first few: with each further layer comes the same again."""

    first: Work
    second: Work
    """With one layer more than the first."""
    further: int
    """Layers beyond those of the first."""

    def _sum(self, of: Callable[[Work], float]) -> float:
        return of(self.first) + self.further * (of(self.second) - of(self.first))

    @property
    def activations(self) -> float:
        return self._sum(lambda work: work.activations)

    @property
    def loss(self) -> float:
        return self.second.loss

    @property
    def flops(self) -> float:
        return self._sum(lambda work: work.flops.sum())

    @property
    def operations(self) -> int:
        return round(self._sum(lambda work: len(work.flops)))

    def seconds(self, flops: float, gpu: Gpu, reached: Reached) -> float:
        """Of all operations one after another, each as slow as its products or its memory; ``flops``: at most."""
        rate, bandwidth = flops * reached.products, 1e9 * gpu.memory_gb_per_s * reached.memory
        return self._sum(lambda work: np.maximum(work.flops / rate, work.moved / bandwidth).sum())


class StepOnMeta:
    """The recipe's step, run on models of the base's first few layers."""

    def __init__(
        self,
        recipe: Recipe,
        base: PreTrainedConfig,
        layers: Sequence[int],
        assistant_width: int,
        slices: int = 1,
    ) -> None:
        """
        Args:
            layers: elements of each layer of the whole base.
            slices: ranks that share each layer, each with its slice of it (tensor parallelism).
        """
        self._recipe, self._base, self._slices, self._assistant_width = recipe, base, slices, assistant_width
        self._layers = len(layers)
        self._first = 1 + layers.index(max(set(layers), key=layers.count))  # the first of those that most are like
        self._warm: set[Method] = set()
        self.work = cache(self._work)
        self._step = cache(self._new_step)
        self._run = cache(self._new_run)
        self._read = cache(self._new_read)

    def _work(self, lengths: Lengths, size: int, checkpointing: bool) -> Layers:
        """Of a micro-batch of ``size`` examples.

        Raises:
            SoftCoTError: the step cannot run without values.
        """
        share = (size - _FEW) / (_MORE - _FEW)
        first, second = (
            self._run(lengths, _FEW, depth, checkpointing).between(
                self._run(lengths, _MORE, depth, checkpointing), share
            )
            for depth in (self._first, self._first + 1)
        )
        return Layers(first, second, self._layers - self._first)

    def _new_run(self, lengths: Lengths, size: int, depth: int, checkpointing: bool) -> Work:
        step = self._step(depth, checkpointing, lengths.shared)
        batch = lengths.batch(size, self._recipe.thoughts.count).to(torch.device("meta"))
        if step.needs_states:
            chains = (step.chains,) if self._recipe.chains else ()
            shape = size, *chains, self._recipe.thoughts.count, self._assistant_width
            batch.thoughts = torch.empty(shape, dtype=step.base.dtype, device="meta")
        with _without_values(step.base):
            if step.num_shared and step not in self._warm:
                step(batch)  # what a run reads once is read
                self._warm.add(step)
            return _traced(step, batch)

    def reading(self, rows: int, positions: int) -> float:
        """Bytes beside weights, keys and values in the pass over prompts that decoding begins with: a layer's, at most.

        Raises:
            SoftCoTError: that cannot run without values.
        """
        few, more = (self._read(size, positions) for size in (_FEW, _MORE))
        return few + (more - few) * (rows - _FEW) / (_MORE - _FEW)

    def _new_read(self, rows: int, positions: int) -> float:
        base = self._step(self._first, False, 0).base
        width = base.get_input_embeddings().weight.shape[1]
        trace = _Trace(base)
        with _without_values(base), torch.no_grad(), trace:
            embeds = torch.empty(rows, positions, width, dtype=base.dtype, device="meta")
            decoder, kept = base.get_decoder(), DynamicCache(config=base.config.get_text_config())
            decoder(inputs_embeds=embeds, use_cache=True, **{cache_name(decoder.forward): kept})
            return trace.peak - sum(layer.keys.nbytes + layer.values.nbytes for layer in kept.layers)

    def _new_step(self, depth: int, checkpointing: bool, shared: int) -> Method:
        """The step of the model's first ``depth`` layers."""
        recipe = self._recipe
        attention = "eager" if recipe.base.attention == "eager" else "sdpa"
        base = meta_model(shallow(self._base, depth), getattr(torch, recipe.base.dtype), attention)
        vocabulary, width = base.get_input_embeddings().weight.shape
        slice_weights(base, self._slices)
        head = base.get_output_embeddings()
        if (parts := vocabulary // head.weight.shape[0]) > 1:  # each rank gathers the others' logits
            head.register_forward_hook(lambda _head, _inputs, logits: torch.cat([logits] * parts, -1))
        return method_class(recipe.method).shaped(recipe, (self._assistant_width, width), base, checkpointing, shared)


def _traced(step: Method, batch: Batch) -> Work:
    step.zero_grad()
    trace = _Trace(step)
    hook = step.base.get_output_embeddings().register_forward_pre_hook(trace.enter_head)
    with trace:
        step(batch).sum().backward()  # of several losses
    hook.remove()
    extra = max(0, trace.head_peak - trace.before_head)
    return Work(np.array(trace.flops), np.array(trace.moved), trace.peak - extra, extra)


@contextmanager
def _without_values(base: nn.Module) -> Iterator[None]:
    """Has attention done in one operation, as GPUs do it; the meta device would do it in pieces.

    A TorchFunctionMode would not be in effect where the backward pass computes a layer again.

    Raises:
        SoftCoTError: in place of whatever a family's code raises that looks at values.
    """
    before = nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = _attention
    try:
        yield
    except SoftCoTError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SoftCoTError(f"{type(base).__name__} cannot be planned: it needs more than shapes: {reason}") from error
    finally:
        nn.functional.scaled_dot_product_attention = before


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if enable_gqa:
        key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], 1) for states in (key, value))
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    return attend(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


class _Trace(TorchDispatchMode):
    """Counts operations, the bytes that they move and the bytes that live, without those of the model's weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.flops: list[float] = []
        self.moved: list[float] = []
        self.peak = self._alive = 0
        self.head_peak = self.before_head = 0
        self._in_head = False
        self._known: weakref.WeakSet = weakref.WeakSet()
        for tensor in (*model.parameters(), *model.buffers()):
            self._known.add(tensor.untyped_storage())

    def enter_head(self, _module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.before_head = self.head_peak = self._alive
        self._in_head = True
        if inputs[0].requires_grad:
            inputs[0].register_hook(self._leave_head)

    def _leave_head(self, _gradient: torch.Tensor) -> None:
        self._in_head = False

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        found = _run(operation, args, kwargs or {})
        given, made = [*_tensors((args, *(kwargs or {}).values()))], [*_tensors((found,))]
        for tensor in made:
            self._see(tensor.untyped_storage())
        if not operation.is_view:
            count = flop_registry.get(operation.overloadpacket)
            flops = count(*args, **(kwargs or {}), out_val=found) if count else _grouped(operation, given)
            self.flops.append(float(flops))
            self.moved.append(float(sum(map(_bytes, (*given, *made)))))
        return found

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        self._alive += storage.nbytes()
        weakref.finalize(storage, self._forget, storage.nbytes())
        self.peak = max(self.peak, self._alive)
        if self._in_head:
            self.head_peak = max(self.head_peak, self._alive)

    def _forget(self, size: int) -> None:
        self._alive -= size


_made: dict[tuple[Any, ...], Any] = {}
"""Sizes, strides and dtypes that an operation makes of others."""


def _run(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operation makes of tensors without values. PyTorch works most of that out in Python, at a tenth of a
    millisecond each; a plan asks for the same thousands of times."""
    if operation.is_view or operation._schema.is_mutable:
        return operation(*args, **kwargs)
    asked = (operation, _form(args), *((key, _form(value)) for key, value in kwargs.items()))
    if (forms := _made.get(asked)) is not None:
        made = [torch.empty_strided(*sizes, dtype=dtype, device="meta") for *sizes, dtype in forms]
        return made[0] if len(made) == 1 else tuple(made)
    found = operation(*args, **kwargs)
    made = found if isinstance(found, list | tuple) else [found]
    given = {tensor.untyped_storage() for tensor in _tensors((args, *kwargs.values()))}
    if all(isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in given for tensor in made):
        _made[asked] = _form(tuple(made))
    return found


def _form(value: Any) -> Any:
    """Of a tensor, size, strides and dtype; of others what tells them apart, such as 2 from 2.0."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    return tuple(map(_form, value)) if isinstance(value, list | tuple) else (type(value), value)


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _bytes(tensor: torch.Tensor) -> int:
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())  # an expanded one repeats what it has


def _grouped(operation: Any, given: list[torch.Tensor]) -> float:
    """Operations of a product with the matrices of experts, which PyTorch's table lacks: each row meets one."""
    if operation.overloadpacket is not torch.ops.aten._grouped_mm:
        return 0.0
    rows, matrices = given[:2]
    return 2.0 * math.prod(rows.shape[:-1]) * rows.shape[-1] * matrices.shape[-1]
