"""Artifacts in an object store: the same layout under a prefix, and a verified local read cache.

    s3://bucket/prefix/{staging,objects,versions}/...     as in a folder; a ROOT can be copied either way
    CACHE/HASH-OF-URL/objects/DIGEST/FILE                 downloaded files, hashed before they are parsed

CACHE is $ZSR_CACHE or ~/.cache/zsr, and holds at most $ZSR_CACHE_BYTES (50 GiB): the least recently used files are
evicted first, but none that was used in the last ten minutes. Object stores cannot rename, so a sealed artifact is
copied from staging on the server side, its manifest last; an upload is atomic. A version is a conditional put.
"""

import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from zsr.artifact.disk import disk_errors, hash_handle
from zsr.artifact.format import FileEntry, canonical
from zsr.errors import ConfigError, DamagedArtifact, StorageError
from zsr.storage import filesystem, remote_errors

CONDITIONAL: Final = ("s3", "s3a")  # schemes whose client sends `If-None-Match: *`; others only check beforehand
PROBE: Final = "versions/.conditional-put"
CACHE_BYTES: Final = 50 << 30
IN_USE: Final = 600  # seconds during which a downloaded file is not evicted, since it is about to be opened

_honoured: set[str] = set()  # stores that were checked for conditional put
_room: dict[Path, int] = {}  # free bytes of each cache, as of its last scan


