"""Run by test_resume.py: train straight and in two halves, in each of several configurations, in one process.

Arguments: folder, recipe, one string of overrides per configuration; the configuration's number names its folder.

    N/straight/demo     steps 1 to 6 without interruption, on the ranks of the first launch
    N/RANKS/demo        steps 4 to 6, resumed on that many ranks from the checkpoint of step 3, and one is kept
    N/RANKS/restored    that checkpoint, loaded on that many ranks and saved again before the first step
"""

import shutil
import sys
from pathlib import Path

from softcot_ds.adapter import AdapterConfig
from softcot_ds.distributed import barrier, init_distributed, is_main, shut_down, world_size
from softcot_ds.experiment import Experiment
from softcot_ds.recipe import load_recipe
from softcot_ds.training.checkpoint import load_checkpoint, save_checkpoint
from softcot_ds.training.engine import build_engine, build_model
from softcot_ds.training.loop import train
from softcot_ds.training.start import Start

folder, recipe, *configurations = sys.argv[1:]
init_distributed(5)
for number, overrides in enumerate(configurations):

    def variant(output_dir: Path, *more: str, overrides: str = overrides):
        return load_recipe(recipe, [*overrides.split(), f"output_dir={output_dir}", *more])

    straight, resumed = (Path(folder, str(number), name) for name in ("straight", str(world_size())))
    if not straight.exists():
        barrier()
        train(variant(straight))
    saved = straight / "demo/checkpoints/step-3"
    if is_main():
        shutil.copytree(saved, resumed / "demo/checkpoints/step-3")
        shutil.copy(straight / "demo/losses.jsonl", resumed / "demo/losses.jsonl")
    barrier()

    again = variant(resumed, "name=restored")
    experiment = Experiment(again)
    model = build_model(again, experiment, Start.again(saved))
    engine = build_engine(model, again)
    load_checkpoint(engine, saved)
    save_checkpoint(engine, again, AdapterConfig.load(saved), experiment.task.prompt_file, {})
    engine.destroy()

    train(variant(resumed, "training.keep_checkpoints=1"))
shut_down()
