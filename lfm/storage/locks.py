"""Advisory file locks (flock), which the kernel releases when the process that holds them ends.

Some mounts support no locks (Lustre without `-o flock`, NFS without a lock daemon). There, files are written without a
lock. Temporary names are unique and files are published by renaming, so that nothing is damaged; only the leftovers of
killed writers cannot be distinguished from the files of living ones, and stay.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path
from typing import IO

_UNSUPPORTED = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


def lock(file: IO[bytes], *, shared: bool = False, wait: bool = True) -> bool:
    """Lock an open file until it is closed; return False if the file system supports no locks.

    Args:
        shared: allow other shared locks at the same time. An exclusive lock needs a file opened for writing, since NFS
            emulates flock by fcntl locks.

    Raises:
        BlockingIOError: the lock is held by another process and `wait` is false.
    """
    operation = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    try:
        fcntl.flock(file, operation)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return False
        raise
    return True


def is_at(file: IO[bytes], path: Path) -> bool:
    """Return whether `path` still names the open file: it may have been removed or replaced before it was locked."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def remove_unlocked(path: Path, *, without_locks: bool = False) -> bool:
    """Remove a local file that no process has locked; return whether it was removed.

    Args:
        without_locks: also remove it if the file system supports no locks.
    """
    with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("r+b") as file:
        if (lock(file, wait=False) or without_locks) and is_at(file, path):
            path.unlink()
            return True
    return False
