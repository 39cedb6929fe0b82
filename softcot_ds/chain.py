"""A chain of SLURM jobs: batch scripts made of those in slurm/, checked, written and submitted together.

The scripts stay in their runs' directories beside what they are given, so that a job can be submitted again by hand.
"""

import argparse
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from softcot_ds.errors import SoftCoTError
from softcot_ds.files import cannot_write, write_atomically
from softcot_ds.planning.hardware import Cluster, load_hardware
from softcot_ds.recipe import Recipe
from softcot_ds.run_dir import latest_checkpoint, saved_step
from softcot_ds.shipped import found

# It brings torch and transformers, which take seconds: not before a recipe's own mistakes have been reported.
if TYPE_CHECKING:
    from softcot_ds.experiment import Experiment

_HOME_LINE = "SOFTCOT_HOME=${SOFTCOT_HOME:-$SLURM_SUBMIT_DIR}\n"
"""Of the scripts in slurm/: where they find the others. A generated script knows."""


@dataclass(frozen=True)
class Job:
    """One batch job: a command with a file of settings."""

    command: str
    name: str
    run_dir: Path
    settings: str
    """YAML, written to ``file`` in the run's directory: what the command is given."""
    axes: tuple[str, ...] = ()
    """Overrides that ask for several evaluations; see cells.py."""
    file: str = "recipe.yaml"

    @classmethod
    def of(cls, command: str, recipe: Recipe, axes: tuple[str, ...] = ()) -> Self:
        """With the recipe of a run."""
        return cls(command, recipe.name, recipe.run_dir, recipe.to_yaml(), axes)

    @property
    def script(self) -> Path:
        """Called by its command, or where the file has a name of its own, by that."""
        name = self.command if self.file == "recipe.yaml" else Path(self.file).stem
        return self.run_dir / "slurm" / f"{name}.sbatch"


@dataclass(frozen=True)
class Submission:
    """How jobs are to be submitted."""

    options: Sequence[str]
    """Of sbatch, as on its command line (``--nodes=2``); they replace those of the scripts."""
    tasks_per_node: str | None = None
    """Processes of a node that build the cache."""
    dry_run: bool = False
    """Only show the scripts, and what they are given."""
    gpu: str | None = None
    """The kind of GPUs, by their name in the hardware table, to warn where they are too small."""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser, required: bool) -> None:
        """``required``: whether the command does nothing but submit."""
        parser.add_argument(
            "--nodes", required=required, help="4, or 3-4 where a restart may do with fewer after a dead node"
        )
        parser.add_argument("--gpus-per-node", help="a rank for each; default: what slurm/*.sbatch say")
        parser.add_argument("--gpu", help="their kind, as softcot-ds plan has it, to be warned where it is too small")
        parser.add_argument("--time", help="limit of each job, as sbatch takes it; training goes on in restarts")
        parser.add_argument(
            "--sbatch",
            action="append",
            default=[],
            metavar="OPTIONS",
            help="further options of sbatch for all jobs, such as --sbatch='--partition=gpu --account=team'",
        )
        parser.add_argument(
            "--dry-run", action="store_true", help="show the scripts and what they are given, submit nothing"
        )

    @classmethod
    def asked_for(cls, args: argparse.Namespace) -> Self:
        named: Mapping[str, str | None] = {
            "--nodes": args.nodes,
            "--gpus-per-node": args.gpus_per_node,
            "--time": args.time,
        }
        options = [f"{name}={value}" for name, value in named.items() if value is not None]
        options += [option for text in args.sbatch for option in shlex.split(text)]
        return cls(options, args.gpus_per_node, args.dry_run, args.gpu)

    def scripts(self, jobs: Sequence[Job]) -> dict[Path, str]:
        """The batch scripts of jobs, by where they are to be. Raises SoftCoTError: an option is none of sbatch's."""
        return {job.script: _script(job, self.options, self.tasks_per_node) for job in jobs}


