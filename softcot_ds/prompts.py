"""A prompt is segments of tokens, never index arithmetic.

A chat template is rendered once with a sentinel where the thoughts go; the text is split there and both sides are
tokenized on their own. No model name is ever tested: any tokenizer with a chat template works. The wording is data: a
prompt file, a YAML mapping with four lists of chat messages (see softcot_ds/tasks/gsm8k.yaml).
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateError
from jinja2.meta import find_undeclared_variables
from transformers import PreTrainedTokenizerBase

from softcot_ds.errors import SoftCoTError
from softcot_ds.files import read_yaml

Messages = list[dict[str, str]]

# What each list of messages in a prompt file must and may contain. A field is written {name}.
_FIELDS = {
    "assistant": ({"question", "thoughts"}, {"count"}),
    "assistant_text": ({"question"}, set()),
    "base": ({"question", "thoughts"}, set()),
    "base_without_thoughts": ({"question"}, set()),
}
_FIELD = re.compile(r"\{(question|thoughts|count)\}")
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
"""A tag of transformers around what the assistant writes; it shows nothing."""


@dataclass(frozen=True)
class PromptFile:
    """The wording of one task. Fields in braces are filled in; other braces are ordinary text."""

    assistant: Messages
    """What the assistant reads; ``{thoughts}`` stands where its placeholder tokens go, ``{count}`` for their number."""
    assistant_text: Messages
    """What the assistant is asked when it answers in words (evaluation condition ``text``)."""
    base: Messages
    """What the base model reads; ``{thoughts}`` stands where the projected thoughts (or the words) go."""
    base_without_thoughts: Messages
    """What the base model reads in the evaluation condition ``none``."""

    @classmethod
    def load(cls, path: Path) -> "PromptFile":
        """Raises SoftCoTError with every mistake of the file."""
        sections = read_yaml(path)
        if not isinstance(sections, dict):
            raise SoftCoTError(f"{path}: a prompt file is a mapping with the keys {', '.join(_FIELDS)}")
        mistakes = [f"unknown key {key!r}; known: {', '.join(_FIELDS)}" for key in sections if key not in _FIELDS]
        for key, (required, optional) in _FIELDS.items():
            mistakes += [f"{key}: {mistake}" for mistake in _check_messages(sections.get(key), required, optional)]
        if mistakes:
            raise SoftCoTError(f"{path}: mistakes in the prompt file:\n" + "\n".join(f"  - {m}" for m in mistakes))
        return cls(**sections)


def _check_messages(messages: Any, required: set[str], optional: set[str]) -> list[str]:
    if not isinstance(messages, list) or not messages:
        return ["missing: write a list of messages with role and content"]
    for message in messages:
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            return [f"a message has a role and a content and nothing else, found {message!r}"]
        if not all(isinstance(value, str) for value in message.values()):
            return [f"role and content are text, found {message!r}"]
    found = [field for message in messages for field in _FIELD.findall(message["content"])]
    mistakes = [f"{{{field}}} is missing" for field in sorted(required - set(found))]
    mistakes += [
        f"{{{field}}} stands here {found.count(field)} times" for field in sorted(required) if found.count(field) > 1
    ]
    mistakes += [f"{{{field}}} has no meaning here" for field in sorted(set(found) - required - optional)]
    return mistakes


@dataclass(frozen=True)
class AssistantInput:
    """What the assistant reads for one example, cut after the last placeholder: it is causal, so the rest is idle."""

    example_id: str
    token_ids: list[int]
    positions: list[int]
    """Index in ``token_ids`` of each placeholder, ascending; one per thought."""


@dataclass(frozen=True)
class BasePrompt:
    """What the base model reads: ``prefix_ids ; thoughts ; suffix_ids``, and then it writes."""

    prefix_ids: list[int]
    suffix_ids: list[int]


class ChatFormat:
    """Renders messages with one tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any], name: str) -> None:
        """``name`` is the model's, for error messages.

        Raises:
            SoftCoTError: the tokenizer has no chat template.
        """
        if tokenizer.chat_template is None:
            raise SoftCoTError(
                f"the tokenizer of {name} has no chat template; use an instruction-tuned model, or set chat_template "
                "of this model in the recipe to a Jinja file"
            )
        self.tokenizer = tokenizer
        self.template_kwargs = template_kwargs
        self.name = name
        try:
            self.template = tokenizer.get_chat_template()
            self.variables = _variables(self.template)
        except (TemplateError, ValueError) as error:
            raise SoftCoTError(f"the chat template of {name} refuses the prompt: {error}") from error

    @property
    def identity(self) -> dict[str, Any]:
        """What decides how messages are rendered, by content: whatever files and settings are called."""
        given = {**self.tokenizer.special_tokens_map, **self.template_kwargs}
        return {
            "template_sha256": hashlib.sha256(self.template.encode()).hexdigest(),
            "variables": {name: given[name] for name in sorted(self.variables & given.keys())},
        }

    def encode(self, text: str) -> list[int]:
        """Token ids of rendered text. The template has already written the special tokens."""
        # Too long a text is our error to report (data.py), not the tokenizer's to warn of.
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def render(self, messages: Messages, **fields: str) -> str:
        """The text that the model reads, up to where it starts to write.

        A last message of the role ``assistant`` is left open: the model continues it.
        """
        # One pass over the wording, so that a question which contains "{thoughts}" stays what it is.
        filled = [
            {"role": m["role"], "content": _FIELD.sub(lambda match: fields[match.group(1)], m["content"])}
            for m in messages
        ]
        open_ended = filled[-1]["role"] == "assistant"
        return self._apply(filled, add_generation_prompt=not open_ended, continue_final_message=open_ended)

    def _apply(self, messages: Messages, **kwargs: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **kwargs, **self.template_kwargs)
        except (TemplateError, TypeError, ValueError) as error:
            raise SoftCoTError(f"the chat template of {self.name} refuses the prompt: {error}") from error

    def split(self, messages: Messages, **fields: str) -> tuple[str, str]:
        """The rendered text left and right of ``{thoughts}``."""
        sentinel = "SOFT-THOUGHTS"
        while any(sentinel in text for text in (*fields.values(), *(m["content"] for m in messages))):
            sentinel += "-"
        text = self.render(messages, thoughts=sentinel, **fields)
        if text.count(sentinel) != 1:
            raise SoftCoTError(
                f"the chat template of {self.name} shows the place of the thoughts {text.count(sentinel)} times, "
                "not once; move {thoughts} to another message of the prompt file"
            )
        left, right = text.split(sentinel)
        return left, right

    def end_of_turn(self, messages: Messages) -> int:
        """The token with which the model ends its answer, as its template writes it."""
        sentinel = "ASSISTANT-ANSWER"
        asked = [{"role": m["role"], "content": "x"} for m in messages if m["role"] != "assistant"]
        text = self._apply([*asked, {"role": "assistant", "content": sentinel}])
        _, shown, after = text.rpartition(sentinel)
        closing = self.encode(after) if shown else []
        if closing and closing[0] in self.tokenizer.all_special_ids:
            return closing[0]
        if self.tokenizer.eos_token_id is None:
            raise SoftCoTError(f"the tokenizer of {self.name} has no end-of-sequence token: answers would never end")
        return self.tokenizer.eos_token_id


