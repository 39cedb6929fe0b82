"""How long the jobs of a recipe take: own targets, the assistant's cache, training with its validations, evaluation."""

from dataclasses import dataclass
from itertools import product

from softcot_ds.data.batches import in_steps
from softcot_ds.models.decoding import portions
from softcot_ds.planning.hardware import Cluster
from softcot_ds.planning.search import GROUPED, SAMPLE_TOKENS, SAMPLES, Choice, Planner, Way, slices_of
from softcot_ds.planning.traffic import Traffic, summed_activations

_FORWARD = 0.4
"""Of a step's time, about, a forward pass alone takes."""
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Decoding:
    """A way to decode the test problems."""

    partition: str
    group_size: int
    bits: int
    batch_size: int
    bytes: float
    """Of a GPU."""
    fits: bool
    token_seconds: float
    """Of a token of all rows of a batch."""
    seconds: float
    """Of the answers under all conditions; 0 where none are decoded."""


@dataclass(frozen=True)
class Jobs:
    """Seconds of each job."""

    targets: float
    """0 where the recipe is trained on the data's own. At most: what is solved is not asked again."""
    cache: float
    training: float
    validation: float
    """Of that."""
    evaluation: float


def token_seconds(planner: Planner, cluster: Cluster, way: Way, rows: int) -> float:
    """A token of each of ``rows``: weights are read, or gathered, whatever their number; keys and values of each."""
    shape, gpu, reached = planner.shape, cluster.gpu, cluster.reached
    cached = planner.itemsize * rows * (planner.prompt + planner.new_tokens) * shape.keys_values
    read = planner.layer_bytes(way.bits) * shape.met(rows) + planner.itemsize * (shape.head or shape.table) + cached
    read /= slices_of(way.partition, way.group_size)
    device = read / (1e9 * gpu.memory_gb_per_s * reached.memory)
    host = planner.decode_operations * 1e-6 * reached.operation_us
    if way.group_size == 1:
        return max(device, host)
    if way.partition == "tensor":
        elements, sums = summed_activations(len(shape.layers), shape.width, rows, 0, 0, False)
        waited = cluster.seconds_of(Traffic(summed=planner.itemsize * elements, sums=sums), way.group_size)
        return max(device, host) + max(waited)
    model = planner.gathers(way.bits)
    gathered = sum(model.sums[way.resident :]) + model.table + model.head
    gathers = Traffic(gathered=planner.itemsize * gathered, gathers=len(shape.layers) - way.resident + 2)
    return max(device, host, *cluster.seconds_of(gathers, way.group_size))


def decoding_memory(planner: Planner, way: Way) -> float:
    """Bytes of a GPU that decodes as many problems together as ``way`` has examples in a micro-batch."""
    holding = way.partition, way.group_size, way.bits
    memory = planner.held(*holding) + planner.resident_bytes(way) + planner.most_gathered(*holding)
    new_tokens = planner.recipe.evaluation.max_new_tokens
    memory += planner.decoding_bytes(*holding[:2], way.micro_batch, planner.prompt, new_tokens, others_wait=True)
    memory += planner.drafting_bytes(way.micro_batch, new_tokens)
    return max(memory, planner.to_load(*holding))


def decoding(planner: Planner, cluster: Cluster, holding: tuple[str, int, int], rows: int) -> Decoding:
    """The test problems under all conditions, ``rows`` of a rank together. Time is that without drafts: how many are
    accepted is not known before.

    Args:
        holding: partition, ranks that share a copy, bits.
    """
    way = Way(*holding, False, 0, rows, 1)
    way = planner.filled(way, cluster, decoding_memory(planner, way))
    memory = decoding_memory(planner, way)
    streams = cluster.ranks // slices_of(way.partition, way.group_size)
    each = token_seconds(planner, cluster, way, rows)
    asked = planner.recipe.evaluation
    decoded = len(asked.conditions) if asked.decode and asked.read == "text" else 0
    seconds = decoded * passes(planner, planner.data.test, asked.samples, rows, streams) * each
    return Decoding(*holding, rows, memory, memory <= cluster.room, each, seconds)


