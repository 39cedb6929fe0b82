"""All ways to hold the weights and cut the batches that a recipe can name: what they need, move and take on GPUs."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import accumulate, product
from typing import Any, Literal

import torch

from softcot_ds.backbone_config import SPLIT
from softcot_ds.errors import SoftCoTError
from softcot_ds.methods.base import method_class
from softcot_ds.methods.conditioning import Conditioning
from softcot_ds.models.limits import Gathers, derive, most_gathered
from softcot_ds.models.partition import gathers_of, make_layers_leaves
from softcot_ds.models.quantized import FewBits, packed_bytes
from softcot_ds.models.rows import ROOM
from softcot_ds.planning.hardware import Cluster
from softcot_ds.planning.lengths import Data, Lengths
from softcot_ds.planning.memory import GIB, shared_bytes, trained_bytes
from softcot_ds.planning.shapes import Shape, find_config, meta_model, sliced_elements
from softcot_ds.planning.traffic import Traffic, gathered_elements, summed_activations
from softcot_ds.planning.work import Layers, StepOnMeta
from softcot_ds.recipe import Recipe

PARTITIONS = ("none", "node", "zero3", "tensor")
"""The simplest first: of two that are as fast, the first is the better."""
GROUPED = ("node", "tensor")
"""Those that ``backbone.group_size`` is for."""
_BITS = (16, 8, 4)
_MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_AS_FAST = 1.02
"""Ways whose times differ by less are as fast as each other: the model knows no better."""
FILLED = 0.95
"""Part of the room that is filled with resident layers: a plan is not that exact."""
SAMPLES, SAMPLE_TOKENS = 2, 128
"""What validation decodes (training/validation.py)."""
_LOGITS = 4
"""Copies in float32 of the logits of a token, in choosing the next."""
BoundBy = Literal["compute", "memory", "host", "within nodes", "between nodes"]


@dataclass(frozen=True)
class Way:
    """What a recipe says of how weights are held and batches cut."""

    partition: str
    group_size: int
    """Ranks that hold one copy of the weights between them."""
    bits: int
    activation_checkpointing: bool
    resident: int
    """Layers, from the first on, that are whole on every rank all the same."""
    micro_batch: int
    """Examples."""
    accumulation: int
    """Micro-batches of a rank in a step."""


@dataclass(frozen=True)
class Choice:
    """A way, and what it means for each GPU."""

    way: Way
    memory: dict[str, float]
    """Bytes by part."""
    fits: bool
    within: float
    """Bytes of a step's operations between ranks of one node: the whole of what each gathers or sums."""
    between: float
    """The same of operations between ranks of several nodes."""
    seconds: float
    """Of a step."""
    bound_by: BoundBy

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())


def slices_of(partition: str, group_size: int) -> int:
    """Ranks that compute with one copy of the weights together, each with its slice of them, on the same examples."""
    return group_size if partition == "tensor" else 1


