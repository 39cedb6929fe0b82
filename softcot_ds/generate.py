"""Answer questions with an adapter: ``softcot-ds generate ADAPTER_DIR --question "..."``."""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from transformers import PreTrainedModel

from softcot_ds.adapter import AdapterConfig, load_adapter
from softcot_ds.backbone import context_length, load_frozen
from softcot_ds.command import OVERRIDES_HELP, run_command
from softcot_ds.decoding import Sampling, decode, try_decoding
from softcot_ds.distributed import device
from softcot_ds.errors import SoftCoTError
from softcot_ds.experiment import Experiment
from softcot_ds.methods.base import Projection, projection_class
from softcot_ds.prompts import AssistantInput, BasePrompt
from softcot_ds.recipe import Recipe
from softcot_ds.run_dir import recipe_and_adapter
from softcot_ds.thoughts import compute_thoughts
from softcot_ds.trial import check_model


def generate(recipe: Recipe, adapter: Path, questions: Iterable[str], with_thoughts: bool = True) -> None:
    """Print the base's answer to each question; on standard error, whether it was cut.

    Args:
        with_thoughts: False shows what the base says without them.

    Raises:
        SoftCoTError: the adapter is incomplete, damaged, or of other models; a question is no text, or too long. What
            is wrong with the adapter or the first question is said before a model is loaded.
    """
    config = AdapterConfig.load(adapter)
    config.check_models(recipe, assistant=projection_class(config.projection).needs_states)
    experiment = Experiment(recipe)
    projection = load_adapter(adapter, experiment) if with_thoughts else None
    reads = projection is not None and projection.needs_states
    inputs = (_Input.of(question, experiment, projection is not None, reads) for question in questions)
    first = next(inputs, None)
    if first is None:
        raise SoftCoTError("no question on standard input; write one per line, or name it with --question")
    assistant = load_frozen(recipe.assistant, "none", device()) if reads else None
    if assistant is not None:
        check_model(assistant, "assistant", recipe.assistant.model)
    base = load_frozen(recipe.base, "none", device())
    try_decoding(base)
    limit = recipe.evaluation.max_new_tokens
    sampling = Sampling(limit, recipe.evaluation.temperature, recipe.evaluation.top_p)
    torch.manual_seed(recipe.seed)
    for item in chain([first], inputs):
        thoughts = _thoughts(projection, assistant, item)
        (output,) = decode(base, [item.prompt], thoughts, experiment.base_prompts.stop_ids, sampling)
        print(experiment.base_tokenizer.decode(output.token_ids), flush=True)
        if output.cut:
            print(f"(cut: evaluation.max_new_tokens={limit}, or the end of the context)", file=sys.stderr)


@torch.no_grad()
def _thoughts(projection: Projection | None, assistant: PreTrainedModel | None, item: "_Input") -> torch.Tensor | None:
    """(1, T, D), or None without a projection."""
    if projection is None:
        return None
    return projection(compute_thoughts(assistant, [item.assistant]).float() if projection.needs_states else None, 1)


@dataclass(frozen=True)
class _Input:
    """What the models read for one question."""

    prompt: BasePrompt
    assistant: AssistantInput | None

    @classmethod
    def of(cls, question: str, experiment: Experiment, with_thoughts: bool, with_assistant: bool) -> "_Input":
        """Raises SoftCoTError when the question is no text, or too long for a model."""
        check_question(question)
        prompts = experiment.base_prompts
        prompt = prompts.with_thoughts(question) if with_thoughts else prompts.without_thoughts(question)
        length = (
            len(prompt.prefix_ids) + len(prompt.suffix_ids) + (experiment.recipe.thoughts.count if with_thoughts else 0)
        )
        context = context_length(experiment.base_config)
        if length >= context:
            raise SoftCoTError(f"the question makes {length} tokens, which leaves no room in the base's {context}")
        asked = experiment.assistant_prompts.thoughts_input("question", question) if with_assistant else None
        context_of_assistant = context_length(experiment.assistant_config)
        if asked is not None and len(asked.token_ids) > context_of_assistant:
            raise SoftCoTError(
                f"the question makes {len(asked.token_ids)} tokens, more than the assistant's {context_of_assistant}"
            )
        return cls(prompt, asked)


def check_question(question: str) -> None:
    """Raises SoftCoTError when there is nothing to answer, or what is no text."""
    if not question.strip():
        raise SoftCoTError("the question is empty; write one")
    if "\0" in question:
        raise SoftCoTError(f"the question {question!r} holds a NUL character; write text")
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise SoftCoTError(f"the question {question!r} is not UTF-8 text: {error.reason}") from error


def _lines() -> Iterator[str]:
    try:
        yield from (line.strip() for line in sys.stdin if line.strip())
    except UnicodeDecodeError as error:
        raise SoftCoTError(f"standard input is not UTF-8 text: {error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="softcot-ds generate", description="Answer questions with an adapter.")
    parser.add_argument("adapter", help="an adapter directory, or the recipe of a trained run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
    parser.add_argument("--question", help="the question; without it, one per line is read from standard input")
    parser.add_argument("--no-thoughts", action="store_true", help="the base alone, for comparison")
    args = parser.parse_intermixed_args(argv)

    def run() -> None:
        if args.question is not None:
            check_question(args.question)  # before the recipe is read, which takes seconds
        recipe, adapter = recipe_and_adapter(args.adapter, args.overrides)
        questions = _lines() if args.question is None else [args.question]
        generate(recipe, adapter, questions, not args.no_thoughts)

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
