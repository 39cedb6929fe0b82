"""The conditions of an evaluation: what stands for the thoughts.

learned      the projected thoughts of the question; of a method without thoughts, the base as it was trained
shuffled     the projected thoughts of another question
mean         the average of the projected thoughts of all problems
zero         zero vectors
empty        nothing, in the prompt with room for thoughts; of a base that thinks, its markers without latents
placeholder  a token of the base that says nothing (the paper's CoT-Unk)
none         nothing: the prompt without thoughts
text         the assistant's words in the prompt (the paper's Assist-CoT)
static       a learned prompt of free vectors, from the adapter of a run with method=prompt_tuning
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial

import torch
from torch import nn

from softcot_ds.adapter import AdapterConfig, load_adapter
from softcot_ds.data.chat import Messages
from softcot_ds.data.examples import Example, others
from softcot_ds.data.prompts import BasePrompt
from softcot_ds.distributed import device
from softcot_ds.errors import SoftCoTError
from softcot_ds.evaluation.jobs import Thoughts, Worker
from softcot_ds.evaluation.report import Record
from softcot_ds.evaluation_config import Condition
from softcot_ds.files import content_digest
from softcot_ds.inference import Adapter
from softcot_ds.methods.base import method_class
from softcot_ds.methods.projection import Projection
from softcot_ds.models.assistant import states_layer
from softcot_ds.models.backbone import weights_fingerprint
from softcot_ds.run_dir import adapter_folder
from softcot_ds.thoughts.reader import read_all_thoughts, states_dtype

_WITHOUT_METHOD = {"none", "text"}
"""What the recipe's own base is asked, whatever is made of it."""
_Pose = Callable[[int, Messages], BasePrompt]
"""From the number of a problem, and messages that follow, to what the base reads."""
_Given = tuple[_Pose, list[Thoughts]]
"""What the base is given under a condition: its prompts, and what stands for the thoughts, of each chain; nothing where
prompts have no room for any."""


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
    pose: _Pose | None = None
    """None where nothing is asked of the base but losses."""
    context: int = 0
    """The longest sequence that the base takes, tokens."""
    other_chains: tuple[Thoughts, ...] = ()
    """Where a problem has several sets of thoughts, those beside ``thoughts``: each is put to the base alone."""
    asked_of: Worker | None = None
    """Who puts them to the base as the method has changed it; None for the recipe's own base."""

    def again(self, problem: int, begun: str = "", then: str = "") -> BasePrompt:
        """The prompt of a problem, thoughts in their place, as it stands when more has been said.

        Args:
            begun: the base's answer so far, with which it is to go on; or of which something is said.
            then: what is said to it: of the answer that was begun, or at the end of the problem.
        """
        said = {"assistant": begun, "user": then}
        return self.pose(problem, [{"role": role, "content": text} for role, text in said.items() if text])

    def room(self, prompt: BasePrompt) -> int:
        """How many tokens the base can write behind it, 0 or less where there is no room."""
        return self.context - len(prompt.prefix_ids) - self.num_thoughts - len(prompt.suffix_ids)

    @property
    def num_thoughts(self) -> int:
        """In each prompt."""
        return self.thoughts.count if self.thoughts else 0

    @property
    def chains(self) -> list["Posed"]:
        """The same with each set of thoughts."""
        return [replace(self, thoughts=of, other_chains=()) for of in (self.thoughts, *self.other_chains)]


