"""Running the assistant: its hidden states at the placeholders are the soft thoughts, of its last layer or another.

The cache and ``thoughts.source=online`` both come through here: in the same batch they are equal bit for bit.
B inputs, K chains of each, S tokens of the longest, T placeholders each, P assistant width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from softcot_ds.backbone_config import Partition
from softcot_ds.data.prompts import AssistantInput
from softcot_ds.errors import SoftCoTError
from softcot_ds.models.backbone import cache_name, context_length, load_config, load_frozen
from softcot_ds.models.embedding import device_of
from softcot_ds.models.shared_prefix import NO_PREFIX, SharedPrefix, common_prefix
from softcot_ds.recipe import Recipe


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """What computes last hidden states without logits: ``get_decoder()``, which some families make the whole model."""
    decoder = model.get_decoder()
    if decoder is not model and isinstance(decoder, PreTrainedModel):
        return decoder
    inner = (module for module in model.modules() if isinstance(module, PreTrainedModel) and module is not model)
    return next(inner, model)


def states_layer(recipe: Recipe) -> int | None:
    """The layer whose states are the thoughts, from 1 on; None for the last, whose states are after the final norm.

    Raises:
        SoftCoTError: the assistant has no such layer.
    """
    count = load_config(recipe.assistant).get_text_config().num_hidden_layers
    layer = recipe.thoughts.layer
    number = layer if layer >= 0 else count + 1 + layer
    if not 1 <= number <= count:
        raise SoftCoTError(
            f"thoughts.layer={layer}: {recipe.assistant.model} has {count} layers; set it to one from 1 to {count}, or "
            "to -1 for the last, -2 for the one before it, and so on"
        )
    return None if number == count else number


def load_to_think(
    recipe: Recipe,
    partition: Partition,
    device: torch.device,
    deepspeed_config: dict[str, Any] | None = None,
    group_size: int | None = None,
) -> PreTrainedModel:
    """The recipe's assistant by ``load_frozen``, ending after the layer that ``thoughts.layer`` names.

    Raises:
        SoftCoTError: see ``load_frozen`` and ``states_layer``; or its layers are not found.
    """
    layer = states_layer(recipe)
    model = load_frozen(recipe.assistant, partition, device, deepspeed_config, group_size)
    if layer is not None:
        end_after(model, layer)
    return model


def end_after(model: PreTrainedModel, layer: int) -> None:
    """Have a model end after so many layers: the others are let go, and the last hidden states that its decoder gives
    are what the last one left hands on, without the final norm.

    Raises:
        SoftCoTError: its layers are not found.
    """
    decoder = decoder_of(model)
    layers = _layers_of(decoder)
    if layers is None or len(layers) != model.config.get_text_config().num_hidden_layers:
        raise SoftCoTError(
            f"thoughts.layer={layer}: the layers of {type(model).__name__} are not found in it; set it to -1"
        )
    del layers[layer:]
    handed_on: list[torch.Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        handed_on[:] = [output if isinstance(output, torch.Tensor) else output[0]]

    def give(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        output.last_hidden_state = handed_on.pop()
        return output

    layers[-1].register_forward_hook(keep)
    decoder.register_forward_hook(give)


def _layers_of(decoder: nn.Module) -> nn.ModuleList | None:
    """Families call their list of layers differently; it is the longest one."""
    lists = (module for module in decoder.children() if isinstance(module, nn.ModuleList))
    return max(lists, key=len, default=None)


def read_shared(assistant: PreTrainedModel, inputs: Sequence[AssistantInput]) -> SharedPrefix:
    """Run the longest common prefix of ``inputs`` that lies before every placeholder and leaves each a token."""
    before = min((min(*item.positions, len(item.token_ids) - 1) for item in inputs), default=0)
    ids = common_prefix([item.token_ids for item in inputs])[:before]
    if not ids:
        return NO_PREFIX
    decoder = decoder_of(assistant)
    if cache_name(decoder.forward) is None:
        return NO_PREFIX
    cache = DynamicCache(config=assistant.config.get_text_config())
    if (layers := _layers_of(decoder)) is not None:
        del cache.layers[len(layers) :]  # of one that ends early (``end_after``)
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
    assistant: PreTrainedModel,
    inputs: Sequence[AssistantInput],
    prefix: SharedPrefix = NO_PREFIX,
    initial_KP: torch.Tensor | None = None,
) -> torch.Tensor:
    """The assistant's last hidden states at the placeholders: after the final norm, unless it ends early.

    Args:
        assistant: causal language model; its head is not run.
        inputs: T placeholders each.
        prefix: what all of them begin with, already run.
        initial_KP: in K chains, what the assistant reads at all placeholders in the place of their tokens' embeddings:
            vectors as its embedding module gives them out, on its device.

    Returns:
        (B, T, P), or (B, K, T, P) with ``initial_KP``, in the assistant's dtype, on its device.

    Raises:
        SoftCoTError: an input is longer than the assistant's context.
    """
    check_length(max(item.positions[-1] + 1 for item in inputs), assistant)
    device = device_of(assistant.get_input_embeddings())
    skip = prefix.length
    # Nothing after the last placeholder reaches it. On the right, padding reaches nothing either, so that no mask is
    # needed and every row has the same positions.
    unread = [torch.tensor(item.token_ids[skip : item.positions[-1] + 1]) for item in inputs]
    chains = 1 if initial_KP is None else len(initial_KP)
    ids_RS = pad_sequence(unread, batch_first=True).to(device).repeat_interleave(chains, dim=0)
    slots_BT = torch.tensor([item.positions for item in inputs], device=device) - skip
    slots_RT = slots_BT.repeat_interleave(chains, dim=0)  # R rows: K of each input, one after another
    cache, decoder = prefix.expanded(len(ids_RS)), decoder_of(assistant)
    given = {} if cache is None else {cache_name(decoder.forward): cache}
    with _embedded(assistant, slots_RT, initial_KP):
        hidden_RSP = decoder(input_ids=ids_RS, use_cache=cache is not None, **given).last_hidden_state
    states_RTP = hidden_RSP.gather(1, slots_RT[:, :, None].expand(-1, -1, hidden_RSP.shape[-1]))
    return states_RTP if initial_KP is None else states_RTP.unflatten(0, (-1, chains))


@contextmanager
def _embedded(assistant: PreTrainedModel, slots_RT: torch.Tensor, initial_KP: torch.Tensor | None) -> Iterator[None]:
    """Within, the model's embedding module gives out ``initial_KP`` at the slots, of each K rows one after another.

    The model is still given ids, so that one which looks at them elsewhere, too, reads what it knows.
    """
    if initial_KP is None:
        yield
        return
    rows_R1 = torch.arange(len(slots_RT), device=slots_RT.device)[:, None]

    def put(_module: nn.Module, _inputs: Any, embeds_RSP: torch.Tensor) -> torch.Tensor:
        embeds_RSP = embeds_RSP.clone()
        embeds_RSP[rows_R1, slots_RT] = initial_KP[rows_R1 % len(initial_KP)].to(embeds_RSP)
        return embeds_RSP

    hook = assistant.get_input_embeddings().register_forward_hook(put)
    try:
        yield
    finally:
        hook.remove()