def _variables(template: str) -> set[str]:
    """Names that a chat template reads and that something outside it must give. Raises jinja2.TemplateError."""
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])  # those that transformers gives to templates
    return find_undeclared_variables(environment.parse(_GENERATION_TAG.sub("", template)))


class BasePrompts:
    """Prompts and targets of the base model."""

    def __init__(self, chat: ChatFormat, prompts: PromptFile) -> None:
        self.chat = chat
        self.prompts = prompts
        self.end_of_turn_id = chat.end_of_turn(prompts.base_without_thoughts)

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer."""
        eos = self.chat.tokenizer.eos_token_id
        return sorted({self.end_of_turn_id} | ({eos} if eos is not None else set()))

    def with_thoughts(self, question: str) -> BasePrompt:
        left, right = self.chat.split(self.prompts.base, question=question)
        return BasePrompt(self.chat.encode(left), self.chat.encode(right))

    def with_words(self, question: str, words: str) -> BasePrompt:
        """The assistant's words stand where the thoughts would (condition ``text``)."""
        return BasePrompt(self.chat.encode(self.chat.render(self.prompts.base, question=question, thoughts=words)), [])

    def without_thoughts(self, question: str) -> BasePrompt:
        return BasePrompt(self.chat.encode(self.chat.render(self.prompts.base_without_thoughts, question=question)), [])

    def target_ids(self, target: str) -> list[int]:
        """The reasoning and answer that the base is trained to write, the end-of-turn token included."""
        return [*self.chat.encode(target), self.end_of_turn_id]


class AssistantPrompts:
    """Inputs of the assistant."""

    def __init__(self, chat: ChatFormat, prompts: PromptFile, count: int, placeholder: str | None) -> None:
        """Raises SoftCoTError when the placeholder is not exactly one token."""
        self.chat = chat
        self.prompts = prompts
        self.count = count
        self.placeholder_id = _placeholder_id(chat, placeholder)

    def thoughts_input(self, example_id: str, question: str) -> AssistantInput:
        left, _ = self.chat.split(self.prompts.assistant, question=question, count=str(self.count))
        left_ids = self.chat.encode(left)
        return AssistantInput(
            example_id,
            left_ids + [self.placeholder_id] * self.count,
            list(range(len(left_ids), len(left_ids) + self.count)),
        )

    def words_prompt(self, question: str) -> list[int]:
        """What the assistant reads when it answers in words."""
        return self.chat.encode(self.chat.render(self.prompts.assistant_text, question=question))

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end the assistant's words."""
        eos = self.chat.tokenizer.eos_token_id
        return sorted({self.chat.end_of_turn(self.prompts.assistant_text)} | ({eos} if eos is not None else set()))


def _placeholder_id(chat: ChatFormat, placeholder: str | None) -> int:
    tokenizer = chat.tokenizer
    if placeholder is None:
        placeholder = tokenizer.unk_token or tokenizer.pad_token or tokenizer.eos_token
        if placeholder is None:
            raise SoftCoTError(f"the tokenizer of {chat.name} has no unk, pad or eos token; set thoughts.placeholder")
    ids = chat.encode(placeholder)
    if len(ids) != 1:
        raise SoftCoTError(
            f"thoughts.placeholder {placeholder!r} is {len(ids)} tokens for the tokenizer of {chat.name}; "
            "name a text that is exactly one token"
        )
    return ids[0]
