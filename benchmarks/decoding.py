"""How fast answers are decoded, with thoughts in the prompts. The last line of output is a JSON object.

    python benchmarks/decoding.py [--seconds N] [--out FILE]

``decode`` of the package, which evaluation, validation and generate share, against transformers' own ``generate`` on
prompts of as many tokens without thoughts. Prompts have GSM8K's lengths; a call decodes so many tokens for all of them.
With a GPU the base has the shape of Llama 3.1 8B in bfloat16, without one it is a tiny one, and nothing is claimed.

- ``tokens_per_second``: of all prompts together, the prompts' own reading included
- ``times_generate``: seconds of generate / of decode
- ``token_seconds``: what one more token of every prompt takes, from calls of two lengths
- ``weight_gbps``: bytes of the weights that a token reads / ``token_seconds``: layers and head, each once
- ``seconds_of_each``: raw, by tokens: the host's launches bound a small batch, and hosts differ by the minute
- ``peak_gib``: the most that the GPU held beyond the weights
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from environment import Budget, describe, keep, write_result
from random_llamas import LLAMA_8B, SMALL_8B, default_device, make_llama
from train_step import NUM_THOUGHTS, read_examples
from transformers import LlamaForCausalLM

from softcot_ds.data.prompts import BasePrompt
from softcot_ds.models.decoding import Sampling, decode, try_decoding

REPEATS = 3


def make_prompts(base: LlamaForCausalLM, count: int) -> list[BasePrompt]:
    examples = read_examples(base.config.vocab_size)[:count]
    return [BasePrompt(example.prefix_ids, example.suffix_ids) for example in examples]


def run_decode(base: LlamaForCausalLM, prompts: list[BasePrompt], tokens: int) -> None:
    """Decode with random thoughts; no text ends early, as the token that would end it hardly comes up."""
    thoughts = torch.randn(len(prompts), NUM_THOUGHTS, base.config.hidden_size, device=base.device)
    outputs = decode(base, prompts, thoughts, [base.config.vocab_size - 1], Sampling(tokens))
    if not any(len(output.token_ids) == tokens for output in outputs):
        raise RuntimeError(f"all of {len(outputs)} outputs ended before {tokens} tokens")


@torch.no_grad()
def run_generate(base: LlamaForCausalLM, prompts: list[BasePrompt], tokens: int) -> None:
    rows = [[*prompt.prefix_ids, *[5] * NUM_THOUGHTS, *prompt.suffix_ids] for prompt in prompts]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=base.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=base.device)
    stop = [base.config.vocab_size - 1]
    made = base.generate(
        ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, eos_token_id=stop, pad_token_id=0
    )
    made.tolist()  # what is decoded is wanted on the host


WAYS = {"decode": run_decode, "generate": run_generate}


def seconds_of(call: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(base: LlamaForCausalLM, batch: int, lengths: tuple[int, int], budget: Budget) -> dict[str, Any]:
    """One batch size: both ways take turns, and turns at being first."""
    prompts, device = make_prompts(base, batch), base.device
    seconds: dict[tuple[str, int], list[float]] = {}
    for run in WAYS.values():
        run(base, prompts, max(lengths))  # the first time, memory for each length of the cache is asked of the device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    for repeat in range(REPEATS):
        if repeat and budget.is_used_up():
            break
        for length in lengths:
            for name, run in list(WAYS.items())[:: -1 if repeat % 2 else 1]:
                took = seconds_of(lambda run=run, length=length: run(base, prompts, length), device)
                seconds.setdefault((name, length), []).append(took)
    short, long = lengths
    read = sum(p.nbytes for p in base.parameters()) - base.get_input_embeddings().weight.nbytes
    row: dict[str, Any] = {"batch": batch, "longest_prompt": max(map(prompt_length, prompts)), "new_tokens": long}
    for name in WAYS:
        whole, part = (statistics.median(seconds[name, length]) for length in (long, short))
        token = (whole - part) / (long - short)
        row[name] = {
            "seconds": whole,
            "tokens_per_second": batch * long / whole,
            "token_seconds": token,
            "weight_gbps": read / token / 1e9,
            "seconds_of_each": {str(length): seconds[name, length] for length in lengths},
        }
    row["times_generate"] = row["generate"]["seconds"] / row["decode"]["seconds"]
    if device.type == "cuda":
        row["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    return row


def prompt_length(prompt: BasePrompt) -> int:
    return len(prompt.prefix_ids) + NUM_THOUGHTS + len(prompt.suffix_ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="begin nothing more after so many")
    parser.add_argument("--out", type=Path, help="write the result, indented, to this file")
    args = parser.parse_args()
    device, budget = default_device(), Budget(args.seconds)
    on_gpu = device.type == "cuda"
    base = make_llama(LLAMA_8B if on_gpu else SMALL_8B, device)
    result: dict[str, Any] = {"benchmark": "decoding", **describe(), "batches": []}
    result["way"] = try_decoding(base)
    for batch in (32, 8, 128) if on_gpu else (2,):
        if budget.is_used_up():
            break
        result["batches"].append(measure(base, batch, (16, 64) if on_gpu else (2, 6), budget))
        keep(result, args.out)
        print(result["batches"][-1], flush=True)
    write_result(result, args.out)


if __name__ == "__main__":
    main()
