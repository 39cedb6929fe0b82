"""What it brings that waiting prompts take the place of outputs that have ended. The last line is a JSON object.

    python benchmarks/refill.py [--model FOLDER] [--dtype D] [--times X] [--problems N] [--batch B] [--repeats N]
        [--out FILE]
    python benchmarks/refill.py --pair ADAPTER [--problems N] [--batch B] [--repeats N] [--out FILE]

The same problems, greedily decoded with thoughts in their prompts, in three ways, which take turns:

- ``batches``: batches of neighbours in length, each by ``generate`` until its longest output ends
- ``refilled``: ``decode`` of the package, in the portions that an evaluation has
- ``alone``: ``decode``, one problem at a time; a few of the problems, spread over all

Without ``--pair``, prompts and outputs have the lengths of GSM8K's problems and reference solutions, or ``--times`` as
long, as models write more than these: an output is cut there. The base has random weights, of the shape of Llama 3.1 8B
in bfloat16 where there is a GPU and a small one in float32 where there is none, or is the model in FOLDER. ``--pair``
decodes test problems of the embedded pair with an adapter of it; their outputs end by themselves.

- ``problems_per_second``: by the clock, and ``per_processor_second``: medians over the repeats
- ``times_batches``: refilled against batches, by processor time on a CPU, by the clock on a GPU
- ``busy``: tokens of outputs / rows of all passes, also of rows that have ended
- ``differ``: outputs that are not those of ``batches``
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from environment import describe, keep, write_result
from random_llamas import LLAMA_8B, SMALL_8B, default_device, make_llama
from train_step import NUM_THOUGHTS, read_examples
from transformers import AutoModelForCausalLM, PreTrainedModel

from softcot_ds.data.prompts import BasePrompt
from softcot_ds.evaluation.decoder import portions
from softcot_ds.evaluation.jobs import neighbours
from softcot_ds.models import decoding
from softcot_ds.models.decoding import Output, Sampling, Writing
from softcot_ds.models.reading import Reading
from softcot_ds.models.refill import decode_refilled
from softcot_ds.models.sampling import Chooser

NEVER: list[int] = []


class Work:
    """Problems, and the ways to decode them."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[BasePrompt],
        thoughts_BTD: torch.Tensor,
        limits: Sequence[int],
        stop_ids: list[int],
        batch: int,
    ) -> None:
        self.model, self.prompts, self.thoughts_BTD, self.limits = model, prompts, thoughts_BTD, limits
        self.stop_ids, self.batch = stop_ids, batch
        self.rows = 0
        model.get_output_embeddings().register_forward_hook(self._count)

    def _count(self, _module: object, inputs: tuple[torch.Tensor, ...], _output: object) -> None:
        self.rows += len(inputs[0])

    def batches(self) -> list[Output]:
        return self._decode(neighbours(self._lengths(), self.batch), False)

    def refilled(self) -> list[Output]:
        return self._decode(portions(self._lengths(), self.batch), True)

    def alone(self, indices: Sequence[int]) -> list[Output]:
        outputs = self._decode([[index] for index in indices], True)
        return [outputs[index] for index in indices]

    def _lengths(self) -> list[int]:
        return [len(prompt.prefix_ids) + len(prompt.suffix_ids) for prompt in self.prompts]

    def _decode(self, parts: Sequence[Sequence[int]], refilled: bool) -> list[Output]:
        writings = [Writing(index, limit) for index, limit in enumerate(self.limits)]
        choose = Chooser(Sampling(max(self.limits)), [])
        for part in parts:
            some = [writings[index] for index in part]
            if refilled:
                stops = set(self.stop_ids)
                decode_refilled(
                    self.model, some, self._reading, choose, stops, self.batch, lambda _: None, self._reading([0])
                )
                continue
            reading = self._reading(list(part))
            made = decoding._generate(self.model, reading, self.stop_ids, max(output.limit for output in some))
            for output, row in zip(some, made.sequences[:, reading.ids_BS.shape[1] :].tolist(), strict=True):
                for token in row:
                    output.add(token, set(self.stop_ids))
        return [Output(output.token_ids, output.cut) for output in writings]

    def _reading(self, indices: list[int]) -> Reading:
        return Reading.of([self.prompts[index] for index in indices], self.thoughts_BTD[indices])


