"""Run by test_agreement.py on two ranks: begin a training in which rank 1 sees something else, in several ways.

Argument: a folder. Into ``CASE.RANK`` there goes the checkpoint that the rank would go on from, or the error.
"""

import json
import shutil
import sys
import time
from functools import partial
from pathlib import Path

from adapters import make_checkpoint
from launch import ROOT

from softcot_ds import agreement
from softcot_ds.distributed import barrier, init_distributed, rank, shut_down
from softcot_ds.errors import SoftCoTError
from softcot_ds.experiment import Experiment
from softcot_ds.recipe import Recipe, load_recipe
from softcot_ds.run_dir import checkpoints
from softcot_ds.training import resume

folder = Path(sys.argv[1])
init_distributed(5)
second = rank() == 1
read_bytes = Path.read_bytes
resume.PATIENCE_S = 4


def write_data(name: str, numbers: range) -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i} + 1 ?", "answer": f"#### {i + 1}"}) + "\n" for i in numbers))
    return path


def recipe_of(case: str, *overrides: str) -> Recipe:
    files = [f"task.train={folder}/train.jsonl", f"task.test={folder}/test.jsonl"]
    sizes = ["task.train_problems=null", "task.test_problems=null", "task.validation_problems=1"]
    where = [f"output_dir={folder / case}", "task.name=gsm8k", *files, *sizes]
    return load_recipe(ROOT / "recipes/word_problems.yaml", [*where, *overrides])


def begin(case: str, *overrides: str, experiment: Experiment | None = None) -> None:
    barrier()
    try:
        experiment = experiment or Experiment(recipe_of(case, *overrides))
        with resume.sole_trainer(experiment.recipe):
            said = str(resume.agreed_start(experiment))
    except SoftCoTError as error:
        said = str(error)
    (folder / f"{case}.{rank()}").write_text(said)
    barrier()


def absent(path: Path, below: Path, until: float) -> bytes:
    """Path.read_bytes where what another node wrote below a folder shows late."""
    if below in path.parents and time.monotonic() < until:
        raise FileNotFoundError(2, "No such file or directory", str(path))
    return read_bytes(path)


if not second:
    write_data("train", range(8))
    write_data("test", range(90, 91))
    (folder / "start.safetensors").write_bytes(b"0")
    for case in ("older", "late", "never", "other"):
        make_checkpoint(recipe_of(case), 10)
        shutil.copytree(folder / case / "demo/checkpoints/step-10", folder / case / "demo/checkpoints/step-9")
barrier()
begin("same")
begin("recipe", *(["training.learning_rate=0.5", "seed=1"] if second else []))

agreement.code_digest.cache_clear()
if second:
    agreement.code_digest = lambda: "other"
begin("code")
agreement.code_digest = lambda: "same"

if second:
    resume.latest_checkpoint = lambda run_dir: checkpoints(run_dir)[0]
begin("older")
for case, seconds in (("late", 1.5), ("never", 60.0)):
    if second:
        Path.read_bytes = partial(absent, below=folder / case, until=time.monotonic() + seconds)
        Path.read_bytes = lambda path, read=Path.read_bytes: read(path)
    begin(case)
    Path.read_bytes = read_bytes
if second:
    Path.read_bytes = lambda path: read_bytes(path) + (b" " if path.name == "optimizer.safetensors" else b"")
begin("other")
Path.read_bytes = read_bytes

here = Experiment(recipe_of("data"))
if not second:
    here.splits  # noqa: B018  # read now
barrier()
if second:
    write_data("train", range(1, 9))
begin("data", experiment=here)
shut_down()
