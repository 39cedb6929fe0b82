"""What a recipe stands for: tokenizers, prompts, task and data, made in one place for every command."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from softcot_ds.data.batches import in_steps
from softcot_ds.data.examples import ContextLimits, Example, Splits, load_splits
from softcot_ds.data.prompts import AssistantPrompts, BasePrompts, ChatFormat, PromptFile, placeholder_id
from softcot_ds.distributed import say
from softcot_ds.errors import SoftCoTError
from softcot_ds.methods.base import method_class
from softcot_ds.methods.initial import initial_embeddings
from softcot_ds.models.assistant import states_layer
from softcot_ds.models.backbone import (
    context_length,
    generation_stop_ids,
    load_config,
    load_tokenizer,
    vocabulary,
    width,
)
from softcot_ds.models.drafting import check_drafting
from softcot_ds.progress import count
from softcot_ds.recipe import ModelConfig, Recipe
from softcot_ds.tasks import Problem, make_task


class Experiment:
    """A recipe's parts that need no weights. Reading them raises SoftCoTError for whatever is wrong with them."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.task = make_task(recipe.task)
        prompts = PromptFile.load(self.task.prompt_file)
        self.base_tokenizer = load_tokenizer(recipe.base)
        self.assistant_tokenizer = load_tokenizer(recipe.assistant)
        self.base_config = load_config(recipe.base)
        self.assistant_config = load_config(recipe.assistant)
        self.base_prompts = BasePrompts(_chat_format(self.base_tokenizer, recipe.base), prompts)
        self.assistant_prompts = AssistantPrompts(
            _chat_format(self.assistant_tokenizer, recipe.assistant),
            prompts,
            recipe.thoughts.count,
            recipe.thoughts.placeholder,
        )
        self._check_tokens("base", [self.base_prompts.end_of_turn_id])
        self._check_tokens("assistant", self.assistant_prompts.placeholder_ids)
        states_layer(recipe)
        if recipe.evaluation.draft:
            tokenizers = self.assistant_tokenizer, self.base_tokenizer
            check_drafting(recipe, tokenizers, (self.assistant_config, self.base_config))
        self.initial = initial_embeddings(recipe)
        """Of its chains; None where a question has one set of thoughts."""
        if "text" in recipe.evaluation.conditions:
            _ = self.assistant_prompts.stop_ids  # what is wrong with them is said now, not when the words are asked for
        if "placeholder" in recipe.evaluation.conditions:
            self._check_tokens("base", [self.base_placeholder_id])

    @property
    def chat_identity(self) -> dict[str, dict[str, Any]]:
        """Both models' effective chat templates by content: two that differ in nothing here render the same prompts.

        JSON values; for ``base`` and ``assistant`` the template's digest, the variables that reach it, and what is said
        of the tokens that end an answer.
        """
        return {"base": self.base_prompts.chat.identity, "assistant": self.assistant_prompts.chat.identity}

    @cached_property
    def base_placeholder_id(self) -> int:
        """What stands at a thought's position in the condition placeholder. Raises SoftCoTError where it is not one
        token."""
        return placeholder_id(self.base_prompts.chat, self.recipe.evaluation.placeholder, "evaluation.placeholder")

    @cached_property
    def widths(self) -> tuple[int, int]:
        """Of the assistant's states and of the base's embeddings. Raises SoftCoTError where one is no causal language
        model's configuration."""
        return width(self.assistant_config), width(self.base_config)

    def require_training(self) -> None:
        """Raises SoftCoTError where there is nothing to train on, or the method cannot be trained as asked for."""
        self.task.require_training()
        method_class(self.recipe.method).check(self.recipe)

    @property
    def base_pad_id(self) -> int:
        """An id to fill padding with; masks hide it, so any row of the table serves."""
        pad = self.base_tokenizer.pad_token_id
        return pad if pad is not None and pad < vocabulary(self.base_config) else 0

    @cached_property
    def splits(self) -> Splits:
        """The examples, read and tokenized on first use."""
        limits = ContextLimits(context_length(self.assistant_config), context_length(self.base_config))
        recipe = self.recipe
        prompts, method = (self.base_prompts, self.assistant_prompts), method_class(recipe.method)
        make = partial(method.make_example, recipe=recipe)
        splits = load_splits(self.task, recipe.task, recipe.targets, *prompts, limits, make)
        validation, test = ([self.example_at(one, None) for one in part] for part in (splits.validation, splits.test))
        splits = replace(splits, validation=validation, test=test)
        if method.leaves_out_steps and not any(self.task.steps(one.problem) for one in splits.train) and splits.train:
            raise SoftCoTError(
                f"method={recipe.method} leaves out steps of solutions, and those of all {len(splits.train)} training "
                f"problems of {recipe.task.name} are the answer alone: take data with worked solutions, whose steps "
                "are lines (task.fields.reasoning of task.name=custom), or another method"
            )
        for example in (*splits.train, *splits.validation, *splits.test):
            self._check_tokens("base", [*example.prefix_ids, *example.suffix_ids, *example.target_ids])
            self._check_tokens("assistant", example.assistant.token_ids)
        return replace(splits, notes=splits.notes + self._stopped_midway(splits.train))

    def example_at(self, example: Example, step: int | None) -> Example:
        """An example of the splits as the method reads it in an optimizer step, from 1 on; with None, in validation and
        evaluation, of what the recipe's last step leaves."""
        return method_class(self.recipe.method).example_at(example, step, self.recipe, self._rest_ids)

    def _rest_ids(self, problem: Problem, skipped: int | None) -> list[int]:
        return self.base_prompts.target_ids(self.task.rest(problem, skipped))

    def count_epochs(self) -> Recipe:
        """The recipe, which from now on has steps in the place of epochs. Reads the data; see ``in_steps``."""
        epochs, num_examples = self.recipe.training.epochs, len(self.splits.train)
        self.recipe = in_steps(self.recipe, num_examples)
        if epochs is not None:
            steps = self.recipe.training.num_steps
            say(f"{count(epochs, 'epoch')} of {num_examples:,} training problems: {steps:,} steps")
        return self.recipe

    def _stopped_midway(self, examples: list[Example]) -> list[str]:
        """A note where a token at which decoding stops stands within what the base is trained to write."""
        found = [{*self.base_prompts.stop_ids}.intersection(example.target_ids[:-1]) for example in examples]
        if not any(found):
            return []
        tokens = ", ".join(repr(self.base_tokenizer.decode([token])) for token in sorted(set().union(*found)))
        return [
            f"{sum(map(bool, found))} of {len(found)} training targets contain {tokens}, where decoding stops because "
            "generation_config.json of the base lists it as eos_token_id: outputs will end there"
        ]

    def _check_tokens(self, role: Literal["base", "assistant"], ids: Sequence[int]) -> None:
        """Raises SoftCoTError where a model has no embedding for a token that its tokenizer knows."""
        config, tokenizer = {
            "base": (self.base_config, self.base_tokenizer),
            "assistant": (self.assistant_config, self.assistant_tokenizer),
        }[role]
        if ids and (largest := max(ids)) >= vocabulary(config):
            name = tokenizer.convert_ids_to_tokens(largest)
            raise SoftCoTError(
                f"the tokenizer of the {role} makes token {largest} ({name!r}), but "
                f"{getattr(self.recipe, role).model} has embeddings for {vocabulary(config)} tokens only: tokens were "
                "added to the tokenizer and not to the model. Take the tokenizer that belongs to it, another "
                "placeholder, or enlarge the model's table (resize_token_embeddings) and save it"
            )


def planned(recipe: Recipe) -> Experiment:
    """A recipe's parts before its work begins: with the data's solutions where a file of others is yet to be made."""
    path = recipe.task.targets_file
    return Experiment(recipe if path is None or path.is_file() else recipe.on_gold())


def _chat_format(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> ChatFormat:
    return ChatFormat(tokenizer, config.template_kwargs, config.model, config.end_of_turn, generation_stop_ids(config))