class Conditions:
    """Prompts and thoughts of each condition."""

    def __init__(
        self,
        adapter: Adapter,
        examples: Sequence[Example],
        make_room: Callable[[], object] = lambda: None,
        changed: Worker | None = None,
    ) -> None:
        """
        Args:
            make_room: is called before the assistant is loaded.
            changed: asks the base as the method has changed it; None where it has not.

        Raises:
            SoftCoTError: the adapter is damaged; or the method has no thoughts that something could stand for.
        """
        self._method = adapter.method
        self._changed = changed
        self._method.check_evaluation(adapter.recipe)
        self._recipe = adapter.recipe
        self._experiment = adapter.experiment
        self._examples = examples
        self._adapter = adapter
        self._projection = adapter.projection if self._method.projection_class else None
        self._make_room = make_room
        self.words: list[str] = []

    def of(self, condition: Condition) -> Posed:
        """Raises SoftCoTError when the condition cannot be met. No model is loaded for it, nor states read."""
        pose, thoughts = CONDITIONS[condition](self)
        prompts = [pose(number, []) for number in range(len(self._examples))]
        options = [example.problem.options for example in self._examples]
        asked_of = None if condition in _WITHOUT_METHOD else self._changed
        first, *others = thoughts or [None]
        context = self._adapter.context
        return Posed(condition, prompts, first, options, pose, context, tuple(others), asked_of)

    def read_states(self) -> torch.Tensor:
        """(problems, T, P) assistant states, or (problems, K, T, P) of K chains, read once; without a cache of them the
        assistant is loaded for it."""
        return self._hidden

    def _learned(self) -> _Given:
        if not self._method.has_thoughts:
            return self._in_room, []
        return self._in_room, self._projected(range(len(self._examples)))

    def _shuffled(self) -> _Given:
        try:
            read = [example.assistant for example in self._examples]
            if self._projection is None:  # no assistant reads the question, but the base
                read = [replace(example.assistant, token_ids=example.prefix_ids) for example in self._examples]
            whose = others(read, self._recipe.seed)
        except SoftCoTError as error:
            raise SoftCoTError(
                f"shuffled: {error}; raise task.test_problems, or leave shuffled out of evaluation.conditions"
            ) from error
        return self._in_room, self._projected(whose)

    def _mean(self) -> _Given:
        return self._in_room, self._mean_thoughts()

    def _zero(self) -> _Given:
        shape = self._recipe.thoughts.count, self._experiment.widths[1]
        zeros = Thoughts(lambda indices: torch.zeros(len(indices), *shape, device=device()), shape[0], {"zeros": shape})
        return self._in_room, [zeros]

    def _empty(self) -> _Given:
        if self._projection is not None:
            return self._in_room, []
        return self._in_room, self._thought_by_base(range(len(self._examples)), self._method.fewest_thoughts)

    def _placeholder(self) -> _Given:
        """As tokens, so that the base reads them as it reads any other."""
        ids = [self._experiment.base_placeholder_id] * self._recipe.thoughts.count

        def pose(number: int, more: Messages) -> BasePrompt:
            prompt = self._in_room(number, more)
            return BasePrompt([*prompt.prefix_ids, *ids, *prompt.suffix_ids], [])

        return pose, []

    def _none(self) -> _Given:
        prompts = self._experiment.base_prompts
        return lambda number, more: prompts.without_thoughts(self._question(number), more), []

    def _text(self) -> _Given:
        prompts, words = self._experiment.base_prompts, self.words
        return lambda number, more: prompts.with_words(self._question(number), words[number], more), []

    def _static(self) -> _Given:
        try:
            path = self._recipe.evaluation.static_adapter
            folder = adapter_folder(str(path)) or path
            config = AdapterConfig.load(folder)
            config.check_models(self._experiment, assistant=False)
            if method_class(config.method).needs_states:
                raise SoftCoTError(f"{folder} is of method={config.method}, whose thoughts differ by question")
            return self._in_room, _repeated(load_adapter(folder, self._experiment), self._recipe.thoughts.count)
        except SoftCoTError as error:
            raise SoftCoTError(f"evaluation.static_adapter: {error}") from error

    def _question(self, number: int) -> str:
        return self._examples[number].problem.question

    def _in_room(self, number: int, more: Messages) -> BasePrompt:
        """The prompt with room for thoughts, where the method has any."""
        if more:
            prompts, question = self._experiment.base_prompts, self._question(number)
            if not self._method.has_thoughts:
                return prompts.without_thoughts(question, more)
            return self._method.prompt(prompts, question, more)
        example = self._examples[number]
        return BasePrompt(example.prefix_ids, example.suffix_ids)

    @cached_property
    def _hidden(self) -> torch.Tensor:
        return read_all_thoughts(self._experiment, self._examples, self._make_room)

    @property
    def _chains(self) -> Sequence[int | None]:
        """By which a problem's sets of states are told apart; one None where there is one."""
        return [None] if self._recipe.chains is None else range(self._recipe.chains.count)

    def _of_chain(self, chain: int | None) -> torch.Tensor:
        """(problems, T, P) states, a view."""
        return self._hidden if chain is None else self._hidden[:, chain]

    def _projected(self, whose: Sequence[int]) -> list[Thoughts]:
        """For problem i the thoughts of problem ``whose[i]``, of each chain the same chain's."""
        projection = self._projection
        if projection is None:
            return self._thought_by_base(whose, self._recipe.thoughts.count)
        if not projection.needs_states:
            return _repeated(projection, self._recipe.thoughts.count)

        @torch.no_grad()
        def of(chain: int | None, indices: list[int]) -> torch.Tensor:
            states_BTP = self._of_chain(chain)[[whose[index] for index in indices]]
            return projection(states_BTP.float(), len(indices))

        count = self._recipe.thoughts.count
        return [
            Thoughts(partial(of, chain), count, self._projection_of(whose, chain), need_states=True)
            for chain in self._chains
        ]

    def _thought_by_base(self, whose: Sequence[int], count: int) -> list[Thoughts]:
        """Likewise, by the base as the method has changed it: so many thoughts."""
        prompts = [self._in_room(index, []) for index in whose]
        adapter, size = self._adapter, self._recipe.evaluation.batch_size

        def of(indices: list[int]) -> torch.Tensor:
            # The worker that asks has loaded the base before.
            asked = [prompts[index] for index in indices]
            return self._method.think(self._changed.model, adapter.weights, asked, count, size)

        read = content_digest([prompt.prefix_ids for prompt in prompts])
        latents = count - self._method.fewest_thoughts
        made_from = {"thought by": adapter.change.made_from, "latents": latents, "prompts": read}
        tokens = sum(len(prompt.prefix_ids) + latents for prompt in prompts if latents)
        return [Thoughts(of, count, made_from, reads=tokens)]

    def _mean_thoughts(self) -> list[Thoughts]:
        projection = self._projection
        if not projection.needs_states:
            return _repeated(projection, self._recipe.thoughts.count)

        @cache
        @torch.no_grad()
        def mean(chain: int | None) -> torch.Tensor:
            states_NTP = self._of_chain(chain)
            if projection.is_affine:
                return projection(states_NTP.float().mean(dim=0, keepdim=True), 1)
            total = sum(projection(some.float(), len(some)).double().sum(dim=0) for some in states_NTP.split(256))
            return (total / len(states_NTP)).float()[None]

        def of(chain: int | None, indices: list[int]) -> torch.Tensor:
            return mean(chain).expand(len(indices), -1, -1)

        everyone, count = range(len(self._examples)), self._recipe.thoughts.count
        return [
            Thoughts(partial(of, chain), count, {"mean of": self._projection_of(everyone, chain)}, need_states=True)
            for chain in self._chains
        ]

    def _projection_of(self, whose: Sequence[int], chain: int | None) -> Record:
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
            # As before there was another layer than the last, and more than one chain.
            **({} if layer is None else {"layer": layer}),
            **({} if chain is None else {"initial embeddings": self._experiment.initial.identity, "chain": chain}),
        }

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
    "empty": Conditions._empty,
    "placeholder": Conditions._placeholder,
    "none": Conditions._none,
    "text": Conditions._text,
    "static": Conditions._static,
}


def _repeated(projection: Projection, count: int) -> list[Thoughts]:
    """The same for every problem: ``learned``, ``shuffled`` and ``mean`` of free vectors are decoded once."""
    made_from = {"free vectors": _weights_digest(projection)}
    return [Thoughts(lambda indices: projection(None, len(indices)).detach(), count, made_from)]


def _weights_digest(module: nn.Module) -> str:
    """Of the names, shapes and values of its weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
