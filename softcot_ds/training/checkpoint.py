"""Checkpoints: an adapter directory (adapter.py), and what training needs to go on.

``checkpoints/step-N/`` holds, beside the adapter's files,

    optimizer.safetensors    AdamW's moments, float32. Where projection.condition is not none, also the weights as they
                             are trained, and what conditions the states: folded together they are the adapter's

All is stored whole, not per rank, so a run resumes on any number of ranks.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from softcot_ds.adapter import AdapterConfig, TrainerState, damaged
from softcot_ds.card import model_card
from softcot_ds.distributed import on_main, say
from softcot_ds.errors import SoftCoTError
from softcot_ds.files import cannot_write, sync_file, sync_folder, temporary_name
from softcot_ds.hub import CARD
from softcot_ds.methods.base import Method, method_class
from softcot_ds.methods.conditioning import Conditioning
from softcot_ds.models.partition import is_partitioned, local_part
from softcot_ds.recipe import Recipe
from softcot_ds.run_dir import CHAT_TEMPLATES, MARKER, checkpoint_step, checkpoints, latest_checkpoint

_MOMENTS = ("exp_avg", "exp_avg_sq")
_TRAINED, _CONDITIONING = "trained", "conditioning"


FILES = ("optimizer.safetensors", "adapter.json", "trainer.json", "recipe.yaml", "prompts.yaml")
"""What a checkpoint holds beside its weights and its marker."""


def files_of(folder: Path) -> tuple[str, ...]:
    """What a checkpoint holds for training, beside its marker. Raises SoftCoTError when it does not say of what
    method it is."""
    method = _method_of(folder)
    return (method.weights_file, *method.other_files, *FILES)


def _method_of(folder: Path) -> type[Method]:
    return method_class(AdapterConfig.load(folder).method)


def save_checkpoint(
    engine: Any,
    recipe: Recipe,
    config: AdapterConfig,
    prompt_file: Path,
    summary: dict[str, Any],
    best: int | None = None,
) -> Path:
    """Write the checkpoint of ``config.step``; all ranks call it. Older ones beyond training.keep_checkpoints go.

    Args:
        summary: how the training went, for reports.
        best: the step of one that stays.

    Raises:
        SoftCoTError: on every rank, when it cannot be written (a full disk), or a value is not finite; nothing
            half-written remains and the older checkpoints are untouched.
    """
    method, parameters = engine.module, engine.module.trained()
    weights = {name: safe_get_full_fp32_param(p).cpu().contiguous() for name, p in parameters.items()}
    moments = {
        f"{moment}.{name}": safe_get_full_optimizer_state(p, moment).cpu().contiguous()
        for name, p in parameters.items()
        for moment in _MOMENTS
    }
    conditioning, kept = method.conditioning, moments
    if conditioning is not None:
        kept = moments | _named(_TRAINED, weights) | _named(_CONDITIONING, conditioning.tensors())
    if not all(value.isfinite().all() for value in (*weights.values(), *moments.values())):
        newest = latest_checkpoint(recipe.run_dir)
        raise SoftCoTError(
            f"weights or moments are not finite after step {config.step}: not saved. The newest checkpoint is "
            f"{newest.name if newest else 'none'}; lower training.learning_rate"
        )
    trainer = TrainerState(step=config.step, optimizer_steps=_optimizer_steps(engine), summary=summary)
    folder = recipe.run_dir / "checkpoints" / f"step-{config.step}"

    def fill(temporary: Path) -> None:
        method.write_adapter(temporary, method.adapter_weights(weights))
        (temporary / "optimizer.safetensors").write_bytes(save(kept))
        (temporary / "adapter.json").write_text(config.to_json())
        (temporary / "trainer.json").write_text(trainer.model_dump_json() + "\n")
        (temporary / "recipe.yaml").write_text(recipe.to_yaml())
        (temporary / CARD).write_text(model_card(recipe, config, trainer.summary), encoding="utf-8")
        shutil.copyfile(prompt_file, temporary / "prompts.yaml")
        for model, name in CHAT_TEMPLATES.items():
            if (template := getattr(recipe, model).chat_template) is not None:
                shutil.copyfile(template, temporary / name)

    def write() -> None:
        _write_folder(folder, fill)
        _prune(recipe.run_dir, recipe.training.keep_checkpoints, best)

    on_main(write)
    return folder


def _named(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{name}": tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _prune(run_dir: Path, keep: int, best: int | None = None) -> None:
    """Remove all checkpoints but the newest ``keep`` and that of the step ``best``. One that cannot be removed is no
    reason to end a training."""
    for old in checkpoints(run_dir)[:-keep]:
        if checkpoint_step(old) == best:
            continue
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
        for path in temporary.rglob("*"):
            (sync_folder if path.is_dir() else sync_file)(path)
        sync_folder(temporary)
        (temporary / MARKER).touch()
        sync_folder(temporary)
        temporary.rename(folder)
        sync_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        kept = latest_checkpoint(folder.parent.parent)
        newest = f"the newest complete checkpoint is {kept.name if kept else 'none'}"
        raise cannot_write(folder, error, kept=newest) from error


def load_checkpoint(engine: Any, folder: Path) -> int:
    """Put a checkpoint's weights and moments into ``engine``; all ranks call it. Returns its step.

    The module itself must hold the weights already (``Start.again`` before ``deepspeed.initialize``): DeepSpeed
    makes its float32 master copy from them, rounded to the compute dtype. Here the exact copy is put back.

    Raises:
        SoftCoTError: a file is damaged.
    """
    state = read_training_state(folder)
    _create_moments(engine, state.trainer.optimizer_steps)
    for name, parameter in engine.module.trained().items():
        _set_full(parameter, state.weights[name])
        for moment in _MOMENTS:
            _set_full(parameter, state.moments[f"{moment}.{name}"], moment)
    return state.trainer.step


class TrainingState(NamedTuple):
    """What a checkpoint holds for training; tensors are float32 on the CPU."""

    weights: dict[str, torch.Tensor]
    """As they are trained: of conditioned states, where there is a conditioning."""
    moments: dict[str, torch.Tensor]
    trainer: TrainerState
    conditioning: Conditioning | None


def read_training_state(folder: Path) -> TrainingState:
    """What training goes on from. Raises SoftCoTError when it is damaged or not of one piece."""
    method = _method_of(folder)
    weights = _load_float32(folder / method.weights_file)
    path = folder / "optimizer.safetensors"
    kept = _load_float32(path)
    trainer = TrainerState.read(folder / "trainer.json")
    conditioning = {name: kept.pop(name) for name in sorted(kept) if name.startswith(f"{_CONDITIONING}.")}
    parts = (*_MOMENTS, _TRAINED) if conditioning else _MOMENTS
    wanted = {f"{part}.{name}": value.shape for name, value in weights.items() for part in parts}
    if {name: value.shape for name, value in kept.items()} != wanted:
        raise damaged(path, f"its moments are not those of {method.weights_file}")
    if not checkpoint_step(folder) == trainer.step == AdapterConfig.load(folder).step:
        raise damaged(folder / "trainer.json", f"step {trainer.step} is not that of the folder and adapter.json")
    if not conditioning:
        return TrainingState(weights, kept, trainer, None)
    trained = {name: kept.pop(f"{_TRAINED}.{name}") for name in weights}
    try:
        found = {name.removeprefix(f"{_CONDITIONING}."): value for name, value in conditioning.items()}
        return TrainingState(trained, kept, trainer, Conditioning.of_tensors(found))
    except ValueError as error:
        raise damaged(path, str(error)) from error


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


def forget_moments(engine: Any) -> None:
    """Have AdamW go on as if no step had been taken; before the first, nothing is there to be forgotten."""
    for state in engine.optimizer.optimizer.state.values():
        for value in state.values():
            value.zero_()  # in place: DeepSpeed has linked them to the parameters


def _set_full(parameter: torch.nn.Parameter, value: torch.Tensor, moment: str | None = None) -> None:
    """Set the float32 master copy, or a moment, of a parameter from its whole value on any number of ranks."""
    value = value.to(parameter.device)
    if is_partitioned(parameter):
        value = local_part(parameter, value)
        set_weight, set_moment = safe_set_local_fp32_param, safe_set_local_optimizer_state
    else:
        set_weight, set_moment = safe_set_full_fp32_param, safe_set_full_optimizer_state
    if moment is None:
        set_weight(parameter, value)
    else:
        set_moment(parameter, value, moment)
