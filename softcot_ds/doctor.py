"""``softcot-ds doctor``: is this environment fit for training? Asked before node hours are spent.

Run it alone, or on all ranks of a job with the launcher that will start the training. Each rank collects facts about
itself and its node; they are gathered, and rank 0 judges and prints. Whatever fails on a rank becomes one of its facts:
all ranks make the same collective calls in the same order. They meet over gloo, so that a rank without its GPU, or NCCL
that does not work, can be told instead of waited for.
"""

import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import secrets
import shutil
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

# What brings torch is imported in functions, after the look at whether it can be.
from softcot_ds import __version__
from softcot_ds.cli import recipe_command
from softcot_ds.errors import LostRank, SoftCoTError
from softcot_ds.recipe import ModelConfig, Recipe

PACKAGE = "softcot-ds"
GIB = 2**30
JOIN_MINUTES = 2.0
"""How long the ranks wait for each other at the start."""
PATIENCE_MINUTES = 30.0
"""How long they wait for one that reads a large model from a slow disk."""
EXCHANGE_SECONDS = 60.0
"""How long the all-reduces may take before NCCL counts as stuck; its first one sets up all connections."""
LOOK_SECONDS = 10.0
"""How long a file may take to show up on another node: network file systems cache folders for a while."""
GPU_MESSAGE_BYTES, CPU_MESSAGE_BYTES = 64 * 2**20, 8 * 2**20
SLOW_GB_PER_S = 2.0
SMALL_SHM_BYTES = 256 * 2**20
DISK_FLOOR_BYTES = GIB
TOLERANCE = 2e-3
"""Relative error of float32 products in the Frobenius norm; TF32, which a site may have switched on, has 3e-4."""

IMPORTED = ("torch", "deepspeed", "transformers")
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


@dataclass
class Facts:
    """What a rank knows about itself and its node."""

    rank: int
    local_rank: int
    node: str
    """Hostname: ranks with the same one are taken to share memory and disks."""
    versions: dict[str, str | None]
    """Of Python and each direct requirement; None where it is not installed."""
    requirements: list[str] | None
    """What the installed package declares for this platform, Python too; None when its metadata is not there."""
    source: str
    """A hash of this project's own files."""
    recipe: str = ""
    """A hash of the resolved recipe and of its DeepSpeed configuration."""
    gpus: int = 0
    """GPUs that this rank sees."""
    gpus_allotted: int | None = None
    """GPUs of this node that SLURM gave to the job; None outside SLURM, or when they are hidden on purpose."""
    gpus_of_machine: int = 0
    """GPUs that the driver shows, whether or not torch sees them; 0 when they are hidden on purpose."""
    gpu: str = ""
    gpu_bytes: int = 0
    gpu_free_bytes: int = 0
    driver: str = ""
    cuda: str = ""
    """The CUDA version that torch was built for."""
    matmul_error: float | None = None
    device_failure: str = ""
    kernel_error: float | None = None
    kernel_failure: str = ""
    shm_bytes: int | None = None
    sum_right: bool | None = None
    bus_gb_per_s: float | None = None
    exchange_failure: str = ""
    folders: dict[str, Folder] = field(default_factory=dict)
    models: dict[str, Model] = field(default_factory=dict)
    """By role, on the first rank of each node."""
    checkpoint_bytes: int = 0
    """What the checkpoints to keep take, and one more while it is written; 0 when unknown."""
    mpi4py: bool = True
    deepspeed_launcher: bool = True
    srun: bool | None = None
    """None outside SLURM."""
    alone_of: str = ""
    """Set when a launcher started several processes and this one knows of no others: the variable that says so."""
    token: str = ""

    @property
    def has_gpu(self) -> bool:
        """Whether this rank has a GPU of its own that works."""
        return self.gpus > self.local_rank and not self.device_failure


