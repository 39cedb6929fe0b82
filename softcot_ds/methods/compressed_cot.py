"""Compressed CoT (arXiv:2412.13171): few states of the base in the place of a whole chain of thought.

    prompt ; k contemplation tokens ; over, once or more, up to T in all ; the answer

A contemplation token is the state after a layer in the middle at the token before it, from the prompt's last on. Two
sets of low-rank matrices stand beside the frozen base: ``ccot`` acts on contemplation tokens and on what follows,
``decode`` on what follows alone, the prompt is read by the base as it is. Training has two stages:

- ``ccot`` is to give contemplation tokens, in each layer, the states that the base itself has at chosen tokens of the
  chain, with that layer's states of the chosen ones before as inputs. All layers at the same time, each from its own
  states alone. The paper lets a trained scorer choose tokens; here they are evenly spaced, the last one among them.
- ``decode`` is to answer, behind contemplation tokens that have been made one after the other. They are constants:
  what is trained of ``ccot`` then lies above the layer that they are taken from.

In both a linear predictor learns from last states, moving nothing else, with which token contemplation is over. Where
it is, a trained vector takes all places that are left, so that all rows have T thoughts and run together.

B batch, L prompt tokens, K contemplation tokens of the longest contemplation, S positions of a pass, T thoughts, R
written tokens, D base width, V vocabulary.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self
from weakref import WeakKeyDictionary

import torch
from pydantic import ValidationError
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import PreTrainedModel

from softcot_ds.ccot_config import CompressedCoTConfig
from softcot_ds.data.batches import Batch, pad
from softcot_ds.data.examples import Example
from softcot_ds.distributed import any_rank
from softcot_ds.errors import SoftCoTError
from softcot_ds.files import read_json
from softcot_ds.methods.base import Given, Rest
from softcot_ds.methods.conditioning import Weights
from softcot_ds.methods.prompt_tuning import random_token_embeddings
from softcot_ds.methods.thinking import Thinking
from softcot_ds.models.assistant import check_length
from softcot_ds.models.chain import Chain
from softcot_ds.models.embedding import device_of
from softcot_ds.models.layer_states import LayerStates, layers_of
from softcot_ds.models.loss import cross_entropy, token_losses
from softcot_ds.models.low_rank import add_low_rank, low_rank_dropouts, low_rank_parameters, low_rank_size
from softcot_ds.models.partition import gathered, needs_all_ranks
from softcot_ds.models.places import AMONG, BEFORE, BEHIND, at, places_in
from softcot_ds.models.shared_prefix import common_prefix
from softcot_ds.recipe import Recipe

_SETTINGS_FILE = "compressed_cot.json"
_ACTS_FROM = {"ccot": AMONG, "decode": BEHIND}
_OVER, _STOP = "over", "stop"


def chosen_places(length: int, ratio: float, most: int) -> list[int]:
    """Which tokens of a chain of so many contemplation stands for, evenly spaced, the last one among them; of an empty
    chain -1, what stands before it."""
    count = min(most, max(1, math.ceil(ratio * length - 1e-9)))  # 0.1 * 30 is more than 3
    return [(number + 1) * length // count - 1 for number in range(count)]


class _Matrices:
    """Both sets of low-rank matrices beside a base, each of which acts where it is to."""

    of_base: ClassVar[WeakKeyDictionary[PreTrainedModel, "_Matrices"]] = WeakKeyDictionary()

    def __init__(self, base: PreTrainedModel, config: CompressedCoTConfig, seed: int) -> None:
        """Raises SoftCoTError where the base has no such layers."""
        layers = layers_of(base)
        self.layer = config.layer or max(1, len(layers) // 2)
        if self.layer > len(layers):
            raise SoftCoTError(
                f"compressed_cot.layer={self.layer}: {type(base).__name__} has {len(layers)} layers; name one of these"
            )
        self.num_layers = len(layers)
        self.trained_from = 0
        """The number of layers whose ``ccot`` gets no gradient."""
        self._places = places_in(base)
        for number, name in enumerate(_ACTS_FROM):
            settings, section = getattr(config, name), f"compressed_cot.{name}"
            add_low_rank(base, settings, (seed + number) % 2**64, name, section)
        for number, layer in enumerate(layers):
            for key, module in layer.named_modules():
                _, is_second, name = key.rpartition(".lora_B.")
                if is_second:
                    module.register_forward_hook(partial(self._act, _ACTS_FROM[name]))
            for key, parameter in layer.named_parameters():
                if ".ccot." in key:
                    parameter.register_hook(partial(self._hold, number))
        self.states = LayerStates(base)
        self.of_base[base] = self

    def _act(self, place: int, _module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * self._places.reached(place, output)

    def _hold(self, layer: int, gradient: torch.Tensor) -> torch.Tensor:
        # Zero and not none: DeepSpeed could take one of a step before.
        return torch.zeros_like(gradient) if layer < self.trained_from else gradient


def _parameters(base: PreTrainedModel) -> dict[str, nn.Parameter]:
    return {
        f"{name}.{key}": parameter for name in _ACTS_FROM for key, parameter in low_rank_parameters(base, name).items()
    }


def _read_prompt(
    base: PreTrainedModel, prompt_BLD: torch.Tensor, mask_BL: torch.Tensor
) -> tuple[Chain, list[torch.Tensor]]:
    """The base behind prompts, which it reads as it is; (B, 1, D) the states of each layer at the last token."""
    chain = Chain(base)
    with torch.no_grad(), at(base, BEFORE), _Matrices.of_base[base].states.kept() as states:
        chain.states(prompt_BLD, mask_BL)
    return chain, [state_BLD[:, -1:] for state_BLD in states]


@torch.no_grad()
def _contemplate(
    base: PreTrainedModel,
    chain: Chain,
    first_B1D: torch.Tensor,
    ends: tuple[torch.Tensor, torch.Tensor],
    count: int,
    lengths_B: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T, D) contemplation tokens, then ``over``; and (B, T) bool, which are contemplation tokens.

    Args:
        chain: behind the prompts.
        first_B1D: the first contemplation token.
        ends: ``over`` and ``stop``.
        count: T.
        lengths_B: how many contemplation tokens there are to be; None where ``stop`` says it.
    """
    matrices = _Matrices.of_base[base]
    over_B1D = ends[0].to(first_B1D).expand_as(first_B1D)
    next_B1D, ended_B = first_B1D, torch.zeros(len(first_B1D), dtype=torch.bool, device=first_B1D.device)
    thoughts, made = [], []
    for number in range(count - 1):
        if lengths_B is not None:
            ended_B = lengths_B <= number
        left = not ended_B.all()
        if not (any_rank(left) if needs_all_ranks(base) else left):
            break
        thoughts.append(torch.where(ended_B[:, None, None], over_B1D, next_B1D))
        made.append(~ended_B)
        if number < count - 2:
            with at(base, AMONG), matrices.states.kept() as states:
                last_B1D = chain.states(thoughts[-1])
            next_B1D = states[matrices.layer - 1]
            ended_B = ended_B | (_scores(last_B1D, ends[1])[:, 0] > 0)
    rest = count - len(thoughts)
    thoughts_BTD = torch.cat([*thoughts, over_B1D.expand(-1, rest, -1)], dim=1)
    return thoughts_BTD, torch.stack([*made, *[torch.zeros_like(ended_B)] * rest], dim=1)


