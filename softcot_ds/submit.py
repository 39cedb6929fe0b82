"""``softcot-ds submit RECIPE --nodes N``: own targets, cache, training and evaluation as a chain of SLURM jobs.

Everything that can be checked without a node is checked here, on the submitting terminal. What is done already is left
out: targets that are there, a complete cache, a finished training. The scripts are those of slurm/, with the site's
options in their headers (chain.py).
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from softcot_ds.cells import NO_GRID, Grid
from softcot_ds.chain import Job, Submission, caches_complete, submit_chain, training_left, warn_if_too_large
from softcot_ds.command import add_recipe, parsed, run_command
from softcot_ds.recipe import Recipe, load_recipe


def submit(recipe: Recipe, submission: Submission, grid: Grid = NO_GRID) -> None:
    """Check the recipe with its data, cache and run directory; then submit the jobs that are left to do.

    Args:
        grid: several seeds, each trained by a job of its own, or several numbers of thoughts, in one evaluation.

    Raises:
        SoftCoTError: anything is wrong with the recipe, or see ``submit_chain``.
    """
    recipe, jobs, data = _left_to_do(recipe, grid)
    warn_if_too_large(recipe, data, submission.scripts(jobs)[jobs[-1].script], submission.gpu)
    submit_chain(jobs, submission)


def _left_to_do(recipe: Recipe, grid: Grid) -> tuple[Recipe, list[Job], Any]:
    """The recipe, with its epochs counted where that can be done; the jobs to submit, in their order; and the data as
    plans have it. Raises SoftCoTError for what is wrong with the recipe."""
    # They bring torch and DeepSpeed, which take seconds: after the recipe's own mistakes have been reported.
    from softcot_ds.experiment import Experiment, planned
    from softcot_ds.methods.base import method_class
    from softcot_ds.planning.lengths import data_of

    experiment = planned(recipe)
    experiment.require_training()
    method = method_class(recipe.method)
    for one in grid.counts(recipe):
        method.check_evaluation(one)  # the last job of the chain
    jobs = []
    pending = experiment.recipe != recipe  # own targets are yet to be made: nor is it known how many there will be
    if pending:
        jobs.append(Job.of("targets", recipe))
    else:
        recipe = experiment.count_epochs()
        if experiment.splits.own is not None:
            print(f"targets   {recipe.task.targets}: {experiment.splits.own.words()}: no job")
    trainings = []
    for run in grid.runs(recipe):
        of_run = None if pending else experiment if run == recipe else Experiment(run)
        trainings.append(training_left(run, of_run))
    reads = recipe.thoughts.source == "cache" and method.needs_states
    if reads and not caches_complete(grid.counts(recipe)):
        jobs.append(Job.of("cache", recipe, grid.of_thoughts.axes))
    jobs += [job for job in trainings if job is not None]
    return recipe, [*jobs, Job.of("evaluate", recipe, grid.axes)], data_of(experiment.splits)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="softcot-ds submit", description="Targets, cache, train and evaluate as a chain of SLURM jobs."
    )
    add_recipe(parser, "a YAML file; softcot-ds recipes lists some")
    Submission.add_arguments(parser, required=True)
    args = parsed(parser, argv)

    def work() -> None:
        grid = Grid.of(args.overrides)
        if grid:
            grid.cells(args.recipe)  # what is wrong with one of them is said now
        recipe = load_recipe(args.recipe, list(grid.plain))
        submit(recipe, Submission.asked_for(args), grid)

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
