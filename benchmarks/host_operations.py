"""What one micro-batch makes the host issue, counted. The last line of output is a JSON object.

    python benchmarks/host_operations.py --out benchmarks/results/host_operations.json

The base is a random Llama of 32 narrow layers in bfloat16, with the proportions of 8B. Counted are PyTorch's operations
below autograd, views among them, and Triton's launches, in one forward and backward pass of the fast step: the number
of layers decides, not their width. It runs on a CPU, with Triton's kernels in its interpreter, and says nothing about
time.

- ``masks_in_each_layer``: masks of true and false, of which each layer's attention makes what it adds to its scores
- ``fast``: as the package has it, without liger-kernel in the layers
- ``liger``: with its norms, rotary embeddings and SwiGLUs
- ``..._checkpointed``: with activation checkpointing
- of each ``forward`` and ``backward``: ``operations`` and ``launches``
- ``kept``: what a forward pass with gradient keeps for each position and layer, bytes / (2 D): numbers of 16 bits in
  units of the width D, 512 here
"""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["DS_ACCELERATOR"] = "cpu"

import torch
from environment import describe, keep, write_result
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import LlamaConfig, LlamaForCausalLM
from triton.runtime.interpreter import InterpretedFunction

from softcot_ds.methods.soft_thoughts import SoftThoughts
from softcot_ds.methods.softcot import LinearProjection
from softcot_ds.models.fused_layers import fuse_layers

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import interpreter
from kept import Kept
from test_step import draw_examples, make_batch

LAYERS, WIDTH, ASSISTANT = 32, 64, 12
LENGTHS = [(2, 1, 2)]


class Counter(TorchDispatchMode):
    """Counts operations and launches within the context."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.launches = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None) -> Any:
        self.operations += 1
        return operation(*args, **(kwargs or {}))

    @contextmanager
    def counting(self) -> Iterator[None]:
        run = InterpretedFunction.run

        def launch(kernel: InterpretedFunction, *args: Any, **kwargs: Any) -> None:
            self.launches += 1
            with _disable_current_modes():  # the interpreter's own operations are no part of it
                run(kernel, *args, **kwargs)

        InterpretedFunction.run = launch
        try:
            with self:
                yield
        finally:
            InterpretedFunction.run = run

    def counts(self) -> dict[str, int]:
        return {"operations": self.operations, "launches": self.launches}


def make_base(width: int, layers: int, liger: bool) -> LlamaForCausalLM:
    """Frozen, with proportions of Llama 3.1 8B."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=width * 7 // 2, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=48,
    )  # fmt: skip
    base = LlamaForCausalLM(config).eval().requires_grad_(False)
    if liger:
        print(fuse_layers(base), flush=True)  # in float32: products in bfloat16 are garbage in Triton 3.9's interpreter
    return base.bfloat16()


def make_masks_in_each_layer(step: SoftThoughts) -> None:
    masks = step.prefixed._masks
    step.prefixed._masks = lambda *args: {window: mask == 0 for window, mask in masks(*args).items()}


def count(checkpointing: bool, liger: bool, masks_in_each_layer: bool) -> dict[str, dict[str, int]]:
    base = make_base(WIDTH, LAYERS, liger)
    projection = LinearProjection(ASSISTANT, WIDTH).bfloat16()
    examples = draw_examples(LENGTHS, thoughts=2, shared=1)
    step = SoftThoughts(base, projection, None, "fast", checkpointing, shared_ids=examples[0][0][:1])
    if masks_in_each_layer:
        make_masks_in_each_layer(step)
    batch = make_batch(examples, torch.bfloat16, num_shared=1)
    step(batch)  # what a run reads once is read
    forward, backward = Counter(), Counter()
    with forward.counting():
        loss = step(batch)
    with backward.counting():
        loss.backward()
    return {"forward": forward.counts(), "backward": backward.counts()}


def kept(liger: bool) -> float:
    """By a layer more."""
    width, positions, held = 512, 8, []
    for layers in (1, 2):
        base = make_base(width, layers, liger)
        embeds = torch.randn(1, positions, width, dtype=torch.bfloat16, requires_grad=True)
        with Kept() as seen:
            states = base.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        held.append(seen.bytes(base))
        del states
    return (held[1] - held[0]) / positions / (2 * width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the result, indented, to this file")
    args = parser.parse_args()
    interpreter.complete()
    result: dict[str, Any] = {"benchmark": "host_operations", **describe(), "layers": LAYERS}
    for checkpointing in (False, True):
        for name in ("masks_in_each_layer", "fast", "liger"):
            found = count(checkpointing, name == "liger", name == "masks_in_each_layer")
            result[name + "_checkpointed" * checkpointing] = found
            keep(result, args.out)
    result["kept"] = {"fast": kept(False), "liger": kept(True)}
    write_result(result, args.out)


if __name__ == "__main__":
    main()
