"""A signal that asks a training to stop, heard by all its ranks at the same step."""

import os
import signal
from typing import Any

from softcot_ds.distributed import max_over_ranks
from softcot_ds.errors import STOP_SIGNALS


class StopRequest:
    """Remembers a signal to stop; the loop looks after each step, so that all ranks stop at the same one."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._order = 0
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: Any) -> None:
        if os.getpid() != self._pid:
            return  # a forked child: a batch system signals those too
        # Not the first: the launcher's own SIGTERM may overtake the signal that it follows up.
        self._order = max(self._order, 1 + STOP_SIGNALS.index(number))

    def agreed_signal(self) -> signal.Signals | None:
        """The signal to stop for, the same on all ranks, or None; of several the last one in ``STOP_SIGNALS``."""
        agreed = max_over_ranks(self._order)
        return STOP_SIGNALS[agreed - 1] if agreed else None
