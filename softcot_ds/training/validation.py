"""What is looked at between training steps: validation loss, the thoughts themselves, sample answers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from softcot_ds.data.batches import Batch
from softcot_ds.data.examples import Example, others
from softcot_ds.data.prompts import BasePrompt
from softcot_ds.distributed import DataRanks, device, say, sum_over_ranks
from softcot_ds.errors import SoftCoTError
from softcot_ds.experiment import Experiment
from softcot_ds.models.decoding import Sampling, decode, try_decoding
from softcot_ds.models.embedding import Nearest, whole_embedding
from softcot_ds.models.partition import OwnPasses
from softcot_ds.thoughts.anatomy import Parts
from softcot_ds.training.batches import MakeBatch
from softcot_ds.training.gap import Gap

_NUM_SAMPLES = 2
_SAMPLE_TOKENS = 128


@dataclass(frozen=True)
class Seen:
    """Thoughts of some problems, and the tokens that are nearest to them in direction."""

    thoughts_ND: np.ndarray
    """Float32."""
    nearest: Nearest
    tokens: list[tuple[str, np.ndarray]]
    """Each of those tokens, as it is read, with its (D,) embedding, float32."""
    names: list[str]
    """Of each thought: its place, and how its question begins."""


@dataclass(frozen=True)
class Validation:
    """What one validation has found."""

    scalars: dict[str, float]
    """For TensorBoard."""
    gap: Gap | None
    """None where thoughts do not depend on the question, or no problem can have another's."""
    samples: str
    """Answers, as text."""
    seen: Seen | None = None
    """None where the method has no thoughts."""