def training_left(run: Recipe, experiment: "Experiment | None") -> Job | None:
    """The job that trains a run; None, and a word about it, where it is trained.

    Args:
        experiment: the run's; None where what it is to be trained on is yet to be made.

    Raises:
        SoftCoTError: what is in its directory is another run's.
    """
    from softcot_ds.training.resume import refuse_other_run

    if experiment is not None:
        refuse_other_run(experiment, latest_checkpoint(run.run_dir))
    if run.training.steps is None or saved_step(run.run_dir) < run.training.steps:
        return Job.of("train", run)
    print(f"train     done to step {saved_step(run.run_dir)} in {run.run_dir}: no job")
    return None


def caches_complete(recipes: Sequence[Recipe]) -> bool:
    """Whether the caches of recipes hold all that they are to; says so."""
    from softcot_ds.thoughts.reader import cached, open_cache

    try:
        wanted = [pair for of in recipes for pair in cached(of)]
        folders = {str(open_cache(of, inputs).folder): None for of, inputs in wanted}
    except SoftCoTError:
        return False
    print(f"cache     complete in {' and '.join(folders)}: no job")
    return True


def warn_if_too_large(recipe: Recipe, data: Any, script: str, gpu: str | None) -> None:
    """Say where a plan finds that the recipe does not fit the GPUs that a job asks for.

    Args:
        data: as plans have it.
        script: of a job that runs the base; says how many nodes and GPUs, of the latter perhaps the kind.
        gpu: their kind; default: what the script says, else h100.

    Raises:
        SoftCoTError: there is no such GPU in the hardware table.
    """
    from softcot_ds.planning.fit import why_too_large

    nodes = re.search(r"^#SBATCH --nodes=(\d+)", script, flags=re.MULTILINE)
    gpus = re.search(r"^#SBATCH --gpus-per-node=(?:(\w[\w-]*):)?(\d+)", script, flags=re.MULTILINE)
    if nodes is None or gpus is None:
        return
    table = load_hardware()
    said = gpus[1] if gpus[1] in table.gpus else None
    kind = table.gpu(gpu or said or "h100")
    cluster = Cluster(kind, table.reached, int(nodes[1]), int(gpus[2]), kind.network_gbps)
    try:
        reason = why_too_large(recipe, cluster, data)
    except SoftCoTError as error:  # a model that cannot be planned may well be trained
        print(f"warning: whether this fits is not known: {error}")
        return
    if reason:
        print(
            f"warning: this will not fit on {kind.words} GPUs: {reason}. softcot-ds plan shows what does; --gpu names "
            "others"
        )


def submit_chain(jobs: Sequence[Job], submission: Submission) -> None:
    """Write and submit jobs: each waits for those of the command before it.

    Raises:
        SoftCoTError: jobs of one of the runs are in the queue already, or SLURM refuses a job; then none of this chain
            is left in the queue.
    """
    scripts = submission.scripts(jobs)
    settings = {job.run_dir / job.file: job.settings for job in jobs}
    if submission.dry_run:
        for path, text in scripts.items():
            print(f"# {path}\n{text}")
        for path, text in settings.items():
            print(f"# {path}\n{text}", end="")
        return
    if shutil.which("sbatch") is None:
        raise SoftCoTError("there is no sbatch here; submit from a login node of the cluster, or see --dry-run")
    run_dirs = list(dict.fromkeys(job.run_dir for job in jobs))
    for run_dir in run_dirs:
        _refuse_second_chain(run_dir / "slurm")
    for run_dir in run_dirs:
        try:
            for path in (run_dir / "slurm", run_dir / "logs"):  # SLURM does not make the folder of a job's log
                path.mkdir(parents=True, exist_ok=True)
            for path, text in (*settings.items(), *scripts.items()):
                if run_dir in (path.parent, path.parent.parent):
                    write_atomically(path, text)
        except OSError as error:
            raise cannot_write(run_dir, error, otherwise="set output_dir") from error
    ids = _submit_jobs(jobs)
    logs = jobs[-1].run_dir / "logs"
    print(f"logs: {logs}; the jobs: squeue -j {','.join(ids)}; to end them: scancel {' '.join(ids)}")


