"""Everything that only a machine with a GPU can say, in one command: the tests that need one, and the benchmarks.

    python benchmarks/gpu.py [--minutes 25] [--out benchmarks/results/gpu-NAME.json] [--only PART ...]

What matters most comes first. Each part is a process of its own, with a share of the time: it ends early where time
runs out, and one that fails or has to be stopped loses nothing of the others, nor of what it had written. The result is
kept after each part; the last line of output is the same as one JSON object: hardware, versions, and of each part what
it measured, its exit code, or why it was left out. The exit code is 1 when a part failed. Without a GPU nothing is run
and nothing is written.

The times of a part are those of its own script, which its docstring explains. A GPU that others use as well, or that is
throttled, says nothing.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from environment import Budget, describe, keep, write_result

ROOT = Path(__file__).parent.parent
TESTS = ("test_gpu.py", "test_thought_embedding.py", "test_loss.py", "test_fused_layers.py")


@dataclass(frozen=True)
class Part:
    """Something to run."""

    command: tuple[str, ...]
    """``{seconds}`` stands for the time that it has, ``{out}`` for the file that it writes."""
    share: float
    """How much of the whole time it may take at most."""


def script(name: str, share: float, *arguments: str) -> Part:
    return Part((sys.executable, str(ROOT / "benchmarks" / name), *arguments, "--out", "{out}"), share)


PARTS = {
    "tests": Part(
        (
            *(sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--junit-xml={out}"),
            *(str(ROOT / "tests" / name) for name in TESTS),
        ),
        0.4,
    ),
    "machine": script("machine.py", 0.1),
    "kernel": script("thought_embedding.py", 0.3, "--seconds", "{seconds}", "--pairs", "1B-to-8B"),
    "step": script("train_step.py", 0.3, "--seconds", "{seconds}"),
    "decoding": script("decoding.py", 0.2, "--seconds", "{seconds}"),
    "cache": script("thought_cache.py", 0.2, "--rows", "2048", "--read-rows", "0"),
    "other_kernels": script(
        "thought_embedding.py", 0.4, "--seconds", "{seconds}", "--pairs", "1.5B-to-7B", "1B-to-70B"
    ),
}
_FOR_ITS_END = 0.8
"""A part is told that it has this part of its time, and stopped after all of it."""
_LEAST_SECONDS = 20.0
"""Nothing is begun with less: importing the libraries takes as long."""
_GRACE_SECONDS = 10.0
_SLOWEST = 12
_SHOWN = 3000
"""Characters that are kept of the end of what a part that failed has printed."""


def run_part(part: Part, seconds: float, out: Path) -> dict[str, Any]:
    """What a part says, with how it ended; it is interrupted after ``seconds``.

    Args:
        out: the file that it writes, which is here for as long as it runs, with its output beside it.
    """
    began, log = time.monotonic(), out.with_suffix(".log")
    values = {"{out}": str(out), "{seconds}": f"{seconds * _FOR_ITS_END:.0f}"}
    with log.open("w") as file:
        process = subprocess.Popen(
            [_fill_in(argument, values) for argument in part.command],
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        in_time = _wait(process, seconds)
    ended: dict[str, Any] = {"exit": process.returncode, "seconds": round(time.monotonic() - began, 1)}
    if not in_time:
        ended["stopped"] = f"after the {seconds:.0f} s that it had"
    text = log.read_text(errors="replace")
    print(text, flush=True)
    if process.returncode:
        ended["output_ends"] = text[-_SHOWN:].replace(str(ROOT), ".").replace(str(Path.home()), "~")
    ended |= _read(out)
    for path in (log, out):
        path.unlink(missing_ok=True)
    return ended


def _fill_in(argument: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        argument = argument.replace(name, value)
    return argument


def _wait(process: subprocess.Popen, seconds: float) -> bool:
    """Whether the process ended by itself in time. One that did not is interrupted, then killed, with its children."""
    try:
        process.wait(seconds)
        return True
    except subprocess.TimeoutExpired:
        for number, grace in ((signal.SIGINT, _GRACE_SECONDS), (signal.SIGKILL, None)):
            try:
                os.killpg(process.pid, number)
                process.wait(grace)
                break
            except subprocess.TimeoutExpired:
                continue
        return False


def _read(out: Path) -> dict[str, Any]:
    """What a part has written: a benchmark's JSON, or the tests' XML."""
    text = out.read_text() if out.exists() else ""
    if text.startswith("<"):
        return _count_tests(text)
    result = json.loads(text) if text else {}
    # Hardware and versions stand once, in the whole.
    return {key: value for key, value in result.items() if key not in describe()}


def _count_tests(xml: str) -> dict[str, Any]:
    """How many tests passed, failed and were skipped, which ones failed, and the seconds of the slowest."""
    counts, failed, seconds = Counter(), [], {}
    for case in ElementTree.fromstring(xml).iter("testcase"):
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        counts[outcome] += 1
        name = f"{case.get('classname')}::{case.get('name')}"
        seconds[name] = float(case.get("time", 0))
        if outcome in ("failure", "error"):
            failed.append(name)
    slowest = sorted(seconds, key=seconds.__getitem__, reverse=True)[:_SLOWEST]
    return {"tests": dict(counts), "failed": failed, "slowest": {name: seconds[name] for name in slowest}}


def default_out(gpu: str) -> Path:
    """A file named after the GPU."""
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower().removeprefix("nvidia")).strip("-")
    return ROOT / "benchmarks" / "results" / f"gpu-{name}.json"


def run_all(parts: dict[str, Part], minutes: float, result: dict[str, Any], out: Path) -> None:
    """Run the parts within the time; ``result`` is kept in ``out`` after each."""
    budget = Budget(60 * minutes)
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    result["parts"] = {}
    for name, part in parts.items():
        seconds = min(part.share * 60 * minutes, budget.left() - _GRACE_SECONDS)
        if seconds < _LEAST_SECONDS:
            result["parts"][name] = {"left_out": f"{max(budget.left(), 0):.0f} s were left"}
        else:
            print(f"{name}: at most {seconds:.0f} s", flush=True)
            result["parts"][name] = run_part(part, seconds, out.with_name(f"{out.stem}-{name}.part.json"))
        keep(result, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu-NAME.json")
    args = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "gpu", **describe()}
    if result["gpu"] is None:
        print("No GPU is visible to PyTorch: nothing is measured. On a machine with one: make gpu")
        print(json.dumps(result))
        return
    out = args.out or default_out(result["gpu"])
    run_all({name: PARTS[name] for name in args.only}, args.minutes, result, out)
    failed = [name for name, part in result["parts"].items() if part.get("exit") and "stopped" not in part]
    print(f"written: {out}; failed: {', '.join(failed) or 'nothing'}")
    write_result(result, out)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
