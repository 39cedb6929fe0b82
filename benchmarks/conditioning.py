"""Whether thoughts carry the question, by what the projection is trained on: plain, centred or whitened states.

    python benchmarks/conditioning.py RECIPE [key=value ...] --variants none "whiten training.learning_rate=1e-4|1e-3"
        static --seeds 0 1 2 --parallel 2 --out FILE

A variant is a ``projection.condition`` and, after it, settings of the recipe; ``static`` is a tuned prompt, the bar to
beat. Where it has several values of one setting, the first seed is trained with each, and the value with the least
validation loss is taken for all seeds. What is compared is the loss of the reference solutions, nats a token, in the
recipe's evaluation.conditions, a question's own thoughts and those of others among them, and with the tuned prompt of
the same seed; and with evaluation.decode=true accuracy. All intervals are of 95%. An ordinary run each: what is done is
not done again.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environment import describe, keep, write_result

STATIC = "static"
VALIDATED = {
    "loss": "loss/validation",
    "gap": "loss/validation_gap",
    "gap_margin": "loss/validation_gap_margin",
    "question_share": "thoughts/question_share",
    "constant_norm": "thoughts/constant_norm",
    "varying_norm": "thoughts/varying_norm",
}
"""What a training says of its last validation, by its tag in TensorBoard."""


@dataclass(frozen=True)
class Run:
    """One training."""

    variant: str
    seed: int
    settings: tuple[str, ...]
    """Overrides, but for what all runs have in common."""

    @classmethod
    def of(cls, variant: str, seed: int, choice: int = 0) -> "Run":
        """With the value of that index where a setting has several."""
        condition, *others = variant.split()
        first = [f"projection.condition={condition}"]
        if condition == STATIC:
            first = ["method=prompt_tuning", "projection.condition=none", "projection.init_scale=1.0"]
        chosen = []
        for text in others:
            key, _, values = text.partition("=")
            several = values.split("|")
            chosen.append(f"{key}={several[choice % len(several)]}")
        return cls(variant, seed, (*first, *chosen))

    @property
    def name(self) -> str:
        text = "-".join((*self.settings, f"seed{self.seed}"))
        return "".join(c if c.isalnum() or c in ".-_" else "-" for c in text.replace("projection.", ""))

    @property
    def is_static(self) -> bool:
        return self.variant.split()[0] == STATIC


def end_with_parent() -> None:
    """In a worker: whoever kills the benchmark has not to look for what it began."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def number_of_choices(variant: str) -> int:
    return max([len(text.split("|")) for text in variant.split()])


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[None]:
    """What this process and its libraries print goes to a file meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    kept = os.dup(1), os.dup(2)
    with path.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        except BaseException:
            traceback.print_exc(file=file)
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in enumerate(kept, 1):
                os.dup2(copy, number)
                os.close(copy)


def build_cache(recipe: str, overrides: list[str], log: Path) -> None:
    from softcot_ds.cache import main

    with output_to(log):
        if code := main([recipe, *overrides]):
            raise RuntimeError(f"the cache was not built (exit code {code}); see {log}")


def train(recipe: str, overrides: list[str], log: Path) -> dict[str, Any]:
    """Train a run to its end; its summary and last validation."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from softcot_ds.adapter import train_summary
    from softcot_ds.recipe import load_recipe
    from softcot_ds.run_dir import recipe_and_adapter
    from softcot_ds.training.loop import train as train_recipe

    loaded = load_recipe(recipe, overrides)
    with output_to(log):
        train_recipe(loaded)
    events = EventAccumulator(str(loaded.run_dir)).Reload()
    known = events.Tags()["scalars"]
    _, adapter = recipe_and_adapter(recipe, overrides)
    summary = train_summary(adapter) or {}
    return {key: summary.get(key) for key in ("steps", "first_loss", "last_loss", "device")} | {
        "validation": {name: events.Scalars(tag)[-1].value for name, tag in VALIDATED.items() if tag in known}
    }


def train_and_evaluate(recipe: str, overrides: list[str], log: Path) -> tuple[dict[str, Any], Any]:
    """Beside what ``train`` gives, the ``Evaluation`` of the adapter."""
    trained = train(recipe, overrides, log)

    from softcot_ds.evaluation.jobs import Loaded
    from softcot_ds.evaluation.run import evaluated
    from softcot_ds.run_dir import recipe_and_adapter

    with output_to(log):
        return trained, evaluated(*recipe_and_adapter(recipe, overrides), Loaded())


