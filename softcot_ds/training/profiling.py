"""A window of training steps as a trace: for Perfetto (ui.perfetto.dev), or TensorBoard with torch-tb-profiler."""

import gzip
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import profile

from softcot_ds.distributed import is_main, on_main, say
from softcot_ds.files import cannot_write, write_atomically
from softcot_ds.recipe import Recipe


class StepProfiler:
    """Records the steps of ``training.profile_steps`` on rank 0: the ranks do alike, and a trace is large."""

    def __init__(self, recipe: Recipe) -> None:
        self._first, self._last = recipe.training.profile_steps or (0, 0)
        self._folder = recipe.run_dir / "profile"
        self._began = 0
        self._profiler: profile | None = None

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """The block is step ``step``; all ranks enter it. With the window's last one its trace is written.

        A run that begins within the window records what is left of it, one that ends within it writes nothing.

        Raises:
            SoftCoTError: on every rank, when the trace cannot be written.
        """
        if self._first <= step <= self._last and not self._began:
            self._began = step
            if is_main():
                self._profiler = profile()
                self._profiler.start()
        yield
        if self._began and step == self._last:
            if self._profiler is not None:
                self._profiler.stop()
            path = self._folder / f"steps-{self._began}-{step}.pt.trace.json.gz"  # a name that TensorBoard looks for
            on_main(lambda: self._write(path))
            say(f"profile of the steps {self._began} to {step}: {path}")
            self._profiler = None

    def _write(self, path: Path) -> None:
        try:
            with tempfile.TemporaryDirectory() as folder:
                trace = Path(folder, "trace.json")
                self._profiler.export_chrome_trace(str(trace))
                content = gzip.compress(trace.read_bytes())
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, content)
        except OSError as error:
            raise cannot_write(path, error, otherwise="leave out training.profile_steps") from error
