"""What each rank finds out about itself and its node.

The facts are gathered, and rank 0 judges and prints. Whatever fails on a rank becomes one of its facts: all ranks make
the same collective calls in the same order. They meet over gloo, so that a rank without its GPU, or NCCL that does not
work, can be told instead of waited for.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import secrets
import shutil
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import softcot_kernels
import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from softcot_kernels import reference

from softcot_ds import distributed
from softcot_ds.agreement import code_digest
from softcot_ds.diagnosis import judge as diagnosis
from softcot_ds.diagnosis.judge import MESSAGE_BYTES, Facts, Folder, Model
from softcot_ds.differences import difference
from softcot_ds.errors import SoftCoTError
from softcot_ds.experiment import Experiment
from softcot_ds.launchers import alone_of
from softcot_ds.methods.base import method_class
from softcot_ds.methods.conditioning import Conditioning
from softcot_ds.methods.trial import Role, Untried, why_unsuitable_ahead
from softcot_ds.models import backbone
from softcot_ds.models.model_files import is_here
from softcot_ds.models.partition import engine_config, short_limits
from softcot_ds.planning.fit import why_too_large
from softcot_ds.planning.hardware import Cluster, load_hardware
from softcot_ds.progress import count
from softcot_ds.recipe import ModelConfig, Recipe
from softcot_ds.thoughts.anatomy import Parts, sample
from softcot_ds.thoughts.reader import open_cache

JOIN_MINUTES = 2.0
"""How long the ranks wait for each other at the start."""
PATIENCE_MINUTES = 30.0
"""How long they wait for one that reads a large model from a slow disk."""
REPEATS = 7
EXCHANGE_SECONDS = 60.0
"""How long the all-reduces may take before NCCL counts as stuck; its first one sets up all connections."""
LOOK_SECONDS = 10.0
"""How long a file may take to show up on another node: network file systems cache folders for a while."""
_SAMPLED_ROWS = 256
"""Of the cache, whose states are looked at."""
TOLERANCE = 2e-3
"""Relative error of float32 products in the Frobenius norm; TF32, which a site may have switched on, has 3e-4."""


def doctor(recipe: Recipe | None) -> None:
    """Check the environment; to be called by all ranks. Prints a line per check, problems last.

    Args:
        recipe: its folders and models are checked too.

    Raises:
        SoftCoTError: there are problems, on every rank; or the ranks do not find each other.
    """
    several = alone_of()
    distributed.init_distributed(JOIN_MINUTES, cpu_only=True)
    group = dist.new_group(backend="gloo", timeout=timedelta(minutes=PATIENCE_MINUTES))

    def gather(facts: Facts) -> list[Facts]:
        everyone: list[Any] = [None] * distributed.world_size()
        dist.all_gather_object(everyone, facts, group=group)
        return everyone

    facts = collect(recipe, distributed.rank(), several)
    everyone = gather(facts)
    if recipes := difference(everyone, lambda facts: facts.recipe):
        # With other folders and models in them, nothing else can be compared.
        raise SoftCoTError(f"the recipe differs (hash {recipes}); give all nodes the same file")
    if recipe is not None and facts.rank == 0:
        facts.too_large = too_large(recipe, everyone)
    exchange(facts, on_gpu=all(other.has_gpu for other in everyone))
    with marks(facts, everyone[0].token):
        everyone = gather(facts)
        look(facts, everyone)
        everyone = gather(facts)
    findings = diagnosis.judge(everyone)
    distributed.on_main(lambda: print(diagnosis.table(findings, everyone), flush=True))
    problems = sum(finding.level == diagnosis.PROBLEM for finding in findings)
    message = f"{count(problems, 'problem')}, listed above, each with what to do"
    if any(other.exchange_failure for other in everyone):
        # A thread may wait inside NCCL for ranks that never come, and to leave the group would be to wait for it.
        distributed.say(f"softcot-ds: error: {message}")
        os._exit(2)
    distributed.shut_down()
    if problems:
        raise SoftCoTError(message)


def collect(recipe: Recipe | None, rank: int, alone_of: str = "") -> Facts:
    """What this rank finds out without the others."""
    requirements = _requirements()
    launchers = {"deepspeed": bool(shutil.which("deepspeed")) or Path(sys.executable).with_name("deepspeed").exists()}
    if "SLURM_JOB_ID" in os.environ:
        launchers["srun"] = bool(shutil.which("srun"))
    facts = Facts(
        rank=rank,
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        node=socket.gethostname(),
        versions={name: _version(name) for name in requirements or diagnosis.SHOWN},
        requirements=requirements,
        source=code_digest(),
        recipe=_hash(recipe.to_yaml(), json.dumps(recipe.backbone.deepspeed_config())) if recipe else "",
        folders=_folders(recipe),
        launchers=launchers,
        alone_of=alone_of,
        token=secrets.token_hex(8),
    )
    with suppress(OSError):
        facts.shm_bytes = shutil.disk_usage("/dev/shm").total
    facts.device_failure = _failure_of(lambda: _look_at_device(facts))
    if facts.has_gpu:
        facts.kernel_failure = _failure_of(lambda: _run_kernel(facts, "cuda"))
    if recipe is not None and facts.local_rank == 0:
        facts.models = {
            "base": _model(recipe.base, "base", recipe.backbone.bits),
            "assistant": _model(recipe.assistant, "assistant"),
        }
        if not any(model.failure for model in facts.models.values()):
            facts.prompts_failure = _failure_of(lambda: Experiment(recipe))
            facts.training_failure = _failure_of(lambda: method_class(recipe.method).check(recipe))
            facts.limits_failure = _failure_of(lambda: _look_at_limits(facts, recipe))
            facts.states = _states(recipe) if rank == 0 else None
        facts.checkpoint_bytes = _checkpoint_bytes(recipe, facts.models)
    return facts


def _requirements() -> dict[str, str] | None:
    """The ranges of Python and of what the installed package requires on this platform; None without its metadata."""
    try:
        package = importlib.metadata.distribution("softcot-ds")
    except importlib.metadata.PackageNotFoundError:
        return None
    needed = map(Requirement, package.requires or [])
    needed = [item for item in needed if not item.marker or item.marker.evaluate({"extra": ""})]
    return {"python": package.metadata["Requires-Python"] or ""} | {item.name: str(item.specifier) for item in needed}


def _version(name: str) -> str | None:
    try:
        return platform.python_version() if name == "python" else importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _hash(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


def _look_at_device(facts: Facts) -> None:
    facts.gpus = torch.cuda.device_count()
    if os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):  # hidden on purpose
        facts.gpus_allotted = int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)
    device = torch.device("cpu")
    if facts.gpus:
        if facts.local_rank >= facts.gpus:
            return  # judged by the counts
        device = torch.device("cuda", facts.local_rank)
        torch.cuda.set_device(device)
        gpu = torch.cuda.get_device_properties(device)
        facts.gpu_bytes = gpu.total_memory
        facts.gpu = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 256, 256, generator=generator)
    product = left.to(device) @ right.to(device)
    facts.matmul_error = _error("a matrix product", product, left.double() @ right.double())


def _run_kernel(facts: Facts, device: str) -> None:
    B, S, T, P, D, V = 2, 5, 3, 64, 96, 32
    generator = torch.Generator().manual_seed(0)
    # In float32, for which the kernel has the fewest configurations to compile and choose from.
    shapes = ((B, T, P), (D, P), (D,), (V, D))
    hidden, weight, bias, embeddings = (torch.randn(shape, generator=generator) for shape in shapes)
    token_ids, slot = torch.randint(V, (B, S), generator=generator), torch.tensor([1, S])
    arguments = (hidden, weight, bias, token_ids, embeddings, slot)
    truth = reference.thought_embedding(*(part.double() if part.is_floating_point() else part for part in arguments))
    found = softcot_kernels.thought_embedding(*(part.to(device) for part in arguments))
    facts.kernel_error = _error("its result", found, truth)


def _error(what: str, found: torch.Tensor, truth: torch.Tensor) -> float:
    error = float((found.double().cpu() - truth).norm() / truth.norm())
    if not error <= TOLERANCE:  # nor if it is NaN
        raise ArithmeticError(f"{what} is wrong: relative error {error:.1e}")
    return error


def _folders(recipe: Recipe | None) -> dict[str, Folder]:
    """The folders that training uses, by the setting that names them."""
    folders = {"TMPDIR": Folder(os.environ.get("TMPDIR", "/tmp"), shared=False)}
    if recipe is None:
        return {"output_dir": _shared_folder(Path("runs"))} | folders
    zero = recipe.backbone.deepspeed_config().get("zero_optimization", {})
    for section in ("offload_param", "offload_optimizer"):
        offload = zero.get(section) or {}
        if offload.get("device") == "nvme":
            folders[f"{section}.nvme_path"] = Folder(str(offload.get("nvme_path")), shared=False)
    shared = {"output_dir": _shared_folder(recipe.output_dir), "cache.path": _shared_folder(recipe.cache.path)}
    return shared | folders


def _shared_folder(path: Path) -> Folder:
    path = path.absolute()
    return Folder(str(path), shared=True, absent=[str(p) for p in (path, *path.parents) if not os.path.exists(p)])


def _model(config: ModelConfig, role: Role, bits: int = 16) -> Model:
    model = Model(config.model)

    def read() -> None:
        if not is_here(config):
            raise SoftCoTError(f"{config.model} is not downloaded, or not completely")
        model.width = backbone.width(backbone.load_config(config))
        backbone.load_tokenizer(config)
        backbone.check_weights(config)
        model.fingerprint = backbone.weights_fingerprint(config)

    def run() -> None:
        try:
            if (reason := why_unsuitable_ahead(config, role, bits)) is not None:
                raise SoftCoTError(reason)
        except Untried as untried:
            model.untried = str(untried)

    model.failure = _failure_of(read)
    if not model.failure:
        model.trial_failure = _failure_of(run)
    return model


def _look_at_limits(facts: Facts, recipe: Recipe) -> None:
    config = engine_config(recipe)
    if config["zero_optimization"].get("stage") == 3:
        online = recipe.thoughts.source == "online"
        models = [recipe.base, recipe.assistant] if online else [recipe.base]
        facts.limits = short_limits(config, *map(backbone.shapes_of, models))


def _states(recipe: Recipe) -> tuple[float, float] | None:
    """See ``Facts.states``; of some rows of the cache."""
    if not method_class(recipe.method).needs_states or recipe.projection.condition != "none":
        return None
    with suppress(SoftCoTError):  # there is none, or softcot-ds cache --verify says what is wrong with it
        states_NTP = sample(open_cache(recipe), _SAMPLED_ROWS)
        if len(states_NTP) > 1:
            parts = Parts.of(states_NTP)
            return parts.constant_norm, parts.varying_norm
    return None


def too_large(recipe: Recipe, everyone: Sequence[Facts]) -> str | None:
    """What of the recipe does not fit the GPUs of these ranks, by plan; None where they are not alike or cannot be
    planned for: what is wrong then is told by another check."""
    ranks_on = Counter(facts.node for facts in everyone)
    least = min(everyone, key=lambda facts: facts.gpu_bytes)
    if not least.gpu_bytes or len({*ranks_on.values()}) > 1:
        return None
    table = load_hardware()
    known = table.found(least.gpu.partition(",")[0]) or table.gpu("h100")  # of one that is not, the memory is
    gpu = known.model_copy(update={"memory_gib": least.gpu_bytes / 2**30})
    ranks = ranks_on[least.node]
    try:
        return why_too_large(recipe, Cluster(gpu, table.reached, len(ranks_on), ranks, gpu.network_gbps))
    except SoftCoTError:
        return None


def _checkpoint_bytes(recipe: Recipe, models: dict[str, Model]) -> int:
    """Float32 weights and AdamW's two moments of what is trained, with what conditions its states and the weights of
    these, for every checkpoint and the one being written."""
    widths = models["assistant"].width, models["base"].width
    if not all(widths):
        return 0  # a model cannot be read, which is said
    method = method_class(recipe.method)
    with torch.device("meta"):
        conditioning = Conditioning.shaped(recipe.projection.condition if method.needs_states else "none", widths[0])
    weights = method.num_trained(recipe, widths, backbone.shapes_of(recipe.base))
    size = 4 * weights * 4 + conditioning.nbytes if conditioning else 3 * weights * 4
    return size * (recipe.training.keep_checkpoints + 2)  # the best one, and one that is being written


def exchange(facts: Facts, on_gpu: bool) -> None:
    """All-reduce between all ranks: is the sum right, and how fast is it.

    Bus bandwidth is algorithm bandwidth x 2(n-1)/n, as nccl-tests define it: what each link must have carried.
    """
    n = dist.get_world_size()
    if n == 1:
        return
    # NCCL connects in the first all-reduce, not here.
    group = dist.new_group(backend="nccl", timeout=timedelta(minutes=JOIN_MINUTES)) if on_gpu else dist.group.WORLD
    device = torch.device("cuda", facts.local_rank) if on_gpu else torch.device("cpu")

    def work() -> None:
        if on_gpu:
            torch.cuda.set_device(device)  # each thread has a current device of its own
        tensor = torch.full((MESSAGE_BYTES // 4,), float(facts.rank + 1), device=device)
        dist.all_reduce(tensor, group=group)
        right = bool((tensor == n * (n + 1) / 2).all())
        tensor.zero_()
        start = time.perf_counter()
        for _ in range(REPEATS):
            dist.all_reduce(tensor, group=group)
        if on_gpu:
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / REPEATS
        if not right:  # told now, for others to have their all-reduces
            raise ArithmeticError("the sum is wrong")
        facts.bus_gb_per_s = MESSAGE_BYTES / seconds * 2 * (n - 1) / n / 1e9

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
    try:
        for folder in folders:
            try:
                if folder.shared:
                    os.makedirs(folder.path, exist_ok=True)
                folder.free_bytes = shutil.disk_usage(folder.path).free
                Path(_mark(folder, token, facts.rank)).write_text("written by softcot-ds doctor\n")
            except OSError as error:
                folder.failure = error.strerror or str(error)
        yield
    finally:
        for folder in folders:
            with suppress(OSError):
                os.unlink(_mark(folder, token, facts.rank))
        for path in sorted({path for folder in folders for path in folder.absent}, key=len, reverse=True):
            with suppress(OSError):  # the last node that leaves finds it empty
                os.rmdir(path)


def look(facts: Facts, everyone: Sequence[Facts]) -> None:
    """Find the files of all nodes in the shared folders; note whose this rank does not see."""
    # Nobody has looked for these names before they were all written, so no cache knows of their absence.
    give_up = time.monotonic() + LOOK_SECONDS
    token = everyone[0].token
    for name, folder in facts.folders.items():
        writers = [o.rank for o in everyone if o.local_rank == 0 and folder.shared and not o.folders[name].failure]
        while True:
            folder.unseen = [rank for rank in writers if not os.path.exists(_mark(folder, token, rank))]
            if not folder.unseen or time.monotonic() > give_up:
                break
            time.sleep(0.2)


def _mark(folder: Folder, token: str, rank: int) -> str:
    return f"{folder.path}/.softcot-ds-doctor-{token}-{rank}"


def _failure_of(work: Callable[[], None]) -> str:
    """Run ``work``; "" or what it raised, in one line: on other ranks it may go well."""
    try:
        work()
    except Exception as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return ""
