"""An adapter with its two models, opened by ``softcot_ds.load``: questions in; answers, thoughts or embeddings out.

B questions, T thoughts, S positions of a prompt, P assistant width, D base width.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean

import torch
from transformers import PreTrainedModel

from softcot_ds.adapter import AdapterConfig, damaged, load_adapter
from softcot_ds.data.prompts import AssistantInput, BasePrompt, BasePrompts
from softcot_ds.distributed import device, init_distributed
from softcot_ds.errors import SoftCoTError
from softcot_ds.experiment import Experiment
from softcot_ds.launchers import launched_ranks
from softcot_ds.methods.base import method_class
from softcot_ds.methods.conditioning import Weights
from softcot_ds.methods.initial import Thinker
from softcot_ds.methods.projection import Projection, load_projection
from softcot_ds.methods.trial import load_assistant, load_scorer
from softcot_ds.models.assistant import states_layer
from softcot_ds.models.backbone import Change, context_length, partition_that_fits
from softcot_ds.models.decoding import Output, Sampling, decode, load_to_decode
from softcot_ds.models.drafting import Drafter
from softcot_ds.models.embedding import whole_embedding
from softcot_ds.models.scoring import Score
from softcot_ds.models.server import Server
from softcot_ds.planning.fit import spare_to_decode
from softcot_ds.recipe import Recipe
from softcot_ds.tasks.base import check_question


@dataclass(frozen=True)
class Question:
    """What the models read for one question."""

    prompt: BasePrompt
    with_method: bool
    """Whether it is put to what was trained, and not to the recipe's base alone."""
    assistant: AssistantInput | None
    """None where the thoughts do not come from it, or there are none."""


@dataclass(frozen=True)
class PromptEmbeddings:
    """What the base reads for one question, without padding: so there is no mask."""

    embeddings: torch.Tensor
    """(S, D) in the base's dtype, on this process's device: what its embedding module gives, with the thoughts."""
    token_ids: torch.Tensor
    """(S,) int64 on the CPU; 0 at a thought."""
    is_thought: torch.Tensor
    """(S,) bool on the CPU: the positions where the thoughts stand."""


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise damaged(path, error.strerror or str(error)) from error


