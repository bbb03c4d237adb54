"""Lock of the staging area of a plan: one process works on it; others wait, and then find it finished.

It is an advisory lock on a file next to the staging area, which the operating system releases when the process ends. It
works between processes of one machine, and of several machines on a shared file system with locks (NFS 4, Lustre,
CephFS). Without such locks, and between machines that write to the same bucket, equal plans write equal bytes, and
`Store.publish` rejects work that became incomplete because another run finished first.
"""

import errno
import fcntl
import logging
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from zsr.artifact.disk import disk_errors
from zsr.errors import StorageError

logger = logging.getLogger("zsr")

WITHOUT_LOCKS: Final = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
POLL: Final = 0.2  # seconds
SUFFIX: Final = ".lock"  # suffix of the file next to a staging area

_held: dict[Path, int] = {}  # open descriptors, by locked file


def acquire(path: Path) -> None:
    """Lock `path` until `release` or the end of this process; waits, with a warning, while another process holds it.

    Returns at once if this process holds it already.

    Raises:
        StorageError, DiskFull: the file cannot be created.
    """
    told = False
    while path not in _held and not try_acquire(path):
        if not told:
            logger.warning("another run is working here (%s); waiting for it to end", _owner(path))
            told = True
        time.sleep(POLL)


def try_acquire(path: Path) -> bool:
    """Lock `path` unless another process holds it; returns whether this process holds it now."""
    if path in _held:
        return True
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):  # another process has just removed the empty folder
            return False
        raise
    if not _locked(descriptor, path):
        os.close(descriptor)
        return False
    _held[path] = descriptor
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return True


def release(path: Path) -> None:
    """Remove the lock file `path` and release the lock. Does nothing if this process does not hold it."""
    descriptor = _held.pop(path, None)
    if descriptor is not None:
        path.unlink(missing_ok=True)  # while the lock is held: see `_locked`
        os.close(descriptor)


def release_all() -> None:
    """Release all locks of a failed job, and remove folders that hold nothing else."""
    for path in list(_held):
        release(path)
        with suppress(OSError):  # not empty: the next run resumes there
            path.parent.rmdir()
            path.parent.parent.rmdir()


def _locked(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in WITHOUT_LOCKS
    try:  # the previous owner may have removed the file, and a third process may have locked a new one at this path
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _owner(path: Path) -> str:
    try:
        return f"{path.read_text(errors='replace')[:200]}, {path}"
    except OSError:
        return str(path)
