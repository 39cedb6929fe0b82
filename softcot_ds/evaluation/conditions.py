"""The conditions of an evaluation: what stands for the thoughts.

learned      the projected thoughts of the question
shuffled     the projected thoughts of another question
mean         the average of the projected thoughts of all problems
zero         zero vectors
placeholder  a token of the base that says nothing (the paper's CoT-Unk)
none         nothing: the prompt without thoughts
text         the assistant's words in the prompt (the paper's Assist-CoT)
static       a learned prompt of free vectors, from the adapter of a run with method=prompt_tuning
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import nn

from softcot_ds.adapter import AdapterConfig, load_adapter
from softcot_ds.data.examples import Example, others
from softcot_ds.data.prompts import BasePrompt
from softcot_ds.distributed import device
from softcot_ds.errors import SoftCoTError
from softcot_ds.evaluation.jobs import Thoughts
from softcot_ds.evaluation.report import Record
from softcot_ds.evaluation_config import Condition
from softcot_ds.files import content_digest
from softcot_ds.inference import Adapter
from softcot_ds.methods.base import method_class
from softcot_ds.methods.projection import Projection
from softcot_ds.models.assistant import states_layer
from softcot_ds.models.backbone import weights_fingerprint
from softcot_ds.thoughts.reader import read_all_thoughts, states_dtype

_Given = tuple[list[BasePrompt], Thoughts | None]
"""What the base is given under a condition: its prompts, and what stands for the thoughts."""


@dataclass(frozen=True)
class Posed:
    """The problems as they are put to the base under one condition."""

    name: str
    """Of the condition, for messages."""
    prompts: list[BasePrompt]
    thoughts: Thoughts | None
    """None where the prompts have no room for any."""
    options: list[tuple[str, ...]]
    """The options of each problem, of A, B, and so on; none where it has none."""


class Conditions:
    """Prompts and thoughts of each condition."""

    def __init__(
        self, adapter: Adapter, examples: Sequence[Example], make_room: Callable[[], object] = lambda: None
    ) -> None:
        """``make_room`` is called before the assistant is loaded. Raises SoftCoTError when the adapter is damaged."""
        self._recipe = adapter.recipe
        self._experiment = adapter.experiment
        self._examples = examples
        self._projection = adapter.projection
        self._make_room = make_room
        self.words: list[str] = []

    def of(self, condition: Condition) -> Posed:
        """Raises SoftCoTError when the condition cannot be met. No model is loaded for it, nor states read."""
        options = [example.problem.options for example in self._examples]
        return Posed(condition, *CONDITIONS[condition](self), options)

    def read_states(self) -> torch.Tensor:
        """(problems, T, P) assistant states, read once; without a cache of them the assistant is loaded for it."""
        return self._hidden

    def _learned(self) -> _Given:
        return self._room(), self._projected(range(len(self._examples)))

    def _shuffled(self) -> _Given:
        try:
            whose = others([example.assistant for example in self._examples], self._recipe.seed)
        except SoftCoTError as error:
            raise SoftCoTError(
                f"shuffled: {error}; raise task.test_problems, or leave shuffled out of evaluation.conditions"
            ) from error
        return self._room(), self._projected(whose)

    def _mean(self) -> _Given:
        return self._room(), self._mean_thoughts()

    def _zero(self) -> _Given:
        shape = self._recipe.thoughts.count, self._experiment.widths[1]
        zeros = Thoughts(lambda indices: torch.zeros(len(indices), *shape, device=device()), {"zeros": shape})
        return self._room(), zeros

    def _placeholder(self) -> _Given:
        """As tokens, so that the base reads them as it reads any other."""
        ids = [self._experiment.base_placeholder_id] * self._recipe.thoughts.count
        return [BasePrompt([*prompt.prefix_ids, *ids, *prompt.suffix_ids], []) for prompt in self._room()], None

    def _none(self) -> _Given:
        prompts = self._experiment.base_prompts
        return [prompts.without_thoughts(example.problem.question) for example in self._examples], None

    def _text(self) -> _Given:
        pairs = zip(self._examples, self.words, strict=True)
        prompts = self._experiment.base_prompts
        return [prompts.with_words(example.problem.question, words) for example, words in pairs], None

    def _static(self) -> _Given:
        folder = self._recipe.evaluation.static_adapter
        try:
            config = AdapterConfig.load(folder)
            config.check_models(self._experiment, assistant=False)
            if method_class(config.method).needs_states:
                raise SoftCoTError(f"{folder} is of method={config.method}, whose thoughts differ by question")
            return self._room(), _repeated(load_adapter(folder, self._experiment))
        except SoftCoTError as error:
            raise SoftCoTError(f"evaluation.static_adapter: {error}") from error

    def _room(self) -> list[BasePrompt]:
        """The prompts with room for thoughts."""
        return [BasePrompt(example.prefix_ids, example.suffix_ids) for example in self._examples]

    @cached_property
    def _hidden(self) -> torch.Tensor:
        return read_all_thoughts(self._experiment, self._examples, self._make_room)

    def _projected(self, whose: Sequence[int]) -> Thoughts:
        """For problem i the thoughts of problem ``whose[i]``."""
        projection = self._projection
        if not projection.needs_states:
            return _repeated(projection)

        @torch.no_grad()
        def of(indices: list[int]) -> torch.Tensor:
            return projection(self._hidden[[whose[index] for index in indices]].float(), len(indices))

        return Thoughts(of, self._projection_of(whose), need_states=True)

    def _mean_thoughts(self) -> Thoughts:
        projection = self._projection
        if not projection.needs_states:
            return _repeated(projection)

        @cache
        @torch.no_grad()
        def mean() -> torch.Tensor:
            if projection.is_affine:
                return projection(self._hidden.float().mean(dim=0, keepdim=True), 1)
            total = sum(projection(some.float(), len(some)).double().sum(dim=0) for some in self._hidden.split(256))
            return (total / len(self._hidden)).float()[None]

        made_from = {"mean of": self._projection_of(range(len(self._examples)))}
        return Thoughts(lambda indices: mean().expand(len(indices), -1, -1), made_from, need_states=True)

    def _projection_of(self, whose: Sequence[int]) -> Record:
        """What decides the projected thoughts of these problems, in this order. Not whether the states are read from a
        cache or computed now: by that, too, at most rounding differs.
        """
        assistant = self._recipe.assistant
        inputs = [self._examples[index].assistant for index in whose]
        layer = states_layer(self._recipe)
        return {
            "projection": self._projection_digest,
            "assistant": self._assistant_fingerprint,
            "dtype": assistant.dtype,
            "attention": assistant.attention,
            "read as": states_dtype(self._recipe),
            "inputs": content_digest([[item.token_ids, item.positions] for item in inputs]),
        } | ({} if layer is None else {"layer": layer})  # as before there was another than the last

    @cached_property
    def _projection_digest(self) -> str:
        return _weights_digest(self._projection)

    @cached_property
    def _assistant_fingerprint(self) -> str:
        return weights_fingerprint(self._recipe.assistant)


CONDITIONS: dict[Condition, Callable[[Conditions], _Given]] = {
    "learned": Conditions._learned,
    "shuffled": Conditions._shuffled,
    "mean": Conditions._mean,
    "zero": Conditions._zero,
    "placeholder": Conditions._placeholder,
    "none": Conditions._none,
    "text": Conditions._text,
    "static": Conditions._static,
}


def _repeated(projection: Projection) -> Thoughts:
    """The same for every problem: ``learned``, ``shuffled`` and ``mean`` of free vectors are decoded once."""
    made_from = {"free vectors": _weights_digest(projection)}
    return Thoughts(lambda indices: projection(None, len(indices)).detach(), made_from)


def _weights_digest(module: nn.Module) -> str:
    """Of the names, shapes and values of its weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
