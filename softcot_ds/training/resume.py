"""What a training goes on from: its run's newest checkpoint, chosen by one rank for all, and of this very run."""

import contextlib
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

from softcot_ds.adapter import AdapterConfig, adapter_config, damaged
from softcot_ds.agreement import agree, facts_of
from softcot_ds.distributed import on_main, say
from softcot_ds.errors import SoftCoTError
from softcot_ds.experiment import Experiment
from softcot_ds.files import cannot_write, parse_yaml, write_atomically
from softcot_ds.lock import sole_owner
from softcot_ds.methods.base import method_class
from softcot_ds.models.backbone import weights_fingerprint
from softcot_ds.recipe import Recipe, fixed_settings, in_todays_words
from softcot_ds.run_dir import latest_checkpoint
from softcot_ds.training.checkpoint import files_of, read_training_state

PATIENCE_S = 60.0
"""How long a file or the end of another process is waited for: caches of NFS are up to a minute old, and so is the
predecessor of a job that goes on after a preemption."""


@contextlib.contextmanager
def sole_trainer(recipe: Recipe) -> Iterator[None]:
    """The run's directory belongs to this training while in the block; all ranks enter it, rank 0 holds the lock.

    Raises:
        SoftCoTError: on every rank, when another process trains there, or the directory cannot be written to.
    """
    with contextlib.ExitStack() as stack:

        def own() -> None:
            try:
                stack.enter_context(sole_owner(recipe.run_dir / "train.lock", "training", say, _patience_s(recipe)))
            except OSError as error:
                raise cannot_write(recipe.run_dir, error, otherwise="set output_dir") from error

        on_main(own)
        yield


def agreed_start(experiment: Experiment) -> Path | None:
    """The checkpoint that this run goes on from, or None: the same for all ranks, as is all else that decides the run.

    All ranks call it. The resolved recipe is then written into the run's directory.

    Raises:
        SoftCoTError: on every rank, when the ranks differ, or the checkpoint is damaged or of another run.
    """
    recipe = experiment.recipe
    chosen = on_main(lambda: _choose(recipe.run_dir))
    facts = facts_of(experiment)
    if chosen is not None:
        facts |= _seen_here(*chosen, _patience_s(recipe))
    agree(facts)
    resume_from = chosen[0] if chosen else None
    on_main(lambda: _claim_run_dir(experiment, resume_from))
    return resume_from


def refuse_other_run(experiment: Experiment, resume_from: Path | None) -> None:
    """Raises SoftCoTError when the run's newest checkpoint is damaged, or belongs to a run of another recipe, wording,
    chat template, data or model."""
    if resume_from is None:
        return
    recipe = experiment.recipe
    read_training_state(resume_from)
    saved, now = AdapterConfig.load(resume_from), adapter_config(experiment)
    differ = _other_settings(recipe, resume_from / "recipe.yaml")
    if _bytes_of(resume_from / "prompts.yaml") != experiment.task.prompt_file.read_bytes():
        differ.append(f"the wording there is not that of {experiment.task.prompt_file}")
    differ += [f"{text} there is another one than now" for text in saved.other_templates(experiment)]
    # The data is compared as tokens, which whatever has been named by now changes too.
    if not differ and saved.training_data not in (None, now.training_data):
        differ.append("the training or validation data there is other data than now")
    if differ:
        raise SoftCoTError(
            f"{recipe.run_dir} holds checkpoints of another run: {'; '.join(differ)}. "
            "Give this run another name (name=...), or remove that folder"
        )
    saved.check_models(experiment)
    if saved.training_data is None or saved.chat_templates is None:
        say(f"{resume_from} is of an older version, which kept no trace of data and chat templates: not compared")


def _other_settings(recipe: Recipe, saved: Path) -> list[str]:
    """The settings that decide the run and are others in a checkpoint's recipe, for a message."""
    try:
        theirs = fixed_settings(in_todays_words(parse_yaml(_bytes_of(saved).decode())))
    except ValueError as error:
        raise damaged(saved, str(error)) from error
    ours = fixed_settings(recipe.model_dump(mode="json"))
    method = method_class(recipe.method)
    differ = {key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key)}
    if not method.projection_class:  # which takes no notice of the section
        differ = {key for key in differ if not key.startswith("projection.")}
    if recipe.training.schedule == "constant":
        differ.discard("training.steps")  # the curve is the same, only its end is another
    texts = [f"{key} is {theirs.get(key)!r} there and {ours.get(key)!r} here" for key in sorted(differ)]
    if differ == {"training.steps"}:
        texts[0] += f", and the {recipe.training.schedule} schedule depends on it from the first step on"
        if method.projection_class:
            weights = saved.parent / method.weights_file
            texts[0] += (
                f"; to go on from these weights, start a run of another name with projection.init_from={weights}"
            )
    return texts


def _claim_run_dir(experiment: Experiment, resume_from: Path | None) -> None:
    """Write the resolved recipe into the run's directory; refuse one that holds another run's checkpoints."""
    refuse_other_run(experiment, resume_from)
    _refuse_words_of_others(experiment)
    recipe = experiment.recipe
    try:
        write_atomically(recipe.run_dir / "recipe.yaml", recipe.to_yaml())
    except OSError as error:
        raise cannot_write(recipe.run_dir, error, otherwise="set output_dir") from error


def _refuse_words_of_others(experiment: Experiment) -> None:
    """Raises SoftCoTError where the own targets are another model's, which reports would call the base's own."""
    own, base = experiment.splits.own, experiment.recipe.base
    if own is not None and own.fingerprint != (fingerprint := weights_fingerprint(base)):
        raise SoftCoTError(
            f"{experiment.recipe.task.targets} holds solutions by {own.base} (fingerprint {own.fingerprint[:12]}), but "
            f"{base.model} holds other weights (fingerprint {fingerprint[:12]}): they are not in its own words. Set "
            "base.model to the one that wrote them, or name another file in task.targets and make it: softcot-ds "
            "targets RECIPE"
        )


def _choose(run_dir: Path) -> tuple[Path, dict[str, str]] | None:
    """The newest checkpoint and a digest of each of its files."""
    folder = latest_checkpoint(run_dir)
    return (folder, {name: _digest(_bytes_of(folder / name)) for name in files_of(folder)}) if folder else None


def _seen_here(folder: Path, wanted: dict[str, str], patience_s: float) -> dict[str, str]:
    """By file: its digest as this rank sees it, or why it sees none. What is not as wanted is given time to arrive."""
    give_up = time.monotonic() + patience_s
    while True:
        seen = {}
        for name in wanted:
            try:
                seen[name] = _digest((folder / name).read_bytes())
            except OSError as error:
                seen[name] = error.strerror or str(error)
        if seen == wanted or time.monotonic() >= give_up:
            return {f"{folder / name}": text for name, text in seen.items()}
        time.sleep(1)


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise damaged(path, error.strerror or str(error)) from error


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _patience_s(recipe: Recipe) -> float:
    """Less than what the other ranks have for this one."""
    return min(PATIENCE_S, 60 * recipe.training.timeout_minutes / 2)
