"""How far what takes long has got, in words."""

import pytest

from softcot_ds.progress import Progress


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
    assert Progress(3, "row", every_seconds=0).line(0) == "0/3 rows (0.0/s, 0s left)"
