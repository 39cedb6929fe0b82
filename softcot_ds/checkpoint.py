"""Checkpoints: an adapter directory that evaluation and generation need, and what training needs to go on.

``checkpoints/step-N/`` holds

    projection.safetensors   the trained weights, float32 (the optimizer's master copy)
    adapter.json             both models with fingerprints, task, thought count, package version
    recipe.yaml              the resolved recipe of the run
    prompts.yaml             the wording that the run was trained with
    optimizer.safetensors    AdamW's moments, float32
    trainer.json             step counters
    COMPLETE                 the marker, written last

The frozen weights are in none of them. Moments are stored whole, not per rank, so a run resumes on any number of ranks.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from softcot_ds import __version__
from softcot_ds.backbone import weights_fingerprint, width
from softcot_ds.data import digest
from softcot_ds.distributed import device, is_main, on_main, rank, say, world_size
from softcot_ds.errors import SoftCoTError
from softcot_ds.experiment import Experiment
from softcot_ds.files import parse_json, sync_file, sync_folder, temporary_name
from softcot_ds.projection import LinearProjection, StaticThoughts, check_fits, load_projection
from softcot_ds.recipe import ModelConfig, Recipe, load_recipe
from softcot_ds.run_dir import MARKER, checkpoint_step, checkpoints, latest_checkpoint

_MOMENTS = ("exp_avg", "exp_avg_sq")


FILES = (
    "projection.safetensors",
    "optimizer.safetensors",
    "adapter.json",
    "trainer.json",
    "recipe.yaml",
    "prompts.yaml",
)
"""What a checkpoint holds beside its marker."""


class _Record(BaseModel):
    """What a JSON file of ours holds; checked when it is read."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises SoftCoTError when the file cannot be read or holds something else."""
        try:
            return cls.model_validate(parse_json(path.read_bytes()))
        except OSError as error:
            raise damaged(path, error.strerror or str(error)) from error
        except ValidationError as error:
            found = error.errors()[0]
            key = ".".join(map(str, found["loc"]))
            raise damaged(path, f"{key}: {found['msg']}" if key else found["msg"]) from error
        except ValueError as error:
            raise damaged(path, str(error)) from error


class ModelIdentity(_Record):
    """Which frozen model an adapter belongs to."""

    model: str
    revision: str | None
    fingerprint: str

    @classmethod
    def of(cls, config: ModelConfig) -> "ModelIdentity":
        return cls(model=config.model, revision=config.revision, fingerprint=weights_fingerprint(config))


class AdapterConfig(_Record):
    """What an adapter directory says about itself."""

    assistant: ModelIdentity
    base: ModelIdentity
    task: str
    projection: Literal["linear", "static"]
    num_thoughts: int = Field(ge=1)
    step: int = Field(ge=0)
    package_version: str = __version__
    training_data: str | None = None
    """Digest of the training examples' tokens, in their order. None: written before it was recorded."""
    chat_templates: dict[str, str] | None = None
    """Digest of the effective chat template of base and assistant. None: written before they were recorded."""

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def load(cls, folder: Path) -> "AdapterConfig":
        """Raises SoftCoTError when ``folder`` is no complete adapter directory."""
        if not folder.is_dir():
            raise SoftCoTError(f"no such adapter directory: {folder}")
        if not (folder / MARKER).is_file():
            raise SoftCoTError(f"{folder} is no complete checkpoint: it has no file {MARKER}; choose another step")
        return cls.read(folder / "adapter.json")

    def at_step(self, step: int) -> "AdapterConfig":
        return self.model_copy(update={"step": step})

    def check_models(self, recipe: Recipe, assistant: bool = True) -> None:
        """Raises SoftCoTError when the recipe's models are not those that the adapter was trained with.

        Args:
            assistant: whether the assistant matters; it does not for free vectors.
        """
        pairs = [("base", self.base, recipe.base)] + assistant * [("assistant", self.assistant, recipe.assistant)]
        for name, trained, config in pairs:
            fingerprint = weights_fingerprint(config)
            if fingerprint != trained.fingerprint:
                raise SoftCoTError(
                    f"the adapter was trained with the {name} {trained.model} (revision {trained.revision}, "
                    f"fingerprint {trained.fingerprint[:12]}), but {config.model} holds other weights "
                    f"(fingerprint {fingerprint[:12]}); set {name}.model to the model it was trained with"
                )

    def other_templates(self, experiment: Experiment) -> list[str]:
        """Which models have another chat template now than in training, for messages."""
        trained, now = self.chat_templates or {}, _chat_templates(experiment)
        return [f"the chat template of {name}" for name in now if trained.get(name, now[name]) != now[name]]


