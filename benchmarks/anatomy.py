"""What makes the assistant's states differ by question: its layer, the placeholder tokens, the wording.

    python benchmarks/anatomy.py RECIPE [KEY=VALUE ...] [--questions N] [--out FILE]

No training. For the recipe's task the states at the placeholders are read from several layers, with the recipe's own
placeholder and wording, with other placeholders, and with other wordings; ``softcot_ds/thoughts/anatomy.py`` says what
is told of them. What ``--out`` holds already is kept, and not measured again. The last line is a JSON object.
"""

import argparse
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from environment import describe, keep, write_result
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from softcot_ds.data.chat import ChatFormat, Messages
from softcot_ds.data.prompts import AssistantInput, AssistantPrompts
from softcot_ds.distributed import init_distributed, shut_down
from softcot_ds.errors import SoftCoTError
from softcot_ds.experiment import Experiment
from softcot_ds.methods.trial import load_assistant
from softcot_ds.models.assistant import decoder_of, read_shared
from softcot_ds.models.backbone import cache_name
from softcot_ds.recipe import load_recipe
from softcot_ds.thoughts.anatomy import Anatomy

BATCH = 16
WORDINGS: dict[str, Messages] = {
    "question alone": [{"role": "user", "content": "{question}\n\n{thoughts}"}],
    "in the answer": [{"role": "user", "content": "{question}"}, {"role": "assistant", "content": "{thoughts}"}],
}
"""Beside the task's own."""


def placeholders(experiment: Experiment) -> Iterator[tuple[str, str | list[str] | None]]:
    """The recipe's own, and some that differ from slot to slot."""
    chat, count = experiment.assistant_prompts.chat, experiment.recipe.thoughts.count
    yield "the recipe's", experiment.recipe.thoughts.placeholder
    in_prompt = experiment.assistant_prompts.thoughts_input("", "").token_ids
    added = chat.tokenizer.added_tokens_decoder
    special = [token.content for number, token in sorted(added.items()) if number not in in_prompt]
    for name, texts in (("digits", [str(digit) for digit in range(1, 10)]), ("special tokens", special)):
        if len(texts := [text for text in texts if is_one_token(chat, text)]) >= min(count, 4):
            yield f"one of the {name}", texts[0]
            yield f"several {name}", texts[:count]


def is_one_token(chat: ChatFormat, text: str) -> bool:
    try:
        chat.one_token(text, "")
    except SoftCoTError:
        return False
    return True


@torch.no_grad()
def states_by_layer(model: PreTrainedModel, inputs: Sequence[AssistantInput]) -> torch.Tensor:
    """(L + 1, N, T, P): transformers' hidden states at the placeholders, of which the last is after the final norm."""
    parts, prefix = [], read_shared(model, inputs)
    for start in range(0, len(inputs), BATCH):
        some = inputs[start : start + BATCH]
        ids = pad_sequence([torch.tensor(item.token_ids[prefix.length :]) for item in some], batch_first=True)
        cache = prefix.expanded(len(some))
        settings = {} if cache is None else {cache_name(decoder_of(model).forward): cache}
        settings |= {"use_cache": cache is not None, "output_hidden_states": True}
        hidden = decoder_of(model)(input_ids=ids, **settings).hidden_states
        rows = torch.arange(len(some))[:, None], torch.tensor([item.positions for item in some]) - prefix.length
        parts.append(torch.stack([states[rows] for states in hidden]))
    return torch.cat(parts, dim=1)


def some_layers(count: int) -> list[int]:
    """Every sixth part of the way up, and the last two."""
    return sorted({1, *(round(count * sixth / 6) for sixth in range(1, 7)), count - 1, count} - {0})


def row(states_NTP: torch.Tensor) -> dict[str, float]:
    anatomy = Anatomy.of(states_NTP)
    found = {
        "constant_norm": anatomy.parts.constant_norm,
        "varying_norm": anatomy.parts.varying_norm,
        "ratio": anatomy.ratio,
        "question_share": anatomy.parts.question_share,
        "rank": anatomy.rank,
        "slot_rank": sum(anatomy.slot_ranks) / len(anatomy.slot_ranks),
        "largest_to_median": (anatomy.rms_P.max() / anatomy.rms_P.median()).item(),
    }
    return {name: round(value, 4) for name, value in found.items()}


def measure(
    experiment: Experiment, model: PreTrainedModel, questions: int, there: Collection[tuple[str, str]]
) -> Iterator[list[dict[str, Any]]]:
    """The rows of each pair of a wording and placeholders that is not ``there``."""
    own = experiment.assistant_prompts
    problems = [example.problem for example in experiment.splits.train[:questions]]
    chosen = dict(placeholders(experiment))
    grid = [("the task's", own.prompts, name, texts) for name, texts in chosen.items()]
    for wording, messages in WORDINGS.items():
        prompts = replace(own.prompts, assistant=messages)
        some = {name: texts for name, texts in chosen.items() if name in ("the recipe's", "one of the digits")}
        grid += [(wording, prompts, name, texts) for name, texts in some.items()]
    for wording, prompts, placeholder, texts in grid:
        if (wording, placeholder) in there:
            continue
        asked = AssistantPrompts(own.chat, prompts, own.count, texts)
        inputs = [asked.thoughts_input(problem.id, problem.question) for problem in problems]
        inputs.sort(key=lambda item: len(item.token_ids))  # little padding
        states = states_by_layer(model, inputs)
        of = {"wording": wording, "placeholder": placeholder}
        yield [{**of, "layer": layer, **row(states[layer])} for layer in some_layers(len(states) - 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--out", type=Path, help="write the result, indented, to this file")
    args = parser.parse_args()
    init_distributed(timeout_minutes=5)
    recipe = load_recipe(args.recipe, args.overrides)
    experiment = Experiment(recipe)
    key = f"{Path(recipe.assistant.model).name}, {recipe.task.name}"
    earlier = json.loads(args.out.read_text())["runs"] if args.out and args.out.exists() else {}
    run: dict[str, Any] = {"questions": args.questions, "thoughts": recipe.thoughts.count, "rows": []}
    if earlier.get(key, {}) | {"rows": []} == run:
        run = earlier[key]
    there = {(row["wording"], row["placeholder"]) for row in run["rows"]}
    result = {"benchmark": "anatomy", **describe(), "runs": {**earlier, key: run}}
    for rows in measure(experiment, load_assistant(recipe), args.questions, there):
        run["rows"] += rows
        for found in rows:
            print(f"{key}: {found}", flush=True)
        keep(result, args.out)
    write_result(result, args.out)
    shut_down()


if __name__ == "__main__":
    main()
