"""What it brings that waiting prompts take the place of outputs that have ended, and that what they have in common is
read once. The last line is a JSON object.

    python benchmarks/refill.py [--model FOLDER] [--dtype D] [--times X] [--problems N] [--samples K] [--batch B]
        [--repeats N] [--out FILE]
    python benchmarks/refill.py --pair ADAPTER [--problems N] [--samples K] [--batch B] [--repeats N] [--out FILE]

The same problems, greedily decoded with thoughts in their prompts, ``--samples`` times each, in three ways, which take
turns:

- ``batches``: batches of neighbours in length, each by ``generate`` until its longest output ends
- ``refilled``: ``decode`` of the package, in the portions that an evaluation has
- ``alone``: ``decode``, one problem at a time; a few of the problems, spread over all

Without ``--pair``, prompts and outputs have the lengths of GSM8K's problems and reference solutions, or ``--times`` as
long, as models write more than these: an output is cut there. The prompts begin alike for as many tokens as the real
ones. The base has random weights, of the shape of Llama 3.1 8B in bfloat16 where there is a GPU and a small one in
float32 where there is none, or is the model in FOLDER. ``--pair`` decodes test problems of the embedded pair with an
adapter of it; their outputs end by themselves.

- ``problems_per_second``: by the clock, and ``per_processor_second``: medians over the repeats
- ``times_batches``: refilled against batches, by processor time on a CPU, by the clock on a GPU
- ``busy``: tokens of outputs / rows of all passes, also of rows that have ended
- ``differ``: outputs that are not those of ``batches``
- ``ties``, where there are any: what a pass in float32 says where two outputs part, after the same tokens. ``gap``: by
  how much the logits of their two tokens differ; ``rounding``: by how much a pass in the base's own dtype misses
  float32's logits at most; ``near``: how many have a gap within twice that, which rounding can turn over;
  ``near_elsewhere``: the share of the places before whose two likeliest tokens are as close
"""

import argparse
import copy
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
from softcot_ds.models.reading import Prompts
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
        samples: int,
    ) -> None:
        self.model, self.prompts, self.thoughts_BTD, self.limits = model, prompts, thoughts_BTD, limits
        self.stop_ids, self.batch, self.samples = stop_ids, batch, samples
        self.rows = 0
        model.get_output_embeddings().register_forward_hook(self._count)

    def _count(self, _module: object, inputs: tuple[torch.Tensor, ...], _output: object) -> None:
        self.rows += len(inputs[0])

    def batches(self) -> list[Output]:
        """As when each sample was read for itself."""
        parts = neighbours(self._lengths(), self.batch)
        return [
            output
            for sample in zip(*(self._in_batches(parts) for _ in range(self.samples)), strict=True)
            for output in sample
        ]

    def refilled(self) -> list[Output]:
        return self._refilled(portions(self._lengths(), self.batch))

    def alone(self, indices: Sequence[int]) -> list[Output]:
        return self._refilled([[index] for index in indices])

    def _lengths(self) -> list[int]:
        return [len(prompt.prefix_ids) + len(prompt.suffix_ids) for prompt in self.prompts]

    def _in_batches(self, parts: Sequence[Sequence[int]]) -> list[Output]:
        writings = {index: Writing(index, index, self.limits[index]) for part in parts for index in part}
        for part in parts:
            reading = Prompts(self.prompts, self.thoughts_BTD).read(part)
            most = max(self.limits[index] for index in part)
            made = decoding._generate(self.model, reading, self.stop_ids, most)
            for index, row in zip(part, made.sequences[:, reading.ids_BS.shape[1] :].tolist(), strict=True):
                for token in row:
                    writings[index].add(token, set(self.stop_ids))
        return [Output(writings[index].token_ids, writings[index].cut) for index in sorted(writings)]

    def _refilled(self, parts: Sequence[Sequence[int]]) -> list[Output]:
        """As ``decode`` does it for each portion, but that every output has its own limit."""
        found: dict[int, list[Output]] = {}
        for part in parts:
            prompts = Prompts([self.prompts[index] for index in part], self.thoughts_BTD[list(part)])
            writings = [
                Writing(number * self.samples + sample, number, self.limits[index])
                for number, index in enumerate(part)
                for sample in range(self.samples)
            ]
            choose = Chooser(Sampling(max(self.limits)), [])
            decode_refilled(self.model, writings, prompts, choose, set(self.stop_ids), self.batch, lambda _: None)
            for number, index in enumerate(part):
                of_one = writings[number * self.samples : (number + 1) * self.samples]
                found[index] = [Output(writing.token_ids, writing.cut) for writing in of_one]
        return [output for index in sorted(found) for output in found[index]]


def gsm8k(model: PreTrainedModel, problems: int, batch: int, samples: int, times: float) -> Work:
    examples = read_examples(model.config.vocab_size)[:problems]
    torch.manual_seed(0)
    embed = model.get_input_embeddings()
    thoughts = torch.randn(problems, NUM_THOUGHTS, model.config.hidden_size, device=model.device)
    thoughts = thoughts * embed.weight.float().std()
    prompts = [BasePrompt(example.prefix_ids, example.suffix_ids) for example in examples]
    limits = [round(times * len(example.target_ids)) for example in examples]
    return Work(model, prompts, thoughts, limits, NEVER, batch, samples)


