"""One process at a time works on the staging area of a plan; another one waits, and then finds it finished.

The lock is an advisory one on a file beside the staging area, which the operating system releases however its process
ends. It covers processes of one machine, and of several machines where a shared file system passes locks on (NFS 4,
Lustre, CephFS). Where it does not, and between machines that work on one bucket, equal plans write equal bytes, and
`Store.publish` refuses what became incomplete because another run finished first.
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
SUFFIX: Final = ".lock"  # of the file beside a staging area

_held: dict[Path, int] = {}  # open descriptors, by the file that is locked


def acquire(path: Path) -> None:
    """Hold `path` until `release`, or the end of this process; waits for a process that holds it, and says so.

    A process that holds it already goes on at once.

    Raises:
        StorageError, DiskFull: the file cannot be made.
    """
    told = False
    while path not in _held and not try_acquire(path):
        if not told:
            logger.warning("another run is at work here (%s); waiting for it to end", _owner(path))
            told = True
        time.sleep(POLL)


def try_acquire(path: Path) -> bool:
    """Hold `path` if no other process does; whether this one holds it now."""
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
    """Let others have `path`, and remove it. Nothing happens if this process does not hold it."""
    descriptor = _held.pop(path, None)
    if descriptor is not None:
        path.unlink(missing_ok=True)  # while it is held: see `_locked`
        os.close(descriptor)


def release_all() -> None:
    """Let go of what a failed job holds, and of folders that it made for nothing else."""
    for path in list(_held):
        release(path)
        with suppress(OSError):  # not empty: the next run goes on there
            path.parent.rmdir()
            path.parent.parent.rmdir()


def _locked(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in WITHOUT_LOCKS
    try:  # who had it before may have removed the file, and a third process may hold a new one of this name
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _owner(path: Path) -> str:
    try:
        return f"{path.read_text(errors='replace')[:200]}, {path}"
    except OSError:
        return str(path)
