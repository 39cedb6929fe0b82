"""Decoding: prompts with thoughts in, tokens out."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedModel

from softcot_ds.data import pad
from softcot_ds.prompts import BasePrompt


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int
    temperature: float = 0.0
    """0 takes the most likely token."""
    top_p: float = 1.0


@dataclass(frozen=True)
class Output:
    """What the model wrote after one prompt."""

    token_ids: list[int]
    """Without the stop token."""
    cut: bool
    """It ended at ``max_new_tokens``, not at a stop token."""


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    prompts: Sequence[BasePrompt],
    thoughts: torch.Tensor | None,
    stop_ids: list[int],
    sampling: Sampling,
    synced: bool = False,
) -> list[Output]:
    """Continue a batch of prompts, padded on the left.

    Args:
        prompts: B prompts ``prefix ; thoughts ; suffix``.
        thoughts: (B, T, D), or None to decode without any.
        stop_ids: tokens that end an output.
        synced: the model is partitioned over ranks: go on until every rank is done, as each forward pass needs all.

    Returns:
        The output of each prompt.
    """
    embed = model.get_input_embeddings()
    device = embed.weight.device
    # One lookup for the whole batch: a partitioned table is gathered once, by every rank alike.
    ids, _ = pad([prompt.prefix_ids + prompt.suffix_ids for prompt in prompts], stop_ids[0], side="right")
    rows = []
    for index, (prompt, tokens) in enumerate(zip(prompts, embed(ids.to(device)), strict=True)):
        prefix, suffix, _ = tokens.tensor_split(
            [len(prompt.prefix_ids), len(prompt.prefix_ids) + len(prompt.suffix_ids)]
        )
        between = [] if thoughts is None else [thoughts[index].to(device, tokens.dtype)]
        rows.append(torch.cat([prefix, *between, suffix]))
    longest = max(len(row) for row in rows)
    embeds = torch.stack([torch.nn.functional.pad(row, (0, 0, longest - len(row), 0)) for row in rows])
    lengths = torch.tensor([[len(row)] for row in rows], device=device)
    mask = (torch.arange(longest, device=device) >= longest - lengths).long()
    sampled = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if sampling.temperature else {}
    # What a model brings along (Qwen2.5: a repetition penalty) would apply wherever nothing is said below.
    model.generation_config = GenerationConfig()
    outputs = model.generate(
        inputs_embeds=embeds,
        attention_mask=mask,
        max_new_tokens=sampling.max_new_tokens,
        do_sample=bool(sampled),
        **sampled,
        eos_token_id=stop_ids,
        pad_token_id=stop_ids[0],
        synced_gpus=synced,
    )
    return [_until_stop(row, set(stop_ids)) for row in outputs.tolist()]


def _until_stop(row: list[int], stops: set[int]) -> Output:
    end = next((i for i, token in enumerate(row) if token in stops), None)
    return Output(row[:end], cut=end is None)
