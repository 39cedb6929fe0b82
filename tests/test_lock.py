"""A folder has one owner."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from softcot_ds.errors import SoftCoTError
from softcot_ds.lock import sole_owner

HOLD = """
import sys, time
from pathlib import Path
from softcot_ds.lock import sole_owner
with sole_owner(Path(sys.argv[1]), "training", print):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path's lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "lock"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_second_owner_is_refused_and_told_who_holds_the_folder(tmp_path, holder):
    with pytest.raises(SoftCoTError) as refused, sole_owner(tmp_path / "lock", "training", print, patience_s=0.3):
        pass
    assert f"another training ({socket.gethostname()}, process {holder.pid}, since 20" in str(refused.value)
    assert f"works in {tmp_path}" in str(refused.value)


def test_owner_that_dies_within_the_patience_is_waited_for(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    said = []
    with sole_owner(tmp_path / "lock", "training", said.append, patience_s=30) as locked:
        assert locked
    assert not said


def test_lock_is_free_again_after_the_block_also_when_it_fails(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), sole_owner(tmp_path / "new/lock", "training", print, patience_s=0):
            raise ZeroDivisionError


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_file_system_without_locks_is_said(tmp_path, monkeypatch, number):
    def no_locks(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    said = []
    with sole_owner(tmp_path / "lock", "training", said.append) as locked:
        assert not locked
    assert said == [f"no file locks in {tmp_path} ({os.strerror(number)}): start one training at a time"]


def test_waiting_is_said_and_ends_with_the_other_owner(tmp_path, holder):
    said = []

    def say(message: str) -> None:
        said.append(message)
        holder.kill()

    began = time.monotonic()
    with sole_owner(tmp_path / "lock", "training", say) as locked:
        assert locked
    assert time.monotonic() - began < 20
    assert len(said) == 1
    assert f"process {holder.pid}" in said[0]
