"""What a recipe stands for: tokenizers, prompts, task and data, made in one place for every command."""

from functools import cached_property
from typing import Any

from softcot_ds.backbone import context_length, load_config, load_tokenizer, pad_id
from softcot_ds.data import ContextLimits, Splits, load_splits
from softcot_ds.prompts import AssistantPrompts, BasePrompts, ChatFormat, PromptFile
from softcot_ds.recipe import Recipe
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
        self.base_prompts = BasePrompts(
            ChatFormat(self.base_tokenizer, recipe.base.template_kwargs, recipe.base.model), prompts
        )
        self.assistant_prompts = AssistantPrompts(
            ChatFormat(self.assistant_tokenizer, recipe.assistant.template_kwargs, recipe.assistant.model),
            prompts,
            recipe.thoughts.count,
            recipe.thoughts.placeholder,
        )

    @property
    def chat_identity(self) -> dict[str, dict[str, Any]]:
        """Both models' effective chat templates by content: two that differ in nothing here render the same prompts.

        JSON values; for ``base`` and ``assistant`` the template's digest, the variables that reach it, and the tokens
        that end an answer.
        """
        return {
            "base": {**self.base_prompts.chat.identity, "stop_ids": self.base_prompts.stop_ids},
            "assistant": {**self.assistant_prompts.chat.identity, "stop_ids": self.assistant_prompts.stop_ids},
        }

    @property
    def base_pad_id(self) -> int:
        return pad_id(self.base_tokenizer)

    @cached_property
    def splits(self) -> Splits:
        """The examples, read and tokenized on first use."""
        limits = ContextLimits(context_length(self.assistant_config), context_length(self.base_config))
        return load_splits(self.task, self.recipe.task, self.base_prompts, self.assistant_prompts, limits)
