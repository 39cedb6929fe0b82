"""Accuracy and loss of an adapter, with controls: ``softcot-ds evaluate RECIPE``, or ``... evaluate ADAPTER_DIR``.

Every condition (evaluation/conditions.py) is put to the base on the same problems with the same settings; what differs
is what stands for the thoughts. Each finished batch is written at once, so an interrupted evaluation goes on where it
was. In the run's directory:

    outputs/HASH/              what was decoded, or losses; the hash is of all that decides them, by content, not path
    evaluation/step-N-HASH/    an evaluation: its report, and every prompt, output, verdict and loss by condition
    report.json, report.html   the report of the fullest one, as numbers (evaluation/report.py) and as a page to look at
    grid.json, grid.html       the newest report of several evaluations in one command (cells.py, evaluation/grid.py)

``seeds=41..45`` trains and evaluates a run for each seed, and ``evaluation.thoughts=[1,2,4]`` evaluates each number of
thoughts. What is done is not done again.
"""

import sys

from softcot_ds.apart import run_apart
from softcot_ds.cells import Grid
from softcot_ds.command import recipe_command
from softcot_ds.run_dir import names_another_task, recipe_and_adapter, refuse_other_steps


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
            run_apart("train", cell)

    from softcot_ds.distributed import on_main, say
    from softcot_ds.evaluation.grid import evaluate_all, grid_table, make_grid_report, write_grid_report

    chosen = [recipe_and_adapter(source, list(cell.overrides)) for cell in cells]
    if grid.seeds:
        refuse_other_steps(chosen)
    report = make_grid_report(evaluate_all(chosen))
    path = on_main(lambda: write_grid_report(whole.run_dir, report))
    say(f"\n{grid_table(report)}\nresults: {path}")


main = recipe_command(
    "evaluate",
    "Accuracy and loss with controls, of a run's newest adapter or of an adapter directory; of several with "
    "seeds=41..45 or evaluation.thoughts=[1,2,4].",
    _evaluate,
    lambda source, overrides: (source, overrides),
)

if __name__ == "__main__":
    sys.exit(main())
