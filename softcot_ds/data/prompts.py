"""A prompt is segments of tokens, never index arithmetic.

A chat template is rendered once with a stand-in where the thoughts go; the text is split there, and both sides become
tokens as if one token stood between them. No model name is ever tested: any tokenizer with a chat template works. The
wording is data: a prompt file, a YAML mapping with four lists of chat messages (see softcot_ds/tasks/gsm8k.yaml).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from softcot_ds.data.chat import FIELD, ChatFormat, Messages, Turn
from softcot_ds.errors import SoftCoTError
from softcot_ds.files import read_yaml

# What each list of messages in a prompt file must and may contain. A field is written {name}.
_FIELDS = {
    "assistant": ({"question", "thoughts"}, {"count"}),
    "assistant_text": ({"question"}, set()),
    "base": ({"question", "thoughts"}, set()),
    "base_without_thoughts": ({"question"}, set()),
}


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

    @property
    def around_thoughts(self) -> tuple[str, str]:
        """What stands before the thoughts and behind them where they follow a question, beyond what the base reads
        without thoughts: to put thoughts behind the question in somebody else's wording.

        Raises:
            SoftCoTError: the thoughts do not follow the question in its message.
        """
        of_question = [
            message["content"].partition("{question}")[2]
            for messages in (self.base, self.base_without_thoughts)
            for message in messages
            if "{question}" in message["content"]
        ]
        (before, thoughts, after), plain = of_question[0].partition("{thoughts}"), of_question[1]
        if not thoughts:
            raise SoftCoTError(
                "the prompt file has the base's thoughts before the question, or in another message, and so says "
                "nothing of what stands around them behind a question in another wording; name one in task.prompts "
                "where {thoughts} follows {question} in its message under base"
            )
        if plain and after.endswith(plain):
            return before, after.removesuffix(plain)
        return before.removeprefix(plain), after


def _check_messages(messages: Any, required: set[str], optional: set[str]) -> list[str]:
    if not isinstance(messages, list) or not messages:
        return ["missing: write a list of messages with role and content"]
    for message in messages:
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            return [f"a message has a role and a content and nothing else, found {message!r}"]
        if not all(isinstance(value, str) for value in message.values()):
            return [f"role and content are text, found {message!r}"]
    found = [field for message in messages for field in FIELD.findall(message["content"])]
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


class BasePrompts:
    """Prompts and targets of the base model."""

    def __init__(self, chat: ChatFormat, prompts: PromptFile) -> None:
        """Raises SoftCoTError where the chat template does not do with the prompts what is needed of it."""
        self.chat = chat
        self.prompts = prompts
        for messages in (prompts.base_without_thoughts, prompts.base):
            chat.check(messages)
            self._turn = Turn(chat, messages)
            self._turn.check_beginning()

    @property
    def end_of_turn_id(self) -> int:
        """The token with which the model ends its answer, as its template writes it."""
        return self._turn.end_id

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer, the template's own first."""
        return self.chat.stop_ids(self.end_of_turn_id)

    def with_thoughts(self, question: str, more: Messages = ()) -> BasePrompt:
        """``more``: messages that follow, such as an answer that has been begun; see ``ChatFormat.prompt_ids``."""
        return BasePrompt(*self.chat.split_prompt_ids(self.prompts.base, more, question=question))

    def with_words(self, question: str, words: str, more: Messages = ()) -> BasePrompt:
        """The assistant's words stand where the thoughts would (condition ``text``)."""
        return BasePrompt(self.chat.prompt_ids(self.prompts.base, more, question=question, thoughts=words), [])

    def without_thoughts(self, question: str, more: Messages = ()) -> BasePrompt:
        return BasePrompt(self.chat.prompt_ids(self.prompts.base_without_thoughts, more, question=question), [])

    def target_ids(self, target: str) -> list[int]:
        """The reasoning and answer that the base is trained to write after its prompt with thoughts.

        White space that the template puts around an answer, and the token that ends it, included. Raises SoftCoTError
        where the template changes the text, or the text contains that token.
        """
        return self._turn.answer_ids(target)


