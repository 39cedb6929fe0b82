"""The step of methods that train the base itself, or weights beside its own, on prompts without thoughts.

One pass over whole rows with gradient: nothing that the base reads stays the same from step to step.

B batch, X positions of the longest row, D base width.
"""

from typing import Self

import torch
from transformers import PreTrainedModel

from softcot_ds.data.batches import Batch
from softcot_ds.data.examples import Example, example_without_assistant
from softcot_ds.data.prompts import AssistantPrompts, BasePrompts
from softcot_ds.methods.base import Method
from softcot_ds.methods.full_step import checkpoint_layers, full_logits
from softcot_ds.models.assistant import check_length
from softcot_ds.models.loss import cross_entropy, token_losses
from softcot_ds.models.operations import Decoder
from softcot_ds.recipe import Recipe
from softcot_ds.tasks import Problem


class TrainedBase(Method):
    """The base alone. A method of this kind says what of it is trained."""

    changes_base = True
    has_thoughts = False
    conditions = ("learned", "none")

    def __init__(self, base: PreTrainedModel, decoder: Decoder | None, activation_checkpointing: bool = False) -> None:
        """
        Args:
            decoder: what decides the operations of the recipe's own base; None where they are not known.
        """
        super().__init__(base)
        self._decoder = decoder
        if activation_checkpointing:
            checkpoint_layers(base)

    @classmethod
    def make_example(
        cls, problem: Problem, target: str, base: BasePrompts, assistant: AssistantPrompts, recipe: Recipe
    ) -> Example:
        return example_without_assistant(problem, target, base, 0)

    def train(self, mode: bool = True) -> Self:
        """Nothing of the base's own changes with it: its own dropout is left out, as in evaluation."""
        self.training = mode
        return self

    def forward(self, batch: Batch, per_token: bool = False) -> torch.Tensor:
        """See ``Method``. Raises SoftCoTError where an example is longer than the base's context."""
        check_length(batch.longest, self.base)
        ids = torch.cat([batch.prefix_ids, batch.suffix_ids], dim=1)
        embeds_BSD = self.base.get_input_embeddings()(ids)
        logits_KV = full_logits(self.base, embeds_BSD, batch.prefix_mask, batch.predict_at, batch.longest)
        return (token_losses if per_token else cross_entropy)(logits_KV, batch.targets)

    def operations(self, batch: Batch) -> int:
        if self._decoder is None:
            return 0
        batch_size, positions = len(batch.prefix_ids), len(batch.prefix_ids) * batch.longest
        frozen = self._decoder.train(batch_size, batch.longest, batch.longest) + self._decoder.train_head(positions)
        return frozen + positions * self.operations_of_trained()

    def operations_of_trained(self) -> int:
        """What training takes for each position beyond a pass through the frozen base and back."""
        raise NotImplementedError
