"""What is watched in TensorBoard, and the lines that a log shows."""

import csv
import io
import re
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from google.protobuf.text_format import MessageToString
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.plugins.projector.metadata import PROJECTOR_FILENAME
from tensorboard.plugins.projector.projector_config_pb2 import EmbeddingInfo, ProjectorConfig
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.profiler import record_function
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import custom_scalars, hparams

from softcot_ds.files import write_atomically
from softcot_ds.points import point
from softcot_ds.training.tags import CHARTS, DESCRIPTIONS

GIB = 1024**3
_MARKS = re.compile(r"[\\`*_{}\[\]()#+.!-]")
"""What means something to Markdown but for what HTML escapes, and can be escaped by a backslash."""


class PhaseTimer:
    """Where a step's time goes. On a GPU it records events and waits for nothing until it is read."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to phase ``name``, which is also what a profile calls it."""
        if self._cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            with record_function(name):
                yield
            end.record()
            self._events.append((name, start, end))
        else:
            began = time.perf_counter()
            with record_function(name):
                yield
            self._seconds[name] += time.perf_counter() - began

    def read(self) -> dict[str, float]:
        """Seconds per phase since the last reading. Waits for the GPU."""
        if self._events:
            torch.cuda.synchronize()
            for name, start, end in self._events:
                self._seconds[name] += start.elapsed_time(end) / 1000
        seconds = dict(self._seconds)
        self._seconds.clear()
        self._events.clear()
        return seconds


def peak_memory_gib(device: torch.device) -> float:
    """The most memory held so far: of the GPU by tensors, or without one of the process (resident set)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


class TensorBoard:
    """The curves of one run. Does nothing on ranks other than 0."""

    def __init__(self, folder: Path, enabled: bool, resumed_step: int) -> None:
        """``resumed_step``: points after it, written by an interrupted run, are removed, so that the curve joins."""
        self._writer = None
        if enabled:
            _forget_after(resumed_step, folder)
            # A TensorBoard that is open has read them already; this has it forget them too.
            self._writer = SummaryWriter(str(folder), purge_step=resumed_step + 1)
            self._writer.file_writer.add_summary(custom_scalars(CHARTS), resumed_step + 1)

    def scalars(self, values: dict[str, float], step: int) -> None:
        if self._writer is not None:
            for tag, value in values.items():
                summary = Summary(value=[point(tag, value, DESCRIPTIONS.get(tag, ""))])
                self._writer.file_writer.add_summary(summary, step)
            self.flush()  # a curve is looked at most when its run has just died

    def block(self, tag: str, text: str, step: int) -> None:
        """``text`` is shown as it is, in letters of one width; long lines are to be scrolled."""
        if self._writer is not None:
            self._writer.add_text(tag, "\n".join(f"    {line}" for line in text.splitlines()), step)

    def prose(self, tag: str, text: str, step: int) -> None:
        """``text`` is shown line by line; long lines are wrapped."""
        if self._writer is not None:
            self._writer.add_text(tag, "  \n".join(map(_as_markdown, text.splitlines())), step)

    def histogram(self, tag: str, values: np.ndarray, step: int) -> None:
        """``values``: of any shape, float."""
        if self._writer is not None:
            self._writer.add_histogram(tag, values, step)

    def projector(self, name: str, vectors: Sequence[np.ndarray], labels: Sequence[str], kinds: Sequence[str]) -> None:
        """The newest of what is called ``name``, in the PROJECTOR tab: vectors in space, to be turned and searched.

        Args:
            vectors: (D,) float32 each; ``labels`` and ``kinds``, by which they can be coloured, say what each is.
        """
        if self._writer is None:
            return
        folder = Path(self._writer.log_dir)
        values, told = io.StringIO(), io.StringIO()
        np.savetxt(values, np.stack(vectors), fmt="%.5g", delimiter="\t")
        rows = csv.writer(told, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE, quotechar=None)
        rows.writerow(["label", "kind"])
        rows.writerows(zip([" ".join(label.split()) for label in labels], kinds, strict=True))
        shown = EmbeddingInfo(tensor_name=name, tensor_path=f"{name}.tsv", metadata_path=f"{name}-labels.tsv")
        write_atomically(folder / shown.tensor_path, values.getvalue())
        write_atomically(folder / shown.metadata_path, told.getvalue())
        config = MessageToString(ProjectorConfig(embeddings=[shown]))
        write_atomically(folder / PROJECTOR_FILENAME, config)

    def hyperparameters(
        self, values: dict[str, Any], first: Collection[str], metrics: Sequence[str], step: int
    ) -> None:
        """The recipe in the HPARAMS tab, beside the last values of curves, named by their tags, as far as they exist.

        Args:
            first: the settings whose columns come first.
        """
        if self._writer is not None:
            plain = {
                key: value if isinstance(value, int | float | str | bool) else str(value)
                for key, value in values.items()
                if value is not None
            }
            # add_hparams would start a second run of its own; the summaries belong to this one.
            experiment, *session = hparams(plain, dict.fromkeys(metrics, 0))
            for summary in (_with_first(experiment, first), *session):
                self._writer.file_writer.add_summary(summary, step)

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _as_markdown(line: str) -> str:
    """What TensorBoard, which takes texts for Markdown, shows as this line."""
    indent = len(line) - len(line.lstrip(" "))
    return "&nbsp;" * indent + _MARKS.sub(r"\\\g<0>", escape(line[indent:], quote=False))


def _with_first(experiment: Summary, first: Collection[str]) -> Summary:
    """TensorBoard sorts columns by name, those before that are said to differ between runs."""
    plugin_data = experiment.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(plugin_data.content)
    for info in content.experiment.hparam_infos:
        info.differs = info.name in first
    plugin_data.content = content.SerializeToString()
    return experiment


def _forget_after(step: int, folder: Path) -> None:
    """Take what is later than ``step`` out of the event files of earlier attempts; step 0 leaves nothing.

    TensorBoard's own way, a mark in the next file that what was read before is void, counts on file names that sort by
    time: the clocks of two nodes may differ. And other readers of event files do not know it. Old marks go as well.
    """
    for path in sorted(folder.glob("events.out.tfevents.*")):
        kept, removed = [], False
        for record in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(record)
            if step and event.step <= step and not event.HasField("session_log"):
                kept.append(record)
            else:
                removed = True
        if removed and kept:
            content = io.BytesIO()
            writer = RecordWriter(content)
            for record in kept:
                writer.write(record)
            write_atomically(path, content.getvalue())
        elif removed:
            path.unlink()