def doctor(recipe: Recipe | None) -> None:
    """Check the environment; to be called by all ranks. Prints a line per check, problems last.

    Args:
        recipe: its folders and models are checked too.

    Raises:
        SoftCoTError: there are problems, on every rank; or the ranks do not find each other.
    """
    _check_imports()
    import torch.distributed as dist

    from softcot_ds import distributed

    alone_of = _alone_of()
    distributed.init_distributed(JOIN_MINUTES, cpu_only=True)
    group = dist.new_group(backend="gloo", timeout=timedelta(minutes=PATIENCE_MINUTES))

    def gather(facts: Facts) -> list[Facts]:
        everyone: list[Any] = [None] * distributed.world_size()
        try:
            dist.all_gather_object(everyone, facts, group=group)
        except RuntimeError as error:
            raise LostRank(
                f"rank {facts.rank} lost the others: {str(error).splitlines()[0]}. One of them ended: see what it said"
            ) from error
        return everyone

    facts = collect(recipe, distributed.rank(), alone_of)
    everyone = gather(facts)
    recipes = _groups(everyone, lambda facts: facts.recipe)
    if len(recipes) > 1:  # with other folders and models in them, nothing else can be compared
        raise SoftCoTError(f"the recipe differs (hash {_each(recipes, everyone)}); give all nodes the same file")
    exchange(facts, on_gpu=all(other.has_gpu for other in everyone))
    with marks(facts, everyone[0].token):
        everyone = gather(facts)
        look(facts, everyone)
        everyone = gather(facts)
    problems = distributed.on_main(lambda: _tell(judge(everyone), everyone))
    message = f"{_count(problems, 'problem')}, listed above, each with what to do"
    if any(other.exchange_failure for other in everyone):
        # A thread may wait inside NCCL for ranks that never come, and to leave the group would be to wait for it.
        distributed.say(f"softcot-ds: error: {message}")
        os._exit(2)
    distributed.shut_down()
    if problems:
        raise SoftCoTError(message)


# Facts


def collect(recipe: Recipe | None, rank: int, alone_of: str = "") -> Facts:
    """What this rank finds out without the others."""
    requirements = _requirements()
    names = [Requirement(line).name for line in requirements or ("python", *IMPORTED, "triton")]
    facts = Facts(
        rank=rank,
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        node=socket.gethostname(),
        versions={name: _version(name) for name in names},
        requirements=requirements,
        source=_source_hash(),
        recipe=_recipe_hash(recipe) if recipe is not None else "",
        mpi4py=importlib.util.find_spec("mpi4py") is not None,  # importing mpi4py.MPI would start MPI
        deepspeed_launcher=bool(shutil.which("deepspeed")) or Path(sys.executable).with_name("deepspeed").exists(),
        srun=bool(shutil.which("srun")) if "SLURM_JOB_ID" in os.environ else None,
        alone_of=alone_of,
        token=secrets.token_hex(8),
    )
    with suppress(OSError):
        facts.shm_bytes = shutil.disk_usage("/dev/shm").total
    facts.device_failure = _failure_of(lambda: _look_at_device(facts))
    if facts.has_gpu:
        facts.kernel_failure = _failure_of(lambda: _run_kernel(facts, "cuda"))
    facts.folders = _folders(recipe)
    if recipe is not None and facts.local_rank == 0:
        facts.models = {"base": _model(recipe.base), "assistant": _model(recipe.assistant)}
        facts.checkpoint_bytes = _checkpoint_bytes(recipe, facts.models)
    return facts


def _check_imports() -> None:
    for name in IMPORTED:
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken installation raises anything
            requirement = _requirement_text(name, _requirements())
            raise SoftCoTError(
                f"{name} {_version(name) or '(not installed)'} cannot be imported on {socket.gethostname()}: "
                f"{_first_line(error)}. Install it again: pip install --force-reinstall '{requirement}'"
            ) from error


def _requirements() -> list[str] | None:
    """Direct requirements of the installed package on this platform, without extras; None without its metadata."""
    try:
        lines = importlib.metadata.requires(PACKAGE) or []
        python = importlib.metadata.metadata(PACKAGE)["Requires-Python"]
    except importlib.metadata.PackageNotFoundError:
        return None
    needed = [Requirement(line) for line in lines]
    needed = [item for item in needed if item.marker is None or item.marker.evaluate({"extra": ""})]
    return [f"python{python or ''}", *(f"{item.name}{item.specifier}" for item in needed)]


def _version(name: str) -> str | None:
    if name == "python":
        return platform.python_version()
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _source_hash() -> str:
    """Over this project's files: nodes with different checkouts would train different things."""
    digest = hashlib.sha256()
    kernels = importlib.util.find_spec("softcot_kernels")
    for folder in (Path(__file__).parent, *map(Path, kernels.submodule_search_locations if kernels else ())):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".yaml"):
                digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _recipe_hash(recipe: Recipe) -> str:
    resolved = recipe.to_yaml() + json.dumps(recipe.backbone.deepspeed_config())
    return hashlib.sha256(resolved.encode()).hexdigest()[:12]


def _alone_of() -> str:
    from softcot_ds.ranks import MPI_SIZE_VARIABLES

    announced = [name for name in MPI_SIZE_VARIABLES if os.environ.get(name, "").isdigit()]
    several = [f"{name}={os.environ[name]}" for name in announced if int(os.environ[name]) > 1]
    return several[0] if several and "RANK" not in os.environ else ""