def gsm8k(model: PreTrainedModel, problems: int, batch: int, times: float) -> Work:
    examples = read_examples(model.config.vocab_size)[:problems]
    torch.manual_seed(0)
    embed = model.get_input_embeddings()
    thoughts = torch.randn(problems, NUM_THOUGHTS, model.config.hidden_size, device=model.device)
    thoughts = thoughts * embed.weight.float().std()
    prompts = [BasePrompt(example.prefix_ids, example.suffix_ids) for example in examples]
    return Work(
        model, prompts, thoughts, [round(times * len(example.target_ids)) for example in examples], NEVER, batch
    )


def pair(adapter: Path, problems: int, batch: int) -> Work:
    from softcot_ds.inference import Adapter
    from softcot_ds.recipe import load_recipe

    recipe = load_recipe(Path(__file__).parents[1] / "recipes/word_problems.yaml", ["evaluation.partition=none"])
    opened = Adapter(recipe, adapter)
    texts = [example.problem.question for example in opened.experiment.splits.test[:problems]]
    prompts = [opened.question(text).prompt for text in texts]
    limits = [recipe.evaluation.max_new_tokens] * len(texts)
    return Work(opened.base, prompts, opened.thoughts(texts), limits, opened.experiment.base_prompts.stop_ids, batch)


def timed(work: Work, way: Callable[[], list[Output]]) -> tuple[list[Output], dict[str, float]]:
    work.rows, clock, processor = 0, time.perf_counter(), time.process_time()
    outputs = way()
    return outputs, {"seconds": time.perf_counter() - clock, "processor_seconds": time.process_time() - processor}


def measure(work: Work, repeats: int, result: dict[str, Any], out: Path | None) -> None:
    """Fills the result, row by row."""
    some = range(0, len(work.prompts), max(1, len(work.prompts) // 8))
    ways = {"batches": work.batches, "refilled": work.refilled, "alone": lambda: work.alone(some)}
    found: dict[str, list[Output]] = {}
    for repeat in range(repeats):
        for name, way in list(ways.items())[:: -1 if repeat % 2 else 1]:
            outputs, took = timed(work, way)
            row = result.setdefault(name, {"problems": len(outputs), "raw": []})
            row["raw"].append(took)
            tokens = sum(len(output.token_ids) + (not output.cut) for output in outputs)
            row["busy"] = tokens / work.rows
            for key, rate in (("seconds", "problems_per_second"), ("processor_seconds", "per_processor_second")):
                row[rate] = len(outputs) / statistics.median(each[key] for each in row["raw"])
            found[name] = outputs
            if len(found) == len(ways):
                result["refilled"]["differ"] = sum(map(Output.__ne__, found["refilled"], found["batches"]))
                result["alone"]["differ"] = sum(
                    each != found["batches"][index] for each, index in zip(found["alone"], some, strict=True)
                )
            if "batches" in found and "refilled" in found:
                rate = "problems_per_second" if work.model.device.type == "cuda" else "per_processor_second"
                result["times_batches"] = result["refilled"][rate] / result["batches"][rate]
            keep(result, out)
            print(name, row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--times", type=float, default=1.0, help="outputs of so many times GSM8K's lengths")
    parser.add_argument("--pair", type=Path, help="an adapter of the embedded pair")
    parser.add_argument("--problems", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the result, indented, to this file")
    args = parser.parse_args()
    device = default_device()
    if args.pair:
        work = pair(args.pair, args.problems, args.batch)
    elif args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
        work = gsm8k(model.eval().requires_grad_(False).to(device), args.problems, args.batch, args.times)
    else:
        base = make_llama(LLAMA_8B if device.type == "cuda" else SMALL_8B, device)
        work = gsm8k(base, args.problems, args.batch, args.times)
    result: dict[str, Any] = {
        "benchmark": "refill",
        **describe(),
        "threads": torch.get_num_threads(),
        "base": "embedded pair" if args.pair else args.model.name if args.model else "random weights",
        "parameters": sum(weight.numel() for weight in work.model.parameters()),
        "dtype": str(work.model.dtype).removeprefix("torch."),
        "batch": args.batch,
        "times": None if args.pair else args.times,
    }
    measure(work, args.repeats, result, args.out)
    write_result(result, args.out)


if __name__ == "__main__":
    main()
