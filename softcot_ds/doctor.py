"""``softcot-ds doctor``: is this environment fit for training? Asked before node hours are spent.

Run it alone, or on all ranks of a job with the launcher that will start the training.
"""

import sys

from softcot_ds.cells import Grid
from softcot_ds.command import recipe_command
from softcot_ds.recipe import Recipe
from softcot_ds.run_dir import load_for_evaluation
from softcot_ds.study_config import is_study, load_study


def _doctor(recipe: Recipe | None) -> None:
    from softcot_ds.diagnosis.examine import doctor  # brings torch and transformers, which take seconds

    doctor(recipe)


def _load(source: str, overrides: list[str]) -> tuple[Recipe]:
    """Of several evaluations, what they have in common, of a study its first cell, of an adapter its own recipe: a
    batch script asks with the arguments of its command."""
    if is_study(source):
        return (load_study(source, overrides).as_recipe,)
    return (load_for_evaluation(source, list(Grid.of(overrides).plain)),)


main = recipe_command("doctor", "Is this environment fit for training?", _doctor, _load, needs_recipe=False)

if __name__ == "__main__":
    sys.exit(main())
