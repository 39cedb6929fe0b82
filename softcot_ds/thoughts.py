"""Running the assistant: its hidden states at the placeholders are the soft thoughts."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from softcot_ds.data import pad
from softcot_ds.prompts import AssistantInput


@torch.no_grad()
def compute_thoughts(assistant: PreTrainedModel, inputs: Sequence[AssistantInput]) -> torch.Tensor:
    """The assistant's last hidden states, after the final norm, at the placeholders.

    Args:
        assistant: causal language model; its head is not run.
        inputs: B inputs with T placeholders each, which end with their last placeholder.

    Returns:
        (B, T, P) in the assistant's dtype, on its device.
    """
    device = assistant.get_input_embeddings().weight.device
    ids, mask = pad([item.token_ids for item in inputs], 0, side="left")
    ids, mask = ids.to(device), mask.to(device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    hidden = assistant.get_decoder()(
        input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=False
    ).last_hidden_state
    # Left padding aligns the ends: a placeholder's distance from the end is the same in the padded batch.
    slots = torch.tensor([[p - len(item.token_ids) for p in item.positions] for item in inputs], device=device)
    slots += ids.shape[1]
    return hidden.gather(1, slots[:, :, None].expand(-1, -1, hidden.shape[-1]))