class Planner:
    """The choices of a recipe, whatever the GPUs."""

    def __init__(self, recipe: Recipe, data: Data) -> None:
        """Raises SoftCoTError where a model's configuration is not to be had."""
        self.recipe, self.data = recipe, data
        self.config = find_config(recipe.base)
        few = recipe.backbone.deepspeed_config()["zero_optimization"].get("stage3_param_persistence_threshold", 10_000)
        self.shape = Shape.of(self.config, few)
        self.assistant = Shape.of(find_config(recipe.assistant), few)
        model = meta_model(self.config, torch.bfloat16)
        make_layers_leaves(model)
        self._gathers = gathers_of(model, few)
        packed = [layer for layer in model.modules() if FewBits(8, self.shape.vocabulary).holds(layer)]
        self._packed = sum(layer.weight.numel() for layer in packed) / sum(self.shape.layers)
        """Share of the layers' weights that can be held in few bits."""
        method = method_class(recipe.method)
        self.needs_states = method.needs_states
        self._trained = method.num_trained(recipe, (self.assistant.width, self.shape.width), model)
        with torch.device("meta"):
            condition = recipe.projection.condition if method.needs_states else "none"
            conditioning = Conditioning.shaped(condition, self.assistant.width)
        self._conditioning = conditioning.nbytes if conditioning else 0
        self.itemsize = 4 if recipe.base.dtype == "float32" else 2
        longest = data.longest
        thoughts = max(recipe.thoughts.count, recipe.evaluation.thoughts or 0)
        self.prompt = longest.shared + longest.prefix + thoughts + longest.suffix
        """Tokens of the longest prompt."""
        self.new_tokens = min(recipe.evaluation.max_new_tokens, longest.target)
        """Tokens until the last row of a batch has ended, about."""
        tokens = recipe.training.micro_batch_tokens
        self.micro_batch = recipe.training.micro_batch_size
        """Examples of the recipe's own micro-batches; of the longest, where it counts tokens."""
        if tokens is not None:
            self.micro_batch = max(1, tokens // (self.prompt + longest.target))
        self.step_on = cache(self._step_on)
        self.gathers = cache(self._gathers_in)
        self.sliced = cache(partial(sliced_elements, model))

    def _step_on(self, slices: int) -> StepOnMeta:
        return StepOnMeta(self.recipe, self.config, self.shape.layers, self.assistant.width, slices)

    @property
    def decode_operations(self) -> float:
        """Operations of a forward pass, about: the step has one over the prefix, one over the rest and one back."""
        return self.step_on(1).work(self.data.mean, 1, False).operations / 3

    def layer_bytes(self, bits: int) -> float:
        """Of a frozen weight of the layers, on average; table and head are of the recipe's dtype in any case."""
        if bits == 16:
            return self.itemsize
        return self.itemsize - self._packed * (self.itemsize - packed_bytes(bits, self.itemsize))

    def _gathers_in(self, bits: int) -> Gathers:
        """What comes and goes, in elements of the recipe's dtype: weights in few bits are packed in fewer."""
        part = self.layer_bytes(bits) / self.itemsize
        layers = tuple(tuple(round(part * weight) for weight in layer) for layer in self._gathers.layers)
        return replace(self._gathers, layers=layers)

    def choices(self, cluster: Cluster, global_batch: int | None = None) -> list[Choice]:
        """All that can be named, the best first: those that fit, by time; then the others, by memory.

        Args:
            global_batch: examples of a step; default: the recipe's.

        Raises:
            SoftCoTError: the global batch does not feed the ranks, whatever is chosen.
        """
        global_batch = global_batch or self.recipe.training.global_batch_size
        found = [self.choice(self._filled(way, cluster), cluster) for way in self._ways(cluster, global_batch)]
        if not found:
            raise _hungry(global_batch, cluster.ranks)
        # Another number of bits is another model: never chosen for being faster, and more of them before fewer.
        own = [choice for choice in found if choice.fits and choice.way.bits == self.recipe.backbone.bits]
        fastest = min((choice.seconds for choice in own), default=0.0)

        def order(choice: Choice) -> tuple[Any, ...]:
            if not choice.fits:
                return True, False, choice.bytes
            as_fast = choice.seconds <= _AS_FAST * fastest
            other_bits = choice.way.bits != self.recipe.backbone.bits, -choice.way.bits
            simple = PARTITIONS.index(choice.way.partition), choice.way.activation_checkpointing
            return (
                False,
                *other_bits,
                not as_fast,
                0.0 if as_fast else choice.seconds,
                *simple,
                choice.between,
                choice.bytes,
            )

        return sorted(found, key=order)

    def holdings(self, cluster: Cluster) -> Iterator[tuple[str, int, int]]:
        """Ways to hold the weights that the recipe accepts: partition, ranks that share a copy, bits."""
        for partition in PARTITIONS:
            sizes = {"none": [1], "zero3": [cluster.ranks]}.get(partition, cluster.groups)
            if partition == "node":  # over all ranks of several nodes it is zero3
                sizes = [size for size in sizes if size < cluster.ranks or cluster.nodes == 1]
            elif partition == "tensor":
                sizes = [size for size in sizes if self.shape.heads % size == 0 and self.sliced(size)]
            for size, bits in product(sizes, _BITS if self._packed > 0.5 else [16]):
                yield partition, size, bits

    def _ways(self, cluster: Cluster, wanted: int) -> Iterator[Way]:
        for partition, size, bits in self.holdings(cluster):
            fed = cluster.ranks // slices_of(partition, size)
            sizes = sorted({*_MICRO_BATCHES, self.recipe.training.micro_batch_size})
            accumulations = {-(-wanted // (micro * fed)) for micro in sizes}
            for steps in sorted(a for a in accumulations if wanted >= a * fed):
                for checkpointing in (False, True):
                    yield Way(partition, size, bits, checkpointing, 0, -(-wanted // (steps * fed)), steps)

    def _filled(self, way: Way, cluster: Cluster) -> Way:
        return self.filled(way, cluster, sum(self.memory(way, cluster.ranks).values()))

    def filled(self, way: Way, cluster: Cluster, needed: float) -> Way:
        """With as many resident layers as there is room for beside the ``needed`` bytes, a rank's share of the weights
        among them; as many as the recipe names where it does."""
        if way.partition not in SPLIT:
            return way
        if (named := self.recipe.backbone.resident_gib) is None:
            held = self.held(way.partition, way.group_size, way.bits)
            spare = FILLED * (cluster.room - held) - (needed - held)
        else:
            spare = named * GIB
        beside = self.itemsize * (1 - 1 / way.group_size)  # a rank's share of a layer is there in any case
        return replace(way, resident=sum(beside * size <= spare for size in accumulate(self.gathers(way.bits).sums)))

    def resident_bytes(self, way: Way) -> float:
        """What its resident layers take beside a rank's share of them."""
        whole = sum(self.gathers(way.bits).sums[: way.resident])
        return self.itemsize * whole * (1 - 1 / way.group_size)

    def own_holding(self, cluster: Cluster, partition: str) -> tuple[str, int, int]:
        """How the recipe itself has the weights held under one of its partitions."""
        group = self.recipe.backbone.group_size or cluster.gpus_per_node
        if partition == "tensor" and not (self.shape.heads % group == 0 and self.sliced(group)):
            partition = "node"  # as loading has it
        size = {"none": 1, "zero3": cluster.ranks}.get(partition, group)
        return partition, size, self.recipe.backbone.bits

    def own_way(self, cluster: Cluster) -> Way:
        """What the recipe itself says. Raises SoftCoTError where its global batch does not feed the ranks."""
        training = self.recipe.training
        partition, size, bits = self.own_holding(cluster, self.recipe.backbone.partition)
        fed = cluster.ranks // slices_of(partition, size)
        steps = -(-training.global_batch_size // (self.micro_batch * fed))
        if training.global_batch_size < steps * fed:
            raise _hungry(training.global_batch_size, cluster.ranks)
        micro_batch = -(-training.global_batch_size // (steps * fed))
        return self._filled(
            Way(partition, size, bits, training.activation_checkpointing, 0, micro_batch, steps), cluster
        )

    def choice(self, way: Way, cluster: Cluster) -> Choice:
        """What one way means on these GPUs."""
        memory = self.memory(way, cluster.ranks)
        frozen, trained, at_end = self._traffic(way)
        seconds, bound_by = self._micro_step(way, frozen, cluster)
        apart = [cluster.seconds_of(traffic, cluster.ranks) for traffic in (trained, at_end)]
        seconds = way.accumulation * (seconds + max(apart[0])) + max(apart[1])
        placed = [(frozen, way.group_size, way.accumulation), (trained, cluster.ranks, way.accumulation)]
        placed.append((at_end, cluster.ranks, 1))
        within, between = (
            sum(times * traffic.size for traffic, ranks, times in placed if (ranks > cluster.gpus_per_node) == crosses)
            for crosses in (False, True)
        )
        return Choice(way, memory, sum(memory.values()) <= cluster.room, within, between, seconds, bound_by)

    def held(self, partition: str, group_size: int, bits: int) -> float:
        """Bytes of the base's frozen weights on each rank, all the time."""
        saved = sum(self._gathers.sums) - sum(self.gathers(bits).sums)
        if partition == "tensor":
            return self.itemsize * (self.sliced(group_size) - saved / group_size)
        return shared_bytes(self.shape.total - saved, self.shape.small, group_size, self.itemsize)

    def to_load(self, partition: str, group_size: int, bits: int) -> float:
        """Bytes of the weights that a rank has when they are loaded: slices are packed when all of them are there."""
        return self.held(partition, group_size, 16 if partition == "tensor" else bits)

    def _assistant_bytes(self, group_size: int) -> float:
        """Its frozen weights on each rank of a training that runs it; from the cache it is not there."""
        if self.recipe.thoughts.source != "online" or not self.needs_states:
            return 0.0
        itemsize = 4 if self.recipe.assistant.dtype == "float32" else 2
        return shared_bytes(self.assistant.total, self.assistant.small, group_size, itemsize)

    def most_gathered(self, partition: str, group_size: int, bits: int) -> float:
        """Bytes of other ranks' weights beside them, and of what is made of few bits to compute with, at most."""
        # The matrix, and what it is made of (models/quantized.py).
        slices = slices_of(partition, group_size)
        made = 2 * self.itemsize * self._gathers.largest_weight / slices if bits < 16 else 0.0
        if partition not in SPLIT or group_size == 1:
            return made
        gathers = self.gathers(bits)
        # A layer more: the buffer that one is gathered in.
        return made + self.itemsize * (most_gathered([gathers], derive([gathers])) + max(gathers.sums))

    def decoding_bytes(
        self, partition: str, group_size: int, rows: int, prompt: int, new_tokens: int, others_wait: bool = False
    ) -> float:
        """Bytes of decoding beside the weights: keys and values, and what a pass needs.

        Args:
            prompt: tokens of each of ``rows``, thoughts included.
            others_wait: whether more prompts follow, as many of which are read while the rows before are there still.
        """
        slices = slices_of(partition, group_size)
        token = rows * self.shape.keys_values * self.itemsize / slices
        reading = self.step_on(slices).reading(rows, prompt) + token * prompt
        # A layer's keys and values are copied when there is no room for one token more.
        written = token * (prompt + -(-new_tokens // ROOM) * ROOM)
        beside = written / len(self.shape.layers)
        # What was read is held, and rows are put together of it.
        most = written + max(reading, 2 * token * prompt, beside) if others_wait else max(reading, written + beside)
        return most + 4 * _LOGITS * rows * self.shape.vocabulary

    def drafting_bytes(self, rows: int, new_tokens: int) -> float:
        """Bytes that an assistant takes which drafts in evaluation: it is whole on each rank and has keys and values of
        its own, and the base has logits to choose more tokens by. 0 where it does not."""
        count = self.recipe.evaluation.draft
        if not count:
            return 0.0
        itemsize = 4 if self.recipe.assistant.dtype == "float32" else 2
        token = rows * self.assistant.keys_values * itemsize
        # As many prompts as rows are read while these are there still, held, and put together with them.
        states = token * (3 * self.prompt + -(-new_tokens // ROOM) * ROOM)
        logits = 4 * _LOGITS * rows * (self.assistant.vocabulary + count * self.shape.vocabulary)
        # Where tokens are sampled, each draft's distribution is kept.
        return itemsize * self.assistant.total + states + logits + 4 * rows * count * self.assistant.vocabulary

    def memory(self, way: Way, ranks: int) -> dict[str, float]:
        """Bytes of a GPU in training, by part."""
        holding = way.partition, way.group_size, way.bits
        step = self._step(way, self.data.longest)
        stage = 3 if way.partition in SPLIT else 1
        trained = trained_bytes(self._trained, self.itemsize, ranks, stage)
        if stage == 3:  # a buffer for gradients on their way, whatever is in it
            trained += 4 * self.recipe.backbone.deepspeed_config()["zero_optimization"].get("reduce_bucket_size", 5e8)
        samples = self.decoding_bytes(*holding[:2], SAMPLES, self.prompt, SAMPLE_TOKENS)
        memory = {
            "held": self.held(*holding) + self.resident_bytes(way),
            "assistant": self._assistant_bytes(way.group_size),
            "tokens": self.itemsize * self.data.tokens * self.shape.width,
            "gathered": self.most_gathered(*holding),
            "activations": step.activations,
            "loss": step.loss,
            "optimizer": trained + self._conditioning,
            "decoding": max(0.0, samples - step.activations - step.loss),  # validation comes between steps
        }
        return memory | {"loading": max(0.0, self.to_load(*holding) - sum(memory.values()))}

    def _step(self, way: Way, lengths: Lengths) -> Layers:
        step = self.step_on(slices_of(way.partition, way.group_size))
        return step.work(lengths, way.micro_batch, way.activation_checkpointing)

    def _traffic(self, way: Way) -> tuple[Traffic, Traffic, Traffic]:
        """Of a micro-step within the ranks that share a copy; of a micro-step over all ranks; of a step's end."""
        weights = self._trained * self.itemsize
        gradients = Traffic(summed=4 * self._trained, sums=1)
        if way.partition in SPLIT:
            elements, gathers = gathered_elements(self.gathers(way.bits), way.resident)
            frozen = Traffic(gathered=self.itemsize * elements, gathers=gathers)
            # What stays whole is gathered at the end, as DeepSpeed does with whatever an optimizer may change.
            stays = Traffic(gathered=self.itemsize * self.shape.small, gathers=1)
            return frozen, Traffic(gathered=2 * weights, gathers=2) + gradients, stays
        at_end = gradients + Traffic(gathered=weights, gathers=1)
        if way.partition == "none":
            return Traffic(), Traffic(), at_end
        lengths, rows = self.data.mean, way.micro_batch
        elements, sums = summed_activations(
            len(self.shape.layers),
            self.shape.width,
            rows * lengths.prefix,
            rows * (self.recipe.thoughts.count + lengths.suffix + lengths.target),
            rows * lengths.target,
            way.activation_checkpointing,
        )
        logits = rows * lengths.target * self.shape.vocabulary
        return Traffic(self.itemsize * logits, 1, self.itemsize * elements, sums), Traffic(), at_end

    def _micro_step(self, way: Way, frozen: Traffic, cluster: Cluster) -> tuple[float, BoundBy]:
        step = self._step(way, self.data.mean)
        compute = cluster.gpu.flops(self.recipe.base.dtype)
        if compute is None:
            raise SoftCoTError(
                f"the hardware table has no tflops of {cluster.gpu.words} for base.dtype {self.recipe.base.dtype}; add "
                "them with --hardware"
            )
        kernels = step.seconds(compute, cluster.gpu, cluster.reached)
        if way.bits < 16:  # each use of a matrix makes it anew: before the thoughts, for the rest, and backward
            made = (self.layer_bytes(way.bits) + 2 * self.itemsize) * sum(self.shape.layers)
            uses = 4 if way.activation_checkpointing else 3
            kernels += uses * made / (1e9 * cluster.gpu.memory_gb_per_s * cluster.reached.memory)
        products = step.flops / compute / cluster.reached.products
        within, between = cluster.seconds_of(frozen, way.group_size)
        host = step.operations * 1e-6 * cluster.reached.operation_us
        times: dict[BoundBy, float] = {
            "compute" if products > kernels / 2 else "memory": kernels,
            "host": host,
            "within nodes": within,
            "between nodes": between,
        }
        bound_by = max(times, key=lambda name: times[name])
        if way.partition == "tensor":  # sums of activations have nothing to hide behind
            return max(kernels, host) + max(within, between), bound_by
        return max(times.values()), bound_by


def _hungry(global_batch: int, ranks: int) -> SoftCoTError:
    return SoftCoTError(
        f"training.global_batch_size {global_batch} does not feed {ranks} ranks; raise it or use fewer ranks"
    )
