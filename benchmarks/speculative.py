"""What drafts of the assistant bring: tokens of a pass of the base, the share that is accepted, and the speed. The last
line is a JSON object.

    python benchmarks/speculative.py [--pair ADAPTER] [--model FOLDER] [--problems N] [--drafts N ...] [--batches B ...]
        [--new-tokens N] [--repeats N] [--seconds S] [--out FILE]

The same problems, greedily decoded without drafts and with each number of them, which take turns, in batches of each
size. Kinds of work:

- ``learned``, ``none`` (``--pair``): test problems of the embedded pair, with an adapter's thoughts and without any;
  the assistant reads what the base does, without the thoughts, as the package has it
- ``learned, asked for a plan``: the same, but that it reads what it is asked for the condition text
- ``itself`` (``--model``): questions like GSM8K's, for which the model in FOLDER drafts for itself: all is accepted but
  for rounding, and nothing is gained, as a draft takes as long as a token of the base

- ``tokens_per_pass``: tokens of an output, its stop token counted, for each pass of the base over it; ``accepted``: the
  share of the drafts
- ``seconds``, ``processor_seconds``: the least of the repeats
- ``times_plain``: how often that fits into what it takes without drafts, by the clock on a GPU, by processor time on a
  CPU
- ``differ``: outputs that are not those without drafts
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from environment import Budget, describe, keep, write_result
from random_llamas import default_device
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from softcot_ds.data.prompts import BasePrompt
from softcot_ds.models.decoding import try_decoding
from softcot_ds.models.drafting import DraftRows
from softcot_ds.models.reading import Prompts
from softcot_ds.models.refill import decode_refilled
from softcot_ds.models.rows import Writing
from softcot_ds.models.sampling import Chooser, Sampling

QUESTIONS = (
    "Tom has {a} bags of {b} plums and eats {c} of them. How many plums are left?",
    "A train has {a} cars with {b} seats each, and {c} seats are taken. How many are free?",
    "Ann reads {a} pages a day for {b} days, and {c} pages are left. How many pages has the book?",
    "A baker sells {a} loaves for {b} euros each and pays {c} euros for flour. How much does he keep?",
)


Row = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """Problems, who answers and who drafts."""

    name: str
    base: PreTrainedModel
    assistant: PreTrainedModel
    prompts: Prompts
    stop_ids: list[int]
    new_tokens: int
    asked: Prompts
    """What the assistant reads."""

    def decode(self, draft: int, batch: int) -> list[Writing]:
        writings = [Writing(number, number, self.new_tokens) for number in range(len(self.prompts.prompts))]
        choose, rows = Chooser(Sampling(self.new_tokens), []), None
        if draft:
            rows = DraftRows(self.assistant, draft, self.asked, choose, self.base.config.vocab_size)
        stops = set(self.stop_ids)
        decode_refilled(self.base, writings, self.prompts, choose, stops, batch, lambda _: None, rows)
        return writings


def of_pair(adapter: Path, problems: int) -> Iterator[Work]:
    from softcot_ds.inference import Adapter
    from softcot_ds.models.drafting import Drafter
    from softcot_ds.recipe import load_recipe

    recipe = load_recipe(
        Path(__file__).parents[1] / "recipes/word_problems.yaml", ["evaluation.partition=none", "evaluation.draft=1"]
    )
    opened = Adapter(recipe, adapter)
    texts = [example.problem.question for example in opened.experiment.splits.test[:problems]]
    plans = [BasePrompt(opened.experiment.assistant_prompts.words_prompt(text), []) for text in texts]
    learned = Prompts([opened.question(text).prompt for text in texts], opened.thoughts(texts))
    none = Prompts([opened.question(text, with_thoughts=False).prompt for text in texts], None)
    assistant, stop_ids = Drafter(recipe).model, opened.experiment.base_prompts.stop_ids
    work = Work("learned", opened.base, assistant, learned, stop_ids, recipe.evaluation.max_new_tokens, learned)
    yield work
    yield replace(work, name="none", prompts=none, asked=none)
    yield replace(work, name="learned, asked for a plan", asked=Prompts(plans, None))


def of_itself(folder: Path, problems: int, new_tokens: int) -> Work:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    tokenizer, numbers = AutoTokenizer.from_pretrained(folder), range(2, 2 + problems)
    texts = [QUESTIONS[n % len(QUESTIONS)].format(a=n + 1, b=2 * n + 3, c=n % 7 + 1) for n in numbers]
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
        for text in texts
    ]
    prompts = Prompts([BasePrompt(tokenizer.encode(chat, add_special_tokens=False), []) for chat in chats], None)
    return Work("itself", model.to(default_device()), model, prompts, [tokenizer.eos_token_id], new_tokens, prompts)


def measure(work: Work, drafts: Sequence[int], batch: int, repeats: int, budget: Budget) -> Iterator[list[Row]]:
    """A row for no drafts and for each number of them, so far, whenever one is told more."""
    by = "seconds" if work.base.device.type == "cuda" else "processor_seconds"
    rows: dict[int, Row] = {}
    said: dict[int, list[list[int]]] = {}
    for model in (work.base, work.assistant):
        try_decoding(model)  # no part of what is timed
    for repeat in range(repeats):
        for draft in (0, *drafts)[:: -1 if repeat % 2 else 1]:
            if repeat and budget.is_used_up():
                return
            clock, processor = time.perf_counter(), time.process_time()
            writings = work.decode(draft, batch)
            took = {"seconds": time.perf_counter() - clock, "processor_seconds": time.process_time() - processor}
            said[draft] = [writing.token_ids.tolist() for writing in writings]
            row = rows.setdefault(draft, {"work": work.name, "batch": batch, "draft": draft, "repeats": 0})
            row["repeats"] += 1
            row |= {name: min(value, row.get(name, value)) for name, value in took.items()}
            row |= counted(writings)
            for each in rows.values():
                each["times_plain"] = rows[0][by] / each[by]
                each["differ"] = sum(map(list.__ne__, said[each["draft"]], said[0]))
            yield list(rows.values())


def counted(writings: Sequence[Writing]) -> Row:
    tokens = sum(len(writing.token_ids) + (not writing.cut) for writing in writings)
    drafted = sum(writing.drafted for writing in writings)
    return {
        "problems": len(writings),
        "tokens": tokens,
        "tokens_per_pass": tokens / sum(writing.passes for writing in writings),
        "accepted": sum(writing.accepted for writing in writings) / drafted if drafted else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", type=Path, help="an adapter of the embedded pair")
    parser.add_argument("--model", type=Path, help="drafts for itself")
    parser.add_argument("--problems", type=int, default=32)
    parser.add_argument("--drafts", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--new-tokens", type=int, default=64, help="of the model's outputs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, help="no repeat begins after so many")
    parser.add_argument("--out", type=Path, help="keep the result, indented, in this file")
    args = parser.parse_args()
    works = list(of_pair(args.pair, args.problems)) if args.pair else []
    if args.model:
        works.append(of_itself(args.model, args.problems, args.new_tokens))
    result: dict[str, Any] = {
        "benchmark": "speculative",
        **describe(),
        "threads": torch.get_num_threads(),
        "model": args.model and args.model.name,
        "dtype": "float32",
        "rows": [],
    }
    budget = Budget(args.seconds)
    for work, batch in product(works, args.batches):
        done, rows = result["rows"], []
        for rows in measure(work, args.drafts, batch, args.repeats, budget):
            result["rows"] = [*done, *rows]
            keep(result, args.out)
        for row in rows:
            print(row, flush=True)
    write_result(result, args.out)


if __name__ == "__main__":
    main()
