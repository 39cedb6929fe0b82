"""What the fast training step brings over the naive one, on GSM8K's lengths. The last line of output is a JSON object.

    python benchmarks/train_step.py --out benchmarks/results/train_step.json

``full`` is the package's naive step with the assistant in the loop, batches padded in arrival order: one pass with
gradient over everything, logits everywhere. ``fast`` is the package's default: thoughts from the cache, grouping by
length. A step here is forward and backward of one micro-batch of 16. The micro-batches of an epoch are ordered by their
padded length and cut into four equal parts; of each part the one closest to its mean is run. The variants take turns,
micro-batch by micro-batch; a variant's time is the sum over micro-batches of its medians.

- ``speedup``: seconds of full / of fast; ``speedup_processor_time``: the same in processor time, which other work on
  the machine disturbs less (without a GPU); ``speedup_arithmetic``: the same in floating-point operations, counted
- ``grad_rel_err``: of the projection's gradient over the micro-batches in arrival order, fast against full
- ``peak_memory_ratio``: fast / full, the most that a step holds beyond the weights, at the longest micro-batch run
- ``without``: for each ingredient, seconds of fast with this one switched off / seconds of fast
- ``prefix_cache_bound``: seconds of fast / of fast on examples without a question, more than a cache of each
  example's prefix could ever bring
- ``samples_per_second``, ``mfu`` (with a GPU, the latter where its peak is known): model FLOPs utilisation
- ``liger_layers`` (with a GPU and liger-kernel): fast with liger-kernel's norms, rotary embeddings and SwiGLUs, as
  training has it there by default; ``with_liger_layers``: its seconds / seconds of fast
- ``steps`` (with a GPU): each micro-batch's shape, seconds, operations and memory; ``sizes`` are micro-batches of 2 to
  32 examples of one length, with activation checkpointing and without

Without a GPU the models are random Llamas in float32 with the proportions of Llama 3.1 8B and 3.2 1B: layers, head and
assistant have the same shares of the arithmetic. With one, they have the very shapes, in bf16.

The lengths, in gsm8k_lengths.json, are numbers of tokens of a sample of GSM8K's training problems. They were made by

    python benchmarks/train_step.py --record-lengths TOKENIZER GSM8K_TRAIN_JSONL
"""

import argparse
import copy
import json
import math
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from environment import Budget, describe, keep, write_result
from random_llamas import LLAMA_1B, LLAMA_8B, SMALL_1B, SMALL_8B, default_device, make_llama
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, LlamaForCausalLM

from softcot_ds.data.batches import Batch, collate, global_batches, order_by_prefix, token_ids
from softcot_ds.data.examples import Example, make_example
from softcot_ds.data.prompts import AssistantInput, AssistantPrompts, BasePrompts, ChatFormat, PromptFile
from softcot_ds.methods.soft_thoughts import SoftThoughts
from softcot_ds.methods.softcot import LinearProjection
from softcot_ds.models.assistant import compute_thoughts
from softcot_ds.models.fused_layers import fuse_layers
from softcot_ds.models.loss import IGNORE, runs_liger
from softcot_ds.models.shared_prefix import common_prefix
from softcot_ds.planning.hardware import peak_flops
from softcot_ds.recipe import TaskConfig
from softcot_ds.tasks import Problem, make_task
from softcot_ds.training.metrics import peak_memory_gib

LENGTHS = Path(__file__).parent / "gsm8k_lengths.json"
NUM_THOUGHTS = 32
MICRO_BATCH = 16
GLOBAL_BATCH = 32
NUM_BATCHES = 4
LIGER = "liger_layers"
INGREDIENTS = (
    "prefix_without_gradient",
    "shared_instruction",
    "head_on_supervised_positions",
    "length_grouping",
    "no_assistant",
    "prefix_for_nothing",
)
PARTS = (attrgetter("prefix_ids"), attrgetter("suffix_ids"), attrgetter("target_ids"))
SIZES = (2, 4, 8, 16, 32)
"""Examples of a micro-batch, where steps of several sizes are looked at."""

Models = tuple[LlamaForCausalLM, LlamaForCausalLM]
"""The base and the assistant."""


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *rest: Any, **named: Any) -> int:
    """Operations of attention, from shapes (B, heads, S, width): a product for each pair with keys, and with values."""
    return 2 * math.prod(query[:3]) * key[2] * (query[3] + value[3])