def cache_directory(url: str) -> Path:
    """Directory of this machine's downloads from `url`."""
    base = os.environ.get("ZSR_CACHE") or "~/.cache/zsr"
    return Path(base).expanduser().absolute() / hashlib.sha256(url.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Bucket:
    """The prefix `url` of an object store, partly mirrored in the directory `mirror`. Names are relative to both."""

    url: str
    mirror: Path

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "mirror": self.mirror}  # connections are not pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @cached_property
    def _store(self) -> tuple[Any, str]:
        return filesystem(self.url)

    @contextmanager
    def _at(self, name: str) -> Iterator[tuple[Any, str]]:
        found, base = self._store
        with remote_errors(f"{self.url}/{name}"):
            yield found, f"{base}/{name}"

    def read(self, name: str, cap: int) -> bytes:
        """At most `cap` bytes of `name`. Raises FileNotFoundError, StorageError."""
        try:
            with self._at(name) as (store, path):
                data: bytes = store.cat_file(path, start=0, end=cap)
        except StorageError as error:
            if _code(error) in ("InvalidRange", "416"):  # a byte range of an empty file is invalid
                return b""
            raise
        return data

    def write(self, name: str, data: bytes) -> None:
        """Put `data` at `name`, atomically."""
        with self._at(name) as (store, path):
            store.pipe_file(path, data)

    def upload(self, source: Path, name: str) -> None:
        """Put the file `source` at `name`, atomically."""
        with self._at(name) as (store, path):
            store.put_file(str(source), path)

    def copy(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Copy names to names, on the server side and in parallel."""
        sources, targets = zip(*pairs, strict=True)
        with self._at("") as (store, base):
            store.copy([base + name for name in sources], [base + name for name in targets], on_error="raise")

    def exists(self, name: str) -> bool:
        with self._at(name) as (store, path):
            return bool(store.exists(path))

    def sizes(self, folder: str) -> dict[str, int]:
        """Size in bytes of everything below `folder`, by name relative to it; empty if there is nothing."""
        try:
            with self._at(folder) as (store, path):
                found = store.find(path, detail=True)
        except FileNotFoundError as error:  # an empty prefix does not raise, so the bucket is missing
            raise StorageError(f"{self.url}: {error}; create the bucket first") from error
        return {name[len(path) + 1 :]: int(about["size"]) for name, about in found.items() if len(name) > len(path)}

    def remove(self, name: str) -> None:
        """Remove the file `name`, or everything below the folder `name`, in the store and in the mirror."""
        with self._at(name) as (store, path):
            if store.exists(path):
                store.rm(path, recursive=True)
        place = self.mirror / name
        if place.is_dir():
            shutil.rmtree(place, ignore_errors=True)
        else:
            place.unlink(missing_ok=True)

    def create(self, name: str, content: dict[str, str]) -> bool:
        """Put `content` at `name` if there is nothing, in one request; returns whether this call created it.

        The content includes a writer id, so that a request that succeeded but was retried is recognized as our own.
        """
        self.require_conditional_put()
        data = canonical({**content, "writer": uuid.uuid4().hex})
        return self._create(name, data) or self.read(name, len(data) + 1) == data

    def _create(self, name: str, data: bytes) -> bool:
        for wait in (0.1, 0.3, 1.0, 3.0):
            try:
                with self._at(name) as (store, path):
                    store.pipe_file(path, data, mode="create")
                return True
            except FileExistsError:
                return False
            except StorageError as error:
                code = _code(error)
                if code in ("PreconditionFailed", "412"):  # from stores whose error does not name the failed condition
                    return False
                if code not in ("ConditionalRequestConflict", "409"):
                    raise
                time.sleep(wait)  # another request for this name is in progress: retry to learn its outcome
        raise StorageError(f"{self.url}/{name}: conflict with other writers for seconds; run the same command again")

    def require_conditional_put(self) -> None:
        """Reject a store in which two publishers could create the same version; checked once per process.

        Raises:
            StorageError: its client does not send the condition, or the store ignores it.
        """
        if self.url in _honoured:
            return
        scheme = self.url.partition(":")[0]
        if scheme in CONDITIONAL:
            marker = b"tells whether this store honours If-None-Match"
            self._create(PROBE, marker)
            if not self._create(PROBE, marker):
                _honoured.add(self.url)
                return
        raise StorageError(
            f"{self.url}: no conditional put (If-None-Match: *), so two publishers could create the same version; use "
            "an S3-compatible store that has it, or a shared POSIX directory"
        )

    def fetch(self, name: str, entry: FileEntry) -> Path:
        """Path of the file `name` in the mirror; downloaded and hashed unless it is there with the right size.

        Raises:
            DamagedArtifact: missing, or its size or hash differs from `entry`.
        """
        target = self.mirror / name
        try:
            if target.lstat().st_size == entry.bytes:
                os.utime(target, ns=(time.time_ns(), target.lstat().st_mtime_ns))  # atime for LRU eviction; keep mtime
                return target
        except FileNotFoundError:
            pass
        _make_room(self.mirror.parent, entry.bytes)
        temporary = target.with_name(f".{target.name[:200]}.{uuid.uuid4().hex}")
        with disk_errors(target, entry.bytes):
            target.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._download(name, entry, temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        return target

    def _download(self, name: str, entry: FileEntry, target: Path) -> None:
        where = f"{self.url}/{name}"
        advice = "restore it, or remove this object and run the job that made it again"
        try:
            with self._at(name) as (store, path):
                size = int(store.info(path)["size"])
                if size == entry.bytes:
                    store.get_file(path, str(target))
        except FileNotFoundError:
            raise DamagedArtifact(f"{where}: missing, but the manifest lists it; {advice}") from None
        if size != entry.bytes:
            raise DamagedArtifact(f"{where}: {size} bytes, but the manifest says {entry.bytes}; {advice}")
        with open(target, "rb") as handle:
            found = hash_handle(handle)
        if found != entry.sha256:
            raise DamagedArtifact(f"{where}: sha256 {found[:12]} but the manifest says {entry.sha256[:12]}; {advice}")


def _code(error: BaseException) -> str:
    """The store's error code in an exception of its client, "" if there is none."""
    seen: BaseException | None = error
    while seen is not None:
        response = getattr(seen, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        seen = seen.__cause__
    return ""


def cache_limit() -> int:
    """Max bytes of the cache. Raises ConfigError unless $ZSR_CACHE_BYTES is a number."""
    text = os.environ.get("ZSR_CACHE_BYTES", str(CACHE_BYTES))
    if not text.isdigit():
        raise ConfigError(f"ZSR_CACHE_BYTES={text!r}: expected a number of bytes")
    return int(text)


def _make_room(cache: Path, wanted: int) -> None:
    """Evict least recently used files until `wanted` more bytes fit; scans the cache only if it may be full."""
    _room[cache] = _room.get(cache, 0) - wanted
    if _room[cache] >= 0:
        return
    files = []
    for path in cache.glob("*/objects/*/**/*"):
        try:
            info = path.lstat()
        except FileNotFoundError:
            continue
        if path.is_file():
            files.append((info.st_atime, info.st_size, path))
    room = cache_limit() - wanted - sum(size for _, size, _ in files)
    for used, size, path in sorted(files):
        if room >= 0 or time.time() - used < IN_USE:
            break
        path.unlink(missing_ok=True)
        room += size
    _room[cache] = room
