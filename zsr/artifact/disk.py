"""Files on a POSIX disk: open regular files only, write atomically, and compare sizes and hashes."""

import errno
import hashlib
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from zsr.artifact.format import CHUNK, FileEntry
from zsr.errors import DamagedArtifact, DiskFull, StorageError
from zsr.storage import filesystem, local_path, remote_errors, url_of


def check_size(path: Path, found: int, entry: FileEntry) -> None:
    if found != entry.bytes:
        raise DamagedArtifact(
            f"{path}: {found} bytes (sha256 not computed) but the manifest says {entry.bytes} (sha256 "
            f"{entry.sha256[:12]}); restore the file, or remove this object and run the job that made it again"
        )


def check_hash(path: Path, found: str, entry: FileEntry) -> None:
    if found != entry.sha256:
        raise DamagedArtifact(
            f"{path}: sha256 {found[:12]} but the manifest says {entry.sha256[:12]}; restore the file, or remove this "
            "object and run the job that made it again"
        )


@contextmanager
def open_regular(path: Path) -> Iterator[Any]:
    """Open a regular file, also through links; a device, pipe or directory is never opened.

    Links are allowed: snapshots (`cp -al`, rsnapshot) and content stores (DVC, git-annex) consist of hard or symbolic
    links, and a reused shard is a hard link. They cannot inject content, since every byte is compared with the SHA-256
    of the manifest before it is parsed.

    Raises:
        DamagedArtifact: missing, a dangling link, or not a regular file.
        StorageError: not readable, for example because of its permissions.
    """
    try:
        _regular(path, os.stat(path))  # before opening: opening a device may have side effects
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.ENOTDIR):
            raise DamagedArtifact(f"{path}: missing, or a dangling link ({error.strerror}); restore it") from error
        raise StorageError(f"{path}: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as handle:
        _regular(path, os.fstat(handle.fileno()))
        yield handle


def _regular(path: Path, info: os.stat_result) -> None:
    if not stat.S_ISREG(info.st_mode):
        raise DamagedArtifact(f"{path}: not a regular file but a device, pipe or directory; restore it from a copy")


def mapped(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    """A verified file as (n,) `dtype`, memory-mapped read-only.

    np.memmap would hold one file descriptor per file, but the usual limit of 1,024 is below the shards of an index.
    """
    with pa.memory_map(str(path)) as file:
        return np.frombuffer(file.read_buffer(), dtype)


def hash_handle(handle: Any) -> str:
    handle.seek(0)
    digest = hashlib.sha256()
    while chunk := handle.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(path: Path, size: int | None = None) -> Iterator[None]:
    """Turn an OSError of a write into StorageError or DiskFull, with the path and the number of bytes to write."""
    try:
        yield
    except OSError as error:
        what = f"{path}" + ("" if size is None else f" ({size} bytes)")
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFull(f"{what}: no space left; free some space and run the same command again") from error
        raise StorageError(f"{what}: {error}") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write, fsync and rename, or put at a URL in one request: readers see the whole file or none.

    Raises:
        StorageError, DiskFull: it cannot be written; no partial file is left.
    """
    if url := url_of(path):
        store, name = filesystem(url)
        with remote_errors(url):
            store.pipe_file(name, data)
        return
    path = local_path(path)
    temporary = path.with_name(f".{path.name[:200]}.{uuid.uuid4().hex}")
    with disk_errors(path, len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_directory(path.parent)
