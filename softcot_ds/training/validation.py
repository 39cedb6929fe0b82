"""What is looked at between training steps: validation loss, the thoughts themselves, sample answers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from softcot_ds.data.examples import Example
from softcot_ds.data.prompts import BasePrompt
from softcot_ds.distributed import DataRanks, device, sum_over_ranks
from softcot_ds.experiment import Experiment
from softcot_ds.models.decoding import Sampling, decode, try_decoding
from softcot_ds.models.embedding import whole_embedding
from softcot_ds.models.loss import IGNORE
from softcot_ds.models.partition import OwnPasses
from softcot_ds.training.batches import MakeBatch

_NUM_SAMPLES = 2
_SAMPLE_TOKENS = 128
_ROW_ELEMENTS = 2**22
"""Elements of the token table that are looked at together: 16 MiB in float32."""


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
        self._make_batch = make_batch
        self._experiment = experiment
        self._ranks = ranks
        self._batch_size = experiment.recipe.training.micro_batch_size
        self._passes = OwnPasses(engine)
        self._decoding_passes = OwnPasses(engine, engine.module.base)
        try_decoding(engine.module.base)

    @torch.no_grad()
    def run(self) -> tuple[dict[str, float], str]:
        """Scalars for TensorBoard, and sample answers as text."""
        self._engine.eval()
        with self._passes:
            scalars = {"loss/validation": self._loss()}
        with self._decoding_passes:
            scalars |= self._thought_statistics()
            samples = self._samples()
        self._engine.train()
        return scalars, samples

    def _loss(self) -> float:
        """Mean cross entropy over the supervised tokens of all validation examples, nats."""
        total = torch.zeros(2, dtype=torch.float64, device=device())
        by_length = sorted(self._examples, key=lambda example: example.length)
        # Cut by the examples alone: padding, and with it rounding, does not depend on the number of ranks.
        size = self._batch_size
        batches = [by_length[start : start + size] for start in range(0, len(by_length), size)]
        ranks = self._ranks
        for start in range(0, len(batches), ranks.count):
            mine = start + ranks.number < len(batches)
            # A rank that is out of batches runs along with one that counts for nothing.
            batch = self._make_batch(batches[start + ranks.number if mine else start])
            if not mine:
                batch.targets.fill_(IGNORE)
            count = int((batch.targets != IGNORE).sum())
            total += torch.stack([self._engine(batch.to(device())).double(), total.new_tensor(count)])
        loss, count = sum_over_ranks(total).tolist()
        return loss / count

    def _thought_statistics(self) -> dict[str, float]:
        """How the projected thoughts lie among the token embeddings."""
        model = self._engine.module
        thoughts = (
            model.thoughts(self._make_batch(self._examples[: self._batch_size]).to(device())).float().flatten(0, 1)
        )
        with whole_embedding(model.base.get_input_embeddings()) as embed:
            token_norm, cosines = compare_with_tokens(thoughts, embed, model.base.config.get_text_config().vocab_size)
        return {
            "thoughts/norm": thoughts.norm(dim=1).mean().item(),
            "thoughts/token_embedding_norm": token_norm,
            "thoughts/cosine_to_nearest_token": cosines.mean().item(),
        }

    def _samples(self) -> str:
        experiment = self._experiment
        examples = self._examples[:_NUM_SAMPLES]
        outputs = decode(
            self._engine.module.base,
            [BasePrompt(example.prefix_ids, example.suffix_ids) for example in examples],
            self._engine.module.thoughts(self._make_batch(examples).to(device())),
            experiment.base_prompts.stop_ids,
            Sampling(min(_SAMPLE_TOKENS, experiment.recipe.evaluation.max_new_tokens)),
            self._engine.module.table,
        )
        parts = []
        for example, output in zip(examples, outputs, strict=True):
            text = experiment.base_tokenizer.decode(output.token_ids)
            answer = experiment.task.extract(text, output.cut, example.problem.options)
            cut = " [cut]" if output.cut else ""
            verdict = "right" if experiment.task.is_correct(answer, example.problem) else "wrong"
            parts.append(
                f"QUESTION\n{example.problem.question}\n\nOUTPUT\n{text}{cut}\n\n"
                f"ANSWER {answer or 'not parsed'} ({verdict}; reference {example.problem.answer})"
            )
        return f"\n\n{'-' * 80}\n\n".join(parts)


def compare_with_tokens(
    vectors_ND: torch.Tensor, embed: Callable[[torch.Tensor], torch.Tensor], vocabulary: int
) -> tuple[float, torch.Tensor]:
    """How vectors lie among the embeddings of all tokens, some tokens at a time: a float32 copy of a large vocabulary's
    table may not fit beside the model.

    Args:
        vectors_ND: float32.
        embed: (1, tokens) ids to (1, tokens, D) embeddings of any floating dtype.
        vocabulary: number of tokens.

    Returns:
        The mean length of an embedding, and (N,) float32: each vector's cosine to the one nearest to it in direction.
    """
    directions = torch.nn.functional.normalize(vectors_ND)
    nearest = torch.full_like(directions[:, 0], -torch.inf)
    total = torch.zeros((), dtype=torch.float64, device=directions.device)
    ids = torch.arange(vocabulary, device=directions.device)
    for some in ids.split(max(1, _ROW_ELEMENTS // vectors_ND.shape[1])):
        rows = embed(some[None])[0].float()
        norms = rows.norm(dim=1)
        total += norms.double().sum()
        cosines = directions @ rows.T / norms.clamp(min=1e-12)  # a row of zeros has no direction: cosine 0
        nearest = torch.maximum(nearest, cosines.amax(dim=1))
    return total.item() / vocabulary, nearest
