"""The command line: ``softcot-ds COMMAND ...``."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from softcot_ds import __version__
from softcot_ds.command import complete, run_command
from softcot_ds.recipe import load_recipe
from softcot_ds.shipped import found
from softcot_ds.values import is_hub_name

COMMANDS = {
    "targets": "let the base solve the training problems itself, to be trained on",
    "cache": "compute the assistant's hidden states into the cache",
    "train": "train the projection",
    "evaluate": "measure accuracy, with controls",
    "study": "methods, tasks, strategies and seeds side by side",
    "generate": "answer a question",
    "lm-eval": "evaluate an adapter with lm-evaluation-harness",
    "push": "send an adapter to the Hugging Face hub",
    "plan": "what each way to hold the weights needs, before a GPU is there",
    "doctor": "check whether this environment is fit for training",
    "submit": "targets, cache, train and evaluate as a chain of SLURM jobs",
    "recipes": "list the recipes and studies that come with softcot-ds",
    "init": "copy a recipe, or another file that comes with it, to change it",
    "schema": "the JSON schema of a recipe, for editors",
}
_NO_RECIPE = ("study", "recipes", "init", "schema")
"""Commands whose first argument is none."""
_ON_HUB = ("evaluate", "generate", "lm-eval", "push", "doctor")
"""Those whose first argument may be an adapter of the hub."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``softcot-ds``."""
    parser = argparse.ArgumentParser(
        prog="softcot-ds",
        description="Distributed training of SoftCoT with DeepSpeed.",
        epilog="commands:\n" + "\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"softcot-ds {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="command", help="one of the commands below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="see softcot-ds COMMAND --help")
    if command := _command_to_complete():
        return _module(command).main([])
    complete(parser)
    args = parser.parse_args(argv)
    first = args.arguments[0] if args.arguments else "-"
    is_none = args.command in _NO_RECIPE or (args.command in _ON_HUB and is_hub_name(first.partition("@")[0]))
    if not is_none and not first.startswith("-") and not os.path.exists(found(Path(first))):
        return run_command(lambda: load_recipe(first))  # which says so, without the wait for what comes next
    # Only the chosen command is imported: it brings torch and deepspeed, which take seconds.
    return _module(args.command).main(args.arguments)


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"softcot_ds.{command.replace('-', '_')}")


def _command_to_complete() -> str | None:
    """The command whose arguments a shell wants completed: its own parser knows them. See argcomplete."""
    if "_ARGCOMPLETE" not in os.environ:
        return None
    _, *words = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])].split(" ")
    if len(words) < 2 or words[0] not in COMMANDS:
        return None
    os.environ["_ARGCOMPLETE"] = "2"  # the first two words are the program, as of: python script.py
    return words[0]


if __name__ == "__main__":
    sys.exit(main())
