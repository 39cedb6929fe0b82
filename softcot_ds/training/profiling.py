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
        """The block is step ``step``. A run that begins within the window records what is left of it."""
        if self._first <= step <= self._last and not self._began:
            self._began = step
            if is_main():
                self._profiler = profile()
                self._profiler.start()
        yield
        if self._profiler is not None and self.ends_with(step):
            self._profiler.stop()

    def ends_with(self, step: int) -> bool:
        """Whether ``step`` was the window's last one, after which ``write`` is to be called."""
        return bool(self._began) and step == self._last

    def write(self) -> None:
        """Write the trace; all ranks call it. A run that ends within the window writes none.

        Raises:
            SoftCoTError: on every rank, when the trace cannot be written.
        """
        # A name that TensorBoard looks for.
        path = self._folder / f"steps-{self._began}-{self._last}.pt.trace.json.gz"
        on_main(lambda: self._write(path))
        say(f"profile of the steps {self._began} to {self._last}: {path}")
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
