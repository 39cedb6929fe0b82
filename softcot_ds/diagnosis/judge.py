"""From the facts that the doctor gathers from all ranks to findings, and to their table."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from packaging.specifiers import SpecifierSet

from softcot_ds import __version__
from softcot_ds.differences import by_value, difference, enumerate_some, name_ranks
from softcot_ds.progress import count
from softcot_ds.thoughts.anatomy import ANOTHER_PLACEHOLDER, SMALL_RATIO

GIB = 2**30
MESSAGE_BYTES = 64 * 2**20
"""What the ranks sum up."""
SLOW_GB_PER_S = 2.0
SMALL_SHM_BYTES = 256 * 2**20
DISK_FLOOR_BYTES = GIB

SHOWN = ("python", "torch", "deepspeed", "transformers", "triton")
KNOWN_BAD = (
    ("deepspeed", "<0.19.4", "activation checkpointing with frozen weights fails, or gives NaN"),
    ("deepspeed", "<=0.19.5", "ZeRO++'s zero_quantized_weights gave wrong values in bfloat16"),
)
"""Package, versions, and what goes wrong with them."""
OK, WARNING, PROBLEM = "ok", "warning", "problem"
Verdict = tuple[str, str] | tuple[str, str, str]
"""Level, text and, unless all is well, what to do."""


@dataclass(frozen=True)
class Finding:
    """The result of one check. ``remedy``: what to do about a warning or a problem."""

    level: str
    title: str
    text: str
    remedy: str = ""


@dataclass
class Folder:
    """A folder as a rank sees it. Only the first rank of a node writes."""

    path: str
    shared: bool
    """Whether all nodes must see the same files in it."""
    absent: list[str] = field(default_factory=list)
    """What of its path is not there yet, the innermost first: made for the check, and removed again."""
    free_bytes: int | None = None
    failure: str = ""
    """Why this rank could not write there."""
    unseen: list[int] = field(default_factory=list)
    """The ranks whose file this rank does not see."""


@dataclass
class Model:
    """A frozen model as a node sees it."""

    name: str
    fingerprint: str = ""
    width: int = 0
    failure: str = ""
    trial_failure: str = ""
    """Why it cannot do its work."""
    untried: str = ""
    """Why that could not be told here."""


@dataclass
class Facts:
    """What a rank knows about itself and its node."""

    rank: int
    local_rank: int
    node: str
    """Hostname: ranks with the same one are taken to share memory and disks."""
    versions: dict[str, str | None]
    """Of Python and each direct requirement; None where it is not installed."""
    requirements: dict[str, str] | None
    """The ranges that the installed package declares for them; None when its metadata is not there."""
    source: str
    """A hash of this project's own files."""
    recipe: str = ""
    """A hash of the resolved recipe and of its DeepSpeed configuration."""
    gpus: int = 0
    """GPUs that this rank sees."""
    gpus_allotted: int = 0
    """GPUs of this node that SLURM gave to the job; 0 outside SLURM, or when they are hidden on purpose."""
    gpu: str = ""
    """Model and memory."""
    gpu_bytes: int = 0
    matmul_error: float = 0.0
    """Relative, of a product in float32."""
    device_failure: str = ""
    kernel_error: float = 0.0
    kernel_failure: str = ""
    shm_bytes: int = SMALL_SHM_BYTES
    bus_gb_per_s: float = 0.0
    exchange_failure: str = ""
    folders: dict[str, Folder] = field(default_factory=dict)
    """By the setting that names them."""
    models: dict[str, Model] = field(default_factory=dict)
    """By role, on the first rank of each node."""
    too_large: str | None = None
    """Of rank 0: what of the recipe does not fit these GPUs, by plan; None where that is not known."""
    limits: dict[str, tuple[int, int]] | None = None
    """DeepSpeed's limits that the recipe's file sets too low for its models, and what they need; None where no weights
    are partitioned, or nothing is known of them."""
    limits_failure: str = ""
    """Why that could not be found out."""
    prompts_failure: str = ""
    """Why the recipe's prompts cannot be made with these models."""
    states: tuple[float, float] | None = None
    """Of rank 0: the length of what is the same in the assistant's states of all questions, and of what varies with the
    question; None where there is no cache of them, or training needs none or takes them conditioned."""
    training_failure: str = ""
    """Why no training of the recipe can begin."""
    checkpoint_bytes: int = 0
    """What the checkpoints to keep take, and one more while it is written; 0 when unknown."""
    launchers: dict[str, bool] = field(default_factory=dict)
    """Which commands that start ranks are there; srun is looked for only within a SLURM job."""
    alone_of: str = ""
    """Set when a launcher started several processes and this one knows of no others: the variable that says so."""
    token: str = ""

    @property
    def has_gpu(self) -> bool:
        """Whether this rank has a GPU of its own that works."""
        return self.gpus > self.local_rank and not self.device_failure


