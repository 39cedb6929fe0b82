"""Whether a recipe fits on some GPUs, as it stands, and how much of them it leaves."""

from softcot_ds.backbone_config import Partition
from softcot_ds.data.examples import Splits
from softcot_ds.distributed import Group, world_size
from softcot_ds.planning.hardware import Cluster, load_hardware
from softcot_ds.planning.jobs import decoding, decoding_memory
from softcot_ds.planning.lengths import Data, data_of, read_data
from softcot_ds.planning.memory import GIB
from softcot_ds.planning.search import FILLED, Planner, Way
from softcot_ds.recipe import Recipe


def why_too_large(recipe: Recipe, cluster: Cluster, data: Data | None = None) -> str:
    """What of the recipe's training and evaluation needs more memory than a GPU has; "" where both fit.

    Args:
        data: of the recipe, where it has been read already.

    Raises:
        SoftCoTError: it cannot be planned.
    """
    planner = Planner(recipe, data or read_data(recipe))
    way = planner.own_way(cluster)
    training = planner.memory(way, cluster.ranks)
    partition = recipe.evaluation.partition or recipe.backbone.partition
    evaluation = decoding(planner, cluster, planner.own_holding(cluster, partition), recipe.evaluation.batch_size)
    needed = {"training": sum(training.values()), "evaluation": evaluation.bytes}
    large = [f"{job} {size / GIB:,.0f} GiB" for job, size in needed.items() if size > cluster.room]
    if not large:
        return ""
    return (
        f"{' and '.join(large)} of a GPU, by plan, of which it has {cluster.gpu.memory_gib:.0f} GiB, "
        f"{cluster.room / GIB:.0f} for a run ({way.partition}, {way.micro_batch} examples of a rank)"
    )


def spare_to_train(recipe: Recipe, splits: Splits, free: float) -> float:
    """What training leaves for layers that each rank holds whole, in bytes.

    Args:
        splits: the recipe's examples.
        free: bytes of a GPU that holds its share of the base already.

    Raises:
        SoftCoTError: it cannot be planned.
    """
    planner = Planner(recipe, data_of(splits))
    holding, checkpointing = _holding(recipe, recipe.backbone.partition), recipe.training.activation_checkpointing
    way = Way(*holding, checkpointing, 0, planner.micro_batch, 1)
    memory = planner.memory(way, world_size())
    needed = sum(memory.values()) - memory["assistant"]  # which is loaded: it is not in what is free
    return _spare(planner, way, needed, free)


def spare_to_decode(recipe: Recipe, partition: Partition, free: float) -> float:
    """The same of evaluation, in which the base is held by ``partition``."""
    planner = Planner(recipe, read_data(recipe))
    way = Way(*_holding(recipe, partition), False, 0, recipe.evaluation.batch_size, 1)
    return _spare(planner, way, decoding_memory(planner, way), free)


def _holding(recipe: Recipe, partition: Partition) -> tuple[str, int, int]:
    ranks = Group.of(recipe.backbone.group_size).size if partition == "node" else world_size()
    return partition, ranks, recipe.backbone.bits


def _spare(planner: Planner, way: Way, needed: float, free: float) -> float:
    beside = needed - planner.held(way.partition, way.group_size, way.bits)
    return max(0.0, FILLED * load_hardware().reached.room * free - beside)