def _attention_backward(_gradient: object, *shapes: Any, **named: Any) -> int:
    return 2 * _attention(*shapes)


def _operators(suffix: str) -> list[Any]:
    """PyTorch's attention, in all its implementations."""
    names = ("efficient_attention", "flash_attention", "cudnn_attention", "flash_attention_for_cpu")
    return [getattr(torch.ops.aten, f"_scaled_dot_product_{name}{suffix}") for name in names]


# PyTorch 2.11's own counter refuses fewer heads of keys than of queries, and counts what kernels of the backward pass
# compute a second time.
ATTENTION = dict.fromkeys(_operators(""), _attention) | dict.fromkeys(_operators("_backward"), _attention_backward)


def record_lengths(tokenizer_name: str, data: str, sample: int = 2048) -> None:
    """Write the numbers of tokens of ``sample`` training problems, with the package's own prompts."""
    task = make_task(TaskConfig(name="gsm8k", train=data, test=data))
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    prompts = PromptFile.load(task.prompt_file)
    chat = ChatFormat(tokenizer, {}, tokenizer_name)
    base, assistant = BasePrompts(chat, prompts), AssistantPrompts(chat, prompts, NUM_THOUGHTS, tokenizer.pad_token)
    problems = task.read("train")
    examples = [make_example(problem, task.target(problem), base, assistant) for problem in problems]
    chosen = random.Random(0).sample(examples, sample)
    lengths = {
        "data": f"GSM8K (openai/grade-school-math, MIT), {sample} of {len(problems)} training problems",
        "tokenizer": Path(tokenizer_name).name,
        "shared_prefix": len(common_prefix([example.prefix_ids for example in examples])),
        "prefix": [len(example.prefix_ids) for example in chosen],
        "suffix": [len(example.suffix_ids) for example in chosen],
        "target": [len(example.target_ids) for example in chosen],
        "assistant": [len(example.assistant.token_ids) for example in chosen],
    }
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in lengths.items())
    LENGTHS.write_text(f"{{\n{lines}\n}}\n")


def read_examples(vocabulary: int) -> list[Example]:
    """Examples of random tokens with the recorded lengths."""
    lengths = json.loads(LENGTHS.read_text())
    rng = random.Random(0)

    def ids(count: int) -> list[int]:
        return [rng.randrange(3, vocabulary) for _ in range(count)]

    shared = ids(lengths["shared_prefix"])
    examples = []
    columns = (lengths[name] for name in ("prefix", "suffix", "target", "assistant"))
    for number, (prefix, suffix, target, assistant) in enumerate(zip(*columns, strict=True)):
        slots = list(range(assistant - NUM_THOUGHTS, assistant))
        examples.append(
            Example(
                Problem(str(number), "", ""),
                AssistantInput(str(number), ids(assistant), slots),
                # A token that tells the examples apart follows what they share.
                [*shared, 3 + number % 8, *ids(prefix - len(shared) - 1)],
                ids(suffix),
                ids(target),
            )
        )
    return examples


