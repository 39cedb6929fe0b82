"""Run by test_recipes.py: cache and train several recipes in one process. Arguments: recipe, overrides, recipe ..."""

import sys

from softcot_ds.distributed import shut_down
from softcot_ds.recipe import load_recipe
from softcot_ds.thoughts.computing import build
from softcot_ds.training.loop import train

arguments = sys.argv[1:]
for recipe, overrides in zip(arguments[::2], arguments[1::2], strict=True):
    resolved = load_recipe(recipe, overrides.split())
    build(resolved)
    train(resolved)
shut_down()
