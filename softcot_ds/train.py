"""Train the projection: ``softcot-ds train RECIPE``; on many ranks ``deepspeed --module softcot_ds.train RECIPE``."""

import sys

from softcot_ds.command import recipe_command
from softcot_ds.recipe import Recipe


def _train(recipe: Recipe) -> None:
    from softcot_ds.training.loop import train  # brings torch and deepspeed, which take seconds

    train(recipe)


main = recipe_command("train", "Train the projection of a recipe.", _train)

if __name__ == "__main__":
    sys.exit(main())
