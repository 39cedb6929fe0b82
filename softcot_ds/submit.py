"""``softcot-ds submit RECIPE --nodes N``: own targets, cache, training and evaluation as a chain of SLURM jobs.

Everything that can be checked without a node is checked here, on the submitting terminal. What is done already is left
out: targets that are there, a complete cache, a finished training. The scripts are those of slurm/, with the site's
options in their headers; they stay in the run's directory beside the resolved recipe, so that a job can be submitted
again by hand.
"""

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from softcot_ds.cells import NO_GRID, Grid
from softcot_ds.command import OVERRIDES_HELP, run_command
from softcot_ds.errors import SoftCoTError
from softcot_ds.files import cannot_write, write_atomically
from softcot_ds.planning.hardware import Cluster, load_hardware
from softcot_ds.recipe import Recipe, load_recipe
from softcot_ds.run_dir import latest_checkpoint, saved_step

CHECKOUT = Path(__file__).parent.parent
_HOME_LINE = "SOFTCOT_HOME=${SOFTCOT_HOME:-$SLURM_SUBMIT_DIR}\n"
"""Of the scripts in slurm/: where they find the others. A generated script knows."""


class _Job(NamedTuple):
    """One batch job: a command with the recipe of a run."""

    command: str
    recipe: Recipe
    axes: tuple[str, ...] = ()
    """Overrides that ask for several evaluations; see cells.py."""

    @property
    def script(self) -> Path:
        return self.recipe.run_dir / "slurm" / f"{self.command}.sbatch"


def submit(
    recipe: Recipe,
    options: Sequence[str],
    tasks_per_node: str | None = None,
    dry_run: bool = False,
    gpu: str | None = None,
    grid: Grid = NO_GRID,
) -> None:
    """Check the recipe with its data, cache and run directory; then submit the jobs that are left to do.

    Args:
        options: of sbatch, as on its command line (``--nodes=2``); they replace those of the scripts.
        tasks_per_node: processes of a node that build the cache.
        dry_run: only show the scripts and the resolved recipe.
        gpu: the kind of GPUs, by their name in the hardware table, to warn where they are too small.
        grid: several seeds, each trained by a job of its own, or several numbers of thoughts, in one evaluation.

    Raises:
        SoftCoTError: anything is wrong with the recipe, jobs of this run are in the queue already, or SLURM refuses a
            job; then none of this chain is left in the queue.
    """
    recipe, jobs, data = _left_to_do(recipe, grid)
    runs = {job.recipe.run_dir: job.recipe for job in jobs}
    if not dry_run:
        if shutil.which("sbatch") is None:
            raise SoftCoTError("there is no sbatch here; submit from a login node of the cluster, or see --dry-run")
        for run_dir in runs:
            _refuse_second_chain(run_dir / "slurm")
    scripts = {job.script: _script(job, options, tasks_per_node) for job in jobs}
    _warn_if_too_large(recipe, data, scripts[jobs[-1].script], gpu)
    if dry_run:
        for path, text in scripts.items():
            print(f"# {path}\n{text}")
        for run_dir, of in runs.items():
            print(f"# {run_dir / 'recipe.yaml'}\n{of.to_yaml()}", end="")
        return
    for run_dir, of in runs.items():
        try:
            for path in (run_dir / "slurm", run_dir / "logs"):  # SLURM does not make the folder of a job's log
                path.mkdir(parents=True, exist_ok=True)
            write_atomically(run_dir / "recipe.yaml", of.to_yaml())
            for path, text in scripts.items():
                if path.parent == run_dir / "slurm":
                    write_atomically(path, text)
        except OSError as error:
            raise cannot_write(run_dir, error, otherwise="set output_dir") from error
    ids = _submit_jobs(jobs)
    print(f"logs: {recipe.run_dir}/logs; the jobs: squeue -j {','.join(ids)}; to end them: scancel {' '.join(ids)}")


def _submit_jobs(jobs: Sequence[_Job]) -> list[str]:
    """The ids of the jobs: each waits for the one before it, but trainings only for what comes before all of them, and
    the evaluation for all trainings."""
    ids: list[str] = []
    before: list[str] = []
    for command, group in groupby(jobs, lambda job: job.command):
        started = []
        for job in group:
            started.append(_sbatch(job.script, before, [*ids, *started]))
            after = f" after job {', '.join(before)}" if before else ""
            name = f" ({job.recipe.name})" if job.recipe.name != jobs[-1].recipe.name else ""
            print(f"{command:9} job {started[-1]}{name}{after}", flush=True)
        ids, before = [*ids, *started], started
    return ids


