"""One owner of a folder at a time, among all processes of all nodes that share its file system."""

import contextlib
import errno
import fcntl
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from softcot_ds.errors import SoftCoTError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What file systems say that cannot lock: some network file systems."""


@contextlib.contextmanager
def sole_owner(path: Path, owner: str, say: Callable[[str], None], patience_s: float = math.inf) -> Iterator[bool]:
    """Keep others out of the folder of the lock file ``path``, which is made if need be.

    The system drops the lock when its holder dies, however it dies; the file stays.

    Args:
        owner: what owns the folder, such as "training", for messages.
        say: takes a message about waiting, once a minute, or about a file system without locks.
        patience_s: how long another owner is waited for.

    Yields:
        Whether others are really kept out.

    Raises:
        SoftCoTError: another owner is still there; names it.
        OSError: the lock file cannot be made or locked.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        begin, next_word, locked = time.monotonic(), 0.0, False
        while not locked:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = True
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip()  # empty while it is being written
                waited = time.monotonic() - begin
                if waited >= patience_s:
                    raise SoftCoTError(
                        f"another {owner} ({holder or 'it has not said which'}) works in {path.parent}; let it end, or "
                        "end it, or give this run another name (name=...)"
                    ) from None
                if holder and waited >= next_word:
                    say(f"another {owner} ({holder}) works in {path.parent}; waiting for it to end")
                    next_word = waited + 60
                time.sleep(0.2)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                say(f"no file locks in {path.parent} ({error.strerror}): start one {owner} at a time")
                break
        file.truncate(0)
        file.write(f"{socket.gethostname()}, process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S %z')}\n")
        file.flush()
        yield locked
