"""What a batch script asks before and after the ranks of a command work: may they begin, and is it to go on later?

    python -m softcot_ds.slurm begin COMMAND RECIPE [key=value ...]        prints the run's directory
    python -m softcot_ds.slurm end COMMAND CODE RECIPE [key=value ...]     CODE is what the ranks ended with

Exit codes: 0 go on, or all is done; 75 (``EX_TEMPFAIL``) put the job back into the queue; anything else ends the job.

A run comes back after a time limit's notice, a preemption, a dead node or rank; it stays away after a mistake of the
user's, after scancel, when two attempts end at the same step, and after ``training.max_restarts`` restarts.
"""

import argparse
import math
import os
import signal
import sys

from softcot_ds.cells import Grid
from softcot_ds.command import EXIT_MISTAKE, exit_code_of, run_command
from softcot_ds.errors import SoftCoTError
from softcot_ds.recipe import Recipe, load_recipe
from softcot_ds.run_dir import Journal, load_for_evaluation, saved_step, stuck_at
from softcot_ds.study_config import is_study, load_study

REQUEUE = 75


def begin(command: str, recipe: Recipe) -> None:
    """Refuse a restart that leads nowhere, and note that an attempt begins.

    Raises:
        SoftCoTError: too many restarts, or the last two attempts got no further.
    """
    restarts, limit = _restarts(), recipe.training.max_restarts
    if restarts > limit:
        raise SoftCoTError(
            f"{recipe.name}: restart {restarts} is one too many (training.max_restarts={limit}); submit it again to go "
            f"on from step {saved_step(recipe.run_dir)}"
        )
    if command == "train":
        journal, step = Journal(recipe.run_dir), saved_step(recipe.run_dir)
        stuck = stuck_at(journal.attempts(_job(), step))
        if stuck is not None:
            raise SoftCoTError(f"{recipe.name}: {_stuck_text(recipe, stuck)}")
        nodes = os.environ.get("SLURM_JOB_NODELIST", "")
        journal.add("begin", job=_job(), restart=restarts, nodes=nodes, step=step)


def end(command: str, code: int, recipe: Recipe, preempted: bool = False) -> tuple[int, str]:
    """What becomes of the job: the exit code of its batch script, and why.

    Args:
        code: what the ranks ended with. Launchers change codes (a rank's -9 becomes 247, the launcher's own death 0),
            so for training the journal and the checkpoints are asked too.
        preempted: SLURM takes the nodes away for another job.
    """
    time_is_up = code == exit_code_of(signal.SIGUSR1)
    cancelled = code in (exit_code_of(signal.SIGINT), exit_code_of(signal.SIGTERM))
    failures_come_back, stuck = False, None
    if command == "train":
        journal, saved = Journal(recipe.run_dir), saved_step(recipe.run_dir)
        journal.add("end", code=code, step=saved, preempted=preempted)
        if code == 0 and saved < _last_step(recipe):
            code = 1  # the launcher died
        attempts = journal.attempts(_job(), saved)
        stopped_by = attempts[-1].signal if attempts else ""
        time_is_up = time_is_up or stopped_by == "SIGUSR1"
        cancelled = cancelled or stopped_by in ("SIGTERM", "SIGINT")
        failures_come_back, stuck = True, stuck_at(attempts)

    if code == 0:
        return 0, "done"
    if code == EXIT_MISTAKE:
        return code, "it stays out of the queue: the message above says what to mend"
    if preempted:
        why = "another job takes its nodes"
    elif time_is_up:
        why = "its time is up"
    elif cancelled:
        return code, "it was cancelled, and stays out of the queue"
    elif failures_come_back:
        why = f"its ranks ended with {code}"
    else:
        return code, f"its ranks ended with {code}; what is finished is kept, submit it again to go on"
    if stuck is not None:
        return code, f"{why}; {_stuck_text(recipe, stuck)}"
    restart, limit = _restarts() + 1, recipe.training.max_restarts
    if restart > limit:
        return code, f"{why}; no more than training.max_restarts={limit} restarts: submit it again to go on"
    return REQUEUE, f"{why}; back into the queue for restart {restart} of {limit}"


def _last_step(recipe: Recipe) -> float:
    """The step at which training is done. Epochs are counted where the data is read: training writes the recipe with
    its steps into the run's directory."""
    written = recipe.run_dir / "recipe.yaml"
    if recipe.training.steps is None and written.is_file():
        recipe = load_recipe(written)
    return math.inf if recipe.training.steps is None else recipe.training.steps


def _stuck_text(recipe: Recipe, step: int) -> str:
    return (
        f"two attempts have ended at step {step} without a further checkpoint; {recipe.run_dir}/logs says why. When it "
        f"is mended, submit it again; where a job's time ends before training.save_every={recipe.training.save_every} "
        "steps are done, ask for more time or save more often"
    )


def _job() -> str:
    return os.environ.get("SLURM_JOB_ID", "")


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _load(source: str, overrides: list[str]) -> Recipe:
    """The recipe of a command, which may have been given an adapter directory or a study instead; of several
    evaluations, what they have in common."""
    if is_study(source):
        return load_study(source, overrides).as_recipe
    return load_for_evaluation(source, list(Grid.of(overrides).plain))


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m softcot_ds.slurm", description=__doc__.splitlines()[0])
    moments = parser.add_subparsers(dest="moment", required=True)
    for moment in ("begin", "end"):
        arguments = moments.add_parser(moment)
        arguments.add_argument("command", choices=("targets", "cache", "train", "evaluate", "study"))
        if moment == "end":
            arguments.add_argument("code", type=int)
            arguments.add_argument("--preempted", action="store_true")
        arguments.add_argument("recipe")
        arguments.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    verdict = 0

    def work() -> None:
        nonlocal verdict
        recipe = _load(args.recipe, args.overrides)
        if args.moment == "begin":
            begin(args.command, recipe)
            print(recipe.run_dir)
        else:
            verdict, why = end(args.command, args.code, recipe, args.preempted)
            print(f"softcot-ds {args.command}: {why}", flush=True)

    return run_command(work) or verdict


if __name__ == "__main__":
    sys.exit(main())