class Adapter:
    """An adapter, opened. A model is loaded when it is first needed: thoughts want no base, answers both.

    Ranks that a launcher has started open it together, and call each method together with the same arguments; all have
    the result. They hold the base as evaluation does, so that one which fits no GPU can answer. A process that is alone
    holds it whole, unless evaluation.partition says otherwise.

    Sampled answers follow torch's random numbers: on several ranks, ``torch.manual_seed`` the same on each.
    """

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        """
        Raises:
            SoftCoTError: the adapter is incomplete, or of other models; their tokenizers or templates cannot be used.
            LostRank: the ranks do not find each other.
        """
        several = launched_ranks() > 1
        self._partition = recipe.evaluation.partition or (recipe.backbone.partition if several else "none")
        if several or self._partition != "none":
            init_distributed(recipe.training.timeout_minutes)
        self.folder = folder
        self.config = AdapterConfig.load(folder)
        if (trained := self.config.num_thoughts) != (count := recipe.thoughts.count):
            raise SoftCoTError(
                f"{folder} was trained with {trained} thoughts, thoughts.count is {count}; set it to {trained}, and "
                f"evaluation.thoughts={count} for so many in evaluation"
            )
        self.recipe = recipe = recipe.trained_to(self.config.step).in_evaluation
        self.method = method_class(self.config.method)
        self.method.check_held(recipe, self._partition)
        if recipe.evaluation.server and self.method.changes_base:
            raise SoftCoTError(
                f"evaluation.server has the base as it was, and method={self.config.method} changes it; leave "
                "evaluation.server out"
            )
        self._needs_states = self.method.needs_states
        self.experiment = Experiment(recipe)
        self.config.check_models(self.experiment, assistant=self._needs_states)

    @cached_property
    def projection(self) -> Projection:
        """The trained weights, float32. Raises SoftCoTError when they are damaged or do not fit the recipe; or the
        method has no projection."""
        return load_adapter(self.folder, self.experiment)

    @cached_property
    def weights(self) -> Weights:
        """The trained weights, float32 on the CPU. Raises SoftCoTError when they are damaged."""
        return load_projection(self.folder / self.method.weights_file)

    @cached_property
    def change(self) -> Change | None:
        """What the method has made of the base; None where that is as it was. Raises SoftCoTError when it is
        damaged."""
        if not self.method.changes_base:
            return None
        files = (self.method.weights_file, *self.method.other_files)
        made_from = {"method": self.config.method, **{name: _digest(self.folder / name) for name in files}}
        return Change(partial(self.method.apply_adapter, folder=self.folder, weights=self.weights), made_from)

    @cached_property
    def server(self) -> Server | None:
        """Who has the base where ``evaluation.server`` names a server. Raises SoftCoTError when it does not answer, or
        has another model."""
        if (url := self.recipe.evaluation.server) is None:
            return None
        base, chat = self.config.base, self.experiment.base_prompts.chat
        timeout_minutes = self.recipe.training.timeout_minutes
        return Server(url, self.recipe.base, base.fingerprint, chat, self.experiment.widths[1], timeout_minutes)

    @property
    def context(self) -> int:
        """The longest sequence that can be decoded, tokens."""
        context = context_length(self.experiment.base_config)
        return min(context, self.server.context) if self.server else context

    @cached_property
    def assistant(self) -> PreTrainedModel:
        """Raises SoftCoTError when it cannot be loaded, or does not do what an assistant must."""
        return load_assistant(self.recipe)

    @cached_property
    def base(self) -> PreTrainedModel:
        """As the method has changed it, if it does. Raises SoftCoTError when it cannot be loaded, or cannot decode with
        thoughts in its prompt."""
        return self._load_base(self.change)

    @cached_property
    def own_base(self) -> PreTrainedModel:
        """The recipe's own; likewise."""
        return self.base if self.change is None else self._load_base(None)

    def _load_base(self, change: Change | None) -> PreTrainedModel:
        backbone = self.recipe.backbone
        partition = partition_that_fits(self.recipe.base, self._partition, backbone.group_size, backbone.bits)
        spare_of = partial(spare_to_decode, self.recipe, partition)
        return load_to_decode(self.recipe.base, self.recipe, partition, spare_of, change)

    @cached_property
    def drafter(self) -> Drafter | None:
        """What writes ahead of the base where ``evaluation.draft`` says so; its model is loaded when it first does."""
        return Drafter.of(self.recipe)

    def answer(self, questions: Sequence[str], with_thoughts: bool = True) -> list[str]:
        """The base's answer to each question, decoded as the recipe's ``evaluation`` says.

        Args:
            with_thoughts: False for what the recipe's base says alone, without thoughts or whatever else was trained.

        Raises:
            SoftCoTError: a question is no text, or too long for a model; said before anything is answered.
        """
        asked = [self.question(text, with_thoughts) for text in questions]
        return [self.experiment.base_tokenizer.decode(output.token_ids) for output in self.outputs(asked)]

    def thoughts(self, questions: Sequence[str]) -> torch.Tensor:
        """(B, T, D) float32 on this process's device: what the base reads in place of the placeholders. Of several
        chains (B, C, T, D), each to be read alone.

        Raises:
            SoftCoTError: see ``answer``; or the method has no thoughts.
        """
        if not self.method.has_thoughts:
            raise SoftCoTError(f"{self.folder} is of method={self.config.method}, which has no thoughts")
        return self._thoughts([self.question(text) for text in questions])

    @torch.no_grad()
    def prompt_embeddings(self, questions: Sequence[str]) -> list[PromptEmbeddings]:
        """What the base reads for each question, for whoever runs it: ``inputs_embeds`` of transformers, after [None];
        ``prompt_embeds`` of vLLM. Of several chains, all of the first question, then of the next.

        Raises:
            SoftCoTError: see ``answer``.
        """
        rows = self._rows([self.question(text).prompt for text in questions])
        thoughts_RTD = self.thoughts(questions).flatten(0, -3)
        count = thoughts_RTD.shape[1]
        found = []
        with whole_embedding(self.base.get_input_embeddings()) as embed:
            for prompt, thoughts_TD in zip(rows, thoughts_RTD, strict=True):
                start = len(prompt.prefix_ids)
                ids_S = torch.tensor([*prompt.prefix_ids, *[0] * count, *prompt.suffix_ids])
                is_thought_S = torch.zeros(len(ids_S), dtype=torch.bool)
                is_thought_S[start : start + count] = True
                embeds_SD = embed(ids_S[None].to(device()))[0].clone()
                embeds_SD[start : start + count] = thoughts_TD.to(embeds_SD)
                found.append(PromptEmbeddings(embeds_SD, ids_S, is_thought_S))
        return found

    def question(self, text: str, with_thoughts: bool = True, prompts: BasePrompts | None = None) -> Question:
        """A question as the models read it.

        Args:
            prompts: the base's wording, where it is not the adapter's.

        Raises:
            SoftCoTError: it is no text, or too long for a model.
        """
        check_question(text)
        prompts, has_room = prompts or self.experiment.base_prompts, with_thoughts and self.method.has_thoughts
        prompt = self.method.prompt(prompts, text) if has_room else prompts.without_thoughts(text)
        length = len(prompt.prefix_ids) + len(prompt.suffix_ids) + (self.recipe.thoughts.count if has_room else 0)
        if length >= self.context:
            raise SoftCoTError(f"the question makes {length} tokens, which leaves no room in the base's {self.context}")
        if not has_room or not self._needs_states:
            return Question(prompt, with_thoughts, None)
        asked = self.experiment.assistant_prompts.thoughts_input("question", text)
        context = context_length(self.experiment.assistant_config)
        if len(asked.token_ids) > context:
            raise SoftCoTError(f"the question makes {len(asked.token_ids)} tokens, more than the assistant's {context}")
        return Question(prompt, with_thoughts, asked)

    def load_models(self, with_thoughts: bool = True) -> None:
        """Load now what answers need, instead of with the first.

        Raises:
            SoftCoTError: see the properties; or the recipe's evaluation does not take one reply for the answer.
        """
        if strategy := self.recipe.evaluation.other_strategy:
            raise SoftCoTError(
                f"evaluation.strategy={strategy['strategy']} is for evaluations; for the one reply to each question, "
                "set evaluation.strategy=single"
            )
        if with_thoughts and self.method.projection_class is not None:
            _ = self.projection
            if self._needs_states:
                _ = self.assistant
        if self.server:
            return
        _ = self.base if with_thoughts else self.own_base
        if self.drafter:
            if with_thoughts and self.method.has_thoughts and self._needs_states and states_layer(self.recipe) is None:
                self.drafter.model = self.assistant  # all of its layers are there already
            _ = self.drafter.model

    def outputs(
        self,
        questions: Sequence[Question],
        sampling: Sampling | None = None,
        progress: Callable[[int], object] = lambda answered: None,
    ) -> list[Output]:
        """What the base writes for each question, all of them with what was trained or all without. Of several chains
        the first one with the answer that most of them have.

        Args:
            sampling: how, where it is not as the recipe's ``evaluation`` says.
            progress: is told how many have their answer, now and then.
        """
        if not questions:
            return []
        self.load_models(questions[0].with_method)
        rows, thoughts = self._asked(questions)
        settings, chains = self.recipe.evaluation, len(rows) // len(questions)
        asked = rows, thoughts, self.experiment.base_prompts.stop_ids, sampling or Sampling.of(settings)
        told = lambda ended: progress(ended // chains)  # noqa: E731
        if self.server:
            outputs = self.server.decode(*asked, settings.batch_size, progress=told)
        else:
            base = self._base_for(questions)
            outputs = decode(base, *asked, batch_size=settings.batch_size, drafter=self.drafter, progress=told)
        return [self._agreed(outputs[first : first + chains]) for first in range(0, len(outputs), chains)]

    def scores(
        self,
        questions: Sequence[Question],
        texts: Sequence[tuple[int, list[int]]],
        progress: Callable[[int], object] = lambda read: None,
    ) -> list[Score]:
        """How likely the base finds each text after a question, all of them with what was trained or all without. Of
        several chains the mean loss, and whether all find it the likeliest.

        Args:
            texts: the index of a question, and tokens; several of a question, or none.
            progress: is told how many have been read, now and then.

        Raises:
            SoftCoTError: the base cannot tell, or its context has no room for a text.
        """
        if not texts:
            return []
        self.load_models(questions[0].with_method)
        base = self._base_for(questions)
        rows, thoughts = self._asked(questions)
        chains = len(rows) // len(questions)
        asked = [(index * chains + chain, text) for index, text in texts for chain in range(chains)]
        room = context_length(base.config) - (0 if thoughts is None else thoughts.shape[1])
        longest = max(len(rows[row].prefix_ids) + len(rows[row].suffix_ids) + len(text) for row, text in asked)
        if longest > room:
            raise SoftCoTError(f"a prompt with its text has {longest} tokens, and the base has room for {room}")
        scorer = load_scorer(base, self.recipe.base.model)
        shared = scorer.read_shared(rows)
        size, found = self.recipe.evaluation.batch_size, []
        for start in range(0, len(asked), size):
            numbers, some = zip(*asked[start : start + size], strict=True)
            given = None if thoughts is None else thoughts[list(numbers)]
            found += scorer.scores([rows[number] for number in numbers], given, some, shared)
            progress(len(found) // chains)
        scorer.read_whole_rows()  # the base decodes with its own layers
        of_texts = (found[first : first + chains] for first in range(0, len(found), chains))
        return [Score(fmean(s.loss for s in scores), all(s.is_likeliest for s in scores)) for scores in of_texts]

    def _base_for(self, questions: Sequence[Question]) -> PreTrainedModel:
        """Loaded."""
        return self.base if questions[0].with_method else self.own_base

    def _asked(self, questions: Sequence[Question]) -> tuple[list[BasePrompt], torch.Tensor | None]:
        """What the base reads, and (R, T, D) the thoughts there, of each question once for each of its chains; None
        where there is no room for any."""
        prompts = [question.prompt for question in questions]
        if not (questions[0].with_method and self.method.has_thoughts):
            return prompts, None
        return self._rows(prompts), self._thoughts(questions).flatten(0, -3)

    def _rows(self, prompts: Sequence[BasePrompt]) -> list[BasePrompt]:
        """Each prompt once for each of its chains."""
        chains = self.recipe.chains.count if self.recipe.chains else 1
        return [prompt for prompt in prompts for _ in range(chains)]

    def _agreed(self, outputs: Sequence[Output]) -> Output:
        """Of one question's chains."""
        if len(outputs) == 1:
            return outputs[0]
        decode_text, extract = self.experiment.base_tokenizer.decode, self.experiment.task.extract
        answers = [extract(decode_text(output.token_ids), output.cut) for output in outputs]
        votes = Counter(answer for answer in answers if answer is not None)
        return outputs[answers.index(votes.most_common(1)[0][0])] if votes else outputs[0]

    @torch.no_grad()
    def _thoughts(self, questions: Sequence[Question]) -> torch.Tensor:
        """(B, T, D) float32, or (B, C, T, D), some questions at a time."""
        size = self.recipe.evaluation.batch_size
        parts = [self._some_thoughts(questions[start : start + size]) for start in range(0, len(questions), size)]
        chains = [self.recipe.chains.count] if self.recipe.chains else []
        none = torch.empty(0, *chains, self.recipe.thoughts.count, self.experiment.widths[1], device=device())
        return torch.cat([none, *parts])

    def _some_thoughts(self, questions: Sequence[Question]) -> torch.Tensor:
        if self.method.projection_class is None:
            prompts, count = [question.prompt for question in questions], self.recipe.thoughts.count
            return self.method.think(self.base, self.weights, prompts, count, len(prompts)).float()
        projection = self.projection
        inputs = [question.assistant for question in questions if question.assistant is not None]
        states = self._thinker(inputs).float() if projection.needs_states else None
        return projection(states, len(questions))

    @cached_property
    def _thinker(self) -> Thinker:
        return Thinker.of(self.assistant, [], self.experiment.initial)