class TrainerState(_Record):
    """What training needs to go on, beside tensors."""

    step: int = Field(ge=0)
    optimizer_steps: int = Field(ge=0)
    summary: dict[str, Any]


def _warn(text: str) -> None:
    if is_main():
        print(f"warning: {text}", file=sys.stderr, flush=True)  # standard output may be answers


def damaged(path: Path, why: str) -> SoftCoTError:
    """The error that a file of a checkpoint is no good, with what to do."""
    return SoftCoTError(
        f"{path} is damaged: {why}; use another checkpoint. To train on from the one before, remove {path.parent}"
    )


def _chat_templates(experiment: Experiment) -> dict[str, str]:
    return {
        name: hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        for name, identity in experiment.chat_identity.items()
    }


def adapter_config(experiment: Experiment) -> AdapterConfig:
    """What the adapters of this recipe's run say about themselves, at step 0."""
    recipe = experiment.recipe
    return AdapterConfig(
        assistant=ModelIdentity.of(recipe.assistant),
        base=ModelIdentity.of(recipe.base),
        task=recipe.task.name,
        projection=recipe.projection.kind,
        num_thoughts=recipe.thoughts.count,
        step=0,
        training_data=digest(experiment.splits.train),
        chat_templates=_chat_templates(experiment),
    )


def recipe_and_adapter(source: str, overrides: list[str]) -> tuple[Recipe, Path]:
    """What to evaluate: ``source`` is an adapter directory, or a recipe whose run's newest checkpoint is meant.

    Raises:
        SoftCoTError: no complete checkpoint is there, or the recipe is wrong.
    """
    folder = Path(source)
    recipe_file = folder / "recipe.yaml" if folder.is_dir() else folder
    if folder.is_dir():
        AdapterConfig.load(folder)
    else:
        run_dir = load_recipe(source, overrides).run_dir
        folder = latest_checkpoint(run_dir)
        if folder is None:
            raise SoftCoTError(
                f"no complete checkpoint in {run_dir}/checkpoints; train first: softcot-ds train {source}"
            )
    # The adapter's own copy of the wording: the file that it was trained with may have changed since.
    return load_recipe(recipe_file, [f"task.prompts={folder / 'prompts.yaml'}", *overrides]), folder


def load_adapter(folder: Path, experiment: Experiment) -> LinearProjection | StaticThoughts:
    """The trained projection in float32 on this process's device.

    Prompts that are rendered otherwise than in training are warned of: they may be meant.

    Raises:
        SoftCoTError: it is damaged or does not fit the models or the thought count.
    """
    config = AdapterConfig.load(folder)
    if config.num_thoughts != experiment.recipe.thoughts.count:
        raise SoftCoTError(
            f"{folder} was trained with {config.num_thoughts} thoughts, thoughts.count is "
            f"{experiment.recipe.thoughts.count}; set it to {config.num_thoughts}"
        )
    for text in config.other_templates(experiment):
        _warn(f"{text} is not the one that {folder} was trained with")
    if config.chat_templates is None:
        _warn(f"{folder} is of an older version, which kept no trace of the chat templates; they are not compared")
    base_width = width(experiment.base_config)
    if config.projection == "static":
        projection = StaticThoughts(torch.zeros(config.num_thoughts, base_width))
    else:
        projection = LinearProjection(width(experiment.assistant_config), base_width)
    path = folder / "projection.safetensors"
    weights = load_projection(path)
    check_fits(weights, projection, path)
    projection.load_state_dict(weights)
    return projection.to(device())


