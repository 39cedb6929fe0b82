"""What a training step does for the K chains of a question, counted and timed. The last line of output is JSON.

    python benchmarks/chains.py --out benchmarks/results/chains.json

The base is a random Llama of SmolLM2 135M's shape with 6 of its layers, in float32 on one thread of a CPU. A question
has 54 tokens that all begin with, 100 others before its thoughts, 32 thoughts, 10 tokens and a target of 150 behind
them: about what GSM8K has. One question in a micro-batch, forward and backward pass.

- ``whole rows``: one pass with gradient over all of each chain, as the paper's own code runs them
- ``prefix of each``: the fast step on each chain as a row of its own
- ``prefix of all``: as the package has it
- ``seconds`` of processor time, the median of several; ``tflop`` of the products, as PyTorch counts them; and
  ``prefix_positions``, those before the thoughts that go through the layers
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from environment import describe, keep, write_result
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from softcot_ds.data.batches import collate
from softcot_ds.data.examples import Example
from softcot_ds.data.prompts import AssistantInput
from softcot_ds.methods.softcot import LinearProjection, SoftCoT
from softcot_ds.methods.softcot_pp import SoftCoTPlusPlus
from softcot_ds.tasks import Problem

SHARED, PREFIX, THOUGHTS, SUFFIX, TARGET = 54, 100, 32, 10, 150
WIDTH, ASSISTANT, VOCABULARY = 576, 576, 49152
CHAINS = (3, 10)
REPEATS = 2
POSITIONS = {
    "whole rows": lambda chains: chains * (SHARED + PREFIX),
    "prefix of each": lambda chains: chains * PREFIX,
    "prefix of all": lambda chains: PREFIX,
}


def make_base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=VOCABULARY,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def make_step(way: str, base: LlamaForCausalLM, chains: int) -> SoftCoT:
    kind = "full" if way == "whole rows" else "fast"
    shared = range(SHARED) if kind == "fast" else ()
    projection = LinearProjection(ASSISTANT, WIDTH)
    if way == "prefix of all":
        return SoftCoTPlusPlus(base, projection, step=kind, shared_ids=shared, chains=chains, contrastive=0)
    return SoftCoT(base, projection, step=kind, shared_ids=shared)


def run(way: str, step: SoftCoT, chains: int) -> None:
    slots = list(range(THOUGHTS))
    prefix = list(range(SHARED + PREFIX))
    suffix, target = list(range(SUFFIX)), list(range(TARGET))
    example = Example(Problem("", "", ""), AssistantInput("", slots, slots), prefix, suffix, target)
    rows = 1 if way == "prefix of all" else chains
    batch = collate([example] * rows, 0, step.num_shared, step.number)
    states = torch.randn(1, chains, THOUGHTS, ASSISTANT, generator=torch.Generator().manual_seed(1))
    batch.thoughts = states if way == "prefix of all" else states[0]
    step(batch).sum().backward()


def measure(way: str, chains: int) -> dict[str, Any]:
    base = make_base()
    step = make_step(way, base, chains)
    run(way, step, chains)  # what a run reads once is read
    seconds = []
    for _ in range(REPEATS):
        start = time.process_time()
        run(way, step, chains)
        seconds.append(time.process_time() - start)
    with FlopCounterMode(display=False) as counter:
        run(way, step, chains)
    return {
        "way": way,
        "chains": chains,
        "seconds": round(statistics.median(seconds), 3),
        "tflop": round(counter.get_total_flops() / 1e12, 4),
        "prefix_positions": POSITIONS[way](chains),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the result, indented, to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"benchmark": "chains", **describe(), "results": []}
    for chains in CHAINS:
        for way in POSITIONS:
            result["results"].append(measure(way, chains))
            keep(result, args.out)
    write_result(result, args.out)


if __name__ == "__main__":
    main()
