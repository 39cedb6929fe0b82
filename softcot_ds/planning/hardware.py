"""GPUs and networks: what they do at most, and how much of that a run is taken to reach. The only table is a YAML file
(hardware.yaml), to which a user's own adds."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pydantic import Field, ValidationError

from softcot_ds.errors import SoftCoTError
from softcot_ds.files import read_yaml
from softcot_ds.planning.memory import GIB
from softcot_ds.planning.traffic import Traffic
from softcot_ds.recipe import Dtype
from softcot_ds.section import Section

SHIPPED = Path(__file__).with_suffix(".yaml")


class Gpu(Section):
    """One kind of GPU, as its data sheet has it."""

    words: str = Field(pattern=r"\w")
    """Of its name as ``torch.cuda.get_device_name`` has it; all must be there."""
    tflops: dict[Dtype, float]
    """Dense operations per second, 1e12."""
    memory_gib: float = Field(gt=0)
    memory_gb_per_s: float = Field(gt=0)
    link_gb_per_s: float = Field(gt=0)
    """To the other GPUs of its node, in one direction."""
    network_gbps: float = Field(gt=0)
    """Of the network between nodes, for each GPU, Gb/s."""

    def flops(self, dtype: Dtype) -> float | None:
        """Operations per second; None where the table does not say."""
        return 1e12 * self.tflops[dtype] if dtype in self.tflops else None


class Reached(Section):
    """What of the data sheets a run reaches, and what it loses whatever the model."""

    products: float = Field(gt=0, le=1)
    """Part of ``tflops``, by products of matrices."""
    memory: float = Field(gt=0, le=1)
    """Part of ``memory_gb_per_s``."""
    links: float = Field(gt=0, le=1)
    """Part of ``link_gb_per_s`` and of the network."""
    operation_us: float = Field(ge=0)
    """The host's time for an operation, microseconds."""
    hop_us: float = Field(ge=0)
    """From rank to rank in a ring, microseconds."""
    room: float = Field(gt=0, le=1)
    """Part of ``memory_gib`` that the allocator can use."""
    context_gib: float = Field(ge=0)
    """What CUDA, NCCL and DeepSpeed themselves take of that."""


class Hardware(Section):
    """The whole table."""

    gpus: dict[str, Gpu]
    reached: Reached

    def gpu(self, name: str) -> Gpu:
        """Raises SoftCoTError for a name that is not in the table, with those that are."""
        by_name = {known.lower(): gpu for known, gpu in self.gpus.items()}
        if name.lower() not in by_name:
            raise SoftCoTError(
                f"no GPU {name!r} in the hardware table; it has {', '.join(self.gpus)}. Describe yours in a file like "
                f"{SHIPPED} and name it with --hardware"
            )
        return by_name[name.lower()]

    def found(self, device_name: str) -> Gpu | None:
        """The GPU of a name such as torch gives it; None where it is not in the table, and for parts of one."""
        words = set(re.split(r"[\s-]+", device_name))
        fitting = [gpu for gpu in self.gpus.values() if set(gpu.words.split()) <= words]
        return max(fitting, key=lambda gpu: len(gpu.words.split()), default=None) if "MIG" not in words else None


@dataclass(frozen=True)
class Cluster:
    """GPUs in nodes."""

    gpu: Gpu
    reached: Reached
    nodes: int
    gpus_per_node: int
    network_gbps: float
    """Of each GPU between nodes, Gb/s."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def room(self) -> float:
        """Bytes of a GPU that a run can use."""
        return (self.gpu.memory_gib * self.reached.room - self.reached.context_gib) * GIB

    @property
    def groups(self) -> list[int]:
        """Numbers of ranks, more than one, into which the nodes fall apart or that take whole nodes."""
        parts = {size for size in range(2, self.gpus_per_node + 1) if self.gpus_per_node % size == 0}
        wholes = {nodes * self.gpus_per_node for nodes in range(1, self.nodes + 1) if self.nodes % nodes == 0}
        return sorted((parts | wholes) - {1})

    def seconds_of(self, traffic: Traffic, ranks: int) -> tuple[float, float]:
        """Of moving it over the links of the nodes, and over the network between them: in rings of ``ranks`` ranks."""
        link = 1e9 * self.gpu.link_gb_per_s * self.reached.links
        network = 1e9 / 8 * self.network_gbps * min(ranks, self.gpus_per_node) * self.reached.links
        nodes = -(-ranks // self.gpus_per_node)
        hops = (traffic.gathers + 2 * traffic.sums) * (ranks - 1) * 1e-6 * self.reached.hop_us
        # A sum goes round twice: once to be made, once to be known.
        received = (traffic.gathered + 2 * traffic.summed) * (ranks - 1) / ranks
        crossing = (traffic.gathered + 2 * traffic.summed) * (nodes - 1) / nodes
        return received / link + hops, (crossing / network + hops) if nodes > 1 else 0.0


def load_hardware(own: Path | None = None) -> Hardware:
    """The shipped table; ``own`` adds to it and replaces what has the same name.

    Raises:
        SoftCoTError: the file cannot be read, or says what the table has no place for.
    """
    if own is None:
        return _shipped()
    added = read_yaml(own)
    if not isinstance(added, dict) or not all(isinstance(part, dict) for part in added.values()):
        raise SoftCoTError(f"{own}: a hardware table has the mappings gpus and reached; {SHIPPED} is an example")
    table = _shipped().model_dump()
    merged = {**added, **{key: table[key] | added.get(key, {}) for key in table}}
    try:
        return Hardware.model_validate(merged)
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise SoftCoTError(f"{own}: {'; '.join(wrong)}. {SHIPPED} is an example") from error


@cache
def _shipped() -> Hardware:
    return Hardware.model_validate(read_yaml(SHIPPED))


def peak_flops(gpu: str, dtype: Dtype) -> float | None:
    """Operations per second that a GPU does at most.

    Args:
        gpu: its name, as ``torch.cuda.get_device_name`` has it.

    Returns:
        None where it is not known: for GPUs that are not in the table, parts of one, and dtypes that it lacks.
    """
    known = load_hardware().found(gpu)
    return known.flops(dtype) if known else None
