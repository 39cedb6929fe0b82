"""Evaluations by the embedded pair on few problems, and what they leave."""

import json
import shutil
from pathlib import Path

import pytest
from adapters import make_adapter
from launch import ONLINE, ROOT
from scribe import Scribe, replace_decoding

from softcot_ds.evaluation.run import evaluate
from softcot_ds.models.backbone import load_tokenizer
from softcot_ds.recipe import Recipe, load_recipe
from softcot_ds.values import resolve_location

RECIPE = ROOT / "recipes" / "word_problems.yaml"
SMALL = ["task.train_problems=8", "task.validation_problems=4", "task.test_problems=24", *ONLINE]
DECODE = ["evaluation.batch_size=5", "evaluation.max_new_tokens=12", "evaluation.text_max_tokens=6"]
EVERY = ["learned", "shuffled", "mean", "zero", "placeholder", "none", "text", "static"]
SEARCH = ["evaluation.partition=none", "evaluation.temperature=0.7", "evaluation.batch_size=1", "task.test_problems=3"]
SEARCH += ["evaluation.draft=2", "evaluation.conditions=[learned]"]
SEARCH += ["evaluation.graph.judge_tokens=4", "evaluation.tree.judge_tokens=4"]
WITHOUT_STATIC = "evaluation.conditions=[learned,shuffled,mean,zero,placeholder,none,text]"


def make_recipe(folder: Path, *overrides: str) -> Recipe:
    """24 made-up test problems."""
    return load_recipe(RECIPE, [f"output_dir={folder}", *SMALL, *DECODE, *overrides])


def records(recipe: Recipe, condition: str) -> list[dict]:
    """What the recipe's only evaluation under a condition has of each problem."""
    (path,) = recipe.run_dir.glob(f"evaluation/*/{condition}.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def recipe_in(folder: Path, *overrides: str) -> Recipe:
    """Every condition. Every path leads into ``folder``: in a copy of it, all of them are others."""
    settings = [
        f"output_dir={folder}",
        "task.name=gsm8k",
        f"task.train={folder}/train.jsonl",
        f"task.test={folder}/test.jsonl",
        "task.train_problems=null",
        "task.test_problems=null",
        "task.validation_problems=0",
        f"base.model={folder}/base",
        f"assistant.model={folder}/assistant",
        *ONLINE,
        f"evaluation.conditions=[{','.join(EVERY)}]",
        f"evaluation.static_adapter={folder}/static",
    ]
    return load_recipe(RECIPE, [*settings, *DECODE, *overrides])


def evaluate_first(folder: Path) -> None:
    """Put into ``folder`` all that ``recipe_in`` names, and an evaluation of it that the scribe writes."""
    for name in ("base", "assistant"):
        shutil.copytree(resolve_location(f"package:pair/{name}"), folder / name)
    write_questions(folder / "test.jsonl")
    (folder / "train.jsonl").write_text((folder / "test.jsonl").read_text().replace("has", "had"))
    make_adapter(folder / "static", recipe_in(folder, "method=prompt_tuning"))
    make_adapter(folder / "adapter", recipe_in(folder))
    with pytest.MonkeyPatch.context() as patch:
        replace_decoding(patch, Scribe(load_tokenizer(recipe_in(folder).base)))
        evaluate(recipe_in(folder), folder / "adapter")


def write_questions(path: Path, answer: int = 1, first: str = "tom") -> None:
    """Seven of them, as GSM8K has them."""
    names = [first, "ann", "leo", "eva", "max", "mia", "ben"]
    lines = [{"question": f"{n} has {i} coins .", "answer": f"so\n#### {i + answer}"} for i, n in enumerate(names, 3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def edit(path: Path, old: str, new: str) -> None:
    """One place in a file that is there."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