def _look_at_device(facts: Facts) -> None:
    import torch

    facts.gpus = torch.cuda.device_count()
    if os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):  # hidden on purpose
        allotted = os.environ.get("SLURM_GPUS_ON_NODE", "")
        facts.gpus_allotted = int(allotted) if allotted.isdigit() else None
        facts.gpus_of_machine = len(list(Path("/dev").glob("nvidia[0-9]*")))
    facts.cuda = torch.version.cuda or ""
    with suppress(OSError):
        first_line = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
        facts.driver = next(iter(re.findall(r"\b\d+\.\d+(?:\.\d+)*\b", first_line)), "")
    device = torch.device("cpu")
    if facts.gpus:
        if facts.local_rank >= facts.gpus:
            return  # judged by the counts
        device = torch.device("cuda", facts.local_rank)
        torch.cuda.set_device(device)
        facts.gpu = torch.cuda.get_device_name(device)
        facts.gpu_free_bytes, facts.gpu_bytes = torch.cuda.mem_get_info(device)
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 256, 256, generator=generator)
    facts.matmul_error = _relative_error(left.to(device) @ right.to(device), left.double() @ right.double())


def _run_kernel(facts: Facts, device: str) -> None:
    import torch
    from softcot_kernels import reference, thought_embedding

    B, S, T, P, D, V = 2, 5, 3, 64, 96, 32
    generator = torch.Generator().manual_seed(0)
    # In float32, for which the kernel has the fewest configurations to compile and choose from.
    hidden, weight, bias, table = (
        torch.randn(shape, generator=generator) for shape in ((B, T, P), (D, P), (D,), (V, D))
    )
    token_ids, slot = torch.randint(V, (B, S), generator=generator), torch.tensor([1, S])
    truth = reference.thought_embedding(
        hidden.double(), weight.double(), bias.double(), token_ids, table.double(), slot
    )
    found = thought_embedding(*(part.to(device) for part in (hidden, weight, bias, token_ids, table, slot)))
    facts.kernel_error = _relative_error(found, truth)


def _relative_error(found: Any, truth: Any) -> float:
    return float((found.double().cpu() - truth).norm() / truth.norm())


def _folders(recipe: Recipe | None) -> dict[str, Folder]:
    """The folders that training uses, by what the user calls them."""
    if recipe is None:
        folders = {"runs": _shared_folder("runs")}
    else:
        folders = {"output_dir": _shared_folder(recipe.output_dir), "cache.path": _shared_folder(recipe.cache.path)}
        zero = recipe.backbone.deepspeed_config().get("zero_optimization", {})
        for section in ("offload_param", "offload_optimizer"):
            offload = zero.get(section) or {}
            if offload.get("device") == "nvme":
                folders[f"{section}.nvme_path"] = Folder(str(offload.get("nvme_path")), shared=False)
    try:
        folders["temporary folder"] = Folder(tempfile.gettempdir(), shared=False)
    except OSError as error:
        folders["temporary folder"] = Folder("/tmp", shared=False, failure=_first_line(error))
    return folders


def _shared_folder(name: str | Path) -> Folder:
    path = Path(name).absolute()
    return Folder(str(path), shared=True, absent=[str(p) for p in (path, *path.parents) if not os.path.exists(p)])


def _model(config: ModelConfig) -> Model:
    from softcot_ds import backbone

    model = Model(config.model)

    def read() -> None:
        model.width = backbone.width(backbone.load_config(config))
        backbone.load_tokenizer(config)
        model.fingerprint = backbone.weights_fingerprint(config)

    model.failure = _failure_of(read)
    return model


def _checkpoint_bytes(recipe: Recipe, models: dict[str, Model]) -> int:
    """Float32 weights and AdamW's two moments of the projection, for every checkpoint and the one being written."""
    inputs = recipe.thoughts.count if recipe.projection.kind == "static" else models["assistant"].width + 1
    return inputs * models["base"].width * 4 * 3 * (recipe.training.keep_checkpoints + 1)


