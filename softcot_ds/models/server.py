"""The base on a vLLM server: prompts with thoughts in, tokens out, over HTTP. No weights are loaded here.

A prompt without thoughts is sent as its tokens. One with them is a chat message of three parts: the text before, the
thoughts as ``prompt_embeds``, and the text behind. Both texts are rendered here already, so a template goes with them
that writes the parts as they stand. The server says which tokens it has read: they must be those of the prompt.

B prompts, T thoughts, D base width.
"""

import base64
import hashlib
import io
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import httpx2
import torch

from softcot_ds.data.chat import ChatFormat
from softcot_ds.data.prompts import BasePrompt
from softcot_ds.errors import SoftCoTError
from softcot_ds.models.backbone import weights_fingerprint
from softcot_ds.models.decoding import Output
from softcot_ds.models.sampling import Sampling
from softcot_ds.recipe import ModelConfig
from softcot_ds.values import resolve_location

KEY = "VLLM_API_KEY"
"""The environment variable that vLLM takes its key from; so do we."""
WAITS = (1.0, 4.0, 15.0)
"""Seconds before each new try of a request that found no server, or one in trouble."""
_AS_IT_STANDS = (
    "{% for message in messages %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}"
)
"""A chat template. By its loop over parts the server sees that it is to be given them one by one: it would join them by
line ends for others."""
_NEUTRAL = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""The server takes from the model's generation_config.json what a request leaves open."""