class Validator:
    """Validation of one engine. All ranks run it together: under ZeRO-3 each forward pass needs all of them."""

    def __init__(
        self,
        engine: Any,
        examples: Sequence[Example],
        make_batch: MakeBatch,
        experiment: Experiment,
        ranks: DataRanks,
    ) -> None:
        """Raises SoftCoTError when the base cannot decode sample answers: now, not after some steps."""
        self._engine = engine
        self._examples = examples
        self._by_length = sorted(examples, key=lambda example: example.length)
        self._make_batch = make_batch
        self._experiment = experiment
        self._ranks = ranks
        self._batch_size = experiment.recipe.training.micro_batch_size
        self._passes = OwnPasses(engine)
        self._decoding_passes = OwnPasses(engine, engine.module.base)
        self._shuffled = self._with_thoughts_of_another()
        try_decoding(engine.module.base)

    @torch.no_grad()
    def run(self) -> Validation:
        """Validate the engine's weights as they are."""
        self._engine.eval()
        with self._passes:
            scalars, gap = self._losses()
        with self._decoding_passes:
            statistics, seen = self._thought_statistics()
            samples = self._samples(seen and seen.nearest)
        self._engine.train()
        return Validation(scalars | statistics, gap, samples, seen)

    def _with_thoughts_of_another(self) -> list[Example] | None:
        """The same examples, but that the assistant is asked another one's question."""
        if not self._by_length or not self._engine.module.needs_states:
            return None
        inputs = [example.assistant for example in self._by_length]
        try:
            taken = others(inputs, self._experiment.recipe.seed)
        except SoftCoTError as error:
            say(f"validation: {error}; so whether thoughts carry their question is not watched")
            return None
        return [
            replace(example, assistant=inputs[other]) for example, other in zip(self._by_length, taken, strict=True)
        ]

    def _losses(self) -> tuple[dict[str, float], Gap | None]:
        """Mean cross entropy over the supervised tokens of all examples, nats; with another question's thoughts too."""
        tokens = np.array([len(example.target_ids) for example in self._by_length])
        own = self._nats(self._by_length)
        found = {"loss/validation": float(own.sum() / tokens.sum())}
        if self._shuffled is None:
            return found, None
        shuffled = self._nats(self._shuffled)
        gap = Gap.of(own, shuffled, tokens)
        found |= {
            "loss/validation_shuffled": float(shuffled.sum() / tokens.sum()),
            "loss/validation_gap": gap.mean,
            "loss/validation_gap_margin": gap.margin,
        }
        return found, gap

    def _nats(self, examples: Sequence[Example]) -> np.ndarray:
        """(N,) float64, the loss of each example, summed over its tokens: the same on any number of ranks, and all."""
        nats_N = torch.zeros(len(examples), dtype=torch.float64, device=device())
        for where, batch, counts in self._batches(examples):
            parts = self._engine(batch, per_token=True).split([len(example.target_ids) for example in examples[where]])
            if counts:
                nats_N[where] = torch.stack([part.sum() for part in parts])
        return sum_over_ranks(nats_N).cpu().numpy()

    def _batches(self, examples: Sequence[Example]) -> Iterator[tuple[slice, Batch, bool]]:
        """Batches on the device, on each rank as many: where their examples stand, and whether this rank's count."""
        # Cut by the examples alone: padding, and with it rounding, does not depend on the number of ranks.
        size, ranks = self._batch_size, self._ranks
        parts = [slice(start, start + size) for start in range(0, len(examples), size)]
        for first in range(0, len(parts), ranks.count):
            # A rank that is out of batches runs along with one that counts for nothing.
            mine = first + ranks.number < len(parts)
            where = parts[first + ranks.number if mine else first]
            yield where, self._make_batch(examples[where]).to(device()), mine and ranks.is_first

    def _thought_statistics(self) -> tuple[dict[str, float], Seen | None]:
        """How the projected thoughts lie among the token embeddings, and what of them varies with the question; and
        those of the first problems."""
        model = self._engine.module
        if not model.has_thoughts:
            return {}, None
        found: dict[str, float] = {}
        if model.needs_states:
            found = self._parts()
        some = self._examples[: max(self._batch_size, _NUM_SAMPLES)]
        thoughts = model.thoughts(self._make_batch(some).to(device())).float()
        if model.chains > 1:
            found["thoughts/cosine_between_chains"] = _mean_cosine(thoughts.flatten(2))
        thoughts_ND = thoughts.flatten(0, -2)
        with whole_embedding(model.base.get_input_embeddings()) as embed:
            vocabulary = model.base.config.get_text_config().vocab_size
            nearest = Nearest.to(thoughts_ND, embed, vocabulary)
            ids_M = nearest.ids_N.unique()
            tokens_MD = embed(ids_M[None])[0].float().cpu().numpy()
        found |= {
            "thoughts/norm": thoughts_ND.norm(dim=1).mean().item(),
            "thoughts/token_embedding_norm": nearest.token_norm,
            "thoughts/cosine_to_nearest_token": nearest.cosines_N.mean().item(),
        }
        tokens = list(zip(map(self._word, ids_M.tolist()), tokens_MD, strict=True))
        each = len(thoughts_ND) // len(some)
        names = [f"{place}: {example.problem.question[:60]}" for example in some for place in range(1, each + 1)]
        return found, Seen(thoughts_ND.cpu().numpy(), nearest, tokens, names)

    def _parts(self) -> dict[str, float]:
        """What of the projected thoughts of all examples is the same for all, and what varies with the question."""
        parts = None
        for _, batch, counts in self._batches(self._by_length):
            thoughts_BTD = self._engine.module.thoughts(batch).flatten(1, -2)  # those of all chains
            parts = parts or Parts(*thoughts_BTD.shape[1:], thoughts_BTD.device)
            if counts:
                parts.add(thoughts_BTD)
        sum_over_ranks(parts.totals)
        return {
            "thoughts/constant_norm": parts.constant_norm,
            "thoughts/varying_norm": parts.varying_norm,
            "thoughts/question_share": parts.question_share,
        }

    def _samples(self, nearest: Nearest | None = None) -> str:
        experiment = self._experiment
        examples = self._examples[:_NUM_SAMPLES]
        thoughts = self._engine.module.thoughts(self._make_batch(examples).to(device()))
        if thoughts is not None and thoughts.ndim == 4:
            thoughts = thoughts[:, 0]  # those of the first chain
        outputs = decode(
            self._engine.module.base,
            [BasePrompt(example.prefix_ids, example.suffix_ids) for example in examples],
            thoughts,
            experiment.base_prompts.stop_ids,
            Sampling(min(_SAMPLE_TOKENS, experiment.recipe.evaluation.max_new_tokens)),
            self._engine.module.table,
        )
        parts = []
        for number, (example, output) in enumerate(zip(examples, outputs, strict=True)):
            text = experiment.base_tokenizer.decode(output.token_ids)
            answer = experiment.task.extract(text, output.cut, example.problem.options)
            cut = " [cut]" if output.cut else ""
            verdict = "right" if experiment.task.is_correct(answer, example.problem) else "wrong"
            tokens = "" if thoughts is None or nearest is None else self._named(nearest, number, thoughts.shape[1])
            parts.append(
                f"QUESTION\n{example.problem.question}\n\n{tokens}OUTPUT\n{text}{cut}\n\n"
                f"ANSWER {answer or 'not parsed'} ({verdict}; reference {example.problem.answer})"
            )
        return f"\n\n{'-' * 80}\n\n".join(parts)

    def _named(self, nearest: Nearest, number: int, count: int) -> str:
        """The tokens nearest to so many thoughts of a problem, those of its first chain."""
        first = number * count * self._engine.module.chains
        ids, cosines = (of_all[first : first + count].tolist() for of_all in (nearest.ids_N, nearest.cosines_N))
        named = [f"{self._word(token)} {cosine:.2f}" for token, cosine in zip(ids, cosines, strict=True)]
        return f"NEAREST TOKENS, AND COSINES TO THEM\n{', '.join(named)}\n\n"

    def _word(self, token: int) -> str:
        return repr(self._experiment.base_tokenizer.decode([token]))


def _mean_cosine(chains_BCW: torch.Tensor) -> float:
    """Of two chains of one question, which have a vector each: the mean over all pairs and questions."""
    directions_BCW = torch.nn.functional.normalize(chains_BCW, dim=-1)
    count = chains_BCW.shape[1]
    return ((directions_BCW.sum(dim=1).square().sum(dim=-1) - count) / (count * (count - 1))).mean().item()