def pair(adapter: Path, problems: int, batch: int, samples: int) -> Work:
    from softcot_ds.inference import Adapter
    from softcot_ds.recipe import load_recipe

    recipe = load_recipe(Path(__file__).parents[1] / "recipes/word_problems.yaml", ["evaluation.partition=none"])
    opened = Adapter(recipe, adapter)
    texts = [example.problem.question for example in opened.experiment.splits.test[:problems]]
    prompts = [opened.question(text).prompt for text in texts]
    limits = [recipe.evaluation.max_new_tokens] * len(texts)
    return Work(
        opened.base, prompts, opened.thoughts(texts), limits, opened.experiment.base_prompts.stop_ids, batch, samples
    )


def timed(work: Work, way: Callable[[], list[Output]]) -> tuple[list[Output], dict[str, float]]:
    work.rows, clock, processor = 0, time.perf_counter(), time.process_time()
    outputs = way()
    return outputs, {"seconds": time.perf_counter() - clock, "processor_seconds": time.process_time() - processor}


@torch.no_grad()
def ties(work: Work, batches: Sequence[Output], refilled: Sequence[Output]) -> dict[str, Any]:
    """Whether outputs of two ways part where two tokens are as good as equally likely."""
    exact = copy.deepcopy(work.model).float()
    gaps, roundings, elsewhere = [], [], []
    for number, (one, other) in enumerate(zip(batches, refilled, strict=True)):
        if one == other:
            continue
        parted = [*map(int.__ne__, one.token_ids, other.token_ids)].index(True)
        before, two = one.token_ids[:parted], [one.token_ids[parted], other.token_ids[parted]]
        index = number // work.samples
        prompt, thoughts_TD = work.prompts[index], work.thoughts_BTD[index]
        ask = [*before, two[0]]  # the last is not read
        true_NV, own_NV = (decoding._logits_alone(m, prompt, thoughts_TD, ask) for m in (exact, work.model))
        gaps.append(float((true_NV[-1, two[0]] - true_NV[-1, two[1]]).abs()))
        roundings.append(float((own_NV[-1].float() - true_NV[-1]).abs().max()))
        likeliest_N2 = true_NV[:-1].topk(2).values
        elsewhere += (likeliest_N2[:, 0] - likeliest_N2[:, 1] <= 2 * roundings[-1]).tolist()
    return {
        "near": sum(gap <= 2 * rounding for gap, rounding in zip(gaps, roundings, strict=True)),
        "near_elsewhere": statistics.mean(elsewhere) if elsewhere else None,
        "gap": gaps,
        "rounding": roundings,
    }


def measure(work: Work, repeats: int, result: dict[str, Any], out: Path | None) -> None:
    """Fills the result, row by row."""
    some = range(0, len(work.prompts), max(1, len(work.prompts) // 8))
    ways = {"batches": work.batches, "refilled": work.refilled, "alone": lambda: work.alone(some)}
    found: dict[str, list[Output]] = {}
    for repeat in range(repeats):
        for name, way in list(ways.items())[:: -1 if repeat % 2 else 1]:
            outputs, took = timed(work, way)
            row = result.setdefault(name, {"problems": len(outputs) // work.samples, "raw": []})
            row["raw"].append(took)
            tokens = sum(len(output.token_ids) + (not output.cut) for output in outputs)
            row["busy"] = tokens / work.rows
            for key, rate in (("seconds", "problems_per_second"), ("processor_seconds", "per_processor_second")):
                row[rate] = row["problems"] / statistics.median(each[key] for each in row["raw"])
            found[name] = outputs
            if "batches" in found and "refilled" in found:
                rate = "problems_per_second" if work.model.device.type == "cuda" else "per_processor_second"
                result["times_batches"] = result["refilled"][rate] / result["batches"][rate]
            keep(result, out)
            print(name, row, flush=True)
    wanted = [index * work.samples + sample for index in some for sample in range(work.samples)]
    same = [found["batches"][number] for number in wanted]
    result["alone"]["differ"] = sum(map(Output.__ne__, found["alone"], same))
    result["refilled"]["differ"] = sum(map(Output.__ne__, found["refilled"], found["batches"]))
    if result["refilled"]["differ"]:
        result["refilled"]["ties"] = ties(work, found["batches"], found["refilled"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--times", type=float, default=1.0, help="outputs of so many times GSM8K's lengths")
    parser.add_argument("--pair", type=Path, help="an adapter of the embedded pair")
    parser.add_argument("--problems", type=int, default=256)
    parser.add_argument("--samples", type=int, default=1, help="outputs of each problem")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the result, indented, to this file")
    args = parser.parse_args()
    device = default_device()
    if args.pair:
        work = pair(args.pair, args.problems, args.batch, args.samples)
    elif args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
        model = model.eval().requires_grad_(False).to(device)
        work = gsm8k(model, args.problems, args.batch, args.samples, args.times)
    else:
        base = make_llama(LLAMA_8B if device.type == "cuda" else SMALL_8B, device)
        work = gsm8k(base, args.problems, args.batch, args.samples, args.times)
    result: dict[str, Any] = {
        "benchmark": "refill",
        **describe(),
        "threads": torch.get_num_threads(),
        "base": "embedded pair" if args.pair else args.model.name if args.model else "random weights",
        "parameters": sum(weight.numel() for weight in work.model.parameters()),
        "dtype": str(work.model.dtype).removeprefix("torch."),
        "batch": args.batch,
        "samples": args.samples,
        "times": None if args.pair else args.times,
    }
    measure(work, args.repeats, result, args.out)
    write_result(result, args.out)


if __name__ == "__main__":
    main()