def train_summary(folder: Path) -> dict[str, Any]:
    """How an adapter was trained: ranks, ZeRO stage, steps, losses, speed."""
    return TrainerState.read(folder / "trainer.json").summary


def save_checkpoint(
    engine: Any, recipe: Recipe, config: AdapterConfig, prompt_file: Path, summary: dict[str, Any]
) -> Path:
    """Write the checkpoint of ``config.step``; all ranks call it. Older ones beyond training.keep_checkpoints go.

    Args:
        summary: how the training went, for reports.

    Raises:
        SoftCoTError: on every rank, when it cannot be written (a full disk), or a value is not finite; nothing
            half-written remains and the older checkpoints are untouched.
    """
    parameters = dict(engine.module.projection.named_parameters())
    weights = {name: safe_get_full_fp32_param(p).cpu().contiguous() for name, p in parameters.items()}
    moments = {
        f"{moment}.{name}": safe_get_full_optimizer_state(p, moment).cpu().contiguous()
        for name, p in parameters.items()
        for moment in _MOMENTS
    }
    if not all(value.isfinite().all() for value in (*weights.values(), *moments.values())):
        kept = latest_checkpoint(recipe.run_dir)
        raise SoftCoTError(
            f"weights or moments are not finite after step {config.step}: not saved. The newest checkpoint is "
            f"{kept.name if kept else 'none'}; lower training.learning_rate"
        )
    trainer = TrainerState(step=config.step, optimizer_steps=_optimizer_steps(engine), summary=summary)
    folder = recipe.run_dir / "checkpoints" / f"step-{config.step}"

    def fill(temporary: Path) -> None:
        # Not by save_file, whose files nobody else may read, whatever the umask says.
        (temporary / "projection.safetensors").write_bytes(save(weights))
        (temporary / "optimizer.safetensors").write_bytes(save(moments))
        (temporary / "adapter.json").write_text(config.to_json())
        (temporary / "trainer.json").write_text(trainer.model_dump_json() + "\n")
        (temporary / "recipe.yaml").write_text(recipe.to_yaml())
        shutil.copyfile(prompt_file, temporary / "prompts.yaml")

    def write() -> None:
        _write_folder(folder, fill)
        _prune(recipe.run_dir, recipe.training.keep_checkpoints)

    on_main(write)
    return folder


def _prune(run_dir: Path, keep: int) -> None:
    """Remove all checkpoints but the newest ``keep``. One that cannot be removed is no reason to end a training."""
    for old in checkpoints(run_dir)[:-keep]:
        try:
            # Without its marker first: a deletion that is cut short leaves no checkpoint that looks whole.
            (old / MARKER).unlink()
            shutil.rmtree(old)
        except OSError as error:  # somebody reads it over NFS; permissions
            say(f"warning: the old checkpoint {old} cannot be removed: {error}; remove it by hand")


