"""How far what takes long has got, in lines of a log and on a terminal."""

import os
import pty
import re
import select
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from softcot_ds.progress import Progress, close_bars, tell


@pytest.mark.parametrize(
    ("seconds", "line"),
    [
        (0.5, "4/10 steps (8.0/s, 1s left)"),
        (4, "4/10 steps (1.0/s, 6s left)"),
        (17.2, "4/10 steps (4.3 s/step, 26s left)"),
        (1000, "4/10 steps (250.0 s/step, 25m00s left)"),
    ],
)
def test_what_is_slower_than_one_a_second_is_told_in_seconds(monkeypatch, seconds, line):
    now = 100.0
    monkeypatch.setattr("softcot_ds.progress.time.monotonic", lambda: now)
    progress = Progress(10, "step", every_seconds=0)
    now += seconds
    assert progress.line(4) == line


def test_several_have_a_name_of_their_own(monkeypatch):
    monkeypatch.setattr("softcot_ds.progress.time.monotonic", lambda: 1.0)
    assert Progress(3, "batch", several="batches").line(3).startswith("3/3 batches (")
    assert Progress(3, "row", every_seconds=0).line(0) == "0/3 rows"


def test_what_comes_before_the_first_is_no_part_of_the_rate_and_all_are_told_once(monkeypatch):
    now = 100.0
    monkeypatch.setattr("softcot_ds.progress.time.monotonic", lambda: now)
    progress = Progress(3000, "token", every_seconds=5)
    now += 60
    assert progress.line(0) == "0/3,000 tokens"
    now += 10
    assert progress.line(1000) == "1,000/3,000 tokens (100.0/s, 20s left)"
    now += 1
    assert progress.line(1500) is None
    assert progress.line(3000).startswith("3,000/3,000 tokens (")
    assert progress.line(3000) is None


@contextmanager
def on_a_terminal(columns: int = 100) -> Iterator[Callable[[], str]]:
    """Both outputs are a terminal; gives what was written on it since it was last asked."""
    reading, writing = pty.openpty()
    termios.tcsetwinsize(writing, (24, columns))

    def read() -> str:
        found = b""
        while select.select([reading], [], [], 0.2)[0]:  # what is written comes in parts, and soon
            found += os.read(reading, 100_000)
        return found.decode()

    with os.fdopen(writing, "w") as screen, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", screen)
        patch.setattr(sys, "stderr", screen)
        patch.setattr("tqdm.std.tqdm.monitor_interval", 0)  # no thread that outlives this
        patch.setattr("softcot_ds.progress.DELAY", 0)
        yield read
    os.close(reading)


def test_a_terminal_shows_one_line_that_rewrites_itself_and_vanishes():
    with on_a_terminal() as read:
        progress = Progress(4, "step", every_seconds=0, name="training", speaks=True)
        time.sleep(0.11)  # a bar is not drawn again before
        progress.show(1, "loss 0.5")
        assert re.fullmatch(r"[^\n]*\rtraining: [^\n]*1/4[^\n]*loss 0\.5[^\n]*", read())
        tell("step 1  validation loss 0.4")
        assert "\rstep 1  validation loss 0.4\r\n" in read()
        progress.show(4, "loss 0.1")
        assert read().endswith(" \r"), "the line is empty"
        tell("done")
        assert read() == "done\r\n"


def test_what_is_left_of_failed_work_is_taken_away():
    with on_a_terminal() as read:
        progress = Progress(4, "step")
        time.sleep(0.11)
        progress.show(2)
        assert "2/4" in read()
        close_bars()
        assert read().endswith(" \r")


def test_one_that_does_not_speak_shows_nothing_anywhere():
    with on_a_terminal() as read:
        Progress(4, "step", every_seconds=0, speaks=False).show(4)
        assert not read()


def test_a_terminal_that_has_no_width_gets_lines():
    with on_a_terminal(columns=0) as read:
        Progress(4, "step", every_seconds=0).show(4)
        assert read().startswith("4/4 steps (")
