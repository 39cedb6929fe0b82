"""Run by test_plan.py: what two ranks really hold and move in a training step, and hold in decoding.

Arguments: a folder, where results.json is left, and jobs as ``recipe_of`` reads them.
"""

import gc
import json
import re
import sys
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from launch import ROOT
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from softcot_ds.data.prompts import BasePrompt
from softcot_ds.distributed import device, init_distributed, is_main, on_main, shut_down
from softcot_ds.methods.soft_thoughts import SoftThoughts
from softcot_ds.methods.softcot import LinearProjection
from softcot_ds.models.backbone import load_frozen
from softcot_ds.models.decoding import Sampling, decode, try_decoding
from softcot_ds.models.partition import engine_config
from softcot_ds.planning.lengths import Lengths
from softcot_ds.recipe import Recipe, load_recipe
from softcot_ds.training import engine as engine_module

RANKS = 2
_LLAMA = {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 256}
SHAPES: dict[str, dict[str, Any]] = {
    "deep": {"model_type": "llama", "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512}
    | {"num_hidden_layers": 6, "tie_word_embeddings": True, **_LLAMA},
    "words": {"model_type": "qwen2", "vocab_size": 20_000, "hidden_size": 128, "intermediate_size": 320}
    | {"num_hidden_layers": 3, "tie_word_embeddings": False, **_LLAMA},
    "experts": {"model_type": "qwen3_moe", "vocab_size": 2000, "hidden_size": 128, "moe_intermediate_size": 192}
    | {"num_hidden_layers": 3, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 16}
    | {"tie_word_embeddings": False, **_LLAMA},
}
DTYPES = {"deep": "float32", "words": "float32", "experts": "bfloat16"}
LENGTHS = Lengths(shared=0, prefix=24, suffix=4, target=40, assistant=32)
STATES, BATCH = 128, 8
DECODED = ("deep:none:16",)
ROWS, NEW_TOKENS = 6, 20


def recipe_of(folder: Path, job: str) -> Recipe:
    """Of a job such as ``deep:none:8``: the shape, how its weights are held, in how many bits."""
    name, partition, bits = job.split(":")
    stage = "zero3" if partition in ("zero3", "node") else "replicated"
    base = [f"base.model={folder / name}", f"base.dtype={DTYPES[name]}"]
    backbone = [f"backbone.partition={partition}", f"backbone.bits={bits}", f"backbone.deepspeed={folder / stage}.json"]
    evaluation = [f"evaluation.batch_size={ROWS}", f"evaluation.max_new_tokens={NEW_TOKENS}"]
    return load_recipe(ROOT / "recipes" / "word_problems.yaml", [*base, *backbone, *evaluation])


class Held(TorchDispatchMode):
    """Bytes of the tensors that live, and of those that collective operations are given."""

    def __init__(self) -> None:
        super().__init__()
        self._alive = 0
        self._known: weakref.WeakSet = weakref.WeakSet()
        files = mapped_files()
        for thing in gc.get_objects():
            # DTensor keeps some without values, with which it tries its operations.
            if isinstance(thing, torch.Tensor) and not thing.is_meta and not isinstance(thing, FakeTensor):
                tensor = _local(thing)
                # On CPUs a slice of a weight is a window on its file: what it does not show is nowhere in memory.
                mapped = any(start <= tensor.data_ptr() < stop for start, stop in files)
                self._see(tensor, tensor.nbytes if mapped else tensor.untyped_storage().nbytes())
        self.at_start = self.peak = self._alive
        self.moved = 0

    def _see(self, tensor: torch.Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._known:
            self._known.add(storage)
            self._alive += size
            weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self._alive -= size

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = operation(*args, **(kwargs or {}))
        if operation.namespace in ("c10d", "_c10d_functional") and not re.search("wait|wrap", operation.name()):
            parts = [leaf for leaf in (*args, found) if isinstance(leaf, torch.Tensor | list | tuple)]
            # Of what goes in and what comes out, the larger is the whole and the other a rank's part.
            self.moved += max(sum(t.nbytes for t in tree_leaves(p) if isinstance(t, torch.Tensor)) for p in parts)
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
                self._see(_local(leaf), _local(leaf).untyped_storage().nbytes())
        self.peak = max(self.peak, self._alive)
        return found


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return getattr(tensor, "_local_tensor", tensor)


def mapped_files() -> list[tuple[int, int]]:
    """Addresses of the weight files that are mapped into memory."""
    lines = (line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(".safetensors"))
    return [tuple(int(address, 16) for address in line.split()[0].split("-")) for line in lines]


def make_files(folder: Path) -> None:
    for name, settings in SHAPES.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).save_pretrained(folder / name)
    for name in ("zero3", "replicated"):
        config = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
        # 200 MB of buffer would hide the rest; and what is large stays large in 8 bits.
        config["zero_optimization"] |= {"reduce_bucket_size": 100_000, "stage3_param_persistence_threshold": 2000}
        (folder / f"{name}.json").write_text(json.dumps(config))


def measure(folder: Path, job: str) -> dict[str, int]:
    """Bytes held between steps, held at most in the third one and moved in it, and held by decoding beside these."""
    gc.collect()
    others = Held().at_start
    recipe = recipe_of(folder, job)
    backbone = recipe.backbone
    base = load_frozen(recipe.base, backbone.partition, device(), engine_config(recipe), None, backbone.bits)
    projection = LinearProjection(STATES, base.config.hidden_size).to(base.dtype)
    with mock.patch.multiple(engine_module, check_model=mock.DEFAULT, why_not_fast=lambda *_: None):  # tried elsewhere
        engine = engine_module.build_engine(SoftThoughts(base, projection), recipe)
    batch = LENGTHS.batch(BATCH, recipe.thoughts.count)
    batch.thoughts = torch.randn(BATCH, recipe.thoughts.count, STATES).to(base.dtype)
    for _ in range(2):  # then DeepSpeed knows what comes next
        engine.backward(engine(batch))
        engine.step()
    gc.collect()
    with Held() as held:
        engine.backward(engine(batch))
        engine.step()
    found = {"between": held.at_start - others, "peak": held.peak - others, "moved": held.moved}
    if job not in DECODED:
        return found
    try_decoding(base)
    for name, count in (("decoding", ROWS), ("decoding more", 3 * ROWS)):
        # They begin differently: nothing is shared.
        prompts = [BasePrompt([number, *[1] * (LENGTHS.prefix - 1)], [2] * LENGTHS.suffix) for number in range(count)]
        thoughts = torch.randn(count, recipe.thoughts.count, base.config.hidden_size)
        gc.collect()
        with Held() as held:
            decode(base, prompts, thoughts, [], Sampling(NEW_TOKENS), batch_size=ROWS)
        found[name] = held.peak - held.at_start
    return found


def work(folder: Path, jobs: list[str]) -> None:
    init_distributed(5)
    on_main(lambda: make_files(folder))
    results = {job: measure(folder, job) for job in jobs}
    if is_main():
        (folder / "results.json").write_text(json.dumps(results))
    shut_down()


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2:])
