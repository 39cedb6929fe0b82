"""What a method is: what of the models, or beside them, is trained, and the step that trains it.

B batch, T thoughts, K supervised tokens, P assistant width, D base width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from safetensors.torch import save
from torch import nn
from transformers import PreTrainedModel

from softcot_ds.backbone_config import Partition
from softcot_ds.choices import METHODS, chosen
from softcot_ds.data.batches import Batch
from softcot_ds.data.chat import Messages
from softcot_ds.data.examples import Example, make_example
from softcot_ds.data.prompts import AssistantInput, AssistantPrompts, BasePrompt, BasePrompts
from softcot_ds.errors import SoftCoTError
from softcot_ds.evaluation_config import Condition
from softcot_ds.methods.conditioning import Conditioning, Weights
from softcot_ds.methods.projection import Projection
from softcot_ds.models.embedding import CompactTable
from softcot_ds.models.frozen_prefix import FrozenPrefix
from softcot_ds.models.partition import whole_shape
from softcot_ds.recipe import Recipe
from softcot_ds.tasks import Problem

Rest = Callable[[Problem, int | None], list[int]]
"""The tokens of what is to be written of a problem's solution without so many of its first steps; without all for None.
"""


@dataclass(frozen=True)
class Given:
    """What a method is built from: the models, loaded as the recipe says and not yet DeepSpeed's, and the data."""

    recipe: Recipe
    base: PreTrainedModel
    assistant: PreTrainedModel | None
    """None where its states come from a cache, or nobody needs them."""
    widths: tuple[int, int]
    """P and D."""
    examples: Sequence[Example]
    """Of training and validation."""
    tokens: Iterable[int]
    """All that batches may hold, padding too."""
    assistant_inputs: Sequence[AssistantInput]
    """All that the assistant may be given."""
    conditioning: Conditioning | None = None
    """What a projection is given in place of plain states."""


