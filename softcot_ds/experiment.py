"""What a recipe stands for: tokenizers, prompts, task and data, made in one place for every command."""

from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from softcot_ds.backbone import context_length, generation_stop_ids, load_config, load_tokenizer, pad_id
from softcot_ds.data import ContextLimits, Splits, load_splits
from softcot_ds.prompts import AssistantPrompts, BasePrompts, ChatFormat, PromptFile
from softcot_ds.recipe import ModelConfig, Recipe
from softcot_ds.tasks import make_task


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
        if "text" in recipe.evaluation.conditions:
            _ = self.assistant_prompts.stop_ids  # what is wrong with them is said now, not when the words are asked for

    @property
    def chat_identity(self) -> dict[str, dict[str, Any]]:
        """Both models' effective chat templates by content: two that differ in nothing here render the same prompts.

        JSON values; for ``base`` and ``assistant`` the template's digest, the variables that reach it, and what is said
        of the tokens that end an answer.
        """
        return {"base": self.base_prompts.chat.identity, "assistant": self.assistant_prompts.chat.identity}

    @property
    def base_pad_id(self) -> int:
        return pad_id(self.base_tokenizer)

    @cached_property
    def splits(self) -> Splits:
        """The examples, read and tokenized on first use."""
        limits = ContextLimits(context_length(self.assistant_config), context_length(self.base_config))
        return load_splits(self.task, self.recipe.task, self.base_prompts, self.assistant_prompts, limits)


def _chat_format(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> ChatFormat:
    return ChatFormat(tokenizer, config.template_kwargs, config.model, config.end_of_turn, generation_stop_ids(config))