def _left_to_do(recipe: Recipe, grid: Grid) -> tuple[Recipe, list[_Job], Any]:
    """The recipe, with its epochs counted where that can be done; the jobs to submit, in their order; and the data as
    plans have it. Raises SoftCoTError for what is wrong with the recipe."""
    # They bring torch and DeepSpeed, which take seconds: after the recipe's own mistakes have been reported.
    from softcot_ds.experiment import Experiment, planned
    from softcot_ds.methods.base import method_class
    from softcot_ds.planning.lengths import data_of
    from softcot_ds.thoughts.reader import cached, open_cache
    from softcot_ds.training.resume import refuse_other_run

    experiment = planned(recipe)
    experiment.require_training()
    jobs = []
    pending = experiment.recipe != recipe  # own targets are yet to be made: nor is it known how many there will be
    if pending:
        jobs.append(_Job("targets", recipe))
    else:
        recipe = experiment.count_epochs()
        if experiment.splits.own is not None:
            print(f"targets   {recipe.task.targets}: {experiment.splits.own.words()}: no job")
    runs = grid.runs(recipe)
    for run in runs if not pending else ():
        of_run = experiment if run == recipe else Experiment(run)
        refuse_other_run(of_run, latest_checkpoint(run.run_dir))
    if recipe.thoughts.source == "cache" and method_class(recipe.method).needs_states:
        try:
            wanted = [pair for of in grid.counts(recipe) for pair in cached(of)]
            folders = {str(open_cache(of, inputs).folder): None for of, inputs in wanted}
            print(f"cache     complete in {' and '.join(folders)}: no job")
        except SoftCoTError:
            jobs.append(_Job("cache", recipe, grid.of_thoughts.axes))
    for run in runs:
        if run.training.steps is None or saved_step(run.run_dir) < run.training.steps:
            jobs.append(_Job("train", run))
        else:
            print(f"train     done to step {saved_step(run.run_dir)} in {run.run_dir}: no job")
    return recipe, [*jobs, _Job("evaluate", recipe, grid.axes)], data_of(experiment.splits)


def _warn_if_too_large(recipe: Recipe, data: Any, script: str, gpu: str | None) -> None:
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


def _script(job: _Job, options: Sequence[str], tasks_per_node: str | None) -> str:
    """The script of slurm/ for one job, with its options and its recipe in it."""
    command, recipe = job.command, job.recipe
    path = CHECKOUT / "slurm" / f"{command}.sbatch"
    if not path.is_file():
        raise SoftCoTError(f"no such script: {path}; install softcot-ds from a checkout, with pip install -e")
    own = [f"--job-name={recipe.name}-{command}", f"--output={recipe.run_dir}/logs/%x-%j.log"]
    if command == "cache" and tasks_per_node:
        own.append(f"--ntasks-per-node={tasks_per_node}")
    again = f"sbatch {recipe.run_dir}/slurm/{path.name}"
    made = f"# {command} of {recipe.name}, made by softcot-ds submit; to submit it again: {again}"
    text = with_options(path.read_text(), [*own, *options], made)
    arguments = shlex.join([str(recipe.run_dir / "recipe.yaml"), *job.axes])
    home = f"SOFTCOT_HOME={shlex.quote(str(CHECKOUT))}\nset -- {arguments}\n"
    if _HOME_LINE not in text:
        raise SoftCoTError(f"{path} has no line {_HOME_LINE.strip()!r}; take the script of the checkout again")
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


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="softcot-ds submit", description="Targets, cache, train and evaluate as a chain of SLURM jobs."
    )
    parser.add_argument("recipe", help="a YAML file; recipes/ holds some")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
    parser.add_argument("--nodes", required=True, help="4, or 3-4 where a restart may do with fewer after a dead node")
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
        "--dry-run", action="store_true", help="show the scripts and the resolved recipe, submit nothing"
    )
    args = parser.parse_intermixed_args(argv)
    named: Mapping[str, str | None] = {
        "--nodes": args.nodes,
        "--gpus-per-node": args.gpus_per_node,
        "--time": args.time,
    }
    options = [f"{name}={value}" for name, value in named.items() if value is not None]
    options += [option for text in args.sbatch for option in shlex.split(text)]

    def work() -> None:
        grid = Grid.of(args.overrides)
        if grid:
            grid.cells(args.recipe)  # what is wrong with one of them is said now
        recipe = load_recipe(args.recipe, list(grid.plain))
        submit(recipe, options, args.gpus_per_node, args.dry_run, args.gpu, grid)

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
