"""Targets in the base's own words against the data's, side by side. The last line is a JSON object.

    python benchmarks/own_targets.py RECIPE [KEY=VALUE ...] [--seeds 0 1 2] [--ranks 1] [--out FILE]

The base solves the training problems once (``targets``). Then for each seed, which decides initialization and data
order, one projection is trained on the data's solutions (``gold``) and one on these (``own``), and both are evaluated
on the same test problems under the recipe's conditions, of which ``learned`` and ``none`` are needed:

- ``accuracy``, with how many outputs of ``problems`` are ``unparsed`` and ``cut``
- ``loss`` of the data's solutions, nats per token
- ``own_loss``, that of the base's own: what it writes greedily without thoughts, where that is right
- ``own_minus_gold``: of ``learned``, with McNemar's exact test of the accuracies, for each seed

``none`` is the same for all, and decoded once. The commands go on where they were, so that this can be started again.
"""

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

from environment import describe, keep, write_result
from word_problems import ROOT, command

from softcot_ds.data.targets import OwnTargets
from softcot_ds.distributed import shut_down
from softcot_ds.evaluation.conditions import Conditions
from softcot_ds.evaluation.jobs import Worker
from softcot_ds.evaluation.losses import TextLosses
from softcot_ds.evaluation.run import evaluate
from softcot_ds.evaluation.statistics import compare
from softcot_ds.inference import Adapter
from softcot_ds.recipe import Recipe, load_recipe
from softcot_ds.run_dir import latest_checkpoint, recipe_and_adapter

KINDS = ("gold", "own")


class SideBySide:
    """The runs of one recipe, named after it."""

    def __init__(self, path: str, overrides: list[str], ranks: int) -> None:
        self.path, self.overrides, self.ranks = path, overrides, ranks
        self.recipe = load_recipe(path, overrides)
        self.targets = self.recipe.output_dir / f"{self.recipe.name}-targets" / "targets.jsonl"

    def run(self, module: str, name: str, *more: str) -> Recipe:
        """Run a command under the launcher; returns its recipe."""
        overrides = [*self.overrides, f"name={self.recipe.name}-{name}", *more]
        command(module, self.path, *overrides, ranks=self.ranks)
        return load_recipe(self.path, overrides)

    def solve(self) -> dict[str, Any]:
        """Have the base solve the training problems; returns how many it did."""
        self.run("targets", "targets", f"task.targets={self.targets}")
        own = OwnTargets.read(self.targets)
        solutions = sum(len(one.solutions) for one in own.problems)
        return {"problems": len(own.problems), "solved": own.solved, "solutions": solutions}

    def train(self, kind: str, seed: int) -> tuple[Recipe, Path]:
        """Returns what is to be evaluated, in a directory that all adapters share: what they have in common is decoded
        once."""
        targets = "gold" if kind == "gold" else self.targets
        trained = self.run("train", f"{kind}-{seed}", f"seed={seed}", f"task.targets={targets}")
        adapter = latest_checkpoint(trained.run_dir)
        return recipe_and_adapter(str(adapter), [f"name={self.recipe.name}-evaluation"])


def evaluated(recipe: Recipe, adapter: Path) -> tuple[dict[str, Any], dict[str, bool]]:
    """Accuracy and losses by condition; and of each problem whether ``learned`` solved it."""
    report = json.loads(json.dumps(evaluate(recipe, adapter)))
    written = recipe.run_dir.glob("evaluation/*/report.json")
    folder = next(path.parent for path in written if json.loads(path.read_text()) == report)
    records = {name: list(map(json.loads, (folder / f"{name}.jsonl").open())) for name in ("learned", "none")}
    own = own_losses(recipe, adapter, [row["output"] if row["correct"] else None for row in records["none"]])
    conditions = {
        name: {key: found[key] for key in ("accuracy", "unparsed", "cut")}
        | {"loss": found["loss"]["per_token"], "own_loss": own["loss"].get(name)}
        for name, found in report["conditions"].items()
    }
    found = {"problems": report["num_problems"], "own_solutions": own["solutions"], "conditions": conditions}
    return found, {row["id"]: row["correct"] for row in records["learned"]}


def own_losses(recipe: Recipe, adapter: Path, outputs: list[str | None]) -> dict[str, Any]:
    """Nats per token, by condition, of what the base wrote itself for the test problems; None where that was wrong."""
    opened = Adapter(recipe, adapter)
    examples, prompts = opened.experiment.splits.test, opened.experiment.base_prompts
    texts = [(index, prompts.target_ids(text.strip())) for index, text in enumerate(outputs) if text is not None]
    if not texts:
        return {"solutions": 0, "loss": {}}
    conditions = Conditions(opened, examples)
    posed = {name: conditions.of(name) for name in recipe.evaluation.conditions}
    losses = TextLosses(Worker(recipe, recipe.base, opened.config.base.fingerprint), posed, texts, "own solutions")
    if losses.need_states:
        conditions.read_states()
    tokens = sum(len(ids) for _, ids in texts)
    return {"solutions": len(texts), "loss": {name: sum(each) / tokens for name, each in losses.of_texts().items()}}


def summarize(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of ``learned``, by kind: mean, least and greatest over the seeds that both kinds have."""
    summary: dict[str, Any] = {}
    for kind, of_kind in runs.items():
        rows = [run["conditions"]["learned"] for seed, run in of_kind.items() if all(seed in runs[k] for k in runs)]
        for key in ("accuracy", "loss", "own_loss"):
            values = [row[key] for row in rows if row[key] is not None]
            if values:
                found = {"mean": statistics.mean(values), "min": min(values), "max": max(values)}
                summary.setdefault(key, {})[kind] = found
    return summary


def model_name(model: str) -> str:
    """Without the place where it lies."""
    return Path(model).name if Path(model).is_dir() else model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, default=1, help="of targets, cache and training")
    parser.add_argument("--out", type=Path, help="write the result, indented, to this file")
    args = parser.parse_intermixed_args()
    out = args.out and args.out.absolute()
    os.chdir(ROOT)
    work = SideBySide(args.recipe, args.overrides, args.ranks)
    result: dict[str, Any] = {
        "benchmark": "own_targets",
        **describe(),
        "base": model_name(work.recipe.base.model),
        "assistant": model_name(work.recipe.assistant.model),
        "task": work.recipe.task.name,
        "settings": work.recipe.targets.model_dump(mode="json"),
        "steps": work.recipe.training.steps,
        "global_batch_size": work.recipe.training.global_batch_size,
        "learning_rate": work.recipe.training.learning_rate,
        "targets": work.solve(),
        "runs": {kind: {} for kind in KINDS},
        "own_minus_gold": {},
    }
    keep(result, out)
    if work.recipe.thoughts.source == "cache":
        work.run("cache", "cache")
    for seed in args.seeds:
        solved = {}
        for kind in KINDS:
            result["runs"][kind][str(seed)], solved[kind] = evaluated(*work.train(kind, seed))
            keep(result, out)
        result["own_minus_gold"][str(seed)] = compare(solved["own"], solved["gold"])
        result["learned"] = summarize(result["runs"])
        keep(result, out)
    write_result(result, out)
    shut_down()


if __name__ == "__main__":
    main()
