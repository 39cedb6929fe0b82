"""Answer questions with an adapter: ``softcot-ds generate ADAPTER_DIR --question "..."``."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from softcot_ds.backbone import load_frozen
from softcot_ds.checkpoint import AdapterConfig, load_adapter, recipe_and_adapter
from softcot_ds.cli import OVERRIDES_HELP, run_command
from softcot_ds.decoding import Sampling, decode, try_decoding
from softcot_ds.distributed import device
from softcot_ds.errors import SoftCoTError
from softcot_ds.experiment import Experiment
from softcot_ds.projection import StaticThoughts
from softcot_ds.recipe import Recipe
from softcot_ds.thoughts import compute_thoughts


def generate(recipe: Recipe, adapter: Path, questions: Iterable[str], with_thoughts: bool = True) -> None:
    """Print the base's answer to each question.

    Args:
        with_thoughts: False shows what the base says without them.

    Raises:
        SoftCoTError: the adapter is incomplete, damaged, or of other models.
    """
    AdapterConfig.load(adapter).check_models(recipe)
    experiment = Experiment(recipe)
    projection = load_adapter(adapter, experiment)
    base = load_frozen(recipe.base, "none", device())
    try_decoding(base)
    assistant = None if isinstance(projection, StaticThoughts) else load_frozen(recipe.assistant, "none", device())
    evaluation = recipe.evaluation
    sampling = Sampling(evaluation.max_new_tokens, evaluation.temperature, evaluation.top_p)
    prompts = experiment.base_prompts
    torch.manual_seed(recipe.seed)
    for question in questions:
        prompt, thoughts = prompts.without_thoughts(question), None
        if with_thoughts:
            prompt = prompts.with_thoughts(question)
            with torch.no_grad():
                if assistant is None:
                    thoughts = projection(1)
                else:
                    item = experiment.assistant_prompts.thoughts_input("question", question)
                    thoughts = projection(compute_thoughts(assistant, [item]).float())
        (output,) = decode(base, [prompt], thoughts, prompts.stop_ids, sampling)
        print(experiment.base_tokenizer.decode(output.token_ids), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="softcot-ds generate", description="Answer questions with an adapter.")
    parser.add_argument("adapter", help="an adapter directory, or the recipe of a trained run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
    parser.add_argument("--question", help="the question; without it, one per line is read from standard input")
    parser.add_argument("--no-thoughts", action="store_true", help="the base alone, for comparison")
    args = parser.parse_intermixed_args(argv)

    def run() -> None:
        questions = [args.question] if args.question is not None else (line.strip() for line in sys.stdin)
        if args.question is not None and not args.question.strip():
            raise SoftCoTError("--question is empty; write a question")
        recipe, adapter = recipe_and_adapter(args.adapter, args.overrides)
        generate(recipe, adapter, (question for question in questions if question), not args.no_thoughts)

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
