"""What soft thoughts bring on the embedded pair, with all controls, over several seeds.

    python benchmarks/word_problems.py --seeds 0 1 2 3 4 --out benchmarks/results/word_problems.json

For each seed the projection and a static prompt are trained on two ranks, by the same commands as ``make demo``, and
evaluated on the same 1,000 test problems under every condition. The seed decides initialization and data order.
Finished seeds are not run again. ``plans_right``: of how many problems the assistant's plan in words, which the
condition ``text`` reads, is the right one: what words could have lost.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from environment import describe

from softcot_ds.pair.world import OPERATIONS

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
CONTROLS = ["shuffled", "mean", "zero", "none", "text", "static"]


def command(module: str, *arguments: str, ranks: int) -> None:
    """Run one command of the package under the deepspeed launcher."""
    launcher = [str(BIN / "deepspeed"), "--log_level", "error", "--num_gpus", str(ranks), "--module"]
    subprocess.run([*launcher, f"softcot_ds.{module}", *arguments], cwd=ROOT, check=True)


def run_seed(seed: int, ranks: int) -> dict[str, Any]:
    """Train and evaluate one seed; returns its report."""
    static, learned = f"name=seeds-static-{seed}", f"name=seeds-{seed}"
    command("train", "recipes/word_problems_static.yaml", static, f"seed={seed}", ranks=ranks)
    command("train", "recipes/word_problems.yaml", learned, f"seed={seed}", ranks=ranks)
    checkpoints = ROOT / "runs" / f"seeds-static-{seed}" / "checkpoints"
    adapter = max(checkpoints.iterdir(), key=lambda path: int(path.name.removeprefix("step-")))
    command(
        "evaluate",
        "recipes/word_problems.yaml",
        learned,
        f"seed={seed}",
        f"evaluation.conditions=[learned,{','.join(CONTROLS)}]",
        f"evaluation.static_adapter={adapter}",
        ranks=ranks,
    )
    return json.loads((ROOT / "runs" / f"seeds-{seed}" / "report.json").read_text())


def plans_right(run_dir: Path) -> int:
    """Of the newest evaluation: how many plans name the operation of each of their question's verbs."""
    operations = {verb: one.name for one in OPERATIONS for verb in (*one.common, *one.rare)}
    right = 0
    for line in max(run_dir.glob("evaluation/*/text.jsonl"), key=os.path.getmtime).read_text().splitlines():
        prompt = json.loads(line)["prompt"]
        question, _, plan = prompt.partition("plan :\n")
        right += plan.partition(" .")[0].split()[1:] == [operations[w] for w in question.split() if w in operations]
    return right


def summarize(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy of each condition over the seeds, and the smallest lead of learned over each control."""
    accuracy = {name: [report["conditions"][name]["accuracy"] for report in reports] for name in ("learned", *CONTROLS)}
    return {
        "accuracy": {
            name: {"mean": statistics.mean(values), "min": min(values), "max": max(values), "seeds": values}
            for name, values in accuracy.items()
        },
        "smallest_lead": {
            name: min(a - b for a, b in zip(accuracy["learned"], accuracy[name], strict=True)) for name in CONTROLS
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the result here, JSON")
    args = parser.parse_args()
    command("cache", "recipes/word_problems.yaml", ranks=args.ranks)
    reports = [run_seed(seed, args.ranks) for seed in args.seeds]
    result = {**describe(), "seeds": args.seeds, **summarize(reports)}
    result |= {"plans_right": plans_right(ROOT / "runs" / f"seeds-{args.seeds[0]}"), "reports": reports}
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "reports"}))


if __name__ == "__main__":
    main()
