"""What a run has left, read back."""

import json
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def losses(run_dir: Path) -> dict[int, float]:
    records = map(json.loads, (run_dir / "losses.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records}


def read_events(run_dir: Path):
    accumulator = EventAccumulator(str(run_dir))
    accumulator.Reload()
    return accumulator


def scalars(run_dir: Path, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in read_events(run_dir).Scalars(tag)}
