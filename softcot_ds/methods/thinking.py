"""What methods share whose thoughts are the base's own states, given back to it: in the place of a solution's steps.

B prompts, L prompt tokens, T thoughts, D base width.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from softcot_ds.data.batches import pad
from softcot_ds.data.chat import Messages
from softcot_ds.data.examples import Example, example_without_assistant
from softcot_ds.data.prompts import AssistantPrompts, BasePrompt, BasePrompts
from softcot_ds.distributed import max_over_ranks
from softcot_ds.errors import SoftCoTError
from softcot_ds.methods.base import Given
from softcot_ds.methods.conditioning import Weights
from softcot_ds.methods.trained_base import TrainedBase
from softcot_ds.models.backbone import keeps_keys_and_values
from softcot_ds.models.embedding import device_of
from softcot_ds.models.partition import needs_all_ranks
from softcot_ds.models.reading import PADDING
from softcot_ds.recipe import Recipe
from softcot_ds.tasks import Problem


class Thinking(TrainedBase):
    """The base, trained, that thinks right behind a prompt and right before an answer."""

    has_thoughts = True
    leaves_out_steps = True
    conditions = ("learned", "shuffled", "zero", "empty", "none")

    around: ClassVar[str]
    """What stands in the place of thoughts beside states, for messages."""

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        super().check(recipe)
        if recipe.training.activation_checkpointing:
            raise SoftCoTError(
                "training.activation_checkpointing would read each latent into the keys and values a second time; set "
                "it to false, and training.micro_batch_size lower where memory is short"
            )
        if recipe.task.targets_file is not None:
            raise SoftCoTError(
                f"task.targets={recipe.task.targets}: method={recipe.method} leaves out steps of solutions, and the "
                "base's own come without any; set task.targets=gold"
            )

    @classmethod
    def check_evaluation(cls, recipe: Recipe) -> None:
        super().check_evaluation(recipe)
        if (count := recipe.evaluation.thoughts) is not None and count < cls.fewest_thoughts:
            raise SoftCoTError(
                f"evaluation.thoughts={count}: {cls.around} the latents of method={recipe.method}; set it "
                f"to {cls.fewest_thoughts} for these alone, or to so many more than the latents"
            )
        if recipe.evaluation.strategy in ("tree", "graph"):
            raise SoftCoTError(
                f"evaluation.strategy={recipe.evaluation.strategy} puts answers to the base again, and method="
                f"{recipe.method} has thoughts right before an answer alone; set it to single or self_consistency"
            )

    @classmethod
    def prompt(cls, prompts: BasePrompts, question: str, more: Messages = ()) -> BasePrompt:
        if more:  # of a strategy that check_evaluation does not know
            raise SoftCoTError(
                "thoughts that the base makes itself stand right before a whole answer, and nothing else can follow "
                "their prompt; set evaluation.strategy to single or self_consistency"
            )
        return prompts.without_thoughts(question)

    @classmethod
    def make_example(
        cls, problem: Problem, target: str, base: BasePrompts, assistant: AssistantPrompts, recipe: Recipe
    ) -> Example:
        return example_without_assistant(problem, target, base, recipe.thoughts.count)

    @staticmethod
    def check_keeps(given: Given) -> None:
        """Raises SoftCoTError where the base cannot read one thought after the other."""
        if not keeps_keys_and_values(given.base.config):
            raise SoftCoTError(
                f"{given.recipe.base.model} keeps other states of what it has read than keys and values, on which its "
                "latents are to be read one by one; name another model in base.model"
            )

    @classmethod
    @torch.no_grad()
    def think(
        cls, base: PreTrainedModel, weights: Weights, prompts: Sequence[BasePrompt], count: int, batch_size: int
    ) -> torch.Tensor:
        embedding = base.get_input_embeddings()
        device = device_of(embedding)
        parts = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
        found = []
        for number in range(max_over_ranks(len(parts)) if needs_all_ranks(base) else len(parts)):
            # A rank that is out of prompts runs along: each forward pass needs all ranks.
            some = parts[min(number, len(parts) - 1)]
            ids_BL, mask_BL = pad([prompt.prefix_ids for prompt in some], PADDING, side="left")
            prompt_BLD, mask_BL = embedding(ids_BL.to(device)), mask_BL.to(device)
            found += [cls.roll_out(base, weights, prompt_BLD, mask_BL, count)] * (number < len(parts))
        return torch.cat(found)

    @classmethod
    @abstractmethod
    def roll_out(
        cls, base: PreTrainedModel, weights: Weights, prompt_BLD: torch.Tensor, mask_BL: torch.Tensor, count: int
    ) -> torch.Tensor:
        """(B, T, D) thoughts, in the prompts' dtype.

        Args:
            weights: by their names in ``trained``; whole, in any floating dtype.
            prompt_BLD: embeddings, padded on the left.
            mask_BL: bool, False on padding.
            count: T.
        """
