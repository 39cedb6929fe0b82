"""The exceptions that a user is meant to read, and the signals that bring some of them."""

import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals that ask to stop: cancelled, or preempted; Ctrl-C; and SLURM's notice before a time limit. Where several
come, the last of these says why: launchers follow any up with SIGTERM, and after a notice the run goes on later."""


class SoftCoTError(Exception):
    """A mistake that the user can mend: bad recipe, bad data, a cache of another model, a full disk.

    The message says what was wrong, the value found and what to do next. The command line prints it
    without a stack trace and exits with 2.
    """


class OtherRankFailed(SoftCoTError):
    """Another rank of a cache's build gave up, and says why."""


class LostRank(SoftCoTError):
    """Another rank has died, does not answer, or was never found. The command line exits with 3: another try may do."""


class Stopped(SoftCoTError):
    """Work that stopped in good order because a signal asked for it, at the same point on all ranks.

    The command line exits with 128 and the signal's number, as shells do.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class Interrupted(KeyboardInterrupt):
    """A signal that asks to stop, raised wherever the process was. Without good order, and without a loss."""

    def __init__(self, signal_number: int) -> None:
        super().__init__()
        self.signal_number = signal_number
