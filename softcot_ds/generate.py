"""Answer questions with an adapter: ``softcot-ds generate ADAPTER_DIR --question "..."``.

A base that no GPU holds answers on several: with ``--gpus 4``, or under the deepspeed launcher; where vLLM
serves it, ``--server http://localhost:8000`` asks there.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from softcot_ds.command import add_recipe, parsed, run_command
from softcot_ds.errors import SoftCoTError
from softcot_ds.launch import add_gpus, launch
from softcot_ds.recipe import Recipe
from softcot_ds.run_dir import recipe_and_adapter
from softcot_ds.tasks.base import check_question

_PATIENCE_MINUTES = 60.0 * 24 * 30
"""How long ranks wait for the next question."""


def generate(recipe: Recipe, adapter: Path, questions: Iterable[str], with_thoughts: bool = True) -> None:
    """Print the base's answer to each question; on standard error, whether it was cut.

    Args:
        questions: of several ranks those of rank 0 count, which prints the answers.
        with_thoughts: False shows what the base says without them.

    Raises:
        SoftCoTError: the adapter is incomplete, damaged, or of other models; a question is no text, or too long. What
            is wrong with the adapter or the first question is said before a model is loaded.
    """
    import torch  # takes seconds, and transformers too

    from softcot_ds.distributed import is_main, set_timeout
    from softcot_ds.inference import Adapter

    opened = Adapter(recipe, adapter)
    asked = (opened.question(question, with_thoughts) for question in _of_main(questions))
    first = next(asked, None)
    if first is None:
        raise SoftCoTError("no question on standard input; write one per line, or name it with --question")
    opened.load_models(with_thoughts)
    set_timeout(_PATIENCE_MINUTES)  # the others wait while rank 0 waits for somebody to write a question
    torch.manual_seed(recipe.seed)
    for question in chain([first], asked):
        (output,) = opened.outputs([question])
        if is_main():
            print(opened.experiment.base_tokenizer.decode(output.token_ids), flush=True)
            if output.cut:
                limit = recipe.evaluation.max_new_tokens
                print(f"(cut: evaluation.max_new_tokens={limit}, or the end of the context)", file=sys.stderr)


def _of_main(questions: Iterable[str]) -> Iterator[str]:
    """Each question as rank 0 has it: the ranks of a node share one standard input."""
    from softcot_ds.distributed import on_main

    remaining = iter(questions)
    while (question := on_main(lambda: next(remaining, None))) is not None:
        yield question


def _lines() -> Iterator[str]:
    try:
        yield from (line.strip() for line in sys.stdin if line.strip())
    except UnicodeDecodeError as error:
        raise SoftCoTError(f"standard input is not UTF-8 text: {error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="softcot-ds generate", description="Answer questions with an adapter.")
    add_recipe(parser, "an adapter: its directory, its run's, the run's recipe, or owner/name on the hub", "adapter")
    parser.add_argument("--question", help="the question; without it, one per line is read from standard input")
    parser.add_argument(
        "--server", metavar="URL", help="a vLLM server that has the base: evaluation.server of the recipe"
    )
    parser.add_argument("--no-thoughts", action="store_true", help="the base alone, for comparison")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    add_gpus(parser)
    args = parsed(parser, argv)
    # An evaluation of the recipe may decode nothing, and leave nothing to a server.
    served = [f"evaluation.server={args.server}", "evaluation.decode=true", "evaluation.read=text"]
    overrides = args.overrides + (served if args.server else [])

    def run() -> None:
        if args.gpus:
            options = [] if args.question is None else [f"--question={args.question}"]
            options += ["--no-thoughts"] if args.no_thoughts else []
            launch("generate", [args.adapter, *overrides, *options], args.gpus)
            return
        if args.question is not None:
            check_question(args.question)  # before the seconds that the rest takes
        recipe, adapter = recipe_and_adapter(args.adapter, overrides)
        questions = _lines() if args.question is None else [args.question]
        generate(recipe, adapter, questions, not args.no_thoughts)

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
