"""Running the assistant: its hidden states at the placeholders are the soft thoughts.

The cache and ``thoughts.source=online`` both come through here: in the same batch they are equal bit for bit.
B inputs, S tokens of the longest, T placeholders each, P assistant width.
"""

import inspect
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from softcot_ds.data.prompts import AssistantInput
from softcot_ds.errors import SoftCoTError
from softcot_ds.models.backbone import context_length
from softcot_ds.models.embedding import device_of
from softcot_ds.models.shared_prefix import NO_PREFIX, SharedPrefix, common_prefix


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """What computes last hidden states without logits: ``get_decoder()``, which some families make the whole model."""
    decoder = model.get_decoder()
    if decoder is not model and isinstance(decoder, PreTrainedModel):
        return decoder
    inner = (module for module in model.modules() if isinstance(module, PreTrainedModel) and module is not model)
    return next(inner, model)


def read_shared(assistant: PreTrainedModel, inputs: Sequence[AssistantInput]) -> SharedPrefix:
    """Run the longest common prefix of ``inputs`` that lies before every placeholder and leaves each a token."""
    before = min((min(*item.positions, len(item.token_ids) - 1) for item in inputs), default=0)
    ids = common_prefix([item.token_ids for item in inputs])[:before]
    if not ids:
        return NO_PREFIX
    decoder = decoder_of(assistant)
    if "past_key_values" not in inspect.signature(decoder.forward).parameters:
        return NO_PREFIX
    cache = DynamicCache(config=assistant.config.get_text_config())
    # States of other kinds (linear attention, convolutions) cannot be given to a whole batch: read the prefix anew.
    if not {type(layer) for layer in cache.layers} <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return NO_PREFIX
    ids_I = torch.tensor(ids, device=device_of(assistant.get_input_embeddings()))
    prefix = SharedPrefix.read(decoder, ids_I, cache)
    if not cache.layers or any(layer.keys is None for layer in cache.layers):  # it keeps nothing, or somewhere else
        return NO_PREFIX
    return prefix


def check_length(length: int, model: PreTrainedModel) -> None:
    """Raises SoftCoTError when a sequence is longer than ``context_length``, for whoever calls with data of their own:
    rotary embeddings that stretch would make a row's result depend on its batch, tables of positions end there.
    """
    if length > (longest := context_length(model.config)):
        raise SoftCoTError(
            f"a sequence has {length} tokens, and {type(model).__name__} takes {longest} here; set task.max_tokens to "
            "leave such problems out, or use a model with a longer context"
        )


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

    Raises:
        SoftCoTError: an input is longer than the assistant's context.
    """
    check_length(max(item.positions[-1] + 1 for item in inputs), assistant)
    device = device_of(assistant.get_input_embeddings())
    skip = prefix.length
    # Nothing after the last placeholder reaches it. On the right, padding reaches nothing either, so that no mask is
    # needed and every row has the same positions.
    unread = [torch.tensor(item.token_ids[skip : item.positions[-1] + 1]) for item in inputs]
    ids_BS = pad_sequence(unread, batch_first=True)
    cache = prefix.expanded(len(inputs))
    hidden_BSP = decoder_of(assistant)(
        input_ids=ids_BS.to(device), past_key_values=cache, use_cache=cache is not None
    ).last_hidden_state
    slots_BT = torch.tensor([item.positions for item in inputs], device=device) - skip
    return hidden_BSP.gather(1, slots_BT[:, :, None].expand(-1, -1, hidden_BSP.shape[-1]))
