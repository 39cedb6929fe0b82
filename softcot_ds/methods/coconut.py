"""Coconut (arXiv:2412.06769): steps of a solution are thought instead of written, in the base's own last hidden states.

    prompt ; begin ; n latents ; end ; the other steps and the answer

The last hidden state at ``begin`` is the input of the first latent, that at a latent the input of the next: a pass of
the base for each, on top of the keys and values of all before, with gradient through them. Latents of a batch stand at
the same places, so that all rows share the passes. Training goes through stages: in stage k the first k steps are left
out, and c latents for each stand in their place; only what is written is supervised.

B batch, L prompt tokens, n latents, T = n + 2 with what stands around them, S tokens of a pass, R written tokens, K
supervised ones, D base width.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
from torch import nn
from transformers import PreTrainedModel

from softcot_ds.data.batches import Batch
from softcot_ds.data.examples import Example
from softcot_ds.errors import SoftCoTError
from softcot_ds.methods.base import Given, Rest
from softcot_ds.methods.conditioning import Weights
from softcot_ds.methods.full import Full
from softcot_ds.methods.lora import Lora
from softcot_ds.methods.prompt_tuning import random_token_embeddings
from softcot_ds.methods.thinking import Thinking
from softcot_ds.models.assistant import check_length
from softcot_ds.models.chain import Chain
from softcot_ds.models.embedding import device_of
from softcot_ds.models.loss import cross_entropy, token_losses
from softcot_ds.models.partition import gathered
from softcot_ds.recipe import Recipe

_MARKERS = "markers"


def _markers(markers_2D: torch.Tensor, like_BSD: torch.Tensor) -> Sequence[torch.Tensor]:
    """(B, 1, D) each."""
    return markers_2D.to(like_BSD).expand(len(like_BSD), -1, -1).split(1, dim=1)


def _think(
    chain: Chain, begun_BSD: torch.Tensor, mask_BL: torch.Tensor, count: int
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """The latents, (B, 1, D) each, after prompts and ``begin``; and what is to be read next, before ``end``, with its
    mask: the last of them."""
    one_B1 = torch.ones_like(mask_BL[:, :1])
    next_BSD, mask_BS, latents = begun_BSD, torch.cat([mask_BL, one_B1], dim=1), []
    for _ in range(count):
        next_BSD, mask_BS = chain.states(next_BSD, mask_BS)[:, -1:], one_B1
        latents.append(next_BSD)
    return latents, next_BSD, mask_BS


class _Coconut(Thinking):
    """The base, trained, and two vectors of their own that it reads around latents."""

    fewest_thoughts = 2
    around = "two vectors stand around"

    markers: nn.Parameter
    """(2, D) ``begin`` and ``end``."""

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        super().check(recipe)
        steps = recipe.training.num_steps
        count = recipe.trained_to(steps).thoughts.count
        if recipe.thoughts.count != count:
            raise SoftCoTError(
                f"thoughts.count={recipe.thoughts.count}: coconut.stage_steps and latents_per_step come to "
                f"{count - 2} latents in step {steps}, the last, and two vectors stand around them; "
                f"set it to {count}"
            )

    @classmethod
    def example_at(cls, example: Example, step: int | None, recipe: Recipe, rest: Rest) -> Example:
        coconut = recipe.coconut
        skipped, latents = coconut.stage(recipe.training.num_steps) if step is None else coconut.drawn_stage(step)
        places = replace(example.assistant, positions=list(range(latents + 2)))
        return replace(example, assistant=places, target_ids=rest(example.problem, skipped))

    @classmethod
    def build(cls, given: Given) -> Self:
        cls.check_keeps(given)
        generator_state = torch.get_rng_state()
        torch.manual_seed(given.recipe.seed)
        markers_2D = random_token_embeddings(given.base, 2)
        torch.set_rng_state(generator_state)
        method = super().build(given)
        method.markers = nn.Parameter(markers_2D)
        return method

    @classmethod
    def num_trained(cls, recipe: Recipe, widths: tuple[int, int], base: PreTrainedModel) -> int:
        return super().num_trained(recipe, widths, base) + 2 * widths[1]

    def trained(self) -> dict[str, nn.Parameter]:
        return super().trained() | {_MARKERS: self.markers}

    def settled(self) -> Self:
        like = self.base.get_input_embeddings().weight
        self.markers.data = self.markers.data.to(device_of(self.base.get_input_embeddings()), like.dtype)
        return super().settled()

    @classmethod
    def apply_adapter(cls, base: PreTrainedModel, folder: Path, weights: Weights) -> None:
        own = {name: value for name, value in weights.items() if name != _MARKERS}
        super().apply_adapter(base, folder, own)

    @classmethod
    def roll_out(
        cls, base: PreTrainedModel, weights: Weights, prompt_BLD: torch.Tensor, mask_BL: torch.Tensor, count: int
    ) -> torch.Tensor:
        begin_B1D, end_B1D = _markers(weights[_MARKERS], prompt_BLD)
        latents, *_ = _think(Chain(base), torch.cat([prompt_BLD, begin_B1D], dim=1), mask_BL, count - 2)
        return torch.cat([begin_B1D, *latents, end_B1D], dim=1)

    def forward(self, batch: Batch, per_token: bool = False) -> torch.Tensor:
        """See ``Method``. Each row has T thoughts, of which all but two are latents."""
        check_length(batch.longest, self.base)
        num_thoughts = len(batch.assistant[0].positions)
        chain, ids = Chain(self.base), torch.cat([batch.prefix_ids, batch.suffix_ids], dim=1)
        prompt_BLD, written_BRD = self.base.get_input_embeddings()(ids).tensor_split([batch.prefix_ids.shape[1]], dim=1)
        begin_B1D, end_B1D = _markers(self.markers, prompt_BLD)
        begun_BSD = torch.cat([prompt_BLD, begin_B1D], dim=1)
        _, next_BSD, mask_BS = _think(chain, begun_BSD, batch.prefix_mask, num_thoughts - 2)
        rest_BSD = torch.cat([end_B1D, written_BRD], dim=1)
        rest_mask_BS = mask_BS.new_ones(rest_BSD.shape[:2])  # nobody sees the padding behind a row
        logits_BSV = chain.logits(torch.cat([next_BSD, rest_BSD], dim=1), torch.cat([mask_BS, rest_mask_BS], dim=1))
        width = num_thoughts + batch.suffix_ids.shape[1]
        logits_KV = logits_BSV[batch.predict_at // width, batch.predict_at % width - width]
        return (token_losses if per_token else cross_entropy)(logits_KV, batch.targets)

    def thoughts(self, batch: Batch) -> torch.Tensor:
        prompt_BLD = self.base.get_input_embeddings()(batch.prefix_ids)
        with gathered(self.markers):  # as DeepSpeed does where this module is called
            weights, count = {_MARKERS: self.markers}, len(batch.assistant[0].positions)
            return self.roll_out(self.base, weights, prompt_BLD, batch.prefix_mask, count)


class Coconut(_Coconut, Lora):
    """Of the base low-rank matrices are trained, by the recipe's section ``lora``."""


class CoconutFull(_Coconut, Full):
    """All weights of the base are trained, as by the paper."""