def _write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Create ``folder`` with ``fill``'s files and the marker, complete or not at all."""
    temporary = temporary_name(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for leftover in folder.parent.glob(".step-*.tmp"):  # of an attempt that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        if folder.exists():  # without its marker. Moved away, as what somebody has open cannot be removed everywhere
            folder.rename(stale := temporary_name(folder))
            shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir()
        fill(temporary)
        for path in temporary.iterdir():
            sync_file(path)
        sync_folder(temporary)
        (temporary / MARKER).touch()
        sync_folder(temporary)
        temporary.rename(folder)
        sync_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        kept = latest_checkpoint(folder.parent.parent)
        raise SoftCoTError(
            f"cannot write the checkpoint {folder}: {error}; "
            f"the newest complete one is {kept.name if kept else 'none'}. Make room and run the same command again"
        ) from error


def load_checkpoint(engine: Any, folder: Path) -> int:
    """Put a checkpoint's weights and moments into ``engine``; all ranks call it. Returns its step.

    The module itself must hold the weights already (``load_projection`` before ``deepspeed.initialize``): DeepSpeed
    makes its float32 master copy from them, rounded to the compute dtype. Here the exact copy is put back.

    Raises:
        SoftCoTError: a file is damaged.
    """
    weights, moments, trainer = read_training_state(folder)
    _create_moments(engine, trainer.optimizer_steps)
    for name, parameter in engine.module.projection.named_parameters():
        _set_full(parameter, weights[name])
        for moment in _MOMENTS:
            _set_full(parameter, moments[f"{moment}.{name}"], moment)
    return trainer.step


def read_training_state(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], TrainerState]:
    """Weights, moments and counters of a checkpoint. Raises SoftCoTError when they are damaged or not of one piece."""
    weights = _load_float32(folder / "projection.safetensors")
    moments = _load_float32(folder / "optimizer.safetensors")
    trainer = TrainerState.read(folder / "trainer.json")
    wanted = {f"{moment}.{name}": value.shape for name, value in weights.items() for moment in _MOMENTS}
    if {name: value.shape for name, value in moments.items()} != wanted:
        raise damaged(folder / "optimizer.safetensors", "its moments are not those of projection.safetensors")
    if not checkpoint_step(folder) == trainer.step == AdapterConfig.load(folder).step:
        raise damaged(folder / "trainer.json", f"step {trainer.step} is not that of the folder and adapter.json")
    return weights, moments, trainer


def _load_float32(path: Path) -> dict[str, torch.Tensor]:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise damaged(path, str(error)) from error
    if not tensors or any(value.dtype != torch.float32 for value in tensors.values()):
        raise damaged(path, "it does not hold float32 tensors")
    return tensors


def _master_copies(engine: Any) -> list[torch.Tensor]:
    """The flat float32 tensors that the inner torch optimizer steps, one per parameter group of this rank."""
    if engine.zero_optimization_stage() == 3:  # lends them to the inner optimizer one by one, for a step only
        return engine.optimizer.fp32_partitioned_groups_flat
    return [master for group in engine.optimizer.param_groups for master in group["params"]]


def _optimizer_steps(engine: Any) -> int:
    states = engine.optimizer.optimizer.state.values()
    return max((int(state["step"]) for state in states if "step" in state), default=0)


def _create_moments(engine: Any, steps: int) -> None:
    """Moments as torch.optim.AdamW would create them in its first step, so that there is something to fill."""
    for master in _master_copies(engine):
        engine.optimizer.optimizer.state[master] = {
            "step": torch.tensor(float(steps)),
            **{moment: torch.zeros_like(master) for moment in _MOMENTS},
        }
    # All but stage 3 link each parameter to its part of the flat moments after the first step; do it now.
    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        link()


def _set_full(parameter: torch.nn.Parameter, value: torch.Tensor, moment: str | None = None) -> None:
    """Set the float32 master copy, or a moment, of a parameter from its whole value on any number of ranks."""
    value = value.to(parameter.device)
    if hasattr(parameter, "ds_id"):
        # ZeRO-3 pads a parameter that the ranks do not divide; safe_set_full_* of DeepSpeed 0.19 does not.
        part = parameter.ds_tensor.numel()
        padded = torch.nn.functional.pad(value.flatten(), (0, part * world_size() - value.numel()))
        value, setters = (
            padded[rank() * part : (rank() + 1) * part],
            (safe_set_local_fp32_param, safe_set_local_optimizer_state),
        )
    else:
        setters = (safe_set_full_fp32_param, safe_set_full_optimizer_state)
    if moment is None:
        setters[0](parameter, value)
    else:
        setters[1](parameter, value, moment)
