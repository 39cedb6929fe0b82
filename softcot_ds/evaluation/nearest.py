"""The tokens that are nearest to the thoughts of each problem, for whoever reads a report: they decide nothing."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from softcot_ds.evaluation.conditions import Posed
from softcot_ds.evaluation.jobs import Worker
from softcot_ds.models.embedding import CompactTable, Nearest, whole_embedding

Near = list[tuple[int, float]]
"""Of each thought of a problem the token whose embedding is nearest to it in direction, and the cosine to that."""


class NearestTokens:
    """Of the thoughts under one condition; of several chains those of the first."""

    def __init__(self, worker: Worker, problems: Posed) -> None:
        """``problems``: with thoughts. What is on disk already is found. Raises SoftCoTError; see ``Worker.job``."""
        thoughts = problems.thoughts

        def work(
            model: PreTrainedModel, _table: CompactTable | None, batch: list[int], _draws: list[int]
        ) -> list[list[Near]]:
            return [nearest_tokens(model, thoughts(batch))]

        name, settings = f"{problems.name} nearest tokens", {"asked": "nearest tokens"}
        self._worker = worker
        self._job = worker.job(
            name, problems.prompts, thoughts, settings, work, lambda near: [tuple(one) for one in near]
        )

    @property
    def need_states(self) -> bool:
        """Whether thoughts have to be made of the assistant's states for it."""
        return bool(self._job.todo)

    def run(self, decode: Callable[[list[int]], str]) -> list[list[tuple[str, float]]]:
        """By problem and thought the token, as ``decode`` writes it, and the cosine. All ranks call it together."""
        return [[(decode([token]), cosine) for token, cosine in near] for near in self._worker.run(self._job)]


@torch.no_grad()
def nearest_tokens(model: PreTrainedModel, thoughts_BTD: torch.Tensor) -> list[Near]:
    """Of each of B problems. All ranks that hold the model together call it together."""
    vocabulary = model.config.get_text_config().vocab_size
    with whole_embedding(model.get_input_embeddings()) as embed:
        nearest = Nearest.to(thoughts_BTD.flatten(0, 1).float(), embed, vocabulary)
    pairs = iter(zip(nearest.ids_N.tolist(), nearest.cosines_N.tolist(), strict=True))
    return [[next(pairs) for _ in thoughts_TD] for thoughts_TD in thoughts_BTD]
