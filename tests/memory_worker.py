"""Run by test_backbone.py on several ranks: peak memory of loading a model and taking a training step; by test_gpu.py
alone, of a GPU."""

import json
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import torch

from softcot_ds.data.batches import Batch
from softcot_ds.distributed import device, init_distributed, rank, shut_down
from softcot_ds.methods.soft_thoughts import SoftCoT
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
engine = build_engine(SoftCoT(base, projection, tokens=range(8)), recipe)
ids = torch.arange(8)[None]
mask = torch.ones(1, 8, dtype=torch.bool)
thoughts = torch.randn(1, 2, 16).to(base.dtype)
batch = Batch(ids, mask, ids, mask, torch.arange(2, 9), ids[0, :7], [], 18, thoughts=thoughts).to(device())
expected = expected_memory(engine)
for _ in range(3):  # from the second on, DeepSpeed knows what comes next and keeps or fetches it
    engine.backward(engine(batch))
    engine.step()
done = True
watcher.join()
if device().type == "cuda":
    peak, before = torch.cuda.max_memory_allocated(), 0
Path(f"{output}.{rank()}").write_text(json.dumps({"peak": peak - before, "expected": asdict(expected)}))
shut_down()