def _submit_jobs(jobs: Sequence[Job]) -> list[str]:
    """The ids of the jobs: each waits for the one before it, but trainings only for what comes before all of them, and
    the evaluation for all trainings."""
    ids: list[str] = []
    before: list[str] = []
    for command, group in groupby(jobs, lambda job: job.command):
        started = []
        for job in group:
            started.append(_sbatch(job.script, before, [*ids, *started]))
            after = f" after job {', '.join(before)}" if before else ""
            name = f" ({job.name})" if job.name != jobs[-1].name else ""
            print(f"{command:9} job {started[-1]}{name}{after}", flush=True)
        ids, before = [*ids, *started], started
    return ids


def _refuse_second_chain(folder: Path) -> None:
    """Two must not train in one directory.

    Raises:
        SoftCoTError: a job with a script of this run is in the queue, or squeue does not say what is in it.
    """
    try:
        listed = subprocess.run(["squeue", "--noheader", "--format=%A %o"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = " ".join((getattr(error, "stderr", None) or str(error)).split())
        raise SoftCoTError(
            f"squeue does not say whether jobs of this run are in the queue already: {said}; submit when it answers"
        ) from error
    for line in listed.stdout.splitlines():
        job, _, script = line.strip().partition(" ")
        if Path(script).is_absolute() and Path(script).parent == folder.absolute():
            raise SoftCoTError(
                f"job {job} of this run is in the queue already ({script}); let it end, or end it with scancel {job}, "
                "or give this run another name (name=...)"
            )


def _script(job: Job, options: Sequence[str], tasks_per_node: str | None) -> str:
    """The script for one job, with its options and its recipe in it: of slurm/ in the current directory, where a site
    may have changed it, else the one shipped."""
    command, run_dir = job.command, job.run_dir
    path = found(Path("slurm/environment.sh")).absolute().with_name(f"{command}.sbatch")
    own = [f"--job-name={job.name}-{command}", f"--output={run_dir}/logs/%x-%j.log"]
    if command == "cache" and tasks_per_node:
        own.append(f"--ntasks-per-node={tasks_per_node}")
    again = f"sbatch {job.script}"
    made = f"# {command} of {job.name}, made by softcot-ds submit; to submit it again: {again}"
    script = path.read_text() if path.is_file() else ""
    if _HOME_LINE not in script:
        raise SoftCoTError(
            f"{path} is missing, or has no line {_HOME_LINE.strip()!r}; the scripts as they are shipped: "
            "softcot-ds init slurm FOLDER"
        )
    text = with_options(script, [*own, *options], made)
    arguments = shlex.join([str(run_dir / job.file), *job.axes])
    home = f"SOFTCOT_HOME={shlex.quote(str(path.parent.parent))}\nset -- {arguments}\n"
    return text.replace(_HOME_LINE, home)


def with_options(script: str, options: Sequence[str], comment: str) -> str:
    """A batch script with these options of sbatch, in place of lines with the same option, and another comment.

    Raises:
        SoftCoTError: an option is not of the form --name or --name=value.
    """
    first, *lines = script.splitlines(keepends=True)
    start = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    header, body = [line for line in lines[:start] if line.startswith("#SBATCH")], lines[start:]
    for option in options:
        if not re.fullmatch(r"--[a-z][a-z-]*(=.*)?", option):
            raise SoftCoTError(
                f"{option!r} is no long option of sbatch; write --name or --name=value, as --partition=gpu"
            )
        name = option.partition("=")[0]
        header = [line for line in header if not re.match(rf"#SBATCH {re.escape(name)}(=|\s|$)", line)]
        header.append(f"#SBATCH {shlex.quote(option)}\n")
    return "".join([first, f"{comment}\n", *header, *body])


def _sbatch(script: Path, before: Sequence[str], submitted: Sequence[str]) -> str:
    """Submit one script after all of ``before``; returns the job's id. If SLURM refuses, ``submitted`` is cancelled."""
    command = ["sbatch", "--parsable", "--kill-on-invalid-dep=yes"]
    if before:
        command.append(f"--dependency=afterok:{':'.join(before)}")
    done = subprocess.run([*command, str(script)], capture_output=True, text=True)
    if done.returncode:
        if submitted:
            subprocess.run(["scancel", *submitted], capture_output=True)
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise SoftCoTError(f"SLURM refuses {script}: {said}. No job of this chain is left in the queue")
    return done.stdout.strip().partition(";")[0]  # JOB;CLUSTER