class RenderedPrompt(BasePrompts):
    """One prompt of somebody else's wording, rendered already, in the place of the prompt file's."""

    def __init__(self, own: BasePrompts, text: str, first_ids: Sequence[int] = ()) -> None:
        """
        Args:
            own: the prompt file's, whose words around thoughts are taken over.
            text: what the base reads; the question stands in it.
            first_ids: tokens that come before the text's.
        """
        self.chat = own.chat
        self.prompts = own.prompts
        self._turn = own._turn
        self._text = text
        self._first_ids = list(first_ids)

    def with_thoughts(self, question: str, more: Messages = ()) -> BasePrompt:
        """Thoughts stand behind the last place where the text has the question: examples come before it.

        Raises:
            SoftCoTError: it does not stand there; or see ``PromptFile.around_thoughts``.
        """
        before, after = self.prompts.around_thoughts
        plain = self.chat.plain(question)  # as a template was given it
        left, found, right = self._text.rpartition(plain if plain in self._text else question)
        if not found:
            raise SoftCoTError(
                f"the question {question[:80]!r} does not stand in the prompt, which ends in {self._text[-200:]!r}, so "
                "that there is no place for its thoughts; name what of the record does, as it is: --question"
            )
        left_ids = self._first_ids + self.chat.encode(left + found + before)
        return BasePrompt(left_ids, self.chat.encode(after + right, continued=True))

    def without_thoughts(self, question: str, more: Messages = ()) -> BasePrompt:
        return BasePrompt(self._first_ids + self.chat.encode(self._text), [])

    def continuation_ids(self, text: str) -> list[int]:
        """The tokens of a text that follows the prompt."""
        return self.chat.encode_after(self._text, text)


class AssistantPrompts:
    """Inputs of the assistant."""

    def __init__(
        self, chat: ChatFormat, prompts: PromptFile, count: int, placeholder: str | Sequence[str] | None
    ) -> None:
        """
        Args:
            placeholder: what ``placeholder_id`` takes, or several that the thoughts take in turn.

        Raises:
            SoftCoTError: a placeholder is not one token, or the template cannot show the prompts.
        """
        self.chat = chat
        self.prompts = prompts
        texts = [placeholder] if placeholder is None or isinstance(placeholder, str) else placeholder
        ids = [placeholder_id(chat, text, "thoughts.placeholder") for text in texts]
        repeats = (n for n in range(1, len(ids) + 1) if ids[:n] * (len(ids) // n) == ids)
        self.placeholder_cycle = ids[: next(repeats)]
        """What repeats, whatever the number of thoughts."""
        self.placeholder_ids = [ids[slot % len(ids)] for slot in range(count)]
        """Of each thought."""
        chat.check(prompts.assistant)
        chat.check(prompts.assistant_text)

    def thoughts_input(self, example_id: str, question: str) -> AssistantInput:
        left_ids, _ = self.chat.split_prompt_ids(self.prompts.assistant, question=question, count=str(self.count))
        token_ids = left_ids + self.placeholder_ids
        return AssistantInput(example_id, token_ids, list(range(len(left_ids), len(token_ids))))

    @property
    def count(self) -> int:
        """T, thoughts of a question."""
        return len(self.placeholder_ids)

    def words_prompt(self, question: str) -> list[int]:
        """What the assistant reads when it answers in words."""
        return self.chat.prompt_ids(self.prompts.assistant_text, question=question)

    @cached_property
    def stop_ids(self) -> list[int]:
        """Tokens that end the assistant's words. Raises SoftCoTError where the template's own is not found."""
        return self.chat.stop_ids(Turn(self.chat, self.prompts.assistant_text).end_id)


def placeholder_id(chat: ChatFormat, placeholder: str | None, setting: str) -> int:
    """The one token that ``placeholder`` is; where it is None the tokenizer's unknown token, else pad, else
    end-of-sequence.

    Raises:
        SoftCoTError: it is not one token, or there is none of these; ``setting`` is what the recipe calls it.
    """
    tokenizer = chat.tokenizer
    if placeholder is None:
        placeholder = tokenizer.unk_token or tokenizer.pad_token or tokenizer.eos_token
        if placeholder is None:
            raise SoftCoTError(f"the tokenizer of {chat.name} has no unk, pad or eos token; set {setting}")
    return chat.one_token(placeholder, setting)