def passes(planner: Planner, problems: int, samples: int, rows: int, streams: int) -> float:
    """Passes over a token of each of ``rows``, one after another, until ``streams`` have decoded all: a row that has
    ended makes room for another output, until a portion has none that wait."""
    cut = portions([0] * problems, rows)
    mean = min(planner.data.mean.target, planner.new_tokens)
    full = max(1.0, samples * len(cut[0]) / rows)
    return -(-len(cut) // streams) * (mean * full + planner.new_tokens - mean)


def decodings(planner: Planner, cluster: Cluster, training: Way) -> list[Decoding]:
    """Ways to evaluate, the best first: those that fit, by time; then the others, by memory.

    Args:
        training: what the recipe has for that: group size and bits are of both.
    """
    found = []
    for (partition, size, bits), rows in product(planner.holdings(cluster), _BATCHES):
        grouped = partition in GROUPED and training.partition in GROUPED
        if bits == training.bits and (size == training.group_size or not grouped):
            found.append(decoding(planner, cluster, (partition, size, bits), rows))
    return sorted(found, key=lambda way: (not way.fits, way.seconds if way.fits else way.bytes, way.batch_size))


def steps_of(planner: Planner) -> int:
    """Optimizer steps of the training. Raises SoftCoTError, see ``in_steps``."""
    return in_steps(planner.recipe, planner.data.train).training.num_steps


def jobs(planner: Planner, cluster: Cluster, choice: Choice, evaluation: Decoding) -> Jobs:
    """The jobs of the recipe with these choices."""
    recipe, way = planner.recipe, choice.way
    times = steps_of(planner) // recipe.training.validate_every
    step = choice.seconds / way.accumulation
    streams = cluster.ranks // slices_of(way.partition, way.group_size)

    def read(problems: int) -> float:
        return _FORWARD * step * -(-problems // (way.micro_batch * streams))

    # With the thoughts of another question too, where there are any. Every rank decodes the samples.
    sampled = SAMPLE_TOKENS * token_seconds(planner, cluster, way, SAMPLES)
    validated = read(planner.data.validation) * (1 + planner.needs_states) + sampled
    validation = times * validated if planner.data.validation else 0.0
    training = steps_of(planner) * choice.seconds + validation
    asked = recipe.evaluation
    scored = len(asked.conditions) * (asked.loss + (asked.decode and asked.read == "options"))
    evaluated = evaluation.seconds + scored * read(planner.data.test)
    targets = _targets_seconds(planner, cluster, evaluation)
    return Jobs(targets, _cache_seconds(planner, cluster), training, validation, evaluated)


def _targets_seconds(planner: Planner, cluster: Cluster, evaluation: Decoding) -> float:
    """The base is asked each training problem as often as the recipe says, and decodes as it does in evaluation."""
    if planner.recipe.task.targets_file is None:
        return 0.0
    streams = cluster.ranks // slices_of(evaluation.partition, evaluation.group_size)
    samples, rows = planner.recipe.targets.samples, evaluation.batch_size
    # Each sample is a round of its own: it is known then what is left to ask.
    return samples * passes(planner, planner.data.train, 1, rows, streams) * evaluation.token_seconds


def _cache_seconds(planner: Planner, cluster: Cluster) -> float:
    """The assistant reads every problem once, each rank its part."""
    recipe, data, shape = planner.recipe, planner.data, planner.assistant
    if recipe.thoughts.source == "online" or not planner.needs_states:
        return 0.0
    tokens = (data.train + data.validation + data.test) * data.mean.assistant / cluster.ranks
    compute = cluster.gpu.flops(recipe.assistant.dtype) or cluster.gpu.flops("bfloat16")
    batches = max(1.0, tokens / recipe.cache.tokens_per_batch)
    host = batches * planner.decode_operations / len(planner.shape.layers) * len(shape.layers)
    products = 2 * shape.met(1) * tokens / (compute * cluster.reached.products)
    return max(products, host * 1e-6 * cluster.reached.operation_us)