def exchange(facts: Facts, on_gpu: bool) -> None:
    """All-reduce between all ranks: is the sum right, and how fast is it.

    Bus bandwidth is algorithm bandwidth x 2(n-1)/n, as nccl-tests define it: what each link must have carried.
    """
    import torch
    import torch.distributed as dist

    n = dist.get_world_size()
    if n == 1:
        return
    # NCCL connects in the first all-reduce, not here.
    group = dist.new_group(backend="nccl", timeout=timedelta(minutes=JOIN_MINUTES)) if on_gpu else dist.group.WORLD
    device = torch.device("cuda", facts.local_rank) if on_gpu else torch.device("cpu")
    size = GPU_MESSAGE_BYTES if on_gpu else CPU_MESSAGE_BYTES

    def work() -> None:
        if on_gpu:
            torch.cuda.set_device(device)  # each thread has a current device of its own
        tensor = torch.full((size // 4,), float(facts.rank + 1), device=device)
        dist.all_reduce(tensor, group=group)
        facts.sum_right = bool((tensor == n * (n + 1) / 2).all())
        seconds = []
        for _ in range(7):
            tensor.zero_()
            if on_gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            dist.all_reduce(tensor, group=group)
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        facts.bus_gb_per_s = size / statistics.median(seconds) * 2 * (n - 1) / n / 1e9

    facts.exchange_failure = _within(EXCHANGE_SECONDS, work)


def _within(seconds: float, work: Callable[[], None]) -> str:
    """Run ``work`` in a thread, which is left behind when it does not end. Returns why it failed, or ""."""
    failure: list[str] = []
    thread = threading.Thread(target=lambda: failure.append(_failure_of(work)), daemon=True)
    thread.start()
    thread.join(seconds)
    return failure[0] if failure else f"no end within {seconds:g} s"


@contextmanager
def marks(facts: Facts, token: str) -> Iterator[None]:
    """The first rank of a node writes a small file into each folder; all of it is gone at the end."""
    folders = list(facts.folders.values()) if facts.local_rank == 0 else []
    written: list[Path] = []
    try:
        for folder in folders:
            if folder.failure:
                continue
            path = Path(folder.path)
            try:
                if folder.shared:
                    path.mkdir(parents=True, exist_ok=True)
                mark = path / _mark_name(token, facts.rank)
                written.append(mark)
                folder.free_bytes = shutil.disk_usage(path).free
                mark.write_text(_mark_text(token, facts))
            except OSError as error:
                folder.failure = error.strerror or str(error)
        yield
    finally:
        for mark in written:
            with suppress(OSError):
                mark.unlink()
        for path in sorted({path for folder in folders for path in folder.absent}, key=len, reverse=True):
            with suppress(OSError):  # the last node that leaves finds it empty
                os.rmdir(path)


def look(facts: Facts, everyone: Sequence[Facts]) -> None:
    """Find the files of all nodes in the shared folders; note whose this rank does not see."""
    # Nobody has looked for these names before they were all written, so no cache knows of their absence.
    waited_until = time.monotonic() + LOOK_SECONDS
    for name, folder in facts.folders.items():
        if not folder.shared:
            continue
        missing = [other for other in everyone if other.local_rank == 0 and not other.folders[name].failure]
        while True:
            missing = [other for other in missing if not _sees(folder.path, other, everyone[0].token)]
            if not missing or time.monotonic() > waited_until:
                break
            time.sleep(0.2)
        folder.unseen = [other.rank for other in missing]


def _sees(path: str, other: Facts, token: str) -> bool:
    try:
        return Path(path, _mark_name(token, other.rank)).read_text() == _mark_text(token, other)
    except (OSError, UnicodeDecodeError):
        return False


def _mark_name(token: str, rank: int) -> str:
    return f".softcot-ds-doctor-{token}-{rank}"


def _mark_text(token: str, facts: Facts) -> str:
    return f"{token} of rank {facts.rank} on {facts.node}\n"


def _failure_of(work: Callable[[], None]) -> str:
    """Run ``work``; "" or what it raised, in one line: on other ranks it may go well."""
    try:
        work()
    except Exception as error:
        return _first_line(error)
    return ""


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


# Judgement: from the facts of all ranks to findings.


def judge(everyone: Sequence[Facts]) -> list[Finding]:
    """What the facts of all ranks, in their order, mean: for each check its ok, or all that is wrong."""
    checks = {
        "versions": judge_versions,
        "devices": judge_devices,
        "communication": judge_communication,
        "shared folders": judge_folders,
        "disks": judge_disks,
        "Triton": judge_kernel,
        "models": judge_models,
        "launchers": judge_launchers,
    }
    findings = []
    for title, check in checks.items():
        found = [Finding(verdict[0], title, *verdict[1:]) for verdict in check(everyone)]
        wrong = [finding for finding in found if finding.level != OK]
        findings += wrong or found
    return findings


def judge_versions(everyone: Sequence[Facts]) -> Iterator[Verdict]:
    """Equal on all ranks, in the declared ranges, none known to be bad."""
    requirements = everyone[0].requirements
    for name in everyone[0].versions:
        groups = _groups(everyone, lambda facts, name=name: facts.versions.get(name))
        if len(groups) > 1:
            most = max(filter(None, groups), key=lambda version: len(groups[version])).partition("+")[0]
            yield (
                PROBLEM,
                f"{name} differs: {_each(groups, everyone)}",
                "let all nodes use one environment on a shared file system, or install there: "
                + (f"pip install '{name}=={most}'" if name != "python" else f"Python {most}"),
            )
        for version, where in groups.items():
            wrong = _wrong_with(name, version, requirements)
            if wrong:
                yield (
                    PROBLEM,
                    f"{name} {version or '(not installed)'} on {_where(where, everyone)}: {'; '.join(wrong)}",
                    f"make a new environment with {_requirement_text(name, requirements)}"
                    if name == "python"
                    else f"pip install '{_requirement_text(name, requirements)}'",
                )
    groups = _groups(everyone, lambda facts: facts.source)
    if len(groups) > 1:
        yield (
            PROBLEM,
            f"the files of {PACKAGE} itself differ (hash {_each(groups, everyone)})",
            "bring all nodes to the same commit, without local changes",
        )
    if requirements is None:
        yield (
            WARNING,
            f"{PACKAGE} is not installed as a package: the ranges that it declares cannot be checked",
            "pip install -e . in the checkout",
        )
    shown = [f"{name} {everyone[0].versions.get(name)}" for name in ("python", *IMPORTED, "triton")]
    yield OK, f"{', '.join(shown)}, {PACKAGE} {__version__}; all {len(everyone[0].versions)} in their ranges"


def _wrong_with(name: str, version: str | None, requirements: Sequence[str] | None) -> list[str]:
    declared = _specifier(name, requirements)
    if version is None:
        return ["is required"] if declared is not None else []
    wrong = []
    if declared is not None and not declared.contains(version, prereleases=True):
        wrong.append(f"outside of {declared}")
    known = [(SpecifierSet(versions), reason) for other, versions, reason in KNOWN_BAD if other == name]
    return [*wrong, *(reason for versions, reason in known if versions.contains(version, prereleases=True))]


def _specifier(name: str, requirements: Sequence[str] | None) -> SpecifierSet | None:
    declared = {item.name: item.specifier for item in map(Requirement, requirements or ())}
    return declared.get(name)


def _requirement_text(name: str, requirements: Sequence[str] | None) -> str:
    return f"{name}{_specifier(name, requirements) or ''}"


def judge_devices(everyone: Sequence[Facts]) -> Iterator[Verdict]:
    """A GPU for each rank or for none, alike and computing right."""
    for failure, where in _failures(everyone, lambda facts: facts.device_failure):
        yield (
            PROBLEM,
            f"the device fails on {_where(where, everyone)}: {failure}",
            "run nvidia-smi there; does the driver fit torch's CUDA version? Leave the node out until it does",
        )
    without = [facts for facts in everyone if not facts.gpus]
    if without and len(without) < len(everyone):
        yield (
            PROBLEM,
            f"no GPU is seen by {_where(without, everyone)}, but by the others",
            "run nvidia-smi there, and look at CUDA_VISIBLE_DEVICES and at the job's --gpus-per-node",
        )
    elif without and (unseen := [facts for facts in everyone if facts.gpus_of_machine or facts.gpus_allotted]):
        count = unseen[0].gpus_allotted or unseen[0].gpus_of_machine
        yield (
            PROBLEM,
            f"torch {everyone[0].versions.get('torch')} sees none of {count} GPUs on {_where(unseen, everyone)}",
            "install torch's CUDA build, for a CUDA version that the driver knows (nvidia-smi shows it); "
            "or set CUDA_VISIBLE_DEVICES= if the CPU is meant",
        )
    crowded = [facts for facts in everyone if 0 < facts.gpus <= facts.local_rank]
    if crowded:
        yield (
            PROBLEM,
            f"no GPU of its own for {_where(crowded, everyone)}: {crowded[0].node} shows {crowded[0].gpus} to "
            f"{len(_ranks_on(crowded[0].node, everyone))} ranks",
            "start as many ranks per node as it has GPUs (deepspeed --num_gpus), and ask SLURM for as many; "
            "under srun, let each task see all GPUs of the node (no --gpus-per-task, no --gpu-bind)",
        )
    firsts = [facts for facts in everyone if facts.local_rank == 0 and facts.gpus]
    for facts in firsts:
        ranks = len(_ranks_on(facts.node, everyone))
        if facts.gpus_allotted and facts.gpus < facts.gpus_allotted:
            yield (
                PROBLEM,
                f"SLURM gave {facts.gpus_allotted} GPUs of {facts.node} to this job, {facts.gpus} are seen",
                "look at CUDA_VISIBLE_DEVICES and, with nvidia-smi, whether a GPU has dropped out",
            )
        elif (facts.gpus_allotted or facts.gpus) > ranks and len(everyone) > 1:
            yield (
                WARNING,
                f"{facts.node} has {facts.gpus_allotted or facts.gpus} GPUs for {ranks} ranks: the rest stays idle",
                "start a rank for each GPU: deepspeed --num_gpus",
            )
    wrong = [facts for facts in everyone if not _close(facts.matmul_error)]
    if wrong:
        errors = [facts.matmul_error for facts in wrong if facts.matmul_error is not None]
        yield (
            PROBLEM,
            f"a matrix product is wrong on {_where(wrong, everyone)}: relative error {errors[0]:.1e}",
            "this hardware computes wrong: leave the node out and have it tested",
        )
    with_gpu = [facts for facts in everyone if facts.gpu]
    alike = {
        "model": lambda facts: facts.gpu,
        "memory": lambda facts: f"{facts.gpu_bytes / GIB:.0f} GiB",
        "driver": lambda facts: facts.driver,
        "CUDA": lambda facts: facts.cuda,
    }
    for what, value in alike.items():
        groups = _groups(with_gpu, value)
        if len(groups) > 1:
            yield (
                WARNING,
                f"GPUs differ in {what}: {_each(groups, everyone)}",
                "the slowest and smallest one decides: take nodes of one kind (#SBATCH --constraint)"
                if what in ("model", "memory")
                else "have the nodes brought to one version, or leave the odd ones out",
            )
    used = [facts for facts in with_gpu if facts.gpu_free_bytes < 0.9 * facts.gpu_bytes]
    if used:
        yield (
            WARNING,
            f"memory of the GPU is in use on {_where(used, everyone)}: {used[0].gpu_free_bytes / GIB:.1f} of "
            f"{used[0].gpu_bytes / GIB:.1f} GiB free",
            "nvidia-smi shows whose processes these are; end yours, or take another node",
        )
    largest = max(facts.matmul_error or 0.0 for facts in everyone)
    if with_gpu:
        first = with_gpu[0]
        text = (
            f"{len(everyone)} x {first.gpu}, {first.gpu_bytes / GIB:.0f} GiB, driver {first.driver or 'unknown'}, "
            f"CUDA {first.cuda}"
        )
    else:
        text = "no GPU: CPU ranks over gloo"
    yield OK, f"{text}; matrix product right to {largest:.0e}"


def _close(error: float | None) -> bool:
    """NaN is not close; what was not computed is judged elsewhere."""
    return error is None or error <= TOLERANCE


def judge_communication(everyone: Sequence[Facts]) -> Iterator[Verdict]:
    """The sum over all ranks is right and does not take for ever."""
    on_gpu = all(facts.has_gpu for facts in everyone)
    nodes = len({facts.node for facts in everyone})
    backend = "NCCL" if on_gpu else "gloo"
    interface = "NCCL_SOCKET_IFNAME" if on_gpu else "GLOO_SOCKET_IFNAME"
    for failure, where in _failures(everyone, lambda facts: facts.exchange_failure):
        yield (
            PROBLEM,
            f"all-reduce over {backend} fails on {_where(where, everyone)}: {failure}",
            f"name the interface that the nodes share in {interface}"
            + on_gpu * "; NCCL_DEBUG=INFO shows what NCCL tries",
        )
    wrong = [facts for facts in everyone if facts.sum_right is False]
    if wrong:
        yield (
            PROBLEM,
            f"all-reduce over {backend} gives a wrong sum on {_where(wrong, everyone)}",
            "leave that node out" + on_gpu * ", or try NCCL_P2P_DISABLE=1 and NCCL_IB_DISABLE=1 to find the link",
        )
    measured = [facts.bus_gb_per_s for facts in everyone if facts.bus_gb_per_s is not None]
    size = (GPU_MESSAGE_BYTES if on_gpu else CPU_MESSAGE_BYTES) // 2**20
    speed = f"bus bandwidth {min(measured):.2f} GB/s (algorithm bandwidth x 2(n-1)/n, {size} MiB)" if measured else ""
    if measured and on_gpu and nodes > 1 and min(measured) < SLOW_GB_PER_S:
        yield (
            WARNING,
            f"NCCL is slow between {nodes} nodes: {speed}",
            "NCCL_DEBUG=INFO shows the transport (NET/Socket is TCP, NET/IB is InfiniBand); name the fast "
            "interface in NCCL_SOCKET_IFNAME",
        )
    crowd = max(len(_ranks_on(facts.node, everyone)) for facts in everyone)
    small = [f for f in everyone if f.shm_bytes is not None and f.shm_bytes < SMALL_SHM_BYTES]
    if small and crowd > 1 and on_gpu:
        yield (
            WARNING,
            f"/dev/shm has {small[0].shm_bytes / 2**20:.0f} MiB on {_where(small, everyone)}: NCCL needs it "
            "between the GPUs of a node, and data loader workers do too",
            "start the container with --shm-size=1g or --ipc=host",
        )
    several = f"{len(everyone)} ranks over {backend}, the sum is right, {speed}"
    yield OK, several if measured else "one rank: nobody to talk to"


def judge_folders(everyone: Sequence[Facts]) -> Iterator[Verdict]:
    """All nodes write to the shared folders and see each other's files there."""
    firsts = [facts for facts in everyone if facts.local_rank == 0]
    shared = [name for name, folder in everyone[0].folders.items() if folder.shared]
    node_of = {facts.rank: facts.node for facts in everyone}
    for name in shared:
        yield from _cannot_write(name, firsts, everyone)
        blind: dict[str, set[str]] = {}
        for facts in everyone:
            for writer in facts.folders[name].unseen:
                blind.setdefault(facts.node, set()).add(node_of[writer])
        pairs = [f"{node} does not see what {_list(sorted(writers))} wrote" for node, writers in blind.items()]
        if pairs:
            paths = _groups(firsts, lambda facts, name=name: facts.folders[name].path)
            where = everyone[0].folders[name].path if len(paths) == 1 else f"({_each(paths, everyone)})"
            yield (
                PROBLEM,
                f"{name} {where} is not shared: {_list(pairs, '; ')}",
                "put it on a file system that all nodes mount, and name it by a path that holds on all of them"
                + (name != "runs") * f": {name}=/path/there",
            )
    nodes = len({facts.node for facts in everyone})
    seen = "written and read on one node" if nodes == 1 else f"each of {nodes} nodes sees what the others write"
    text = ", ".join(f"{name} {everyone[0].folders[name].path}" for name in shared)
    yield OK, f"{text}: {seen}"


def _cannot_write(name: str, firsts: Sequence[Facts], everyone: Sequence[Facts]) -> Iterator[Verdict]:
    settings = {"output_dir": "output_dir", "cache.path": "cache.path", "temporary folder": "TMPDIR"}
    setting = f": {settings[name]}=/path/there" if name in settings else ""
    for failure, where in _failures(firsts, lambda facts: facts.folders[name].failure):
        yield (
            PROBLEM,
            f"{name} {where[0].folders[name].path}, on {_where(where, everyone, ranks=False)}: cannot write: {failure}",
            f"make it writable and not full there, or name another folder{setting}",
        )


def judge_disks(everyone: Sequence[Facts]) -> Iterator[Verdict]:
    """Room for the checkpoints and some to spare, on every node."""
    texts = []
    firsts = [facts for facts in everyone if facts.local_rank == 0]
    for name, folder in everyone[0].folders.items():
        if not folder.shared:
            yield from _cannot_write(name, firsts, everyone)
        needed = max(DISK_FLOOR_BYTES, everyone[0].checkpoint_bytes if name == "output_dir" else 0)
        known = {facts.rank: facts.folders[name].free_bytes for facts in firsts}
        known = {rank: free for rank, free in known.items() if free is not None}
        short = [facts for facts in firsts if known.get(facts.rank, needed) < needed]
        if short:
            least = min(short, key=lambda facts: known[facts.rank])
            reason = "the checkpoints to keep take it" if needed > DISK_FLOOR_BYTES else "less does not last"
            yield (
                PROBLEM if folder.shared else WARNING,
                f"{name} {least.folders[name].path} has {_size(known[least.rank])} free on "
                f"{_where(short, everyone, ranks=False)}, {_size(needed)} are needed: {reason}",
                "make room, or name another folder",
            )
        if known:
            texts.append(f"{name} {_size(min(known.values()))}")
    least = "" if len(firsts) == 1 else f", the least of {len(firsts)} nodes"
    yield OK, f"free: {', '.join(texts)}{least}"


def _size(number: int) -> str:
    return f"{number / GIB:,.1f} GiB" if number >= GIB else f"{number / 2**20:,.1f} MiB"


def judge_kernel(everyone: Sequence[Facts]) -> Iterator[Verdict]:
    """The project's Triton kernel compiles and computes right on every GPU."""
    for failure, where in _failures(everyone, lambda facts: facts.kernel_failure):
        yield (
            PROBLEM,
            f"the kernel does not run on {_where(where, everyone)}: {failure}",
            "Triton needs a C compiler (gcc) and a writable cache: see TRITON_CACHE_DIR, by default ~/.triton",
        )
    wrong = [facts for facts in everyone if not _close(facts.kernel_error)]
    if wrong:
        yield (
            PROBLEM,
            f"the kernel computes wrong on {_where(wrong, everyone)}: relative error {wrong[0].kernel_error:.1e}",
            "please report it with the GPU's model and the versions of torch and triton",
        )
    errors = [facts.kernel_error for facts in everyone if facts.kernel_error is not None]
    text = f"the kernel is right to {max(errors):.0e}" if errors else "no GPU: not needed"
    yield OK, text


def judge_models(everyone: Sequence[Facts]) -> Iterator[Verdict]:
    """Both models are there on all nodes, and the same."""
    texts = []
    firsts = [facts for facts in everyone if facts.models]
    if not firsts:
        yield OK, "no recipe given: not looked at"
        return
    for role, first in firsts[0].models.items():
        for failure, where in _failures(firsts, lambda facts, role=role: facts.models[role].failure):
            yield (
                PROBLEM,
                f"{role} cannot be read on {_where(where, everyone, ranks=False)}: {failure}",
                f"name a folder that all nodes see in {role}.model; for a hub name, let HF_HOME be a folder "
                "that they all see, and once, where there is internet: hf download NAME",
            )
        readable = [facts for facts in firsts if not facts.models[role].failure]
        groups = _groups(readable, lambda facts, role=role: facts.models[role].fingerprint[:12])
        if len(groups) > 1:
            yield (
                PROBLEM,
                f"{role} {first.name} has different weights: {_each(groups, everyone)} (fingerprints)",
                f"pin {role}.revision to a commit, or copy one folder to all nodes",
            )
        texts += [f"{role} {first.name} ({fingerprint})" for fingerprint in groups]
    same = "" if len(firsts) == 1 else f", the same on {len(firsts)} nodes"
    yield OK, f"{', '.join(texts)}{same}"


def judge_launchers(everyone: Sequence[Facts]) -> Iterator[Verdict]:
    """What starts several processes is there, and has told them of each other."""
    if everyone[0].alone_of:
        yield (
            PROBLEM,
            f"{everyone[0].alone_of}, but this process knows of no others: each would train alone",
            "start one deepspeed per node, which starts the ranks; under srun with --ntasks-per-node=1",
        )
    missing = {
        "mpi4py": ([f for f in everyone if not f.mpi4py], "pip install mpi4py; softcot-ds cache needs it under mpirun"),
        "the deepspeed command": (
            [facts for facts in everyone if not facts.deepspeed_launcher],
            "put the environment's bin folder into PATH there",
        ),
        "srun": ([facts for facts in everyone if facts.srun is False], "put SLURM's commands into PATH there"),
    }
    for name, (where, remedy) in missing.items():
        if where:
            yield WARNING, f"{name} is missing on {_where(where, everyone)}", remedy
    there = ["deepspeed", "mpi4py", *(["srun"] if everyone[0].srun else [])]
    yield OK, ", ".join(there)


def _groups(everyone: Sequence[Facts], value: Callable[[Facts], Any]) -> dict[Any, list[Facts]]:
    """The ranks by value, in the order in which values first appear."""
    groups: dict[Any, list[Facts]] = {}
    for facts in everyone:
        groups.setdefault(value(facts), []).append(facts)
    return groups


def _failures(everyone: Sequence[Facts], value: Callable[[Facts], str]) -> Iterator[tuple[str, list[Facts]]]:
    return ((failure, where) for failure, where in _groups(everyone, value).items() if failure)


def _each(groups: dict[Any, list[Facts]], everyone: Sequence[Facts]) -> str:
    """``2.13.0 on node1, node2; 2.12.1 on node3``: the most frequent first."""
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    return _list([f"{value or 'none'} on {_where(where, everyone)}" for value, where in ordered], "; ")


def _where(some: Sequence[Facts], everyone: Sequence[Facts], ranks: bool = True) -> str:
    """Nodes by name; with ``ranks``, single ranks where others of their node do not belong to ``some``."""
    names: list[str] = []
    for node, members in _groups(some, lambda facts: facts.node).items():
        # Of what only the first rank of a node looks at, that rank speaks for the node.
        if not ranks or len(members) == len(_ranks_on(node, everyone)):
            names.append(node)
        else:
            names += [f"rank {facts.rank} ({node})" for facts in members]
    return _list(names)


def _ranks_on(node: str, everyone: Sequence[Facts]) -> list[Facts]:
    return [facts for facts in everyone if facts.node == node]


def _list(names: Sequence[str], separator: str = ", ", most: int = 6) -> str:
    more = f"{separator}and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more


def _tell(findings: Sequence[Finding], everyone: Sequence[Facts]) -> int:
    """Print the findings, problems last. Returns how many problems there are."""
    nodes = len({facts.node for facts in everyone})
    lines = [f"{_count(len(everyone), 'rank')} on {_count(nodes, 'node')}"]
    for level in (OK, WARNING, PROBLEM):
        for finding in findings:
            if finding.level == level:
                lines.append(f"{level:<9}{finding.title:<16}{finding.text}")
                if finding.remedy:
                    lines.append(f"{'':<25}-> {finding.remedy}")
    print("\n".join(lines), flush=True)
    return sum(finding.level == PROBLEM for finding in findings)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


main = recipe_command("doctor", "Is this environment fit for training?", doctor, needs_recipe=False)

if __name__ == "__main__":
    sys.exit(main())
