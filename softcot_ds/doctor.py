"""``softcot-ds doctor``: is this environment fit for training? Asked before node hours are spent.

Run it alone, or on all ranks of a job with the launcher that will start the training.
"""

import sys

from softcot_ds.command import recipe_command
from softcot_ds.recipe import Recipe


def _doctor(recipe: Recipe | None) -> None:
    from softcot_ds.diagnosis.examine import doctor  # brings torch and transformers, which take seconds

    doctor(recipe)


main = recipe_command("doctor", "Is this environment fit for training?", _doctor, needs_recipe=False)

if __name__ == "__main__":
    sys.exit(main())
