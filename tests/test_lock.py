"""A folder has one owner."""

import contextlib
import errno
import fcntl
import os
import socket
import subprocess
import sys

import pytest

from softcot_ds.errors import SoftCoTError
from softcot_ds.lock import sole_owner

pytestmark = pytest.mark.distributed

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
    """Holds tmp_path's lock, as another process would: the system counts each opening of the file."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(sole_owner(tmp_path / "lock", "training", print))
        yield stack


def test_second_owner_is_refused_and_told_who_holds_the_folder(tmp_path, holder):
    with pytest.raises(SoftCoTError) as refused, sole_owner(tmp_path / "lock", "training", print, patience_s=0.3):
        pass
    assert f"another training ({socket.gethostname()}, process {os.getpid()}, since 20" in str(refused.value)
    assert f"works in {tmp_path}" in str(refused.value)


def test_owner_that_is_killed_leaves_a_free_folder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "lock"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    held = pytest.raises(SoftCoTError, match=f"process {process.pid}, ")
    with held, sole_owner(tmp_path / "lock", "training", print, patience_s=0):
        pass
    process.kill()
    process.wait()
    with sole_owner(tmp_path / "lock", "training", print, patience_s=0) as locked:
        assert locked


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
        holder.close()

    with sole_owner(tmp_path / "lock", "training", say, patience_s=60) as locked:
        assert locked
    assert len(said) == 1
    assert f"process {os.getpid()}" in said[0]