def choose_batches(examples: list[Example]) -> tuple[list[list[Example]], list[list[Example]]]:
    """Micro-batches as the training loop groups them, and in arrival order."""
    epoch = islice(global_batches([e.length for e in examples], GLOBAL_BATCH, seed=0), len(examples) // GLOBAL_BATCH)
    grouped = [examples[index] for batch in epoch for index in order_by_prefix(batch, examples)]
    return tuple(
        representative([order[start : start + MICRO_BATCH] for start in range(0, len(order), MICRO_BATCH)])
        for order in (grouped, examples)
    )


def representative(batches: list[list[Example]]) -> list[list[Example]]:
    """Of all batches, ordered by length and cut into NUM_BATCHES equal parts, the one closest to each part's mean."""
    by_length = sorted(batches, key=padded_length)
    bounds = [len(batches) * part // NUM_BATCHES for part in range(NUM_BATCHES + 1)]
    chosen = []
    for start, stop in pairwise(bounds):
        mean = statistics.mean(map(padded_length, by_length[start:stop]))
        chosen.append(min(by_length[start:stop], key=lambda batch: abs(padded_length(batch) - mean)))
    return chosen


def padded_length(batch: list[Example]) -> int:
    """Positions of each example: prefix and rest are padded to the longest in the batch."""
    return max(len(e.prefix_ids) for e in batch) + max(e.length - len(e.prefix_ids) for e in batch)


def with_prefix_gradient(step: SoftThoughts) -> None:
    """Take the prefix for a part of the suffix: it runs with gradient."""
    loss = step.prefixed.loss

    def run(embeds, mask, positions, prefix_length, keep, *others):
        rows = embeds.shape[1] - prefix_length
        keep = keep + (keep // rows + 1) * prefix_length
        return loss(embeds, mask, positions, 0, keep, *others)

    step.prefixed.loss = run


def with_head_everywhere(step: SoftThoughts) -> None:
    """Run the head on every position of thoughts and suffix."""
    loss = step.prefixed.loss

    def run(embeds, mask, positions, prefix_length, keep, targets, *others):
        everywhere = torch.arange(len(embeds) * (embeds.shape[1] - prefix_length), device=embeds.device)
        targets = torch.full_like(everywhere, IGNORE).index_put((keep,), targets)
        return loss(embeds, mask, positions, prefix_length, everywhere, targets, *others)

    step.prefixed.loss = run


def with_liger_layers(step: SoftThoughts) -> None:
    """Have liger-kernel compute in the base's layers."""
    print(fuse_layers(step.base), flush=True)


class Variant:
    """A way to do the training step: a model, and the micro-batches for it."""

    def __init__(
        self,
        models: Models,
        batches: list[list[Example]],
        step: str = "fast",
        shared_ids: list[int] = (),
        online: bool = False,
        checkpointing: bool = False,
        change: Callable[[SoftThoughts], None] = lambda step: None,
    ) -> None:
        base, assistant = models
        torch.manual_seed(0)
        projection = LinearProjection(assistant.config.hidden_size, base.config.hidden_size)
        # Each variant hooks the layers of a base of its own, over the same weights.
        memo = {id(parameter): parameter for parameter in base.parameters()}
        base = copy.deepcopy(base, memo)
        tokens = token_ids([example for batch in batches for example in batch], 0)
        self.step = SoftThoughts(base, projection, assistant, step, checkpointing, shared_ids, tokens)
        self.step.projection.to(base.device, base.dtype)
        change(self.step)
        self.batches = [self._collate(batch, assistant, online).to(base.device) for batch in batches]

    def _collate(self, examples: list[Example], assistant: LlamaForCausalLM, online: bool) -> Batch:
        batch = collate(examples, 0, self.step.num_shared, self.step.number)
        if not online:
            batch.thoughts = compute_thoughts(assistant, batch.assistant)
        return batch

    def run(self, number: int) -> float:
        """Loss of one micro-batch, its gradient added to the projection's."""
        loss = self.step(self.batches[number])
        loss.backward()
        return loss.detach()

    def count(self) -> None:
        """Run each micro-batch once: ``gradient`` is their sum's in one vector, ``operations`` what was done in each,
        in floating-point operations."""
        self.step.projection.zero_grad()
        self.operations = []
        for number in range(len(self.batches)):
            with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
                self.run(number)
            self.operations.append(counter.get_total_flops())
        gradient = torch.cat([parameter.grad.flatten() for parameter in self.step.projection.parameters()])
        self.gradient = gradient.double()


@dataclass
class Runs:
    """How often a micro-batch was run, and what each time took."""

    seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)
    peak_gib: list[float] = field(default_factory=list)
    """The most that the GPU held beyond what lay there before the step."""


def make_models(device: torch.device) -> Models:
    shapes = (LLAMA_8B, LLAMA_1B) if device.type == "cuda" else (SMALL_8B, SMALL_1B)
    return tuple(make_llama(shape, device) for shape in shapes)


def make_variants(models: Models, names: Sequence[str]) -> dict[str, Variant]:
    """The variants of these names."""
    examples = read_examples(models[0].config.vocab_size)
    grouped, arrival = choose_batches(examples)
    ids = common_prefix([example.prefix_ids for example in examples])
    options = {
        "full": {"batches": arrival, "step": "full", "online": True},
        "fast": {"batches": grouped, "shared_ids": ids},
        "prefix_without_gradient": {"batches": grouped, "shared_ids": ids, "change": with_prefix_gradient},
        "shared_instruction": {"batches": grouped},
        "head_on_supervised_positions": {"batches": grouped, "shared_ids": ids, "change": with_head_everywhere},
        "length_grouping": {"batches": arrival, "shared_ids": ids},
        "no_assistant": {"batches": grouped, "shared_ids": ids, "online": True},
        LIGER: {"batches": grouped, "shared_ids": ids, "change": with_liger_layers},
        "prefix_for_nothing": {
            "batches": [[replace(example, prefix_ids=ids) for example in batch] for batch in grouped],
            "shared_ids": ids,
        },
    }
    return {name: Variant(models, **options[name]) for name in names}


def make_sizes(models: Models) -> dict[str, Variant]:
    """The fast step, with activation checkpointing and without, on micro-batches of SIZES that hardly need padding."""
    examples = read_examples(models[0].config.vocab_size)
    ids = common_prefix([example.prefix_ids for example in examples])
    middle = [statistics.median(len(part(e)) for e in examples) for part in PARTS]
    examples.sort(key=lambda e: max(abs(len(part(e)) - m) for part, m in zip(PARTS, middle, strict=True)))
    options = {"batches": [examples[:size] for size in SIZES], "shared_ids": ids}
    return {
        "sizes": Variant(models, **options),
        "sizes_checkpointed": Variant(models, **options, checkpointing=True),
    }


def now(device: torch.device) -> tuple[float, float]:
    """Seconds by the clock, and of this process on the processor."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def measure(
    variants: dict[str, Variant],
    device: torch.device,
    rounds: int,
    budget: Budget,
    runs: dict[tuple[str, int], Runs],
) -> Iterator[None]:
    """Run all micro-batches of all variants ``rounds`` times, in turns; less often, but once, if the budget says so.

    It stops after each round, so that what ``runs`` holds then can be kept.
    """
    on_gpu = device.type == "cuda"
    for repeat in range(rounds):
        if repeat and budget.is_used_up():
            return
        for number in range(max(len(variant.batches) for variant in variants.values())):
            order = [name for name, variant in variants.items() if number < len(variant.batches)]
            random.Random(f"{repeat}/{number}").shuffle(order)
            for name in order:
                took = runs.setdefault((name, number), Runs())
                if on_gpu:
                    torch.cuda.reset_peak_memory_stats()
                before = peak_memory_gib(device)
                began = now(device)
                variants[name].run(number)
                ended = now(device)
                took.seconds.append(ended[0] - began[0])
                took.processor_seconds.append(ended[1] - began[1])
                took.peak_gib.append(peak_memory_gib(device) - before)
        print(f"round {repeat + 1} of {rounds}: {', '.join(variants)}", flush=True)
        yield


def peak_memory(name: str) -> float:
    """GiB that one step of a variant holds beyond what was there before it, at its longest micro-batch, on a CPU.

    It must be a process's first step: the peak of a process never falls.
    """
    device = torch.device("cpu")
    variant = make_variants(make_models(device), (name,))[name]
    before = peak_memory_gib(device)
    variant.run(NUM_BATCHES - 1)
    return peak_memory_gib(device) - before


def positions(batches: list[list[Example]]) -> dict[str, float]:
    """Mean positions of an example: real ones, with the package's padding of both parts, with padding of the whole."""
    return {
        "real": statistics.mean(example.length for batch in batches for example in batch),
        "padded_in_two_parts": statistics.mean(map(padded_length, batches)),
        "padded_as_a_whole": statistics.mean(max(example.length for example in batch) for batch in batches),
    }


def summarize(variants: dict[str, Variant], runs: dict[tuple[str, int], Runs], peak: float | None) -> dict[str, Any]:
    """What the variants that have been run say; ``peak``: operations per second of the GPU, if that is known."""
    wall, processor = (
        {
            name: sum(statistics.median(getattr(runs[name, number], what)) for number in range(NUM_BATCHES))
            for name in variants
        }
        for what in ("seconds", "processor_seconds")
    )
    operations = {name: sum(variant.operations) for name, variant in variants.items()}
    fast, full = variants["fast"], variants["full"]
    on_gpu = fast.gradient.is_cuda
    leading = [name for name in ("fast", "full", LIGER) if name in variants]
    ingredients = [name for name in variants if name not in (*leading, "prefix_for_nothing")]
    examples = NUM_BATCHES * MICRO_BATCH
    summary: dict[str, Any] = {
        "speedup": wall["full"] / wall["fast"],
        "speedup_processor_time": None if on_gpu else processor["full"] / processor["fast"],
        "speedup_arithmetic": operations["full"] / operations["fast"],
        "without": {name: wall[name] / wall["fast"] for name in ingredients},
        "without_arithmetic": {name: operations[name] / operations["fast"] for name in ingredients},
        "seconds_per_example": {name: wall[name] / examples for name in wall},
    }
    if "length_grouping" in variants:  # fast without grouping sees the examples that full sees
        difference = variants["length_grouping"].gradient - full.gradient
        summary["grad_rel_err"] = (difference.norm() / full.gradient.norm()).item()
        summary["prefix_cache_bound"] = wall["fast"] / wall["prefix_for_nothing"]
    if LIGER in variants:
        summary["with_liger_layers"] = wall[LIGER] / wall["fast"]
    if on_gpu:
        peaks = {name: min(runs[name, NUM_BATCHES - 1].peak_gib) for name in leading}
        summary |= {
            "samples_per_second": {name: examples / wall[name] for name in leading},
            "peak_gib_beyond_weights": peaks,
            "peak_memory_ratio": peaks["fast"] / peaks["full"],
        }
    if peak:
        summary["mfu"] = {name: operations[name] / wall[name] / peak for name in leading}
    return summary


def steps(variants: dict[str, Variant], runs: dict[tuple[str, int], Runs]) -> list[dict[str, Any]]:
    """A row for each micro-batch of each variant: its shape, its time and operations, and what it held on the GPU."""
    rows = []
    for (name, number), took in runs.items():
        variant = variants[name]
        batch = variant.batches[number]
        prefix = batch.prefix_ids.shape[1]
        rest = len(batch.assistant[0].positions) + batch.suffix_ids.shape[1]
        rows.append(
            {
                "variant": name,
                "examples": len(batch.suffix_ids),
                "read_once": variant.step.num_shared,
                "prefix": prefix,
                "rest": rest,
                "whole": batch.longest,
                "supervised": len(batch.targets),
                "seconds": statistics.median(took.seconds),
                "operations_counted": variant.operations[number],
                "operations_by_formula": variant.step.operations(batch),
                "peak_gib": min(took.peak_gib),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often each micro-batch is run by each variant")
    parser.add_argument("--seconds", type=float, help="begin nothing more after so many")
    parser.add_argument("--out", type=Path, help="write the result, indented, to this file")
    parser.add_argument("--record-lengths", nargs=2, metavar=("TOKENIZER", "DATA"), help="see above")
    args = parser.parse_args()
    if args.record_lengths:
        record_lengths(*args.record_lengths)
        return

    device, budget = default_device(), Budget(args.seconds)
    on_gpu = device.type == "cuda"
    result: dict[str, Any] = {"benchmark": "train_step", **describe(), "threads": torch.get_num_threads()}
    grouped, arrival = choose_batches(read_examples(100))
    result["positions"] = {"arrival_order": positions(arrival), "grouped": positions(grouped)}
    if not on_gpu:
        # One after the other, each in a process of its own.
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            peaks = {name: pool.apply(peak_memory, (name,)) for name in ("fast", "full")}
        result |= {"peak_gib_beyond_weights": peaks, "peak_memory_ratio": peaks["fast"] / peaks["full"]}

    models = make_models(device)
    peak = peak_flops(str(result["gpu"]), "bfloat16")
    variants: dict[str, Variant] = {}
    runs: dict[tuple[str, int], Runs] = {}
    # On a processor, which other work disturbs, all take turns; on a GPU what matters most comes first.
    leading = ["fast", "full", *([LIGER] if runs_liger(device, models[0].dtype) else [])]
    for names in (leading, INGREDIENTS) if on_gpu else ([*leading, *INGREDIENTS],):
        if budget.is_used_up():
            break
        new = make_variants(models, names)
        for variant in new.values():
            variant.count()
        variants |= new
        for _ in measure(new, device, args.rounds, budget, runs):
            result |= summarize(variants, runs, peak)
            if on_gpu:
                result["steps"] = steps(variants, runs)
                keep(result, args.out)
    if on_gpu and not budget.is_used_up():
        sizes, size_runs = make_sizes(models), {}
        for variant in sizes.values():
            variant.count()
        of_variants = result["steps"]
        for _ in measure(sizes, device, args.rounds, budget, size_runs):
            result["steps"] = of_variants + steps(sizes, size_runs)
            keep(result, args.out)
    write_result(result, args.out)


if __name__ == "__main__":
    main()
