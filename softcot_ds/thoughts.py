"""Running the assistant: its hidden states at the placeholders are the soft thoughts.

The cache and ``thoughts.source=online`` both come through here: in the same batch they are equal bit for bit.
B inputs, S tokens of the longest, T placeholders each, P assistant width.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from softcot_ds.frozen_prefix import states_depend_on_length
from softcot_ds.prompts import AssistantInput


@dataclass(frozen=True)
class SharedPrefix:
    """Keys and values of the tokens that all inputs begin with: the assistant reads the instruction once."""

    ids: tuple[int, ...]
    cache: DynamicCache | None
    """Batch of one; None when nothing is shared."""

    @classmethod
    @torch.no_grad()
    def of(cls, assistant: PreTrainedModel, inputs: Sequence[AssistantInput]) -> Self:
        """Run the longest common prefix of ``inputs`` that lies before every placeholder and leaves each a token."""
        first = min((item.token_ids for item in inputs), default=[])
        last = max((item.token_ids for item in inputs), default=[])
        length = min((min(*item.positions, len(item.token_ids) - 1) for item in inputs), default=0)
        # What the smallest and the largest in lexicographic order share, all between them share.
        while first[:length] != last[:length]:
            length -= 1
        if not length or states_depend_on_length(assistant):
            return cls((), None)
        cache = DynamicCache(config=assistant.config.get_text_config())
        ids = torch.tensor([first[:length]], device=assistant.get_input_embeddings().weight.device)
        assistant.get_decoder()(input_ids=ids, past_key_values=cache, use_cache=True)
        # States of other kinds (linear attention, convolutions) cannot be given to a whole batch: read the prefix anew.
        if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
            return cls((), None)
        return cls(tuple(first[:length]), cache)

    def expanded(self, batch: int) -> DynamicCache | None:
        """The cache for a batch, to be extended by a forward pass, which leaves this one as it is."""
        if self.cache is None:
            return None
        expanded = copy.copy(self.cache)
        expanded.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in expanded.layers:  # a view: the forward pass concatenates, and so copies, once
            layer.keys = layer.keys.expand(batch, -1, -1, -1)
            layer.values = layer.values.expand(batch, -1, -1, -1)
        return expanded


NO_PREFIX = SharedPrefix((), None)


@torch.no_grad()
def compute_thoughts(
    assistant: PreTrainedModel, inputs: Sequence[AssistantInput], prefix: SharedPrefix = NO_PREFIX
) -> torch.Tensor:
    """The assistant's last hidden states, after the final norm, at the placeholders.

    Args:
        assistant: causal language model; its head is not run.
        inputs: T placeholders each.
        prefix: what all of them begin with, already run.

    Returns:
        (B, T, P) in the assistant's dtype, on its device.
    """
    device = assistant.get_input_embeddings().weight.device
    skip = len(prefix.ids)
    # Nothing after the last placeholder reaches it. On the right, padding reaches nothing either, so that no mask is
    # needed and every row has the same positions.
    unread = [torch.tensor(item.token_ids[skip : item.positions[-1] + 1]) for item in inputs]
    ids_BS = pad_sequence(unread, batch_first=True)
    cache = prefix.expanded(len(inputs))
    hidden_BSP = assistant.get_decoder()(
        input_ids=ids_BS.to(device), past_key_values=cache, use_cache=cache is not None
    ).last_hidden_state
    slots_BT = torch.tensor([item.positions for item in inputs], device=device) - skip
    return hidden_BSP.gather(1, slots_BT[:, :, None].expand(-1, -1, hidden_BSP.shape[-1]))