def _scores(last_BSD: torch.Tensor, stop: torch.Tensor) -> torch.Tensor:
    """(B, S) logits that contemplation is over with each of these tokens, by their last states."""
    wide = _wide(last_BSD.detach())
    stop = stop.to(wide)
    return wide @ stop[:-1] + stop[-1]


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


class CompressedCoT(Thinking):
    """The frozen base with both sets of matrices, the vector that stands where contemplation is over, and what tells
    that it is."""

    around = "a vector stands behind"
    losses: ClassVar[dict[str, Literal["tokens", "problems"]]] = {
        "language_model": "tokens",  # 0 in the first stage
        "hidden_states": "problems",  # 0 in the second
        "over": "problems",
    }
    weights_file = "compressed_cot.safetensors"
    other_files = (_SETTINGS_FILE,)

    over: nn.Parameter
    """(1, D)."""
    stop: nn.Parameter
    """(D + 1,) weights of a last state, and a bias."""

    def __init__(self, base: PreTrainedModel, recipe: Recipe, over_1D: torch.Tensor) -> None:
        """Raises SoftCoTError where the base has no layers as the recipe names them."""
        self._matrices = _Matrices(base, recipe.compressed_cot, recipe.seed)
        super().__init__(base, None)
        self._recipe = recipe
        self._dropouts = low_rank_dropouts(base)
        self.over = nn.Parameter(over_1D)
        self.stop = nn.Parameter(torch.zeros(over_1D.shape[1] + 1))

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        super().check(recipe)
        if recipe.thoughts.count < 2:
            raise SoftCoTError(
                f"thoughts.count={recipe.thoughts.count}: the last is the vector that ends contemplation; set it to "
                "one more than the contemplation tokens that the longest chain may have"
            )
        if recipe.training.weight_decay:
            raise SoftCoTError(
                f"training.weight_decay={recipe.training.weight_decay:g} would shrink what method={recipe.method} "
                "holds in each of its stages; set it to 0"
            )
        cls._check_steps(recipe)

    @staticmethod
    def _check_steps(recipe: Recipe) -> None:
        steps, first = recipe.training.steps, recipe.compressed_cot.ccot_steps
        if steps is not None and first >= steps:
            raise SoftCoTError(
                f"compressed_cot.ccot_steps={first} leaves none of the {steps} steps of the training to answers; lower "
                "it, or raise training.steps"
            )

    @classmethod
    def build(cls, given: Given) -> Self:
        cls._check_steps(given.recipe)  # epochs have been counted by now
        cls.check_keeps(given)
        generator_state = torch.get_rng_state()
        torch.manual_seed(given.recipe.seed)
        over_1D = random_token_embeddings(given.base, 1)
        torch.set_rng_state(generator_state)
        return cls(given.base, given.recipe, over_1D)

    @classmethod
    def num_trained(cls, recipe: Recipe, widths: tuple[int, int], base: PreTrainedModel) -> int:
        config = recipe.compressed_cot
        sizes = [low_rank_size(base, getattr(config, name), f"compressed_cot.{name}") for name in _ACTS_FROM]
        return sum(sizes) + 2 * widths[1] + 1

    @classmethod
    def begins_anew(cls, step: int, recipe: Recipe) -> bool:
        return step == recipe.compressed_cot.ccot_steps + 1

    @classmethod
    def example_at(cls, example: Example, step: int | None, recipe: Recipe, rest: Rest) -> Example:
        """In the first stage with the whole solution and no room for thoughts, later with thoughts and the answer."""
        answer = rest(example.problem, None)
        reasoning = len(example.target_ids) - len(common_prefix([example.target_ids[::-1], answer[::-1]]))
        if step is not None and step <= recipe.compressed_cot.ccot_steps:
            nowhere = replace(example.assistant, positions=[])
            return replace(example, assistant=nowhere, num_reasoning=reasoning)
        return replace(example, target_ids=answer, num_reasoning=reasoning)

    def trained(self) -> dict[str, nn.Parameter]:
        return _parameters(self.base) | {_OVER: self.over, _STOP: self.stop}

    def settled(self) -> Self:
        embedding = self.base.get_input_embeddings()
        for parameter in self.trained().values():
            parameter.data = parameter.data.to(device_of(embedding), self.base.dtype)
        return self

    def train(self, mode: bool = True) -> Self:
        for dropout in self._dropouts:
            dropout.train(mode)
        return super().train(mode)

    def write_adapter(self, folder: Path, weights: Weights) -> None:
        super().write_adapter(folder, weights)
        settings = self._recipe.compressed_cot.model_copy(update={"layer": self._matrices.layer})
        (folder / _SETTINGS_FILE).write_text(json.dumps(settings.model_dump(mode="json"), indent=2) + "\n")

    @classmethod
    def apply_adapter(cls, base: PreTrainedModel, folder: Path, weights: Weights) -> None:
        values = read_json(folder / _SETTINGS_FILE)
        try:
            config = CompressedCoTConfig.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            raise SoftCoTError(f"{folder / _SETTINGS_FILE} is damaged: {why}; use another checkpoint") from error
        _Matrices(base, config, seed=0)
        parameters = _parameters(base)
        cls.check_fits({name: weights[name] for name in weights if name not in (_OVER, _STOP)}, parameters, folder)
        for name, parameter in parameters.items():
            parameter.data = weights[name].to(parameter.device, base.dtype)
            parameter.requires_grad_(False)

    @classmethod
    def roll_out(
        cls, base: PreTrainedModel, weights: Weights, prompt_BLD: torch.Tensor, mask_BL: torch.Tensor, count: int
    ) -> torch.Tensor:
        chain, begun = _read_prompt(base, prompt_BLD, mask_BL)
        first_B1D = begun[_Matrices.of_base[base].layer - 1]
        thoughts_BTD, _ = _contemplate(base, chain, first_B1D, (weights[_OVER], weights[_STOP]), count)
        return thoughts_BTD

    def thoughts(self, batch: Batch) -> torch.Tensor:
        prompt_BLD = self.base.get_input_embeddings()(batch.prefix_ids)
        with gathered(self.over, self.stop):  # as DeepSpeed does where this module is called
            weights, count = {_OVER: self.over, _STOP: self.stop}, len(batch.assistant[0].positions)
            return self.roll_out(self.base, weights, prompt_BLD, batch.prefix_mask, count)

    def forward(self, batch: Batch, per_token: bool = False) -> torch.Tensor:
        """See ``Method``. Of a batch without room for thoughts ``ccot`` learns from the solutions that it holds."""
        check_length(batch.longest, self.base)
        embedding, length = self.base.get_input_embeddings(), batch.prefix_ids.shape[1]
        ids = torch.cat([batch.prefix_ids, batch.suffix_ids], dim=1)
        prompt_BLD, written_BRD = embedding(ids).tensor_split([length], dim=1)
        chain, begun = _read_prompt(self.base, prompt_BLD, batch.prefix_mask)
        most, ratio = self._recipe.thoughts.count - 1, self._recipe.compressed_cot.ratio
        chosen = [chosen_places(count, ratio, most) for count in batch.num_reasoning]
        lengths_B = torch.tensor([len(places) for places in chosen], device=prompt_BLD.device)
        if not batch.assistant[0].positions:
            return self._towards_teacher(chain, begun, written_BRD, chosen, lengths_B)
        return self._answer(batch, chain, begun, written_BRD, lengths_B, per_token)

    def _towards_teacher(
        self,
        chain: Chain,
        begun: Sequence[torch.Tensor],
        solution_BRD: torch.Tensor,
        chosen: Sequence[list[int]],
        lengths_B: torch.Tensor,
    ) -> torch.Tensor:
        """The losses of the first stage.

        Args:
            begun: of each layer, the states at the prompts' last tokens.
            chosen: places in each solution.
        """
        length = chain.length
        with torch.no_grad(), at(self.base, BEFORE), self._matrices.states.kept() as read:
            chain.states(solution_BRD)
        chain.back_to(length)
        places, made_BK = pad(chosen, -1, side="right")
        from_begin_BK1 = places.to(lengths_B.device)[:, :, None] + 1
        teacher = [
            torch.cat(parts, dim=1).take_along_dim(from_begin_BK1, dim=1) for parts in zip(begun, read, strict=True)
        ]
        layer = self._matrices.layer - 1
        self._matrices.trained_from = 0
        with at(self.base, AMONG), self._matrices.states.kept(apart=True) as own:
            last_BKD = chain.states(torch.cat([begun[layer], teacher[layer][:, :-1]], dim=1))
        made_BK = made_BK.to(lengths_B.device)
        errors = [
            (_wide(found) - _wide(wanted)).square().mean(dim=-1) / _wide(wanted).var(dim=-1, correction=0)
            for found, wanted in zip(own, teacher, strict=True)
        ]
        of_problem_B = torch.stack(errors).mean(dim=0).where(made_BK, 0).sum(dim=1) / lengths_B
        return torch.stack([0 * self.over.sum(), of_problem_B.sum(), self._loss_of_end(last_BKD, lengths_B)])

    def _answer(
        self,
        batch: Batch,
        chain: Chain,
        begun: Sequence[torch.Tensor],
        written_BRD: torch.Tensor,
        lengths_B: torch.Tensor,
        per_token: bool,
    ) -> torch.Tensor:
        """The losses of the second stage, or with ``per_token`` those of the supervised tokens, as in evaluation."""
        matrices, count, length = self._matrices, len(batch.assistant[0].positions), chain.length
        known = None if per_token else lengths_B
        first_B1D = begun[matrices.layer - 1]
        latents_BTD, made_BT = _contemplate(self.base, chain, first_B1D, (self.over, self.stop), count, known)
        chain.back_to(length)
        thoughts_BTD = torch.where(made_BT[:, :, None], latents_BTD, self.over)
        matrices.trained_from = matrices.layer if self._recipe.compressed_cot.train_upper else matrices.num_layers
        with at(self.base, AMONG):
            last_BSD = chain.states(thoughts_BTD[:, :-1])
        with at(self.base, BEHIND):
            logits_BSV = chain.logits(torch.cat([thoughts_BTD[:, -1:], written_BRD], dim=1))
        width = count + batch.suffix_ids.shape[1]
        logits_KV = logits_BSV[batch.predict_at // width, batch.predict_at % width - width]
        if per_token:
            return token_losses(logits_KV, batch.targets)
        loss = cross_entropy(logits_KV, batch.targets)
        return torch.stack([loss, torch.zeros_like(loss), self._loss_of_end(last_BSD, lengths_B)])

    def _loss_of_end(self, last_BSD: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Summed over problems, of each the mean over its contemplation tokens, in nats."""
        number_S = torch.arange(last_BSD.shape[1], device=lengths_B.device)
        scores_BS = _scores(last_BSD, self.stop)
        is_last_BS = (number_S == lengths_B[:, None] - 1).to(scores_BS)
        losses_BS = binary_cross_entropy_with_logits(scores_BS, is_last_BS, reduction="none")
        return (losses_BS.where(number_S < lengths_B[:, None], 0).sum(dim=1) / lengths_B).sum()
