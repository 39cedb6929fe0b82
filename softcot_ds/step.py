"""The training step: from a batch to the loss, with only the work that the projection's gradient needs.

B batch, L prefix tokens, T thoughts, R suffix and target tokens, D base width, V vocabulary.

The base is causal and frozen, so nothing before the first thought depends on the projection: the prefix runs without
gradient and only leaves its keys and values behind. ``step="full"`` is the naive step, kept as an oracle: one pass over
the whole sequence with gradient, logits everywhere. Both give the same loss and the same gradient.
"""

from typing import Literal

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from softcot_ds.data import IGNORE, Batch
from softcot_ds.projection import LinearProjection, StaticThoughts
from softcot_ds.thoughts import compute_thoughts


class SoftCoT(nn.Module):
    """The frozen base and the trained projection; the frozen assistant too, when thoughts are computed online."""

    def __init__(
        self,
        base: PreTrainedModel,
        projection: LinearProjection | StaticThoughts,
        assistant: PreTrainedModel | None = None,
        step: Literal["fast", "full"] = "fast",
    ) -> None:
        super().__init__()
        self.base = base
        self.projection = projection
        self.assistant = assistant
        self.step = step

    def forward(self, batch: Batch) -> torch.Tensor:
        """Cross entropy summed over the supervised tokens of the batch, in nats; float32 scalar.

        It is a sum because the mean is over the global batch, whose token count the caller knows.
        """
        embeds, mask, positions = self._inputs(batch)
        prefix_length = batch.prefix_ids.shape[1]
        if self.step == "full":
            logits = self.base(
                inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
            ).logits
            logits = logits[:, prefix_length:]
        else:
            logits = self._suffix_logits(embeds, mask, positions, prefix_length)
        # Position T - 1 + i of [thoughts ; suffix] predicts the suffix token i.
        num_suffix = batch.labels.shape[1]
        logits = logits[:, -num_suffix - 1 : -1]
        return nn.functional.cross_entropy(
            logits.float().flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE, reduction="sum"
        )

    def thoughts(self, batch: Batch) -> torch.Tensor:
        """(B, T, D) projected thoughts, in the base's dtype."""
        if isinstance(self.projection, StaticThoughts):
            return self.projection(len(batch.suffix_ids))
        hidden = batch.thoughts
        if hidden is None:
            hidden = compute_thoughts(self.assistant, batch.assistant)
        return self.projection(hidden.to(batch.suffix_ids.device))

    def _inputs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Embeddings (B, L+T+R, D), mask (B, L+T+R) and positions (B, L+T+R) of the whole sequence.

        The prefix is padded on the left and the suffix on the right, so that real tokens are adjacent.
        """
        embed = self.base.get_input_embeddings()
        thoughts = self.thoughts(batch)
        tokens = embed(torch.cat([batch.prefix_ids, batch.suffix_ids], dim=1))
        prefix, suffix = tokens.split([batch.prefix_ids.shape[1], batch.suffix_ids.shape[1]], dim=1)
        embeds = torch.cat([prefix, thoughts.to(tokens.dtype), suffix], dim=1)
        thoughts_mask = batch.prefix_mask.new_ones(thoughts.shape[:2])
        mask = torch.cat([batch.prefix_mask, thoughts_mask, batch.suffix_mask], dim=1)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        return embeds, mask.long(), positions

    def _suffix_logits(
        self, embeds: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, prefix_length: int
    ) -> torch.Tensor:
        """(B, T+R, V) logits of thoughts and suffix; gradient flows through them alone."""
        cache = DynamicCache(config=self.base.config)
        if prefix_length:
            with torch.no_grad():
                self.base.get_decoder()(
                    inputs_embeds=embeds[:, :prefix_length],
                    attention_mask=mask[:, :prefix_length],
                    position_ids=positions[:, :prefix_length],
                    past_key_values=cache,
                    use_cache=True,
                )
        return self.base(
            inputs_embeds=embeds[:, prefix_length:],
            attention_mask=mask,
            position_ids=positions[:, prefix_length:],
            past_key_values=cache,
            use_cache=True,
        ).logits