def judge(everyone: Sequence[Facts]) -> list[Finding]:
    """What the facts of all ranks, in their order, mean: for each check its ok, or all that is wrong."""
    checks = (_versions, _devices, _communication, _folders, _disks, _models, _states, _memory, _gathering, _launchers)
    findings = []
    for check in checks:
        found = [Finding(verdict[0], check.__name__.strip("_"), *verdict[1:]) for verdict in check(everyone)]
        wrong = [finding for finding in found if finding.level != OK]
        findings += wrong or found
    return findings


def table(findings: Sequence[Finding], everyone: Sequence[Facts]) -> str:
    """The findings as lines, problems last."""
    nodes = len({facts.node for facts in everyone})
    lines = [f"{count(len(everyone), 'rank')} on {count(nodes, 'node')}"]
    for level in (OK, WARNING, PROBLEM):
        for finding in findings:
            if finding.level == level:
                lines.append(f"{level:<9}{finding.title:<16}{finding.text}")
                if finding.remedy:
                    lines.append(f"{'':<25}-> {finding.remedy}")
    return "\n".join(lines)


def _versions(everyone: Sequence[Facts]) -> Iterator[Verdict]:
    """Equal on all ranks, in the declared ranges, none known to be bad."""
    declared = everyone[0].requirements
    for name in everyone[0].versions:
        if different := difference(everyone, lambda facts, name=name: facts.versions.get(name)):
            yield (
                PROBLEM,
                f"{name} differs: {different}",
                "let all nodes use one environment on a shared file system, or install the same version there",
            )
        specifier = (declared or {}).get(name, "")
        for version, where in by_value(everyone, lambda facts, name=name: facts.versions.get(name)).items():
            if wrong := _wrong_with(name, version, specifier):
                yield (
                    PROBLEM,
                    f"{name} {version or '(not installed)'} on {name_ranks(where, everyone)}: {'; '.join(wrong)}",
                    f"pip install '{name}{specifier}'" if name != "python" else f"make one with Python {specifier}",
                )
    if sources := difference(everyone, lambda facts: facts.source):
        yield (
            PROBLEM,
            f"the files of softcot-ds itself differ (hash {sources})",
            "bring all nodes to the same commit, without local changes",
        )
    shown = ", ".join(f"{name} {everyone[0].versions.get(name)}" for name in SHOWN)
    count = len(everyone[0].versions)
    ranges = "is not installed: ranges unknown" if declared is None else f"{__version__}; all {count} in range"
    yield OK, f"{shown}, softcot-ds {ranges}"


def _wrong_with(name: str, version: str | None, specifier: str) -> list[str]:
    if version is None:
        return ["is required"]
    wrong = [] if version in SpecifierSet(specifier, prereleases=True) else [f"outside of {specifier}"]
    bad = [(SpecifierSet(versions, prereleases=True), reason) for other, versions, reason in KNOWN_BAD if other == name]
    return wrong + [reason for versions, reason in bad if version in versions]


