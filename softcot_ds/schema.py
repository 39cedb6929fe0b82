"""``softcot-ds schema``: the JSON schema of a recipe, by which editors complete its keys, explain them, and underline
what is wrong. What only a recipe as a whole can show, such as a setting that does not fit another, the commands say.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from softcot_ds.command import parsed, run_command
from softcot_ds.recipe import Recipe


def recipe_schema() -> dict[str, Any]:
    """JSON Schema, draft 2020-12: it takes every recipe that commands take."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="softcot-ds schema", description="The JSON schema of a recipe, for editors.")
    parsed(parser, argv)
    return run_command(lambda: print(json.dumps(recipe_schema(), indent=2)))


if __name__ == "__main__":
    sys.exit(main())
