"""What a plan says: a table for people, an object for scripts."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from softcot_ds.errors import SoftCoTError
from softcot_ds.files import dump_yaml
from softcot_ds.methods.base import method_class
from softcot_ds.planning.hardware import Cluster
from softcot_ds.planning.jobs import Decoding, decodings, jobs, steps_of
from softcot_ds.planning.lengths import read_data
from softcot_ds.planning.memory import GIB
from softcot_ds.planning.search import GROUPED, Choice, Planner, Way
from softcot_ds.progress import count, duration
from softcot_ds.recipe import Recipe
from softcot_ds.tables import table_lines
from softcot_ds.tasks import make_task

MOST_GPUS = 1024


@dataclass(frozen=True)
class Scaled:
    """The best choice on another number of nodes, with a global batch that grows with it."""

    gpus: int
    choice: Choice
    global_batch: int
    per_second: float
    """Examples."""


class Plan:
    """All that is known of a recipe on some GPUs."""

    def __init__(self, planner: Planner, cluster: Cluster) -> None:
        """Raises SoftCoTError: see ``Planner.choices``."""
        self.planner, self.cluster = planner, cluster
        self.choices = planner.choices(cluster)
        self.best = self.choices[0]
        self.decodings = decodings(planner, cluster, self.best.way)
        self.evaluation = self.decodings[0]
        self.jobs = jobs(planner, cluster, self.best, self.evaluation)


def make_plan(recipe: Recipe, cluster: Cluster) -> Plan:
    """Raises SoftCoTError where a configuration is not to be had, or the global batch does not feed the ranks."""
    make_task(recipe.task).require_training()
    method_class(recipe.method).check(recipe)
    return Plan(Planner(recipe, read_data(recipe)), cluster)


def recipe_lines(plan: Plan) -> str:
    """What to write into the recipe for the best choice, YAML."""
    way, decoding = plan.best.way, plan.evaluation
    backbone: dict[str, Any] = {"partition": way.partition}
    grouped = next((found for found in (way, decoding) if found.partition in GROUPED), None)
    if grouped and grouped.group_size != plan.cluster.gpus_per_node:
        backbone["group_size"] = grouped.group_size
    if way.bits != 16:
        backbone["bits"] = way.bits
    training = {"micro_batch_size": way.micro_batch, "activation_checkpointing": way.activation_checkpointing}
    evaluation = {"partition": decoding.partition, "batch_size": decoding.batch_size}
    return dump_yaml({"backbone": backbone, "training": training, "evaluation": evaluation})


def as_json(plan: Plan, scaled: Sequence[Scaled] = ()) -> dict[str, Any]:
    """The whole plan as JSON values; GB are 1e9 bytes, of a step; hours are of the whole job."""
    cluster, planner = plan.cluster, plan.planner
    return {
        "recipe": planner.recipe.name,
        "base": {"model": planner.recipe.base.model, "parameters": planner.shape.total},
        "gpus": {"nodes": cluster.nodes, "per_node": cluster.gpus_per_node, **cluster.gpu.model_dump()}
        | {"network_gbps": cluster.network_gbps, "room_gib": cluster.room / GIB},
        "data": asdict(planner.data),
        "best": _choice(plan.best),
        "choices": [_choice(choice) for choice in plan.choices],
        "evaluation": [_decoding(way) for way in plan.decodings],
        "recipe_lines": recipe_lines(plan),
        "hours": {name: _hours(seconds, cluster.ranks) for name, seconds in asdict(plan.jobs).items()},
        "scaling": [
            {"gpus": row.gpus, "global_batch": row.global_batch, "examples_per_second": row.per_second}
            | {"efficiency": efficiency, "choice": _choice(row.choice)}
            for row, efficiency in zip(scaled, _efficiencies(scaled), strict=True)
        ],
    }


def _hours(seconds: float, gpus: int) -> dict[str, float]:
    return {"hours": seconds / 3600, "gpu_hours": seconds / 3600 * gpus}


def _choice(choice: Choice) -> dict[str, Any]:
    return {
        **asdict(choice.way),
        "memory_gib": choice.bytes / GIB,
        "memory": {f"{part}_gib": size / GIB for part, size in choice.memory.items()},
        "between_nodes_gb": choice.between / 1e9,
        "within_nodes_gb": choice.within / 1e9,
        "step_seconds": choice.seconds,
        "bound_by": choice.bound_by,
        "fits": choice.fits,
    }


def _decoding(way: Decoding) -> dict[str, Any]:
    found = asdict(way)
    return {**found, "memory_gib": found.pop("bytes") / GIB}


def scale(plan: Plan) -> list[Scaled]:
    """From one node on, doubled as far as ``MOST_GPUS``: the best choice of each. The global batch grows with the GPUs,
    from the recipe's on those that were asked for, and feeds each rank with one example at least."""
    cluster, wanted, found = plan.cluster, plan.planner.recipe.training.global_batch_size, []
    nodes = 1
    while nodes * cluster.gpus_per_node <= MOST_GPUS:
        larger = replace(cluster, nodes=nodes)
        batch = max(larger.ranks, -(-wanted * nodes // cluster.nodes))
        best = plan.planner.choices(larger, batch)[0]
        found.append(Scaled(larger.ranks, best, batch, batch / best.seconds))
        nodes *= 2
    return found


def _efficiencies(scaled: Sequence[Scaled]) -> list[float | None]:
    """Examples per second and GPU, against those of the fewest GPUs that the model fits on; None where it does not."""
    rates = [row.per_second / row.gpus if row.choice.fits else None for row in scaled]
    first = next((rate for rate in rates if rate), None)
    return [rate and first and rate / first for rate in rates]


def as_text(plan: Plan, scaled: Sequence[Scaled] = ()) -> str:
    """The plan for people."""
    parts = [_about(plan), _table(plan), _standing(plan), _lines(plan), _jobs_table(plan)]
    if scaled:
        parts.append(_scaling_table(scaled))
    return "\n\n".join(parts)


def _about(plan: Plan) -> str:
    cluster, planner = plan.cluster, plan.planner
    gpu = cluster.gpu
    between = f", {cluster.network_gbps:g} Gb/s of each to other nodes" if cluster.nodes > 1 else ""
    return (
        f"{planner.recipe.name}: {planner.recipe.base.model}, {planner.shape.total / 1e9:.1f} billion weights\n"
        f"{count(cluster.nodes, 'node')} with {cluster.gpus_per_node} x {gpu.words}: {gpu.memory_gib:g} GiB, "
        f"{cluster.room / GIB:.1f} of them for a run; {gpu.link_gb_per_s:g} GB/s within a node{between}\n"
        f"data: {planner.data.source}\n"
        "Everything below is computed from shapes and data sheets, not measured."
    )


def _table(plan: Plan) -> str:
    rows = []
    shown: set[tuple[Any, ...]] = set()
    for choice in plan.choices:
        way = choice.way
        if (key := (way.partition, way.group_size, way.bits)) in shown:
            continue
        shown.add(key)
        memory = [choice.bytes, *(choice.memory[part] for part in ("held", "gathered", "activations", "loss"))]
        rows.append(
            [
                _holding(way),
                str(way.bits),
                f"{way.micro_batch}x{way.accumulation}{' ckpt' if way.activation_checkpointing else ''}",
                *(f"{part / GIB:.1f}" for part in memory),
                *(f"{moved / 1e9:,.1f}" for moved in (choice.within, choice.between)),
                _seconds(choice.seconds),
                choice.bound_by if choice.fits else "does not fit",
            ]
        )
    header = ["partition", "bits", "batch", "total", "held", "gathered", "activ.", "loss", "within", "between", "step"]
    return (
        "\n".join(table_lines([*header, "bound by"], rows, words=(0, 2, 11)))
        + "\n\nThe best of each way to hold the weights, the fastest first. total, of which held, gathered, activ. and "
        "loss:\nGiB on a GPU, total with what is trained and its buffers, and an assistant that runs online. within, "
        "between: GB\ngathered or summed in a step between ranks of one node and of several. node and tensor: ranks "
        "that share a copy.\nbatch: examples of a micro-batch x micro-batches of a rank in a step; ckpt: with "
        "activation checkpointing."
    )


def _standing(plan: Plan) -> str:
    try:
        choice = plan.planner.choice(plan.planner.own_way(plan.cluster), plan.cluster)
    except SoftCoTError as error:
        return f"The recipe as it stands: {error}"
    way, fits = choice.way, "fits" if choice.fits else "does not fit"
    return (
        f"The recipe as it stands ({way.partition}, {way.micro_batch} x {way.accumulation} examples) {fits}: "
        f"{choice.bytes / GIB:.1f} GiB, {_seconds(choice.seconds)} a step, bound by {choice.bound_by}."
    )


def _lines(plan: Plan) -> str:
    if not plan.best.fits:
        return "Nothing fits: take more GPUs, or larger ones."
    indented = "".join(f"  {line}\n" for line in recipe_lines(plan).splitlines()).rstrip()
    return f"The best, as lines of the recipe:\n{indented}"


def _jobs_table(plan: Plan) -> str:
    rows, ranks = plan.jobs, plan.cluster.ranks
    recipe = plan.planner.recipe
    notes = {}
    if recipe.task.targets_file is not None:
        notes["targets"] = f"{count(recipe.targets.samples, 'sample')} of each training problem at most"
    notes |= {
        "cache": f"{plan.planner.data.mean.assistant} tokens of each problem",
        "training": f"{steps_of(plan.planner):,} steps, {_seconds(rows.validation)} of it validation",
        "evaluation": f"{count(len(recipe.evaluation.conditions), 'condition')}, {plan.evaluation.batch_size} problems "
        f"of a rank together, {1e3 * plan.evaluation.token_seconds:.0f} ms a token"
        + ("" if plan.evaluation.fits else "; does not fit"),
    }
    seconds = {name: getattr(rows, name) for name in notes}
    cells = [[name, duration(seconds[name]), f"{seconds[name] / 3600 * ranks:,.1f}", notes[name]] for name in notes]
    return "\n".join(table_lines(["job", "time", "GPU-hours", ""], cells, words=(0, 3)))


def _scaling_table(scaled: Sequence[Scaled]) -> str:
    rows = []
    for row, efficiency in zip(scaled, _efficiencies(scaled), strict=True):
        way, cells = row.choice.way, [str(row.gpus)]
        if efficiency is None:
            cells.append("does not fit")
        else:
            cells += [_holding(way), f"{row.global_batch:,}", _seconds(row.choice.seconds), f"{row.per_second:,.1f}"]
            cells += [f"{efficiency:.0%}", f"in {way.bits} bits" if way.bits != 16 else ""]
        rows.append(cells)
    header = ["GPUs", "partition", "global batch", "step", "examples/s", "a GPU, against the fewest", ""]
    return "\n".join(table_lines(header, rows, words=(1, 6)))


def _holding(way: Way) -> str:
    return f"{way.partition} {way.group_size}" if way.partition in GROUPED else way.partition


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f}s" if seconds < 60 else duration(seconds)
