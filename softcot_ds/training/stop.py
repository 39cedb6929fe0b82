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
        self._signal = 0
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: Any) -> None:
        if os.getpid() != self._pid:
            return  # a forked child: a batch system signals those too
        # The first counts, as launchers follow up with SIGTERM; but not against the notice that the run goes on later.
        if not self._signal or number == signal.SIGUSR1:
            self._signal = number

    def agreed_signal(self) -> signal.Signals | None:
        """The signal to stop for, the same on all ranks, or None; the notice of a time limit before others."""
        order = 1 + STOP_SIGNALS.index(self._signal) if self._signal else 0
        agreed = max_over_ranks(order)
        return STOP_SIGNALS[agreed - 1] if agreed else None