def _devices(everyone: Sequence[Facts]) -> Iterator[Verdict]:
    """A GPU for each rank or for none, alike and computing right."""
    yield from _failing(
        "the device fails",
        everyone,
        lambda facts: facts.device_failure,
        "run nvidia-smi there; does the driver fit torch's CUDA version? Leave the node out until it computes right",
    )
    yield from _failing(
        "the project's Triton kernel fails",
        everyone,
        lambda facts: facts.kernel_failure,
        "Triton needs a C compiler (gcc) and a writable TRITON_CACHE_DIR, by default ~/.triton; a wrong result please "
        "report, with the GPU's model and the versions of torch and triton",
    )
    any_gpu = any(facts.gpus for facts in everyone)
    ranks_on = Counter(facts.node for facts in everyone)
    needed = {facts.rank: max(ranks_on[facts.node] if any_gpu else 0, facts.gpus_allotted) for facts in everyone}
    few = [facts for facts in everyone if facts.gpus < needed[facts.rank]]
    for (gpus, need), where in by_value(few, lambda facts: (facts.gpus, needed[facts.rank])).items():
        yield (
            PROBLEM,
            f"{gpus} of {need} GPUs are seen by {name_ranks(where, everyone)}: a node needs one for each rank, and "
            "all that SLURM gave to the job",
            "look at nvidia-smi, CUDA_VISIBLE_DEVICES, torch's CUDA build and --gpus-per-node; start as many ranks per "
            "node as it has GPUs (deepspeed --num_gpus); srun must show them all to each task (no --gpu-bind, no "
            "--gpus-per-task); for CPUs, set CUDA_VISIBLE_DEVICES= everywhere",
        )
    with_gpu = [facts for facts in everyone if facts.gpu]
    if different := difference(with_gpu, lambda facts: facts.gpu):
        yield (
            WARNING,
            f"GPUs differ: {different}",
            "the slowest and smallest one decides: take nodes of one kind (#SBATCH --constraint)",
        )
    text = f"{len(everyone)} x {with_gpu[0].gpu}" if with_gpu else "no GPU: CPU ranks over gloo"
    text += f"; a matrix product is right to {max(facts.matmul_error for facts in everyone):.0e}"
    if any_gpu:
        text += f", the Triton kernel to {max(facts.kernel_error for facts in everyone):.0e}"
    yield OK, text


def _communication(everyone: Sequence[Facts]) -> Iterator[Verdict]:
    """The sum over all ranks is right and does not take for ever."""
    on_gpu = all(facts.has_gpu for facts in everyone)
    nodes = {facts.node for facts in everyone}
    backend = "NCCL" if on_gpu else "gloo"
    more = "; NCCL_DEBUG=INFO shows what NCCL tries, NCCL_P2P_DISABLE=1 or NCCL_IB_DISABLE=1 finds a bad link"
    yield from _failing(
        f"all-reduce over {backend} fails",
        everyone,
        lambda facts: facts.exchange_failure,
        f"name the interface that the nodes share in {backend.upper()}_SOCKET_IFNAME; leave out a node that sums wrong"
        + (more if on_gpu else ""),
    )
    slowest = min(facts.bus_gb_per_s for facts in everyone)
    speed = f"bus bandwidth {slowest:.2f} GB/s (algorithm bandwidth x 2(n-1)/n, {_size(MESSAGE_BYTES)})"
    if slowest and on_gpu and len(nodes) > 1 and slowest < SLOW_GB_PER_S:
        yield (
            WARNING,
            f"NCCL is slow between {len(nodes)} nodes: {speed}",
            "NCCL_DEBUG=INFO shows the transport (NET/Socket is TCP, NET/IB is InfiniBand); name the fast "
            "interface in NCCL_SOCKET_IFNAME",
        )
    small = [facts for facts in everyone if facts.shm_bytes < SMALL_SHM_BYTES]
    if small and on_gpu and len(everyone) > len(nodes):
        yield (
            WARNING,
            f"/dev/shm has {_size(small[0].shm_bytes)} on {name_ranks(small, everyone)}: NCCL and data loaders need it",
            "start the container with --shm-size=1g or --ipc=host",
        )
    several = f"{len(everyone)} ranks over {backend}, the sum is right, {speed}"
    yield OK, several if slowest else "one rank: nobody to talk to"


