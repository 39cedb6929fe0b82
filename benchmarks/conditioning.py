"""Whether thoughts carry the question, by what the projection is trained on: plain, centred or whitened states.

    python benchmarks/conditioning.py RECIPE [key=value ...] --variants none "center learning_rate=3e-3" --seeds 0 1

A variant is a ``projection.condition`` and, after it, keys of ``training`` and ``projection`` with their values. Each
is trained and evaluated with each seed, by one process. What is compared is the loss of the reference solutions, nats a
token, with a question's own thoughts and with those of others, with the 95% interval of the difference. What is
done is written at once, and is not done again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from environment import describe, keep, write_result

from softcot_ds.recipe import ProjectionConfig, load_recipe

EVALUATION = ["evaluation.decode=false", "evaluation.conditions=[learned,shuffled,none]"]


def settings_of(variant: str) -> list[str]:
    """The overrides that a variant stands for."""
    condition, *others = variant.split()
    sections = {True: "projection", False: "training"}
    return [f"projection.condition={condition}"] + [
        f"{sections[text.partition('=')[0] in ProjectionConfig.model_fields]}.{text}" for text in others
    ]


def measure(recipe: str, overrides: list[str]) -> dict[str, Any]:
    """Train and evaluate; losses and their differences, with 95% intervals over problems, nats per token."""
    run_dir = load_recipe(recipe, overrides).run_dir
    for command, more in (("train", []), ("evaluate", EVALUATION)):
        subprocess.run([sys.executable, "-m", f"softcot_ds.{command}", recipe, *overrides, *more], check=True)
    report = json.loads((run_dir / "report.json").read_text())
    return {
        "train": report["train"],
        "problems": report["num_problems"],
        "loss": {name: found["loss"]["per_token"] for name, found in report["conditions"].items()},
        "difference": {
            name: {key: found["loss"][key] for key in ("per_token", "ci95")}
            for name, found in report["comparisons"].items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--variants", nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, help="write the result, JSON, to this file")
    args = parser.parse_args()
    result = {"benchmark": "conditioning", **describe(), "recipe": args.recipe, "overrides": args.overrides, "runs": []}
    if args.out is not None and args.out.exists():
        result["runs"] = json.loads(args.out.read_text())["runs"]
    done = {(run["variant"], run["seed"]) for run in result["runs"]}
    subprocess.run([sys.executable, "-m", "softcot_ds.cache", args.recipe, *args.overrides], check=True)
    for seed in args.seeds:
        for variant in args.variants:
            if (variant, seed) in done:
                continue
            name = f"name=conditioning-{'-'.join(variant.replace('=', '-').split())}-{seed}"
            overrides = [*args.overrides, name, f"seed={seed}", *settings_of(variant)]
            result["runs"].append({"variant": variant, "seed": seed, **measure(args.recipe, overrides)})
            keep(result, args.out)
    write_result(result, args.out)


if __name__ == "__main__":
    main()
