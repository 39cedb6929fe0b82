"""Accuracy and loss of an adapter, with controls: ``softcot-ds evaluate RECIPE``, or ``... evaluate ADAPTER_DIR``.

Every condition (evaluation/conditions.py) is put to the base on the same problems with the same settings; what differs
is what stands for the thoughts. Each finished batch is written at once, so an interrupted evaluation goes on where it
was. In the run's directory:

    outputs/HASH/              what was decoded, or losses; the hash is of all that decides them, by content, not path
    evaluation/step-N-HASH/    an evaluation: its report, and every prompt, output, verdict and loss by condition
    report.json                the report of the fullest one (evaluation/report.py)
    grid.json                  the newest report of several evaluations in one command (cells.py, evaluation/grid.py)

``seeds=41..45`` trains and evaluates a run for each seed, and ``evaluation.thoughts=[1,2,4]`` evaluates each number of
thoughts. What is done is not done again.
"""

import contextlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from softcot_ds.cells import Cell, Grid
from softcot_ds.command import recipe_command
from softcot_ds.errors import Interrupted, SoftCoTError
from softcot_ds.launchers import environment_apart
from softcot_ds.recipe import Recipe
from softcot_ds.run_dir import checkpoint_step, names_another_task, recipe_and_adapter

_PATIENCE_S = 2.0
"""How long a training that has the signal to stop takes to end, where it has nothing to save yet."""


def _evaluate(source: str, overrides: list[str]) -> None:
    grid = Grid.of(overrides)
    if grid:
        _evaluate_cells(source, grid)
        return
    recipe, adapter = recipe_and_adapter(source, overrides)
    from softcot_ds.evaluation.run import evaluate  # brings torch and transformers, which take seconds

    evaluate(recipe, adapter)


def _evaluate_cells(source: str, grid: Grid) -> None:
    """Train what is to be trained, all of it; then evaluate every cell. All ranks work on one after the other."""
    whole, cells = grid.recipe(source), grid.cells(source)
    # Adapters of another task are evaluated as they are: how they were trained is not in these overrides.
    if grid.seeds and not names_another_task(source, grid.plain):
        for cell in grid.of_seeds.cells(source):
            _train_apart(source, cell)

    from softcot_ds.distributed import on_main, say
    from softcot_ds.evaluation.grid import Evaluated, grid_table, make_grid_report, write_grid_report
    from softcot_ds.evaluation.jobs import Loaded
    from softcot_ds.evaluation.run import evaluated

    loaded, found = Loaded(), []
    chosen = [recipe_and_adapter(source, list(cell.overrides)) for cell in cells]
    if grid.seeds:
        _refuse_other_steps(chosen)
    for recipe, adapter in chosen:
        one = evaluated(recipe, adapter, loaded)
        found.append(Evaluated(recipe.seed, str(recipe.run_dir), one.folder, one.report, one.scores))
    report = make_grid_report(found)
    path = on_main(lambda: write_grid_report(whole.run_dir, report))
    say(f"\n{grid_table(report)}\nresults: {path}")


def _refuse_other_steps(chosen: Sequence[tuple[Recipe, Path]]) -> None:
    """Raises SoftCoTError where the runs' newest checkpoints are of different steps: a mean of them is of none."""
    steps = {recipe.name: checkpoint_step(adapter) for recipe, adapter in chosen}
    if len(set(steps.values())) > 1:
        named = ", ".join(f"{name}: {step}" for name, step in steps.items())
        raise SoftCoTError(
            f"the newest checkpoints are of different steps ({named}), and are not reported as one. Train all to the "
            f"same with training.steps={max(steps.values())}, or remove what is beyond the others from checkpoints/"
        )


def _train_apart(source: str, cell: Cell) -> None:
    """Train a cell's run, in a process of its own: DeepSpeed holds on to the models of a training until its process
    ends. Under a launcher each rank starts one, and they meet as their parents would, which have not met yet; the
    next ones must not take what is left of them for each other.

    Raises:
        SystemExit: the training did not end well, and has said why.
    """
    command = [sys.executable, "-m", "softcot_ds.train", source, *cell.overrides]
    process = subprocess.Popen(command, env=environment_apart(cell.recipe.name))
    try:
        code = process.wait()
    except Interrupted as error:
        # Mostly the signal went to all processes. One that has it saves and ends; only one that has not is sent it.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE_S)
        if process.poll() is None:
            process.send_signal(error.signal_number)
        process.wait()
        raise
    if code:
        raise SystemExit(code if code > 0 else 128 - code)


main = recipe_command(
    "evaluate",
    "Accuracy and loss with controls, of a run's newest adapter or of an adapter directory; of several with "
    "seeds=41..45 or evaluation.thoughts=[1,2,4].",
    _evaluate,
    lambda source, overrides: (source, overrides),
)

if __name__ == "__main__":
    sys.exit(main())
