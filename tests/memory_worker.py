"""Run by test_backbone.py on several ranks: peak memory of loading a model and taking a training step; by test_gpu.py
alone, of a GPU."""

import json
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import torch
import triton

from softcot_ds.data.batches import Batch
from softcot_ds.distributed import device, init_distributed, rank, shut_down
from softcot_ds.methods.soft_thoughts import SoftThoughts
from softcot_ds.methods.softcot import LinearProjection
from softcot_ds.models.backbone import load_frozen
from softcot_ds.models.partition import engine_config
from softcot_ds.recipe import load_recipe
from softcot_ds.training.engine import build_engine
from softcot_ds.training.memory import expected_memory

recipe_path, output, *overrides = (a for a in sys.argv[1:] if not a.startswith("--local_rank"))
recipe = load_recipe(recipe_path, overrides)
init_distributed(5)


def private_bytes() -> int:
    """Memory of this process that is not backed by a file: mapped weight files do not count, copies of them do."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


peak = before = private_bytes()
done = False


def watch() -> None:
    global peak
    while not done:
        peak = max(peak, private_bytes())
        time.sleep(0.002)


watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
base = load_frozen(recipe.base, recipe.backbone.partition, device(), engine_config(recipe))
projection = LinearProjection(16, base.config.hidden_size)
engine = build_engine(SoftThoughts(base, projection, tokens=range(8)), recipe)
ids = torch.arange(8)[None]
mask = torch.ones(1, 8, dtype=torch.bool)
thoughts = torch.randn(1, 2, 16).to(base.dtype)
batch = Batch(ids, mask, ids, mask, torch.arange(2, 9), ids[0, :7], [], 18, thoughts=thoughts).to(device())
expected = expected_memory(engine)
on_gpu = device().type == "cuda"
peaks: dict[str, int] = {}


def note_peak(stage: str) -> None:
    """The most that the GPU has held since the last note."""
    if on_gpu:
        peaks[stage] = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()


note_peak("ready")
for step in range(3):  # from the second on, DeepSpeed knows what comes next and keeps or fetches it
    engine.backward(engine(batch))
    engine.step()
    note_peak("first_step" if step == 0 else "later_steps")
done = True
watcher.join()
fixed: dict[str, int] = {}
if on_gpu:
    # cuBLAS keeps room to work in for each thread, as much for a toy as for a real model: on an H200 twice 32 MiB.
    held = torch.cuda.memory_allocated()
    torch._C._cuda_clearCublasWorkspaces()
    fixed["workspaces"] = held - torch.cuda.memory_allocated()
    # Triton's tuner overwrites the GPU's cache between the runs that it times, in the first step: 256 MiB.
    fixed["tuner"] = triton.runtime.driver.active.get_empty_cache_for_benchmark().nbytes
    peak, before = max(peaks.values()), 0
measured = {"peak": peak - before, "peaks": peaks, "fixed": fixed, "expected": asdict(expected)}
Path(f"{output}.{rank()}").write_text(json.dumps(measured))
shut_down()
