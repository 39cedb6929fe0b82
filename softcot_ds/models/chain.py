"""A model's passes over rows that grow, with gradient: one after the other on top of the keys and values of all before.

Rows are padded on the left, and what is read next stands at the same places in all of them. Gradient flows through the
keys and values: what is read last moves what was read first.

B rows, S tokens of a pass, N tokens read so far, D width, V vocabulary.
"""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from softcot_ds.models.assistant import decoder_of
from softcot_ds.models.backbone import cache_name, context_length


class Chain:
    """Rows on their way through a model whose layers keep keys and values and nothing else."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._most = context_length(model.config)
        # One that knows of no window keeps the keys of all tokens: the mask has the window.
        self._cache = DynamicCache()
        self._mask_BN: torch.Tensor | None = None

    def states(self, embeds_BSD: torch.Tensor, mask_BS: torch.Tensor | None = None) -> torch.Tensor:
        """(B, S, D) last hidden states, after the final norm, of what stands next in each row.

        Args:
            embeds_BSD: in the model's dtype.
            mask_BS: bool, False on padding in front of a row, in its first pass; None without any. What stands behind
                the end of a row, in its last pass, no causal model sees: nothing is said of it.
        """
        return self._read(decoder_of(self._model), embeds_BSD, mask_BS).last_hidden_state

    def logits(self, embeds_BSD: torch.Tensor, mask_BS: torch.Tensor | None = None) -> torch.Tensor:
        """(B, S, V) logits of what stands next in each row; arguments as of ``states``."""
        return self._read(self._model, embeds_BSD, mask_BS).logits

    @property
    def length(self) -> int:
        """N, padding included."""
        return self._mask_BN.shape[1]

    def back_to(self, length: int) -> None:
        """Forget what stands behind the first so many positions."""
        self._mask_BN = self._mask_BN[:, :length]
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]

    def _read(self, module: nn.Module, embeds_BSD: torch.Tensor, mask_BS: torch.Tensor | None) -> Any:
        if mask_BS is None:
            mask_BS = torch.ones(embeds_BSD.shape[:2], dtype=torch.bool, device=embeds_BSD.device)
        self._mask_BN = mask_BS if self._mask_BN is None else torch.cat([self._mask_BN, mask_BS], dim=1)
        inputs: dict[str, Any] = {cache_name(module.forward): self._cache}
        if "position_ids" in inspect.signature(module.forward).parameters:
            positions_BN = (self._mask_BN.cumsum(dim=1) - 1).clamp(min=0, max=self._most - 1)
            inputs["position_ids"] = positions_BN[:, -embeds_BSD.shape[1] :]
        return module(
            inputs_embeds=embeds_BSD,
            attention_mask=self._mask_BN.long(),
            use_cache=True,
            **inputs,
        )
