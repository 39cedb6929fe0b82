"""Targets in the base's own words: ``softcot-ds targets RECIPE``; on many ranks with the deepspeed launcher.

The base solves the training problems itself; what is graded right goes into the file that task.targets names, for
training in the place of the data's own solutions. What is decoded is kept in the run's directory as an evaluation's is:
the same command goes on where it was interrupted.
"""

import sys

from softcot_ds.command import recipe_command
from softcot_ds.recipe import Recipe


def _make(recipe: Recipe) -> None:
    from softcot_ds.evaluation.targets import make_targets  # brings torch and transformers, which take seconds

    make_targets(recipe)


main = recipe_command("targets", "Let the base solve the training problems itself, to be trained on.", _make)

if __name__ == "__main__":
    sys.exit(main())
