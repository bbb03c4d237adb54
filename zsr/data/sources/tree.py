"""Folders of raw files, on a disk or in an object store: listed in order, one folder in memory at a time.

Links are followed: whoever made the folder made them. Names that come out of tables and archives are not the owner's
own; they go through `artifact.safe_name` first.
"""

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Final, cast

from zsr.data.decode import BadImage, Limits
from zsr.data.rows import Modality
from zsr.data.sources import Item
from zsr.errors import ConfigError
from zsr.storage import filesystem, url_of

# what a picture may be called; those of other formats than JPEG, PNG and WebP are quarantined, not overlooked
PICTURES: Final = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp"),
    *(".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".ppm", ".svg"),
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in a folder. `guard` holds size and modification time, or an object store's own mark."""

    name: str
    is_folder: bool
    guard: str


@dataclass(frozen=True)
class Tree:
    """Everything below `root`, a path or a URL such as s3://bucket/prefix. Names are relative, with slashes."""

    root: str

    @classmethod
    def at(cls, root: str | Path) -> "Tree":
        return cls(url_of(root) or str(root).rstrip("/"))

    def __str__(self) -> str:
        return self.root

    @cached_property
    def _local(self) -> Path | None:
        return None if url_of(self.root) else Path(self.root)

    @cached_property
    def _store(self) -> tuple[Any, str]:
        return filesystem(self.root)

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root}  # connections stay behind

    def __setstate__(self, state: dict[str, Any]) -> None:
        object.__setattr__(self, "root", state["root"])

    def entries(self, folder: str = "") -> list[Entry]:
        """What `folder` holds, hidden names left out, sorted by name; nothing if there is no such folder."""
        found = self._local_entries(folder) if self._local else self._stored_entries(folder)
        return sorted((e for e in found if not e.name.startswith(".")), key=lambda e: os.fsencode(e.name))

    def _local_entries(self, folder: str) -> Iterator[Entry]:
        try:
            with os.scandir(Path(self.root, folder)) as listed:
                for one in listed:
                    try:
                        info = one.stat()
                    except OSError:  # a link to nowhere: reading it will say so
                        info = one.stat(follow_symlinks=False)
                    yield Entry(one.name, stat.S_ISDIR(info.st_mode), f"{info.st_size}:{info.st_mtime_ns}")
        except (FileNotFoundError, NotADirectoryError):
            return

    def _stored_entries(self, folder: str) -> Iterator[Entry]:
        files, prefix = self._store
        place = f"{prefix}/{folder}".rstrip("/")
        try:
            listed = files.ls(place, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return
        for one in listed:
            name = PurePosixPath(str(one["name"])).name
            if str(one["name"]).rstrip("/") != place:  # a store may list the folder's own mark
                mark = one.get("ETag") or one.get("etag") or one.get("mtime") or ""
                yield Entry(name, one["type"] == "directory", f"{one.get('size')}:{mark}")

    def folders(self, folder: str = "") -> list[str]:
        """Names of the folders in `folder`."""
        return [entry.name for entry in self.entries(folder) if entry.is_folder]

    def pictures(self, folder: str) -> list[Entry]:
        """The files of `folder` that are called like pictures."""
        return [e for e in self.entries(folder) if not e.is_folder and PurePosixPath(e.name).suffix.lower() in PICTURES]

    def files(self, *suffixes: str) -> list[Entry]:
        """The files at the top whose names end so."""
        return [entry for entry in self.entries() if not entry.is_folder and entry.name.endswith(suffixes)]

    def first(self, *names: str) -> str | None:
        """The first of `names` that is a folder."""
        return next((name for name in names if self.entries(name)), None)

    def open(self, name: str) -> BinaryIO:
        """A plain file, opened for reading.

        Raises:
            BadImage: a device, a socket or a named pipe, which might never end.
            OSError: missing or not to be read.
        """
        if self._local is None:
            files, prefix = self._store
            return cast(BinaryIO, files.open(f"{prefix}/{name}", "rb"))
        # a named pipe would block without O_NONBLOCK; plain files ignore it
        handle = os.fdopen(os.open(self._local / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
        if not stat.S_ISREG(os.fstat(handle.fileno()).st_mode):
            handle.close()
            raise BadImage("wrong_type", f"{name} is no plain file")
        return handle

    def read(self, name: str, start: int = 0, length: int = -1, cap: int = Limits().encoded) -> bytes:
        """`length` bytes of `name` from `start`; -1 means all of it.

        Raises:
            BadImage: more than `cap` bytes, of which none is read; or no plain file.
            OSError: missing or not to be read.
        """
        with self.open(name) as handle:
            if length < 0:
                length = handle.seek(0, os.SEEK_END) - start
            if length > cap:
                raise BadImage("oversized", f"{length} bytes, at most {cap} are read")
            handle.seek(start)
            return handle.read(length)


def picture_item(modality: Modality, path: str, label: str, entry: Entry, pair: str | None = None) -> Item:
    """The item of the picture file at `path`, which is its key as well."""
    try:
        path.encode()
    except UnicodeEncodeError:
        key, name = (text.encode(errors="backslashreplace").decode() for text in (path, label))
        return Item(modality, key, name, guard=entry.guard, problem=f"bad_key: {key}: rename it to valid UTF-8")
    return Item(modality, path, label, pair, where=path, guard=entry.guard)


def class_items(tree: Tree, modality: Modality, folder: str, spelling: Callable[[str], str]) -> Iterator[Item]:
    """The pictures of FOLDER/CLASS/FILE, class by class; `spelling` makes labels of folder names.

    Raises:
        ConfigError: there is none.
    """
    empty = True
    for name in tree.folders(folder):
        for entry in tree.pictures(f"{folder}/{name}"):
            empty = False
            yield picture_item(modality, f"{folder}/{name}/{entry.name}", spelling(name), entry)
    if empty:
        raise ConfigError(f"{tree}/{folder}: no pictures in folders of classes; expected {folder}/CLASS/NAME.jpg")
