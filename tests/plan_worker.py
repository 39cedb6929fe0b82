"""Run by test_plan.py on several ranks: what a training step really holds and moves."""

import gc
import json
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from softcot_ds.distributed import device, init_distributed, is_main, on_main, shut_down
from softcot_ds.methods.soft_thoughts import SoftCoT
from softcot_ds.methods.softcot import LinearProjection
from softcot_ds.models.backbone import load_frozen
from softcot_ds.models.partition import engine_config
from softcot_ds.planning.lengths import Lengths
from softcot_ds.recipe import load_recipe
from softcot_ds.training.engine import build_engine
from softcot_ds.values import resolve_location

SHAPES: dict[str, dict[str, int]] = {
    "wide": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_key_value_heads": 8},
    "deep": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 16, "num_key_value_heads": 2},
    "words": {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3, "num_key_value_heads": 4},
}
VOCABULARY = {"wide": 1000, "deep": 2000, "words": 20_000}
LENGTHS = Lengths(shared=0, prefix=24, suffix=4, target=40, assistant=32)


STATES, BATCH = 128, 8


def overrides(folder: Path, name: str, partition: str) -> list[str]:
    """What makes word_problems.yaml a recipe of one of the shapes."""
    stage = "zero3" if partition in ("zero3", "node") else "replicated"
    deepspeed = f"backbone.deepspeed={folder / stage}.json"
    return [f"base.model={folder / name}", f"backbone.partition={partition}", deepspeed]


class Held(TorchDispatchMode):
    """Bytes of the tensors that live, and of those that collective operations are given."""

    def __init__(self) -> None:
        super().__init__()
        self._alive = 0
        self._known: weakref.WeakSet = weakref.WeakSet()
        for thing in gc.get_objects():
            if isinstance(thing, torch.Tensor):
                self._see(thing)
        self.peak = self._alive
        self.moved = 0

    def _see(self, tensor: torch.Tensor) -> None:
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
        if storage not in self._known:
            self._known.add(storage)
            self._alive += storage.nbytes()
            weakref.finalize(storage, self._gone, storage.nbytes())

    def _gone(self, size: int) -> None:
        self._alive -= size

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = operation(*args, **(kwargs or {}))
        if operation.namespace in ("c10d", "_c10d_functional") and "wait" not in operation.name():
            parts = [leaf for leaf in (*args, found) if isinstance(leaf, torch.Tensor | list | tuple)]
            # Of what goes in and what comes out, the larger is the whole and the other a rank's part.
            self.moved += max(sum(t.nbytes for t in tree_leaves(p) if isinstance(t, torch.Tensor)) for p in parts)
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf)
        self.peak = max(self.peak, self._alive)
        return found


def make_base(folder: Path, name: str) -> None:
    torch.manual_seed(0)
    shape = {**SHAPES[name], "vocab_size": VOCABULARY[name], "num_attention_heads": 8}
    config = LlamaConfig(**shape, max_position_embeddings=256, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(folder / name)
    AutoTokenizer.from_pretrained(resolve_location("package:pair/base")).save_pretrained(folder / name)


def measure(recipe_path: str, folder: Path, name: str, partition: str) -> dict[str, int]:
    """Bytes that the third step holds at most and those that it moves."""
    on_main(lambda: make_base(folder, name))
    others = Held().peak
    recipe = load_recipe(recipe_path, overrides(folder, name, partition))
    base = load_frozen(recipe.base, partition, device(), engine_config(recipe))
    projection = LinearProjection(STATES, base.config.hidden_size).to(base.dtype)
    engine = build_engine(SoftCoT(base, projection), recipe)
    batch = LENGTHS.batch(BATCH, recipe.thoughts.count)
    batch.thoughts = torch.randn(BATCH, recipe.thoughts.count, STATES)
    for _ in range(2):  # then DeepSpeed knows what comes next
        engine.backward(engine(batch))
        engine.step()
    gc.collect()
    with Held() as held:
        engine.backward(engine(batch))
        engine.step()
    return {"held": held.peak - others, "moved": held.moved}


if __name__ == "__main__":
    recipe_path, folder, *jobs = (a for a in sys.argv[1:] if not a.startswith("--local_rank"))
    init_distributed(5)
    results = {job: measure(recipe_path, Path(folder), *job.split(":")) for job in jobs}
    if is_main():
        (Path(folder) / "results.json").write_text(json.dumps(results))
    shut_down()
