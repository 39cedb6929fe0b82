"""Whether a recipe fits on some GPUs, as it stands."""

from softcot_ds.planning.hardware import Cluster
from softcot_ds.planning.jobs import decoding
from softcot_ds.planning.lengths import Data, read_data
from softcot_ds.planning.memory import GIB
from softcot_ds.planning.search import Planner, Way
from softcot_ds.recipe import SPLIT, Recipe


def why_too_large(recipe: Recipe, cluster: Cluster, data: Data | None = None) -> str:
    """What of the recipe's training and evaluation needs more memory than a GPU has; "" where both fit.

    Args:
        data: of the recipe, where it has been read already.

    Raises:
        SoftCoTError: it cannot be planned.
    """
    planner = Planner(recipe, data or read_data(recipe))
    way = planner.own_way(cluster)
    training = planner.memory(way, cluster)
    partition = recipe.evaluation.partition or recipe.backbone.partition
    held, size, bits = planner.own_holding(cluster, partition)
    resident = way.resident if held in SPLIT else 0
    evaluation = decoding(planner, cluster, Way(held, size, bits, False, resident, recipe.evaluation.batch_size, 1))
    needed = {"training": sum(training.values()), "evaluation": evaluation.bytes}
    large = [f"{job} {size / GIB:,.0f} GiB" for job, size in needed.items() if size > cluster.room]
    if not large:
        return ""
    return (
        f"{' and '.join(large)} of a GPU, by plan, of which it has {cluster.gpu.memory_gib:.0f} GiB, "
        f"{cluster.room / GIB:.0f} for a run ({way.partition}, {way.micro_batch} examples of a rank)"
    )