class Method(nn.Module, ABC):
    """The module that DeepSpeed's engine wraps: the models with what is trained, from a batch to the loss.

    All that the training loop, checkpoints, validation, evaluation and plans know of a method is here; nothing else
    tests its name. What it is trained to is in the parameters that ``trained`` names: checkpoints hold no buffers.
    """

    needs_states: ClassVar[bool] = False
    """Whether it reads the assistant's states, from a cache of them or from the assistant, which then runs along."""
    changes_base: ClassVar[bool] = False
    """Whether weights of the base are trained, or added to it: then nothing that it reads may be read once for all
    steps, and what evaluation runs is another model than the recipe's."""
    has_thoughts: ClassVar[bool] = True
    """Whether prompts have room for thoughts."""
    leaves_out_steps: ClassVar[bool] = False
    """Whether it trains on solutions without some of their steps: some problems must have any."""
    fewest_thoughts: ClassVar[int] = 1
    """What stands in their place where a base that thinks itself is given back none of its states."""
    conditions: ClassVar[tuple[Condition, ...]] = ()
    """Those of an evaluation that say something of it; empty for all."""
    projection_class: ClassVar[type[Projection] | None] = None
    """What makes its thoughts, and takes the recipe's section ``projection``; None where nothing is projected."""
    losses: ClassVar[dict[str, Literal["tokens", "problems"]]] = {"language_model": "tokens"}
    """What ``forward`` gives, by name, and of what in the global batch each is a mean."""
    weights_file: ClassVar[str] = "projection.safetensors"
    """In an adapter directory, the safetensors file of the trained weights: float32, by the names of ``trained``."""
    other_files: ClassVar[tuple[str, ...]] = ()
    """What ``write_adapter`` writes beside it that decides what is computed."""

    conditioning: Conditioning | None = None
    """What a projection is given in place of plain states."""
    prefixed: FrozenPrefix | None = None
    """What runs the fast step; None in the full one."""
    chains: int = 1
    """Sets of thoughts of a question, each of which the base reads alone."""
    num_shared: int = 0
    """Tokens that all prefixes begin with and that are read once: batches leave them out."""

    def __init__(self, base: PreTrainedModel, assistant: PreTrainedModel | None = None) -> None:
        super().__init__()
        self.base = base
        self.assistant = assistant
        self.table: CompactTable | None = None
        """Of the tokens that batches hold; None where the base's own table is asked."""

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        """Raises SoftCoTError where the recipe asks for what this method cannot do."""
        if cls.projection_class is None and recipe.projection.init_from is not None:
            raise SoftCoTError(
                f"projection.init_from={recipe.projection.init_from}: method={recipe.method} has no projection that "
                "could start from it; leave it out"
            )
        cls.check_held(recipe, recipe.backbone.partition)
        if cls.changes_base and recipe.backbone.resident_gib:
            raise SoftCoTError(
                f"backbone.resident_gib={recipe.backbone.resident_gib:g} is for a base that stays as it is, and "
                f"method={recipe.method} changes it; leave it out"
            )

    @classmethod
    def check_evaluation(cls, recipe: Recipe) -> None:
        """Raises SoftCoTError where an evaluation by the recipe asks for what this method cannot do."""
        if cls.conditions and (unknown := sorted({*recipe.evaluation.conditions} - {*cls.conditions})):
            raise SoftCoTError(
                f"evaluation.conditions: {', '.join(unknown)}: method={recipe.method} makes no thoughts that "
                f"this could stand for; take some of [{', '.join(cls.conditions)}], where none is the base as it was"
            )
        cls.check_held(recipe, recipe.evaluation.partition or recipe.backbone.partition)

    @classmethod
    def check_held(cls, recipe: Recipe, partition: Partition) -> None:
        """Raises SoftCoTError where the base cannot be held so, in training or evaluation."""
        if cls.changes_base and partition == "tensor":
            raise SoftCoTError(
                f"the base is to be held by partition=tensor, in slices, and method={recipe.method} changes whole "
                "layers; set backbone.partition, or evaluation.partition, to none or zero3"
            )
        if cls.changes_base and recipe.backbone.bits < 16:
            raise SoftCoTError(
                f"backbone.bits={recipe.backbone.bits} is for a base that stays as it is, and method={recipe.method} "
                "changes it; set it to 16"
            )

    @classmethod
    def prompt(cls, prompts: BasePrompts, question: str, more: Messages = ()) -> BasePrompt:
        """What the base reads of a question, with room for the method's thoughts.

        Args:
            more: messages that follow, such as an answer that has been begun; see ``ChatFormat.prompt_ids``.

        Raises:
            SoftCoTError: the thoughts have no place that they were trained for where more follows.
        """
        return prompts.with_thoughts(question, more)

    @classmethod
    def make_example(
        cls, problem: Problem, target: str, base: BasePrompts, assistant: AssistantPrompts, recipe: Recipe
    ) -> Example:
        """A problem as tokens; ``target`` is what the base is to write, of all steps of the training the longest."""
        return make_example(problem, target, base, assistant)

    @classmethod
    def begins_anew(cls, step: int, recipe: Recipe) -> bool:
        """Whether what is trained towards changes with an optimizer step, which then knows nothing of those before:
        weights that are not trained from there on stay as they are."""
        return False

    @classmethod
    def example_at(cls, example: Example, step: int | None, recipe: Recipe, rest: Rest) -> Example:
        """An example as it is read in an optimizer step, from 1 on; with None, in validation and evaluation."""
        return example

    @classmethod
    @abstractmethod
    def build(cls, given: Given) -> Self:
        """From the recipe's seed alone, the same on every rank, what is trained in float32: the caller puts a
        checkpoint's weights into it, and then has it ``settled``."""

    @classmethod
    @abstractmethod
    def num_trained(cls, recipe: Recipe, widths: tuple[int, int], base: PreTrainedModel) -> int:
        """How many weights are trained, for plans; ``base`` is on the meta device, where there are no values."""

    @classmethod
    def shaped(
        cls, recipe: Recipe, widths: tuple[int, int], base: PreTrainedModel, checkpointing: bool, num_shared: int
    ) -> Self:
        """The step on the meta device, with activation checkpointing or without, for plans.

        Raises:
            SoftCoTError: it cannot be planned.
        """
        raise SoftCoTError(f"a training by method={recipe.method} cannot be planned for yet; try it on a few steps")

    @abstractmethod
    def forward(self, batch: Batch, per_token: bool = False) -> torch.Tensor:
        """Cross entropy summed over the K supervised tokens of the batch, in nats: a scalar in float32 at least. Of a
        method with several ``losses`` these sums, in their order.

        They are sums because the means are over the global batch, whose tokens and problems the caller knows.

        Args:
            per_token: give (K,) float64, the cross entropy of each supervised token and nothing else, instead; of
                several chains their mean.
        """

    @abstractmethod
    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained, by the names in checkpoints; all else is frozen."""

    def settled(self) -> Self:
        """Ready for DeepSpeed, which takes a model of one dtype, and makes the float32 copy of what is trained
        itself."""
        return self

    def use_full_step(self, reason: str | None) -> None:
        """Run the full step from now on: asked only of a method that has ``prefixed``."""
        raise NotImplementedError

    def number(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Tokens, int64 on the CPU, as batches must name them."""
        return token_ids

    def operations(self, batch: Batch) -> int:
        """Floating-point operations of the forward and backward pass over a batch; 0 where they are not known."""
        return 0

    def thoughts(self, batch: Batch) -> torch.Tensor | None:
        """(B, T, D) what the base reads in the place of thoughts, or (B, C, T, D) of several chains; None where prompts
        have no room for any."""
        return None

    def dropout(self, drawn_by: Sequence[str], batch: Batch) -> torch.Tensor | None:
        """What a training step wants as ``batch.kept``, on the CPU; None where it draws nothing.

        Args:
            drawn_by: for each example of the batch, all that its random numbers depend on.
        """
        return None

    def adapter_weights(self, weights: Weights) -> Weights:
        """What the adapter directory holds, float32 on the CPU, of these values of what is trained."""
        return weights

    @classmethod
    def apply_adapter(cls, base: PreTrainedModel, folder: Path, weights: Weights) -> None:
        """Make of a base, loaded and not yet DeepSpeed's, what it was trained to, where ``changes_base``.

        Args:
            folder: the adapter directory.
            weights: what it holds.

        Raises:
            SoftCoTError: they are not of this base.
        """
        raise NotImplementedError

    @classmethod
    def think(
        cls, base: PreTrainedModel, weights: Weights, prompts: Sequence[BasePrompt], count: int, batch_size: int
    ) -> torch.Tensor:
        """(B, T, D) what stands for the thoughts where the base that ``apply_adapter`` has changed makes them itself:
        where there are thoughts and no ``projection_class``. All ranks call it together where the base is partitioned.

        Args:
            weights: what the adapter directory holds.
            prompts: B of them; not empty.
            count: T, from ``fewest_thoughts`` on.
            batch_size: prompts that are read together.
        """
        raise NotImplementedError

    @staticmethod
    def check_fits(weights: Weights, parameters: Mapping[str, nn.Parameter], folder: Path) -> None:
        """Raises SoftCoTError when an adapter's weights are not those of ``parameters``, by name or shape."""
        wanted = {name: tuple(whole_shape(parameter)) for name, parameter in parameters.items()}
        found = {name: tuple(value.shape) for name, value in weights.items()}
        if differ := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
            there, here = (shapes.get(differ[0], "missing") for shapes in (found, wanted))
            raise SoftCoTError(
                f"{folder}: its weights are not those of this base: {len(differ)} differ, {differ[0]!r} first: {there} "
                f"there, {here} here; set base.model as in its recipe.yaml"
            )

    def write_adapter(self, folder: Path, weights: Weights) -> None:
        """Write ``adapter_weights`` into an adapter directory. On one rank alone: it may not gather anything."""
        # Not by save_file, whose files nobody else may read, whatever the umask says.
        (folder / self.weights_file).write_bytes(save(weights))


def method_class(name: str) -> type[Method]:
    """The class of a ``method``. Raises SoftCoTError when choices.py names none, or one that is not whole."""
    found = chosen(METHODS, name)
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise SoftCoTError(f"{METHODS[name]} lacks {', '.join(missing)}; see Method in methods/base.py")
    return found
