"""Accuracies and losses of an evaluation in TensorBoard, as points and pictures, beside the curves of its training."""

import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from softcot_ds.evaluation.drawing import conditions as drawn
from softcot_ds.evaluation.drawing import picture
from softcot_ds.files import write_atomically
from softcot_ds.points import point


def write_points(run_dir: Path, report: Mapping[str, Any]) -> None:
    """Write what an evaluation found as points at its step, ``accuracy/CONDITION`` and ``test_loss/CONDITION``, and as
    pictures; those of an earlier one at the same step go. Training that goes on from before that step forgets them as
    it does its own.

    Raises:
        OSError: they cannot be written.
    """
    now, ending = time.time(), f"evaluation.{report['step']}"
    file = io.BytesIO()
    writer = RecordWriter(file)
    writer.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
    values = [point(*one) for one in _points(report)] + _pictures(report)
    writer.write(Event(wall_time=now, step=report["step"], summary=Summary(value=values)).SerializeToString())
    path = run_dir / f"events.out.tfevents.{int(now)}.{ending}"
    earlier = [other for other in run_dir.glob(f"events.out.tfevents.*.{ending}") if other != path]
    write_atomically(path, file.getvalue())
    for other in earlier:
        other.unlink(missing_ok=True)


def _points(report: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    """Tags, values and what they are."""
    problems, found = f"{report['num_problems']:,} test problems", []
    for name, row in report["conditions"].items():
        if "accuracy" in row:
            found.append((f"accuracy/{name}", row["accuracy"], f"The share of {problems} that is answered right."))
        if "loss" in row:
            words = f"Loss of the reference solutions of {problems}, nats per token."
            found.append((f"test_loss/{name}", row["loss"]["per_token"], words))
    return found


def _pictures(report: Mapping[str, Any]) -> list[Summary.Value]:
    """All conditions side by side, with intervals."""
    rows = report["conditions"].items()
    accuracies = {name: {"mean": row["accuracy"], "ci95": row["ci95"]} for name, row in rows if "accuracy" in row}
    told = {name: row["loss"] for name, row in rows if "loss" in row}
    losses = {name: {"mean": one["per_token"], "ci95": one.get("ci95")} for name, one in told.items()}
    found = []
    for tag, points, factor, label in (
        ("accuracy", accuracies, 100, "accuracy, %"),
        ("test_loss", losses, 1, "loss of the solutions, nats per token"),
    ):
        if points:
            png = picture(len(points), drawn(points, factor, label))
            width, height = (int.from_bytes(png[at : at + 4]) for at in (16, 20))  # of its first chunk, IHDR
            image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)
            found.append(Summary.Value(tag=f"conditions/{tag}", image=image))
    return found
