"""What all benchmarks share: what a measurement was made on, how its result is given, and how long it may take."""

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import torch


def describe() -> dict[str, Any]:
    """Date, commit, hardware and versions. A copy without its history is told its commit by SOFTCOT_DS_COMMIT."""
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    return {
        "date": datetime.date.today().isoformat(),
        "commit": os.environ.get("SOFTCOT_DS_COMMIT") or commit or "unknown",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "triton", "transformers", "deepspeed")},
        **(_gpu() if torch.cuda.is_available() else {}),
    }


def _processor() -> str:
    """The processor's name as Linux gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    driver = None
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.partition("\n")[0].strip()
    return {
        "gpus": torch.cuda.device_count(),
        "gpu_memory_gib": round(properties.total_memory / 2**30, 2),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "driver": driver or None,
    }


class Budget:
    """How long a script may take. One that has none is never used up."""

    def __init__(self, seconds: float | None) -> None:
        self._ends = float("inf") if seconds is None else time.monotonic() + seconds

    def left(self) -> float:
        return self._ends - time.monotonic()

    def is_used_up(self) -> bool:
        return self.left() <= 0


def keep(result: dict[str, Any], out: Path | None) -> None:
    """Write what there is so far into the file ``out``, if there is one: whoever is stopped then has not lost it."""
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".part")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(out)


def write_result(result: dict[str, Any], out: Path | None) -> None:
    """The result as the last line of the output, and into the file ``out`` if there is one."""
    keep(result, out)
    print(json.dumps(result), flush=True)