class Study:
    """All runs of one recipe, some at a time, each in one of a few processes that stay."""

    def __init__(self, args: argparse.Namespace) -> None:
        from softcot_ds.recipe import load_recipe

        self.args = args
        recipe = load_recipe(args.recipe, args.overrides)
        self.folder = recipe.run_dir
        self.compared = [name for name in recipe.evaluation.conditions if name != STATIC]
        self.result: dict[str, Any] = {
            "benchmark": "conditioning",
            **describe(),
            "recipe": args.recipe,
            "overrides": args.overrides,
            "seeds": args.seeds,
            "chosen": {},
            "trained": {},
            "evaluated": {},
            "summaries": {},
            "failed": {},
        }
        self.cells: dict[str, list[Any]] = {}
        self.pool = ProcessPoolExecutor(args.parallel, multiprocessing.get_context("spawn"), end_with_parent)

    def overrides(self, run: Run) -> list[str]:
        return [
            *self.args.overrides,
            f"output_dir={self.folder}",
            f"name={run.name}",
            f"seed={run.seed}",
            f"evaluation.outputs={self.folder / 'outputs'}",  # what does not depend on the weights is computed once
            *run.settings,
        ]

    def all(self, work: Any, jobs: dict[Run, list[str]]) -> Iterator[tuple[Run, Any]]:
        """What came of each, as it ends; one that fails is told and left out."""
        futures = {}
        for run, given in jobs.items():
            log = self.folder / "logs" / f"{run.name}.txt"
            futures[self.pool.submit(work, self.args.recipe, given, log)] = run
        for future in as_completed(futures):
            run = futures[future]
            try:
                found = future.result()
            except Exception as error:
                self.result["failed"][run.name] = f"{type(error).__name__}: {error}"
                print(f"{run.name}: failed: {error}", flush=True)
            else:
                yield run, found
            keep(self.result, self.args.out)

    def build_caches(self) -> None:
        """One for each kind of states."""
        runs = {}
        for variant in self.args.variants:
            run = Run.of(variant, self.args.seeds[0])
            states = tuple(text for text in run.settings if text.startswith("thoughts."))
            if not run.is_static:
                runs.setdefault(states, run)
        for _ in self.all(build_cache, {run: [*self.args.overrides, *states] for states, run in runs.items()}):
            pass

    def keep_training(self, run: Run, found: dict[str, Any]) -> None:
        told = {"variant": run.variant, "seed": run.seed, "settings": run.settings}
        self.result["trained"][run.name] = told | found
        print(f"{run.name}: {json.dumps(found['validation'])}", flush=True)

    def choose(self) -> dict[str, int]:
        """Of each variant, the index of the values with which the first seed's validation loss is least."""
        first, tried = self.args.seeds[0], {}
        for variant in self.args.variants:
            tried[variant] = [Run.of(variant, first, choice) for choice in range(number_of_choices(variant))]
        jobs = {run: self.overrides(run) for runs in tried.values() if len(runs) > 1 for run in runs}
        for run, found in self.all(train, jobs):
            self.keep_training(run, found)
        found = {}
        for variant, runs in tried.items():
            losses = [self.result["trained"].get(run.name, {}).get("validation", {}).get("loss") for run in runs]
            ranked = sorted((loss, index) for index, loss in enumerate(losses) if loss is not None and loss == loss)
            if ranked or len(runs) == 1:
                found[variant] = ranked[0][1] if ranked else 0
                self.result["chosen"][variant] = runs[found[variant]].settings
        return found

    def compare(self, chosen: dict[str, int]) -> None:
        """All seeds of each variant: a tuned prompt first, which stands beside the others of its seed.

        Seed by seed: what is cut short has whole comparisons.
        """
        runs = [Run.of(variant, seed, choice) for seed in self.args.seeds for variant, choice in chosen.items()]
        static = {run: [*self.overrides(run), "evaluation.conditions=[learned,none]"] for run in runs if run.is_static}
        self.keep_evaluations(static)
        jobs = {}
        for run in runs:
            beside = next((other for other in static if other.seed == run.seed), None)
            if not run.is_static:
                jobs[run] = [*self.overrides(run), *self.conditions(beside)]
        self.keep_evaluations(jobs)
        self.pool.shutdown()

    def conditions(self, static: Run | None) -> list[str]:
        from softcot_ds.run_dir import recipe_and_adapter

        if static is None or static.name not in self.result["evaluated"]:
            return []
        _, adapter = recipe_and_adapter(self.args.recipe, self.overrides(static))
        beside = ",".join([*self.compared, STATIC])
        return [f"evaluation.conditions=[{beside}]", f"evaluation.static_adapter={adapter}"]

    def keep_evaluations(self, jobs: dict[Run, list[str]]) -> None:
        from softcot_ds.evaluation.grid import Evaluated, make_grid_report

        for run, (trained, found) in self.all(train_and_evaluate, jobs):
            self.keep_training(run, trained)
            report = {key: found.report[key] for key in ("num_problems", "conditions", "comparisons")}
            self.result["evaluated"][run.name] = {"variant": run.variant, "seed": run.seed, **report}
            of = self.cells.setdefault(run.variant, [])
            of.append(Evaluated(run.seed, run.name, found.folder, found.report, found.scores))
            of.sort(key=lambda cell: cell.seed)
            self.result["summaries"][run.variant] = make_grid_report(of)["summaries"][0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--variants", nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time, on one GPU or on the cores")
    parser.add_argument("--out", type=Path, help="write the result, JSON, to this file")
    args = parser.parse_args()
    study = Study(args)
    study.build_caches()
    study.compare(study.choose())
    write_result(study.result, args.out)


if __name__ == "__main__":
    main()
