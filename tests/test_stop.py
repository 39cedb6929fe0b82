"""Which of several signals a training stops for."""

import os
import signal
from collections.abc import Iterator

import pytest

from softcot_ds.errors import STOP_SIGNALS
from softcot_ds.training.stop import StopRequest


@pytest.fixture
def handlers_put_back() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("signals", "stops_for"),
    [
        ("", None),
        ("TERM", "SIGTERM"),
        ("INT", "SIGINT"),
        ("INT TERM", "SIGINT"),
        ("TERM INT", "SIGINT"),  # the launcher was quicker than Ctrl-C itself
        ("USR1 TERM", "SIGUSR1"),
        ("TERM USR1", "SIGUSR1"),
        ("INT USR1 INT", "SIGUSR1"),
    ],
)
def test_the_launchers_own_signal_never_hides_why_a_run_stops(handlers_put_back, signals, stops_for):
    request = StopRequest()
    for name in signals.split():
        os.kill(os.getpid(), signal.Signals[f"SIG{name}"])
    agreed = request.agreed_signal()
    assert (agreed and agreed.name) == stops_for
