"""One pass over ``prefix ; suffix`` of a frozen causal model, with gradient through the suffix alone.

Nothing before the first thought depends on the projection. So in every layer the prefix runs first, without gradient,
and leaves its keys and values; then the suffix runs on top of them, with gradient. Doing both layer by layer, not the
whole prefix first, means that under ZeRO-3 a layer's weights are gathered once for both.

A layer is not rewritten: its own forward is called twice, with slices of the arguments that the model made for the
whole sequence (rotary embeddings, positions) and with a stand-in for the cache. So whatever the family does in a layer,
it does here. Only the attention masks are made here: by position, so that sliding windows stay right where padding
stands between shared tokens and the rest of a prefix, and without looking at what is in them, which would wait for the
GPU.

Several rows may have their prefix in common, as the chains of one question have, which differ in their thoughts: it
then runs once for all of them.

B rows, C rows next to each other with one prefix, A = B / C prefixes, I shared tokens, L prefix tokens, R suffix tokens
(thoughts among them), S = L + R, N = I + S, K kept positions, D width, V vocabulary.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from softcot_ds.models.backbone import cache_name, keeps_keys_and_values
from softcot_ds.models.loss import cross_entropy, fused_cross_entropy, runs_liger
from softcot_ds.models.shared_prefix import KeysValues, SharedPrefix
from softcot_ds.models.slices import is_sliced


def why_unsupported(model: PreTrainedModel) -> str | None:
    """Why a model cannot run this way, or None when it can: its layers must keep keys and values and nothing else."""
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        return "its decoder has no list of layers"
    config = model.config.get_text_config()
    if not keeps_keys_and_values(config):
        return "some of its layers keep other states than keys and values"
    attention = set(getattr(config, "layer_types", None) or ())
    if not attention <= {"full_attention", "sliding_attention"} or getattr(config, "attention_chunk_size", None):
        return "some of its layers attend neither to all earlier tokens nor to a sliding window"
    if getattr(config, "use_bidirectional_attention", None) or not getattr(config, "is_causal", True):
        return "it is not causal"
    if not all(cache_name(layer.forward) for layer in layers):
        return "its layers take no cache of keys and values"
    return None


@dataclass
class _Call:
    """One pass under way."""

    prefix_length: int
    length: int
    """S."""
    keep_K: torch.Tensor
    targets_K: torch.Tensor | None
    """What should follow, where head and cross entropy are one; None for logits."""
    shared: SharedPrefix | None
    chains: int = 1
    """C."""
    masks: dict[int | None, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """What prefix and suffix may attend to in a layer, by its sliding window."""
    prefix_ALD: torch.Tensor | None = None
    parts: dict[torch.Tensor, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """Of each tensor that the model gives its layers, that of the prefix and of the suffix: cut once for all layers."""

    def part(self, values: Any, which: int) -> Any:
        """Cut every (., S, ...) tensor in ``values`` to the prefix, 0, or the suffix, 1."""
        if isinstance(values, torch.Tensor):
            if values.ndim < 2 or values.shape[1] != self.length:
                return values
            if values not in self.parts:
                # In one piece each, as kernels want them, which would copy them in each layer.
                cut = values[:: self.chains, : self.prefix_length], values[:, self.prefix_length :]
                self.parts[values] = cut[0].contiguous(), cut[1].contiguous()
            return self.parts[values][which]
        if isinstance(values, tuple):
            return tuple(self.part(value, which) for value in values)
        if isinstance(values, dict):
            return {key: self.part(value, which) for key, value in values.items()}
        return values


class _Recorder:
    """Stands in for a cache while the prefix runs: remembers the keys and values, after the shared ones."""

    def __init__(self, shared: KeysValues | None) -> None:
        self.states = shared

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> KeysValues:
        if self.states is not None:
            past_keys, past_values = self.states
            keys, values = torch.cat([past_keys, keys], dim=2), torch.cat([past_values, values], dim=2)
        self.states = keys, values
        return keys, values


class _Replay:
    """Stands in for a cache while the suffix runs: changes nothing, so the layer may be run again (checkpointing)."""

    def __init__(self, states: KeysValues, chains: int) -> None:
        """``states``: of A prefixes."""
        self._states = states
        self._chains = chains

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> KeysValues:
        past_keys, past_values = self._states
        return self._behind(past_keys, keys), self._behind(past_values, values)

    def _behind(self, past: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """(B, heads, ., head width): what each row has of its own, behind what it has in common with others."""
        own = own.unflatten(0, (-1, self._chains))
        return torch.cat([past[:, None].expand(-1, self._chains, -1, -1, -1), own], dim=3).flatten(0, 1)


class FrozenPrefix:
    """Lets a model run ``prefix ; suffix`` as described above; otherwise the model works as before."""

    def __init__(self, model: PreTrainedModel, activation_checkpointing: bool = False) -> None:
        self._model = model
        self._checkpointing = activation_checkpointing
        self._call: _Call | None = None
        self._layers = model.get_decoder().layers
        cache = DynamicCache(config=model.config.get_text_config())
        self._windows = [getattr(layer, "sliding_window", None) for layer in cache.layers]
        head = model.get_output_embeddings()
        # No subclass: quantized weights; nor a slice of a head.
        plain = type(head) is nn.Linear and head.bias is None and not is_sliced(head.weight)
        self._head = head if plain else None
        self._forwards = {module: module.forward for module in self._layers}
        for index, layer in enumerate(self._layers):
            names = list(inspect.signature(layer.forward).parameters)
            layer.forward = partial(self._run_layer, index, names, cache_name(layer.forward), layer.forward)
        if self._head is not None:
            self._forwards[self._head] = self._head.forward
            self._head.forward = partial(self._run_head, self._head.forward)
        self._trial: torch.Tensor | None = None
        self.fuses_loss: bool | None = None
        """Whether head and cross entropy are one, without logits; None before the first pass, which finds out."""

    def remove(self) -> None:
        """Give the model its own layers and head back."""
        for module, forward in self._forwards.items():
            module.forward = forward

    def loss(
        self,
        embeds_BSD: torch.Tensor,
        mask_BN: torch.Tensor,
        positions_BS: torch.Tensor,
        prefix_length: int,
        keep_K: torch.Tensor,
        targets_K: torch.Tensor,
        shared: SharedPrefix | None = None,
        chains: int = 1,
    ) -> torch.Tensor:
        """Cross entropy at chosen positions of the suffix, summed.

        Args:
            embeds_BSD: the prefix, padded on the left, and the suffix.
            mask_BN: int64, 0 on padding; the tokens of ``shared`` come first.
            positions_BS: int64, the position of each token.
            prefix_length: L.
            keep_K: int64 indices into the flattened (B, R) suffix. The head runs on these alone.
            targets_K: int64, the tokens that should follow there.
            chains: C; the prefix of the first of C rows counts for all of them.

        Returns:
            A scalar as of ``loss.cross_entropy``, with gradient with respect to the suffix part of ``embeds_BSD``.
        """
        if self.fuses_loss is None:
            self.fuses_loss = (
                self._head is not None
                and runs_liger(embeds_BSD.device, embeds_BSD.dtype)
                and self._head_makes_logits(embeds_BSD)
            )
        fused = targets_K if self.fuses_loss else None
        call = _Call(prefix_length, embeds_BSD.shape[1], keep_K, fused, shared, chains)
        found_1KV = self._run(call, embeds_BSD, mask_BN, positions_BS)  # with the loss in its place where they are one
        return found_1KV.squeeze() if self.fuses_loss else cross_entropy(found_1KV[0], targets_K)

    def logits(
        self,
        embeds_BSD: torch.Tensor,
        mask_BN: torch.Tensor,
        positions_BS: torch.Tensor,
        prefix_length: int,
        keep_K: torch.Tensor,
        shared: SharedPrefix | None = None,
        chains: int = 1,
    ) -> torch.Tensor:
        """(K, V) logits at the positions ``keep_K`` of the suffix; arguments as of ``loss``."""
        call = _Call(prefix_length, embeds_BSD.shape[1], keep_K, None, shared, chains)
        return self._run(call, embeds_BSD, mask_BN, positions_BS)[0]

    def _run(
        self, call: _Call, embeds_BSD: torch.Tensor, mask_BN: torch.Tensor, positions_BS: torch.Tensor
    ) -> torch.Tensor:
        for window, mask in self._masks(mask_BN, positions_BS, embeds_BSD.dtype).items():
            cut = partial(_rows, total=call.length)
            call.masks[window] = (
                cut(mask[:: call.chains], 0, call.prefix_length),
                cut(mask, call.prefix_length, call.length),
            )
        self._call = call
        try:
            # A mask of four dimensions stops the model from making one; the layers get theirs from the call.
            return self._model(
                inputs_embeds=embeds_BSD,
                attention_mask=mask_BN[:, None, None],
                position_ids=positions_BS,
                use_cache=False,
            ).logits
        finally:
            self._call = None

    def read_shared(self, ids_I: torch.Tensor) -> SharedPrefix:
        """Run tokens that every prefix begins with."""
        # A cache that knows of no window keeps the keys of all of them: the masks here count them all.
        return SharedPrefix.read(self._model.get_decoder(), ids_I, DynamicCache())

    @torch.no_grad()
    def _head_makes_logits(self, embeds_BSD: torch.Tensor) -> bool:
        """Whether logits are a plain product with the head's weight, which families that scale or cap them change.

        No list of families: the model is given logits in the head's place, and must return them as they are.
        """
        trial_V = torch.linspace(-1000, 1000, self._head.out_features, dtype=embeds_BSD.dtype, device=embeds_BSD.device)
        self._trial = trial_V[None, None]
        try:
            logits = self._model(inputs_embeds=embeds_BSD[:1, :1].detach(), use_cache=False).logits
            return torch.equal(logits.to(trial_V.dtype), self._trial)
        finally:
            self._trial = None

    def _run_head(self, forward: Callable[..., torch.Tensor], states_1KD: torch.Tensor) -> torch.Tensor:
        if self._trial is not None:
            return self._trial
        if self._call is None or self._call.targets_K is None:
            return forward(states_1KD)
        # Here, inside the head's own forward, because a partitioned weight exists nowhere else.
        loss = fused_cross_entropy(states_1KD[0], self._head.weight, self._call.targets_K)
        return loss[None, None, None]  # in the place of logits, and with as many dimensions

    def _masks(
        self, mask_BN: torch.Tensor, positions_BS: torch.Tensor, dtype: torch.dtype
    ) -> dict[int | None, torch.Tensor]:
        """Masks by window, (B, 1, S, N): what attention adds to its scores; of bool ones each layer would make it."""
        config = self._model.config.get_text_config()
        if is_flash_attention_requested(config):
            return dict.fromkeys(self._windows, mask_BN)  # the kernels leave padding out and count what remains
        batch, queries = positions_BS.shape
        index_N = torch.arange(mask_BN.shape[1], device=mask_BN.device)
        shared = len(index_N) - queries
        keys_BN = torch.cat([index_N[:shared].expand(batch, -1), positions_BS], dim=1)
        distance_BSN = positions_BS[:, :, None] - keys_BN[:, None, :]
        # Padding sees itself: nobody reads what comes of it, but a softmax over nothing could give NaN, and zero times
        # NaN is NaN.
        itself_1SN = index_N[None, shared:, None] == index_N
        hidden = torch.finfo(dtype).min if config._attn_implementation == "eager" else -torch.inf
        keys = mask_BN.shape[1]
        masks = {}
        for window in set(self._windows):
            near_BSN = distance_BSN >= 0 if window is None else (distance_BSN >= 0) & (distance_BSN < window)
            allowed_B1SN = (near_BSN & mask_BN.bool()[:, None] | itself_1SN)[:, None]
            # Rows begin at multiples of 16 bytes, as GPU kernels want: PyTorch would make a padded copy in each layer.
            room_B1SX = torch.zeros(batch, 1, queries, keys + -keys % 8, dtype=dtype, device=mask_BN.device)
            masks[window] = room_B1SX[..., :keys].masked_fill_(~allowed_B1SN, hidden)
        return masks

    def _run_layer(
        self,
        index: int,
        names: list[str],
        cache: str,
        forward: Callable[..., torch.Tensor],
        /,  # the layer's own names, ``cache`` among them, go into kwargs
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        call = self._call
        if call is None:
            return forward(*args, **kwargs)
        kwargs |= zip(names, args, strict=False)  # some families pass masks and positions without their names
        hidden = kwargs.pop(names[0])  # (B, S, D) into the first layer, (B, R, D) into the others
        length = call.prefix_length
        if index == 0:
            # Between the layers only the suffix is handed on by the model; the prefix waits in the call.
            call.prefix_ALD, hidden = hidden[:: call.chains, :length], hidden[:, length:]
        prefix_mask, suffix_mask = call.masks[self._windows[index]]
        kwargs.pop("attention_mask", None)
        kwargs.pop(cache, None)
        states = call.shared.layer(index, len(hidden) // call.chains) if call.shared is not None else None
        if length:
            recorder = _Recorder(states)
            with torch.no_grad():
                call.prefix_ALD = forward(
                    call.prefix_ALD,
                    attention_mask=prefix_mask,
                    **{cache: recorder},
                    **call.part(kwargs, 0),
                )
            states = recorder.states
        run = partial(
            forward,
            attention_mask=suffix_mask,
            **{cache: None if states is None else _Replay(states, call.chains)},
            **call.part(kwargs, 1),
        )
        hidden_BRD = checkpoint(run, hidden, use_reentrant=False) if self._checkpointing else run(hidden)
        if index == len(self._layers) - 1:
            # What follows, final norm and head, works on each position alone: give it the chosen ones only.
            return hidden_BRD.flatten(0, 1)[call.keep_K][None]
        return hidden_BRD


def _rows(mask: torch.Tensor, start: int, stop: int, total: int) -> torch.Tensor:
    """The mask of queries ``start`` to ``stop``, whose keys end with themselves.

    ``mask`` is (B, 1, queries, keys), or (B, keys) as flash attention takes it; keys may have a past that queries have
    not.
    """
    keys = mask.shape[-1] - (total - stop)
    return mask[..., :keys] if mask.ndim == 2 else mask[:, :, start:stop, :keys]
