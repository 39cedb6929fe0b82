"""How long things take, how large and how many they are, in words."""

import time


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


class Progress:
    """Progress lines with rate and time left, for terminals and log files alike."""

    def __init__(self, total: int, unit: str, every_seconds: float = 5.0, several: str = "") -> None:
        """
        Args:
            unit: what one is called; ``several``, more than one, where an s is not enough.
        """
        self._total = total
        self._unit = unit
        self._units = several or unit + "s"
        self._every = every_seconds
        self._done = 0
        self._began = self._last = time.monotonic()

    def line(self, done: int) -> str | None:
        """A line for ``done`` of the total, or None when the last one is less than ``every_seconds`` old."""
        now = time.monotonic()
        if now - self._last < self._every and done < self._total:
            return None
        self._last = now
        rate = done / max(now - self._began, 1e-9)
        left = (self._total - done) / rate if rate else 0.0
        pace = f"{1 / rate:.1f} s/{self._unit}" if 0 < rate < 1 else f"{rate:.1f}/s"
        return f"{done}/{self._total} {self._units} ({pace}, {duration(left)} left)"
