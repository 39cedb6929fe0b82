"""A file system of a test's own, to be filled."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Callable[[str], None]]:
    """In a new folder, of a size as ``mount`` has it, such as 700k; yields what changes that. Skips the test where this
    process has no right to mount."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no right to mount a small tmpfs: {mounted.stderr.decode().strip()}")
    try:
        yield lambda other: subprocess.run(["mount", "-o", f"remount,size={other}", folder], check=True)
    finally:
        subprocess.run(["umount", folder], check=True)
