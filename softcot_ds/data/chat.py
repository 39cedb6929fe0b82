"""One tokenizer's chat template: prompts as tokens, and where an answer begins and ends.

Nothing is known by name. What a template does is found out by rendering short conversations with it, and the measure is
always the tokens of a whole conversation as ``apply_chat_template`` writes it.
"""

import difflib
import hashlib
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import takewhile
from typing import Any

from jinja2 import Environment, TemplateError, TemplateSyntaxError
from jinja2.meta import find_undeclared_variables
from transformers import PreTrainedTokenizerBase

from softcot_ds.errors import SoftCoTError
from softcot_ds.recipe import ModelConfig

Messages = list[dict[str, str]]

RENDER_SECONDS = 5.0
"""Processor time that one rendering may take; an ordinary one takes less than a millisecond."""

FIELD = re.compile(r"\{(question|thoughts|count)\}")
# Stand-ins of private-use characters: no filter of a template changes them, and plain() cuts them in filled-in text.
_THOUGHTS, _TEXT, _CUT = ("\U0010c07a" + last for last in "\U0010c071\U0010c072\U0010c073")
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
"""A tag of transformers around what the assistant writes; it shows nothing."""
_PROVIDED = {*Environment().globals, "raise_exception", "strftime_now", "messages", "add_generation_prompt"}
"""Names that a template reads and that are not the recipe's to give."""
_INPUTS = {"tools", "documents"}
"""Names of what transformers gives to templates in a form of its own."""
_NEUTRAL = {"question": _TEXT, "thoughts": _THOUGHTS, "count": "1"}


def fill(messages: Messages, fields: dict[str, str]) -> Messages:
    """Messages with their fields filled in; in one pass, so a question that contains "{thoughts}" stays what it is."""
    return [
        {"role": m["role"], "content": FIELD.sub(lambda match: fields[match.group(1)], m["content"])} for m in messages
    ]


def joined(messages: Messages, more: Messages) -> Messages:
    """Messages and those that follow. One of the same role as the one before it goes on with this: an answer where it
    stops, and what somebody else says after an empty line. So roles take turns, as many templates want it."""
    found = list(messages)
    for message in more:
        if found and found[-1]["role"] == message["role"]:
            between = "" if message["role"] == "assistant" else "\n\n"
            message = {**message, "content": found.pop()["content"] + between + message["content"]}
        found.append(message)
    return found