def _folders(everyone: Sequence[Facts]) -> Iterator[Verdict]:
    """Every node writes to all folders, and sees what the others wrote to the shared ones."""
    firsts = [facts for facts in everyone if facts.local_rank == 0]
    for name, folder in everyone[0].folders.items():
        yield from _failing(
            f"{name} {folder.path} cannot be written",
            firsts,
            lambda facts, name=name: facts.folders[name].failure,
            f"make it writable and not full there, or name another folder in {name}",
        )
        pairs = sorted({(facts.node, everyone[rank].node) for facts in everyone for rank in facts.folders[name].unseen})
        if pairs:
            texts = [f"{reader} does not see what {writer} wrote" for reader, writer in pairs]
            yield (
                PROBLEM,
                f"{name} {folder.path} is not shared: {enumerate_some(texts, '; ')}",
                f"put it on a file system that all nodes mount, and name it in {name} by a path that holds on "
                "all of them",
            )
    nodes = len({facts.node for facts in everyone})
    seen = "written and read on one node" if nodes == 1 else f"each of {nodes} nodes sees what the others write"
    shared = [f"{name} {folder.path}" for name, folder in everyone[0].folders.items() if folder.shared]
    yield OK, f"{', '.join(shared)}: {seen}"


def _disks(everyone: Sequence[Facts]) -> Iterator[Verdict]:
    """Room for the checkpoints and some to spare, on every node."""
    texts = []
    for name, folder in everyone[0].folders.items():
        needed = max(DISK_FLOOR_BYTES, everyone[0].checkpoint_bytes if name == "output_dir" else 0)
        known = [facts for facts in everyone if facts.folders[name].free_bytes is not None]
        short = [facts for facts in known if facts.folders[name].free_bytes < needed]
        least = _size(min((facts.folders[name].free_bytes for facts in known), default=0))
        texts += [f"{name} {least}"] if known else []
        if short:
            reason = "the checkpoints to keep take it" if needed > DISK_FLOOR_BYTES else "less does not last"
            yield (
                PROBLEM if folder.shared else WARNING,
                f"{name} {folder.path} has {least} free on {name_ranks(short, known)}, {_size(needed)} needed: "
                + reason,
                "make room, or name another folder",
            )
    yield OK, f"free: {', '.join(texts)}"


def _models(everyone: Sequence[Facts]) -> Iterator[Verdict]:
    """Both models are there on all nodes, and the same."""
    firsts = [facts for facts in everyone if facts.models]
    texts = []
    for role, first in everyone[0].models.items():
        yield from _failing(
            f"{role} cannot be read",
            firsts,
            lambda facts, role=role: facts.models[role].failure,
            f"name a folder that all nodes see in {role}.model; for a hub name, let HF_HOME be one that they all see, "
            "and once, where there is internet: hf download NAME",
        )
        readable = [facts for facts in firsts if not facts.models[role].failure]
        if different := difference(readable, lambda facts, role=role: facts.models[role].fingerprint[:12]):
            yield (
                PROBLEM,
                f"{role} {first.name} has different weights: {different} (fingerprints)",
                f"pin {role}.revision to a commit, or copy one folder to all nodes",
            )
        yield from _failing(
            f"{role} {first.name} does not do what is asked of it",
            readable,
            lambda facts, role=role: facts.models[role].trial_failure,
            f"name a model of another family in {role}.model, or try {role}.attention: eager",
        )
        if untried := next((facts.models[role].untried for facts in readable if facts.models[role].untried), ""):
            yield (
                WARNING,
                f"whether {role} {first.name} does what is asked of it shows only when it is loaded: {untried}",
                "train a few steps first; a base that does not fit is refused before the first one",
            )
        texts.append(f"{role} {first.name} ({first.fingerprint[:12]})")
    yield from _failing(
        "the recipe's prompts cannot be made",
        firsts,
        lambda facts: facts.prompts_failure,
        "mend what it says: every command would end with it",
    )
    yield from _failing(
        "the recipe cannot be trained", firsts, lambda facts: facts.training_failure, "do what it says before training"
    )
    same = f", the same on {len(firsts)} nodes" if len(firsts) > 1 else ""
    yield OK, f"{', '.join(texts)}{same}" if texts else "no recipe given: not looked at"


