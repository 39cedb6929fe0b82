"""Commands that each rank runs in a process of its own, one after the other.

DeepSpeed holds on to the models of a training until its process ends. Under a launcher each rank starts a process, and
these meet as their parents would, which have not met yet; the next ones must not take what is left of them for each
other.
"""

import contextlib
import subprocess
import sys

from softcot_ds.cells import Cell
from softcot_ds.errors import Interrupted
from softcot_ds.launchers import environment_apart

_PATIENCE_S = 2.0
"""How long a process that has the signal to stop takes to end, where it has nothing to save yet."""


def run_apart(command: str, cell: Cell) -> None:
    """Run a command, such as ``train``, with a cell's recipe. All ranks call it together.

    Raises:
        SystemExit: the command did not end well, and has said why.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", f"softcot_ds.{command}", cell.source, *cell.overrides],
        env=environment_apart(f"{command}-{cell.recipe.name}"),
    )
    try:
        code = process.wait()
    except Interrupted as error:
        # Mostly the signal went to all processes. One that has it saves and ends; only one that has not is sent it.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE_S)
        if process.poll() is None:
            process.send_signal(error.signal_number)
        process.wait()
        raise
    if code:
        raise SystemExit(code if code > 0 else 128 - code)