class ChatFormat:
    """Renders messages with one tokenizer's chat template, as tokens."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template_kwargs: dict[str, Any],
        name: str,
        end_of_turn: str | None = None,
        listed_stop_ids: Sequence[int] = (),
    ) -> None:
        """``name`` is the model's, for error messages.

        Args:
            end_of_turn: the text of the token that ends an answer; default: what the template closes an answer with.
            listed_stop_ids: tokens that end an answer by what the model's files say.

        Raises:
            SoftCoTError: there is no chat template, or none that Jinja reads; it knows nothing of a key of
                ``template_kwargs``; ``end_of_turn`` is not one token.
        """
        if tokenizer.chat_template is None:
            raise SoftCoTError(
                f"the tokenizer of {name} has no chat template; use an instruction-tuned model, or set chat_template "
                "of this model in the recipe to a Jinja file"
            )
        self.tokenizer = tokenizer
        self.template_kwargs = template_kwargs
        self.name = name
        self.known_stop_ids = {*listed_stop_ids, tokenizer.eos_token_id} - {None}
        with self._explained(), _time_limit():
            self.template: str = tokenizer.get_chat_template()
            self.variables = _variables(self.template)
        self._check_kwargs()
        added = tokenizer.added_tokens_decoder
        self._opener = next((token.content for token in added.values() if not (token.rstrip or token.single_word)), "")
        self._control = self._control_pattern()
        self.end_of_turn = end_of_turn
        self.given_end_id = None if end_of_turn is None else self.one_token(end_of_turn, "end_of_turn")

    @property
    def identity(self) -> dict[str, Any]:
        """What decides how messages are rendered and answers end, by content: whatever the files are called."""
        given = {**self.tokenizer.special_tokens_map, **self.template_kwargs}
        return {
            "template_sha256": hashlib.sha256(self.template.encode()).hexdigest(),
            "variables": {name: given[name] for name in sorted(self.variables & given.keys())},
            "end_of_turn": self.end_of_turn,
            "known_stop_ids": sorted(self.known_stop_ids),
        }

    def stop_ids(self, end_id: int) -> list[int]:
        """All tokens that end an answer: first the end of a turn, then those that are known without the template."""
        return [end_id, *sorted(self.known_stop_ids - {end_id})]

    def encode(self, text: str, continued: bool = False) -> list[int]:
        """Token ids of rendered text. The template has already written the special tokens.

        ``continued``: the text comes after a token of its own, such as a thought, and not first, where many tokenizers
        put a space before it.
        """
        ids: list[int] = []
        for piece in text.split(_CUT):
            opener = self._opener if continued else ""
            # Too long a text is our error to report (examples.py), not the tokenizer's to warn of.
            found = self.tokenizer(opener + piece, add_special_tokens=False, verbose=False)["input_ids"]
            ids += found[1:] if opener else found
            continued = True
        return ids

    def encode_after(self, context: str, text: str, continued: bool = False) -> list[int]:
        """Ids of rendered text that comes after ``context``, from whose ids on the model writes.

        Where the two grow together, as a space at the end of a prompt does with a first word, the context's ids stay as
        they are, and the text is tokenized by itself.
        """
        for neighbour, is_continued in ((context, continued), ("\n", False), ("", True)):
            before, both = self.encode(neighbour, is_continued), self.encode(neighbour + text, is_continued)
            if both[: len(before)] == before:
                break
        return both[len(before) :]

    def one_token(self, text: str, setting: str) -> int:
        """The id of a text that must be exactly one token; ``setting`` is its name in the recipe, for the error."""
        ids = self.encode(text)
        if len(ids) != 1:
            raise SoftCoTError(
                f"{setting} {text!r} is {len(ids)} tokens for the tokenizer of {self.name}; "
                "name a text that is exactly one token"
            )
        return ids[0]

    def prompt_ids(self, messages: Messages, more: Messages = (), **fields: str) -> list[int]:
        """What the model reads, up to where it starts to write.

        Args:
            more: messages of plain text, without fields, which follow; see ``joined``.
        """
        return self.encode(self.prompt(self._filled(messages, more, self._plain(fields))))

    def split_prompt_ids(self, messages: Messages, more: Messages = (), **fields: str) -> tuple[list[int], list[int]]:
        """The same, left and right of ``{thoughts}``."""
        text = self.prompt(self._filled(messages, more, self._plain(fields) | {"thoughts": _THOUGHTS}))
        self._check_place_of_thoughts(text)
        left, right = text.split(_THOUGHTS)
        return self.encode(left), self.encode(right, continued=True)

    def check(self, messages: Messages) -> None:
        """Raises SoftCoTError unless the template shows the question and the thoughts, and the same text every day."""
        filled = fill(messages, _NEUTRAL)
        text = self.prompt(filled)
        if any(_THOUGHTS in message["content"] for message in filled):
            self._check_place_of_thoughts(text)
        if _TEXT not in text:
            raise SoftCoTError(
                f"the chat template of {self.name} does not show the question; move {{question}} to another message of "
                "the prompt file"
            )
        remedy = "name a copy of it that writes the same text every time in chat_template of this model"
        if self.prompt(filled) != text:
            raise SoftCoTError(f"the chat template of {self.name} writes another text each time; {remedy}")
        try:
            self.prompt(filled, strftime_now=None)  # without a clock
        except SoftCoTError as error:
            raise SoftCoTError(
                f"the chat template of {self.name} writes today's date into the prompt, another one every day; give it "
                f"one in template_kwargs of this model, if it reads one (date_string), or {remedy}"
            ) from error

    def prompt(self, messages: Messages, **variables: Any) -> str:
        """The text that the model reads before it writes. A last message of the role ``assistant`` is left open."""
        open_ended = messages[-1]["role"] == "assistant"
        return self._apply(messages, not open_ended, open_ended, **variables)

    def conversation(self, messages: Messages) -> str:
        """The text of a conversation that the model has no more to add to."""
        return self._apply(messages, False, False)

    def plain(self, text: str) -> str:
        """Text to fill in, cut inside whatever would become a control token: no question ends its own turn."""
        return self._control.sub(lambda match: match.group() + _CUT, text)

    def _filled(self, messages: Messages, more: Messages, fields: dict[str, str]) -> Messages:
        plain = [{"role": message["role"], "content": self.plain(message["content"])} for message in more]
        return joined(fill(messages, fields), plain)

    def _plain(self, fields: dict[str, str]) -> dict[str, str]:
        return {name: self.plain(text) for name, text in fields.items()}

    def _apply(self, messages: Messages, prompted: bool, open_ended: bool, **variables: Any) -> str:
        with self._explained(), _time_limit():
            text = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=prompted,
                continue_final_message=open_ended,
                **{**self.template_kwargs, **variables},
            )
            text.encode()  # no tokenizer takes half of a surrogate pair
        return text

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """A template is a program, and may raise anything."""
        try:
            yield
        except Exception as error:
            line = f"line {error.lineno}: " if isinstance(error, TemplateSyntaxError) else ""
            kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
            message = " ".join(str(error).split())
            raise SoftCoTError(f"the chat template of {self.name} refuses the prompt: {line}{kind}{message}") from error

    def _check_kwargs(self) -> None:
        known = sorted(self.variables - _PROVIDED)
        defaults = ModelConfig.model_fields["template_kwargs"].default  # not the user's words
        mistakes = []
        for key in self.template_kwargs:
            if key not in known and key not in defaults:
                near = difflib.get_close_matches(key, known, n=1)
                mistakes.append(f"{key!r} (did you mean {near[0]!r}?)" if near else repr(key))
        if mistakes:
            raise SoftCoTError(
                f"template_kwargs of {self.name}: its chat template does not read {', '.join(mistakes)}; "
                f"it reads {', '.join(known) or 'nothing that can be set'}"
            )

    def _check_place_of_thoughts(self, text: str) -> None:
        if text.count(_THOUGHTS) != 1:
            raise SoftCoTError(
                f"the chat template of {self.name} shows the place of the thoughts {text.count(_THOUGHTS)} times, "
                "not once; move {thoughts} to another message of the prompt file"
            )

    def _control_pattern(self) -> re.Pattern[str]:
        """Matches the first character of whatever filled-in text must not contain.

        That is what tells the model who is speaking, special tokens and those that end an answer or that the template
        writes, and our stand-ins.
        """
        shown = [self.template]
        for roles in (("user", "assistant"), ("system", "user", "assistant")):
            try:
                shown.append(self.conversation([{"role": role, "content": "x"} for role in roles]))
            except SoftCoTError as error:  # a template may have no system role
                if isinstance(error.__cause__, TimeoutError):
                    raise
        tokens = [_THOUGHTS, _TEXT, _CUT]
        named = {*self.tokenizer.all_special_ids, *self.known_stop_ids}
        for number, token in self.tokenizer.added_tokens_decoder.items():
            known = token.special or number in named or any(token.content in text for text in shown)
            if known and len(token.content) > 1 and not token.content.isspace():
                tokens.append(token.content)
        first = "".join(sorted({token[0] for token in tokens}))
        return re.compile(f"(?=[{re.escape(first)}])(?=(?:{'|'.join(map(re.escape, tokens))})).", re.DOTALL)


class Turn:
    """The model's turn after one list of messages: where its answer begins, and the token that ends it."""

    def __init__(self, chat: ChatFormat, messages: Messages) -> None:
        """Raises SoftCoTError where no single token is found that ends an answer."""
        self._chat = chat
        self._wording = messages
        self._messages = fill(messages, _NEUTRAL | {"question": "x"})
        self._prompt = chat.prompt(self._messages)
        self._reply: Messages = []
        closing = self._look_around_answer()
        end = self._end_in(closing)
        if end is None:  # some templates close a turn when the next one begins
            self._reply = [{"role": "user", "content": "x"}]
            with suppress(SoftCoTError):  # nor does every template go on after an answer
                closing = self._look_around_answer()
                end = self._end_in(closing)
        if end is not None:
            self.end_id, self._num_idle = closing[end], len(closing) - end - 1
            return
        self._reply = []
        self._look_around_answer()
        if chat.given_end_id is None:
            raise SoftCoTError(
                f"the chat template of {chat.name} closes an answer with {_shown(self._after)}, no single token of its "
                "tokenizer; name the text of the token that ends an answer in end_of_turn of this model"
            )
        self.end_id, self._num_idle = chat.given_end_id, None

    def check_beginning(self) -> None:
        """Raises SoftCoTError where the prompt ends elsewhere than where a conversation has the answer.

        A template that has the model think first, or name a channel, does that: what the model writes is no answer yet.
        """
        if self._begins_where_prompted():
            return
        common = sum(
            1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self._prompt, self._before, strict=False))
        )
        raise SoftCoTError(
            f"the chat template of {self._chat.name} does not put an answer where its prompt ends: the prompt goes on "
            f"with {_shown(self._prompt[common:])}, a conversation with {_shown(self._before[common:])} before the "
            f"answer; {self._remedy()}"
        )

    def answer_ids(self, answer: str) -> list[int]:
        """What follows the prompt where the model gives this answer, the token that ends it included.

        Raises:
            SoftCoTError: the template changes the answer, or the answer contains the token that would end it.
        """
        chat, plain = self._chat, self._chat.plain(answer)
        text = chat.conversation(self._conversation(plain))
        body = text.removeprefix(self._prompt).removesuffix(self._after)
        if self._prompt + body + self._after != text or body.strip() != plain.strip():
            raise SoftCoTError(
                f"the chat template of {chat.name} does not show the answer {answer!r} as it is; name a copy that does "
                "in chat_template of this model"
            )
        *_, thoughts, context = self._prompt.rpartition(_THOUGHTS)
        if self._num_idle is None:
            ids = [*chat.encode_after(context, body, bool(thoughts)), self.end_id]
        else:
            ids = chat.encode_after(context, body + self._after, bool(thoughts))
            ids = ids[: len(ids) - self._num_idle]
        if self.end_id in ids[:-1] or ids[-1] != self.end_id:
            raise SoftCoTError(
                f"{chat.tokenizer.decode([self.end_id])!r} is to end an answer of {chat.name}, but does not stand at "
                f"the end, and there only, of {answer!r}; name another token in end_of_turn of this model"
            )
        return ids

    def _conversation(self, answer: str) -> Messages:
        return joined(self._messages, [{"role": "assistant", "content": answer}]) + self._reply

    def _look_around_answer(self) -> list[int]:
        """Note the text before and after an answer that is shown, and once; returns the tokens after it."""
        text = self._chat.conversation(self._conversation(_TEXT))
        self._before, _, self._after = text.partition(_TEXT) if text.count(_TEXT) == 1 else (text, "", "")
        return self._chat.encode(self._after, continued=True)

    def _end_in(self, closing: list[int]) -> int | None:
        """Which of the tokens after an answer ends it."""
        chat = self._chat
        if chat.given_end_id is not None:
            return closing.index(chat.given_end_id) if chat.given_end_id in closing else None
        shown = [at for at, token in enumerate(closing) if chat.tokenizer.decode([token]).strip()]
        if not shown:
            return None
        first = closing[shown[0]]
        if first not in chat.tokenizer.added_tokens_decoder:  # an ordinary word, then: only if it stands alone
            return shown[0] if len(shown) == 1 and not self._reply else None
        if self._reply and first not in chat.known_stop_ids:
            # Next comes the user's turn. What opens the first one too is what opens it, and closes nothing.
            opening = chat.prompt([{"role": "user", "content": _TEXT}]).partition(_TEXT)[0]
            if first in chat.encode(opening):
                return None
        return shown[0]

    def _begins_where_prompted(self) -> bool:
        return self._before.startswith(self._prompt) and not self._before.removeprefix(self._prompt).strip()

    def _remedy(self) -> str:
        """The setting that mends the beginning: a switch of the template that does, where there is one."""
        chat = self._chat
        for name in sorted(chat.variables - _PROVIDED - _INPUTS - chat.tokenizer.special_tokens_map.keys()):
            for value in (False, True):
                kwargs = {**chat.template_kwargs, name: value}
                other = ChatFormat(chat.tokenizer, kwargs, chat.name, chat.end_of_turn, sorted(chat.known_stop_ids))
                with suppress(SoftCoTError):  # a template may refuse the value
                    if Turn(other, self._wording)._begins_where_prompted():
                        return f"set template_kwargs: {{{name}: {str(value).lower()}}} for this model"
        return (
            "name a copy of it in chat_template of this model, with a prompt that ends where an answer begins, or end "
            "these messages in the prompt file with one of the role assistant, which the model then goes on with"
        )


@cache
def _variables(template: str) -> frozenset[str]:
    """Names that a template reads and does not define."""
    # Not optimized: an optimizer would compute 9**9**9. The extension is one that transformers gives to templates.
    environment = Environment(extensions=["jinja2.ext.loopcontrols"], optimized=False)
    return frozenset(find_undeclared_variables(environment.parse(_GENERATION_TAG.sub("", template))))


def _shown(text: str) -> str:
    return repr(text.replace(_THOUGHTS, "").replace(_TEXT, "")[:60]) if text else "nothing"


class _TooLong(BaseException):
    """No Exception: Jinja goes on after those while it computes constants."""


@contextmanager
def _time_limit() -> Iterator[None]:
    """Ends what runs too long with a TimeoutError; in the main thread, the only one that signals reach."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, RENDER_SECONDS)
    try:
        yield
    except _TooLong as error:
        raise TimeoutError(f"not done after {RENDER_SECONDS:g} s of processor time") from error
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