def _states(everyone: Sequence[Facts]) -> Iterator[Verdict]:
    """The assistant's states differ from question to question."""
    if (states := everyone[0].states) is None:
        yield OK, "no cache of them that can be read, or training does not take them as they are: not looked at"
        return
    constant, varying = states
    if not math.isfinite(varying):
        yield (
            PROBLEM,
            "some of the cache are not finite",
            "softcot-ds cache RECIPE --verify may find them damaged; else remove the cache and build it anew",
        )
        return
    text = f"{varying:.3g} of their length varies with the question, {constant:.3g} is the same for all"
    if varying < SMALL_RATIO * constant:
        yield (
            WARNING,
            f"{text}: training sees little else than a constant",
            "if thoughts.placeholder is a special token, as by default, try an ordinary one: softcot-ds cache RECIPE "
            f"{ANOTHER_PLACEHOLDER}, and then the same with --info. Or set projection.condition=center; "
            "docs/debugging.md says more",
        )
    yield OK, text


def _memory(everyone: Sequence[Facts]) -> Iterator[Verdict]:
    """What the recipe needs of a GPU is there."""
    nodes = len({facts.node for facts in everyone})
    if too_large := everyone[0].too_large:
        yield (
            WARNING,
            f"{too_large} is too much",
            f"softcot-ds plan RECIPE --nodes {nodes} --gpus-per-node {len(everyone) // nodes} shows what fits",
        )
    planned = everyone[0].too_large is not None
    yield OK, "training and evaluation fit, by plan" if planned else "no recipe, or no GPUs alike: not planned"


def _gathering(everyone: Sequence[Facts]) -> Iterator[Verdict]:
    """Partitioned weights are there before they are asked for."""
    firsts = [facts for facts in everyone if facts.local_rank == 0]
    yield from _failing(
        "DeepSpeed's limits cannot be derived",
        firsts,
        lambda facts: facts.limits_failure,
        "mend backbone.deepspeed: training would end with it",
    )
    limits = everyone[0].limits
    for key, (value, needed) in (limits or {}).items():
        yield (
            WARNING,
            f"{key} is {json.dumps(value)}, and these models need {json.dumps(needed)}: {_SHORT[key]}",
            f"leave it out of the file that backbone.deepspeed names, or set {json.dumps(needed)}",
        )
    yield OK, "no partitioned weights" if limits is None else "each layer is gathered while the one before it runs"


_SHORT = {
    "overlap_comm": "gathering and computing wait for each other",
    "stage3_allgather_sequential": "next to nothing is gathered ahead",
    "stage3_prefetch_bucket_size": "the rest of a layer is gathered when it is asked for, while nothing runs",
    "stage3_max_live_parameters": "a layer is not gathered, or in part, while the one before it runs",
    "stage3_max_reuse_distance": "the last layer is let go before the head runs, and gathered again after it",
    "buffer_count": "reading from NVMe ends in an error as soon as more weights are in use",
    "buffer_size": "the largest weight's share does not fit into a buffer, and loading ends in an error",
}
"""What comes of a value other than the one that is needed."""


def _launchers(everyone: Sequence[Facts]) -> Iterator[Verdict]:
    """What starts several processes is there, and has told them of each other."""
    if everyone[0].alone_of:
        yield (
            PROBLEM,
            f"{everyone[0].alone_of}, but this process knows of no others: each would train alone",
            "start one deepspeed per node, which starts the ranks; under srun with --ntasks-per-node=1",
        )
    for name in everyone[0].launchers:
        if missing := [facts for facts in everyone if not facts.launchers.get(name, True)]:
            yield WARNING, f"{name} is missing on {name_ranks(missing, everyone)}", "put its folder into PATH there"
    yield OK, ", ".join(everyone[0].launchers)


def _failing(what: str, ranks: Sequence[Facts], failure: Callable[[Facts], str], remedy: str) -> Iterator[Verdict]:
    for reason, some in by_value(ranks, failure).items():
        if reason:
            yield PROBLEM, f"{what} on {name_ranks(some, ranks)}: {reason}", remedy


def _size(number: int) -> str:
    return f"{number / GIB:,.1f} GiB" if number >= GIB else f"{number / 2**20:,.1f} MiB"