class Server:
    """A server that has the recipe's base, checked when it is opened."""

    def __init__(
        self, url: str, config: ModelConfig, fingerprint: str, chat: ChatFormat, width: int, timeout_minutes: float
    ) -> None:
        """
        Args:
            url: without the ``/v1`` of its paths.
            fingerprint: of the base's weights (``weights_fingerprint``).
            chat: the base's.
            width: D.
            timeout_minutes: how long an answer may take.

        Raises:
            SoftCoTError: nobody answers there; it has another model, or takes no thoughts.
        """
        self.url = url
        self._config = config
        self._chat = chat
        self._dtype = getattr(torch, config.dtype)
        headers = {"Authorization": f"Bearer {key}"} if (key := os.environ.get(KEY)) else {}
        timeout = httpx2.Timeout(60 * timeout_minutes, connect=30)
        limits = httpx2.Limits(max_connections=None)
        self._client = httpx2.Client(base_url=url, headers=headers, timeout=timeout, limits=limits)
        self._waits: Sequence[float] = ()
        model = self._own_model(self._asked("GET", "/v1/models"), fingerprint)
        self._name: str = model["id"]
        self.context = int(model.get("max_model_len") or 2**31 - 1)
        """The longest sequence that it takes, tokens."""
        self._try(width)
        self._waits = WAITS

    @cached_property
    def version(self) -> str:
        """vLLM's."""
        return str(self._asked("GET", "/version").get("version"))

    def decode(
        self,
        prompts: Sequence[BasePrompt],
        thoughts_BTD: torch.Tensor | None,
        stop_ids: Sequence[int],
        sampling: Sampling,
        batch_size: int,
        seeds: Sequence[int] | None = None,
        samples: int = 1,
        progress: Callable[[int], object] = lambda ended: None,
    ) -> list[Output]:
        """Continue prompts as ``decoding.decode`` does, whose arguments these are; ``batch_size`` requests at a time.

        Greedily the outputs are the same, but for rounding. Sampled ones have the same distribution, and are drawn from
        the server's own random numbers.

        Raises:
            SoftCoTError: the server is down or refuses; or what it has read is not the prompt.
        """
        if seeds is None:
            seeds = torch.randint(2**62, (len(prompts) * samples,)).tolist()
        asked = [
            (prompts[number // samples], None if thoughts_BTD is None else thoughts_BTD[number // samples], seed)
            for number, seed in enumerate(seeds)
        ]
        outputs: dict[int, Output] = {}
        with ThreadPool(max(1, min(batch_size, len(asked)))) as pool:  # of daemons: a signal waits for no answer
            ask = lambda number: (number, self._output(*asked[number], stop_ids, sampling))  # noqa: E731
            for number, output in pool.imap_unordered(ask, range(len(asked))):
                outputs[number] = output
                progress(len(outputs))
        return [outputs[number] for number in range(len(asked))]

    def _output(
        self,
        prompt: BasePrompt,
        thoughts_TD: torch.Tensor | None,
        seed: int,
        stop_ids: Sequence[int],
        sampling: Sampling,
    ) -> Output:
        path, read = self._prompt(prompt, thoughts_TD)
        count = 0 if thoughts_TD is None else len(thoughts_TD)
        length = len(prompt.prefix_ids) + count + len(prompt.suffix_ids)
        settings = {
            "model": self._name,
            "max_tokens": min(sampling.max_new_tokens, self.context - length),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed % 2**63,
            "stop_token_ids": list(stop_ids),
            "ignore_eos": True,  # these are all that end an answer
            "skip_special_tokens": False,
            "return_token_ids": True,
        }
        reply = self._asked("POST", path, read | settings | _NEUTRAL)
        try:
            choice = reply["choices"][0]
            told = reply["prompt_token_ids"] if "prompt_token_ids" in reply else choice["prompt_token_ids"]
            told, token_ids, reason = list(told), list(choice["token_ids"]), choice["finish_reason"]
        except (KeyError, IndexError, TypeError) as error:
            raise SoftCoTError(
                f"{self.url} tells no tokens ({type(error).__name__}: {error}): it is no vLLM, or too old a one; "
                f"version 0.32 does, and this one is {self.version}"
            ) from error
        behind = len(told) - len(prompt.suffix_ids)
        if (
            len(told) != length
            or told[: len(prompt.prefix_ids)] + told[behind:] != prompt.prefix_ids + prompt.suffix_ids
        ):
            raise self._wrong(f"has read other tokens than the prompt's ({len(told)}, and it has {length})")
        if reason not in ("stop", "length"):  # such as abort, where the server is ended while it answers
            raise self._wrong(f"has given up an answer ({reason})")
        if reason == "stop" and token_ids and token_ids[-1] in stop_ids:
            token_ids.pop()
        return Output(token_ids, reason == "length")

    def _prompt(self, prompt: BasePrompt, thoughts_TD: torch.Tensor | None) -> tuple[str, dict[str, Any]]:
        """The path to ask, and what is read.

        What is left of a prompt in the server's cache is found by its tokens, and thoughts are none of them (vLLM issue
        56655). So a salt tells prompts apart that differ in thoughts, and samples of one share what was read.
        """
        if thoughts_TD is None:
            return "/v1/completions", {"prompt": [*prompt.prefix_ids, *prompt.suffix_ids]}
        left, right = self._texts(prompt)
        data = io.BytesIO()
        torch.save(thoughts_TD.detach().to("cpu", self._dtype).clone(), data)  # a view would take all it is a view of
        of_thoughts = {"type": "prompt_embeds", "data": base64.b64encode(data.getvalue()).decode()}
        parts = [{"type": "text", "text": text} if text else None for text in (left, right)]
        content = [part for part in (parts[0], of_thoughts, parts[1]) if part]
        return "/v1/chat/completions", {
            "messages": [{"role": "user", "content": content}],
            "chat_template": _AS_IT_STANDS,
            "add_generation_prompt": False,
            "cache_salt": hashlib.sha256(data.getvalue() + repr(prompt).encode()).hexdigest(),
        }

    def _texts(self, prompt: BasePrompt) -> tuple[str, str]:
        """Left and right of the thoughts. Raises SoftCoTError where they would be read as other tokens."""
        decode, encode = self._chat.tokenizer.decode, self._chat.encode
        left, right = str(decode(prompt.prefix_ids)), str(decode(prompt.suffix_ids))
        if encode(left) != prompt.prefix_ids or encode(right, continued=True) != prompt.suffix_ids:
            raise SoftCoTError(
                f"the prompt {left[-200:] + right[:80]!r} cannot be sent to a server, which would read other tokens: "
                "its question may hold what looks like a special token; leave it, or evaluation.server, out"
            )
        return left, right

    def _try(self, width: int) -> None:
        """A thought of zeros, which is read as the real ones are."""
        prompt = BasePrompt(self._chat.encode("Say yes."), [])
        self._output(prompt, torch.zeros(1, width), 0, [], Sampling(1))

    def _own_model(self, models: Mapping[str, Any], fingerprint: str) -> Mapping[str, Any]:
        """The base among what the server has."""
        there = models.get("data") or []
        for model in there:
            if not model.get("parent") and self._is_own(str(model.get("root") or model["id"]), fingerprint):
                return model
        names = ", ".join(str(model.get("root") or model.get("id")) for model in there) or "no model"
        raise self._wrong(f"has {names}, and the recipe's base is {self._config.model}")

    def _is_own(self, name: str, fingerprint: str) -> bool:
        """A folder of this machine is told by its weights, any other by its name."""
        own = resolve_location(self._config.model)
        if Path(name).is_dir():
            return weights_fingerprint(self._config.model_copy(update={"model": name, "revision": None})) == fingerprint
        return name == own or Path(name).name.lower() == Path(own).name.lower()

    def _asked(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        for wait in (*self._waits, None):
            try:
                response = self._client.request(method, path, json=body)
                if response.status_code not in (429, 500, 502, 503, 504):
                    break
                why = f"{response.status_code}: {_said(response)}"
            except httpx2.TransportError as error:
                why = f"{type(error).__name__}: {error}".rstrip(": ")
                if isinstance(error, httpx2.ReadTimeout):
                    minutes = self._client.timeout.read / 60
                    raise self._wrong(f"has not answered in training.timeout_minutes={minutes:g}") from error
            if wait is None:
                raise self._wrong(f"does not answer ({why})")
            time.sleep(wait)
        if response.status_code == 401:
            raise SoftCoTError(f"the vLLM server at {self.url} wants a key: set {KEY} to it")
        if response.status_code != 200:
            raise self._wrong(f"refuses {path} ({response.status_code}: {_said(response)})")
        try:
            return dict(response.json())
        except (ValueError, TypeError) as error:
            raise self._wrong(f"answers {path} with something else than JSON") from error

    def _wrong(self, what: str) -> SoftCoTError:
        command = f"vllm serve {resolve_location(self._config.model)} --dtype {self._config.dtype}"
        return SoftCoTError(
            f"the vLLM server at {self.url} {what}. Start it so, and the same command goes on from what is finished:\n"
            f"  {command} --enable-prompt-embeds --trust-request-chat-template"
        )


def _said(response: httpx2.Response) -> str:
    """What is wrong, in the server's own words."""
    try:
        found = response.json()
        return str(found.get("error", found).get("message", found))[:500]
    except (ValueError, AttributeError):
        return response.text[:500]
