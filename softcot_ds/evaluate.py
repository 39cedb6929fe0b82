"""Accuracy and loss of an adapter, with controls: ``softcot-ds evaluate RECIPE``, or ``... evaluate ADAPTER_DIR``.

Every condition (evaluation/conditions.py) is put to the base on the same problems with the same settings; what differs
is what stands for the thoughts. Each finished batch is written at once, so an interrupted evaluation goes on where it
was. In the run's directory:

    outputs/HASH/              what was decoded, or losses; the hash is of all that decides them, by content, not path
    evaluation/step-N-HASH/    an evaluation: its report, and every prompt, output, verdict and loss by condition
    report.json                the report of the fullest one (evaluation/report.py)
"""

import sys
from pathlib import Path

from softcot_ds.command import recipe_command
from softcot_ds.recipe import Recipe
from softcot_ds.run_dir import recipe_and_adapter


def _evaluate(recipe: Recipe, adapter: Path) -> None:
    from softcot_ds.evaluation.run import evaluate  # brings torch and transformers, which take seconds

    evaluate(recipe, adapter)


main = recipe_command(
    "evaluate",
    "Accuracy and loss with controls, of a run's newest adapter or of an adapter directory.",
    _evaluate,
    recipe_and_adapter,
)

if __name__ == "__main__":
    sys.exit(main())
