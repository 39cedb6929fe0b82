"""What a training holds in the memory of each rank, as far as it is known before the first step."""

from dataclasses import dataclass
from typing import Any

from softcot_ds.distributed import world_size
from softcot_ds.models.limits import Limits, most_gathered
from softcot_ds.models.partition import comes_and_goes, gathers_of, held_bytes, whole_shape
from softcot_ds.planning.memory import trained_bytes
from softcot_ds.progress import size


@dataclass(frozen=True)
class ExpectedMemory:
    """Bytes on a rank. Activations, which depend on the batch, and DeepSpeed's buffers come on top: the peak of a CPU
    rank with next to no activations is seen to be 1.15 to 1.35 times the total."""

    weights: int
    """Frozen weights that the rank holds all the time."""
    tokens: int
    """Embeddings of the tokens that occur in the data."""
    gathered: int
    """Other ranks' frozen weights that it holds beside them, at most."""
    trained: int
    """What is trained with its gradient, its float32 copy and its moments."""

    def __str__(self) -> str:
        return (
            f"{size(self.total)} ({size(self.weights)} frozen weights, {size(self.gathered)} gathered from other ranks "
            f"at most, {size(self.tokens)} embeddings of the data's tokens, {size(self.trained)} for what is trained)"
        )

    @property
    def total(self) -> int:
        return self.weights + self.tokens + self.gathered + self.trained


def expected_memory(engine: Any) -> ExpectedMemory:
    """Of a training, from its parameters as DeepSpeed holds them.

    Partitioned weights are gathered before their use and may stay until the next one: as many as DeepSpeed's limits let
    (models/limits.py). On a single rank nothing is gathered. Weights that are offloaded count as gathered alone.
    """
    trained = {*engine.module.trained().values()}
    frozen = [parameter for parameter in engine.module.parameters() if parameter not in trained]
    weights = sum(held_bytes(parameter) for parameter in frozen)
    come_and_go = {parameter for parameter in frozen if comes_and_goes(parameter)}
    gathered = 0
    if come_and_go:
        limits = Limits(
            engine.zero_prefetch_bucket_size(), engine.zero_max_live_parameters(), engine.zero_max_reuse_distance()
        )
        threshold = engine.zero_param_persistence_threshold()
        models = [model for model in (engine.module.base, engine.module.assistant) if model is not None]
        most = most_gathered([gathers_of(model, threshold) for model in models], limits)
        itemsize = next(iter(come_and_go)).element_size()
        gathered = itemsize * min(most, sum(whole_shape(parameter).numel() for parameter in come_and_go))
    stage, ranks = engine.zero_optimization_stage(), world_size()
    copies = sum(trained_bytes(whole_shape(weight).numel(), weight.element_size(), ranks, stage) for weight in trained)
    tokens = 0 if engine.module.table is None else engine.module.table.rows_KD.nbytes
    return ExpectedMemory(weights, tokens, gathered, round(copies))
