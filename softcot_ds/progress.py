"""How long things take, how large and how many they are, in words; and how far long work is."""

import os
import sys
import time
import weakref
from typing import TextIO

from tqdm import tqdm

DELAY = 1.0
"""Seconds: work that is done in less shows no bar."""

_bars: weakref.WeakSet[tqdm] = weakref.WeakSet()


def duration(seconds: float) -> str:
    """Seconds as people read them: ``42s``, ``3m10s``, ``2h05m``."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02}m"


def size(number: int) -> str:
    """Bytes as people read them: ``1.50 GB``, ``12.3 MB``."""
    return f"{number / 1e9:,.2f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"


def count(number: int, what: str, several: str = "") -> str:
    """``1 rank``, ``2 ranks``; ``several``: what more than one are called where an s is not enough."""
    return f"{number} {what}" if number == 1 else f"{number} {several or what + 's'}"


def tell(message: str, file: TextIO | None = None) -> None:
    """Print a line, at once, above whatever bars a terminal shows. ``file``: standard output if None."""
    file = file or sys.stdout
    with tqdm.external_write_mode(file=file):
        print(message, file=file, flush=True)


def close_bars() -> None:
    """Take from the terminal what bars are left there: their work has failed, or was interrupted."""
    for bar in list(_bars):
        bar.close()


class Progress:
    """How far long work is, with rate and time left: on a terminal a bar that rewrites itself and is gone at the end,
    in a log file a line every few seconds."""

    def __init__(
        self, total: int, unit: str, every_seconds: float = 5.0, several: str = "", name: str = "", speaks: bool = True
    ) -> None:
        """
        Args:
            total: how many there are; nothing is shown of none.
            unit: what one is called; ``several``, more than one, where an s is not enough.
            name: of the work, for those who see several.
            speaks: False shows nothing: of several ranks one speaks.
        """
        self._total = total
        self._unit = unit
        self._units = several or unit + "s"
        self._every = every_seconds
        self._name = name
        self._last = time.monotonic()
        self._seen: list[tuple[float, int]] = [(self._last, 0)]
        """When how many were done, at the last lines: the rate is that of the last minute or so."""
        # On standard error, as everybody's; not of what is done in a moment.
        shown = speaks and total > 0 and sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
        self._bar = None
        if shown:
            self._bar = tqdm(total=total, unit=unit, desc=name.rstrip(":") or None, leave=False, delay=DELAY)
            _bars.add(self._bar)
        self._lines = speaks and not (shown and sys.stdout.isatty())

    def show(self, done: int, note: str = "") -> None:
        """So many of the total are done, of which ``note`` says more."""
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - self._bar.n)
            if done >= self._total:
                self.close()
        if self._lines and (line := self.line(done)):
            tell((f"{self._name:9} " if self._name else "") + (f"{note}  " if note else "") + line)

    def close(self) -> None:
        """No more is shown of it."""
        if self._bar is not None:
            self._bar.close()

    def line(self, done: int) -> str | None:
        """A line for ``done`` of the total; None where the last is less than ``every_seconds`` old, or was of all."""
        now = time.monotonic()
        if self._seen[-1][1] >= self._total or (now - self._last < self._every and done < self._total):
            return None
        self._last = now
        # What took time before the first is no part of the rate.
        self._seen = [*self._seen[-12:], (now, done)] if done else [(now, 0)]
        then, done_then = self._seen[0]
        text = f"{done:,}/{self._total:,} {self._units}"
        if done == done_then:
            return text
        rate = (done - done_then) / max(now - then, 1e-9)
        pace = f"{1 / rate:,.1f} s/{self._unit}" if rate < 1 else f"{rate:,.1f}/s"
        return f"{text} ({pace}, {duration((self._total - done) / rate)} left)"
