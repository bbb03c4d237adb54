"""List folders of raw files, on disk or in an object store, in order, with one folder in memory at a time.

Links are followed, since the owner of the folder made them. Names from tables and archives are not trusted and go
through `plain_name` first. Every file that looks like an image becomes a row, used or quarantined; all other files are
counted in `Tree.unread`, so that no file is silently ignored.
"""

import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from mimetypes import MimeTypes
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Final, cast

import numpy as np

from zsr.data.decode import IMAGE_SUFFIXES, READ, BadImage, Limits
from zsr.data.rows import Modality
from zsr.data.sources import Item
from zsr.errors import ConfigError, StorageError
from zsr.storage import filesystem, local_path, remote_errors, url_of

KNOWN_TYPES: Final = MimeTypes(filenames=())  # Python's own table, the same on every machine
HEAD: Final = 64  # bytes read to detect an image by its magic number
PART: Final = 255  # max bytes of one path component, the limit of common file systems


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in a folder.

    Attributes:
        guard: size and modification time, or an object store's ETag.
        problem: "KIND: message" for a dangling link, a loop, or a folder that cannot be listed.
        inode: device and inode of a local folder.
    """

    name: str
    is_folder: bool
    guard: str
    problem: str = ""
    inode: tuple[int, int] | None = None

    @property
    def is_hidden(self) -> bool:
        return self.name.startswith(".")


@dataclass(frozen=True, eq=False)  # caches are keyed by object identity: a later Tree may find other files
class Tree:
    """Everything below `root`, a path or a URL such as s3://bucket/prefix. Names are relative, with slashes.

    Attributes:
        unread: number of files that `images` and `files` skipped, by extension or reason.
    """

    root: str
    unread: Counter[str] = field(default_factory=Counter)

    @classmethod
    def at(cls, root: str | Path) -> "Tree":
        return cls(url_of(root) or str(local_path(root)))

    def __str__(self) -> str:
        return self.root

    @cached_property
    def _local(self) -> Path | None:
        return None if url_of(self.root) else Path(self.root)

    @cached_property
    def _store(self) -> tuple[Any, str]:
        return filesystem(self.root)

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root}  # connections are not pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        object.__setattr__(self, "root", state["root"])
        object.__setattr__(self, "unread", Counter())

    def entries(self, folder: str = "") -> list[Entry]:
        """The entries of `folder` without hidden names, sorted by name; empty if there is no such folder.

        Raises:
            StorageError: it cannot be listed.
        """
        return [entry for entry in self._entries(folder) if not entry.is_hidden]

    def _entries(self, folder: str) -> list[Entry]:
        if self._local:
            try:
                return sorted(self._local_entries(folder), key=lambda e: os.fsencode(e.name))
            except OSError as error:
                raise StorageError(f"{Path(self.root, folder)}: cannot be listed: {error.strerror}") from error
        with remote_errors(self.root):
            return sorted(self._stored_entries(folder), key=lambda e: os.fsencode(e.name))

    def _local_entries(self, folder: str) -> Iterator[Entry]:
        try:
            with os.scandir(Path(self.root, folder)) as listed:
                yield from map(_local_entry, listed)
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
            if str(one["name"]).rstrip("/") != place:  # a store may list the folder's own marker object
                mark = one.get("ETag") or one.get("etag") or one.get("mtime") or ""
                yield Entry(name, one["type"] == "directory", f"{one.get('size')}:{mark}")

    def walk(self, folder: str = "", skip: Collection[str] = ()) -> Iterator[tuple[str, Entry]]:
        """Path and entry of every file below `folder`, in name order; also of folders that cannot be entered.

        Hidden files and folders are counted in `unread` and skipped.

        Args:
            skip: paths of folders to leave out.
        """
        yield from self._walk(folder, frozenset(skip), self._above(folder))

    def _walk(
        self, folder: str, skip: frozenset[str], above: frozenset[tuple[int, int]]
    ) -> Iterator[tuple[str, Entry]]:
        for entry in self._entries(folder):
            path = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_hidden:
                self.unread[_sort_of(entry)] += 1
            elif not entry.is_folder:
                yield path, entry
            elif entry.inode in above:
                yield path, replace(entry, problem="bad_link: The link leads to a folder that holds it; remove it.")
            elif path not in skip:
                try:
                    yield from self._walk(path, skip, above | ({entry.inode} if entry.inode else set()))
                except StorageError as error:
                    if self._local is None:
                        raise
                    yield path, replace(entry, problem=f"unreadable: The folder {error}.")

    def _above(self, folder: str) -> frozenset[tuple[int, int]]:
        """Device and inode of the local `folder` and of its parents: a link to one of them is a loop."""
        if self._local is None:
            return frozenset()
        place = (self._local / folder).resolve()
        infos = [each.stat() for each in (place, *place.parents) if each.exists()]
        return frozenset((info.st_dev, info.st_ino) for info in infos)

    def images(self, folder: str = "", skip: Collection[str] = ()) -> Iterator[tuple[str, Entry]]:
        """Path and entry of every file below `folder` that looks like an image; others are counted in `unread`."""
        return self.files(lambda path: False, folder, skip)

    def files(
        self, wanted: Callable[[str], bool], folder: str = "", skip: Collection[str] = ()
    ) -> Iterator[tuple[str, Entry]]:
        """Like `images`, and also the files for whose paths `wanted` is true."""
        for path, entry in self.walk(folder, skip):
            if wanted(path) or self._is_image(path, entry):
                yield path, entry
            else:
                self.unread[_sort_of(entry)] += 1

    def _is_image(self, path: str, entry: Entry) -> bool:
        """Whether the file has an image extension or header, or may contain images."""
        if entry.is_folder or called_like_an_image(entry.name):
            return True
        if not may_be_an_image(entry.name):
            return False
        if entry.problem:
            return True  # a dangling link may have been a folder of images
        try:
            return begins_like_an_image(self.read(path, length=HEAD))
        except (OSError, BadImage):
            return False

    def folders(self, folder: str = "") -> list[str]:
        """Names of the folders in `folder`."""
        return [entry.name for entry in self.entries(folder) if entry.is_folder]

    def first(self, *names: str) -> str | None:
        """The first of `names` that is a non-empty folder, as it is spelled on disk; case-insensitive."""
        return next(iter(self.named(*names)), None)

    def named(self, *names: str) -> list[str]:
        """All non-empty folders with one of `names`, case-insensitive, in the order of `names`."""
        return [found for name in names for found in self._spelt("", name.split("/")) if self.entries(found)]

    def _spelt(self, folder: str, parts: list[str]) -> list[str]:
        """Paths below `folder` whose components equal `parts` up to case, the exact one first."""
        if not parts:
            return [folder]
        alike = [name for name in self.folders(folder) if name.casefold() == parts[0].casefold()]
        alike.sort(key=lambda name: name != parts[0])
        return [p for name in alike for p in self._spelt(f"{folder}/{name}" if folder else name, parts[1:])]

    def open(self, name: str) -> BinaryIO:
        """Open a regular file for reading.

        Raises:
            BadImage: a device, a socket or a named pipe, which might never end.
            OSError: missing or not readable.
            StorageError: the object store cannot be reached.
        """
        if self._local is None:
            files, prefix = self._store
            with remote_errors(self.root):
                return cast(BinaryIO, files.open(f"{prefix}/{name}", "rb"))
        # opening a named pipe would block without O_NONBLOCK; regular files ignore it
        handle = os.fdopen(os.open(self._local / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
        if not stat.S_ISREG(os.fstat(handle.fileno()).st_mode):
            handle.close()
            raise BadImage("wrong_type", f"{name} is a device, a socket or a named pipe, and no plain file.")
        return handle

    def read(self, name: str, start: int = 0, length: int = -1, cap: int = Limits().encoded) -> bytes:
        """Read `length` bytes of `name` from `start`; -1 means all of it.

        Raises:
            BadImage: more than `cap` bytes, in which case none is read; or not a regular file.
            OSError: missing or not readable.
            StorageError: the object store cannot be reached.
        """
        with self.open(name) as handle:
            if self._local is not None:
                return _part(handle, start, length, cap)
            with remote_errors(self.root):
                return _part(handle, start, length, cap)


def _part(handle: BinaryIO, start: int, length: int, cap: int) -> bytes:
    if length < 0:
        length = handle.seek(0, os.SEEK_END) - start
    if length > cap:
        raise BadImage("oversized", f"The file has {length} bytes; at most {cap} are read.")
    handle.seek(start)
    return handle.read(length)


def _local_entry(one: os.DirEntry[str]) -> Entry:
    try:
        info = one.stat()
    except OSError as error:  # a dangling link or a link to itself
        info = one.stat(follow_symlinks=False)
        problem = f"bad_link: The link leads nowhere ({error.strerror}); fix or remove it."
        return Entry(one.name, False, f"{info.st_size}:{info.st_mtime_ns}", problem)
    folder = stat.S_ISDIR(info.st_mode)
    guard = f"{info.st_size}:{info.st_mtime_ns}"
    return Entry(one.name, folder, guard, inode=(info.st_dev, info.st_ino) if folder else None)


def _sort_of(entry: Entry) -> str:
    """The key under which `unread` counts a skipped file: its extension, or that it is hidden or macOS metadata."""
    if entry.name.startswith("._"):
        return "._*"  # macOS stores attributes of a file next to it
    if entry.name == ".DS_Store":
        return entry.name
    if entry.is_hidden:
        return "hidden folder" if entry.is_folder else "hidden file"
    return PurePosixPath(entry.name).suffix.lower() or "no ending"


def called_like_an_image(name: str) -> bool:
    """Whether `name` has an image extension, in any case."""
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def may_be_an_image(name: str) -> bool:
    """Whether the extension of `name` is of no known type."""
    return KNOWN_TYPES.guess_type(name)[0] is None


def begins_like_an_image(head: bytes) -> bool:
    """Whether the first bytes are those of an image format that is supported, with or without an extra."""
    return any(re.match(pattern, head, re.DOTALL) for _, pattern in READ)


def plain_name(name: str) -> str:
    """Normalize the relative path `name` from a table or an archive: `./a//b` and `a\\b` become a/b.

    It is only read from, so any characters are allowed, composed or not; names in artifacts are stricter.

    Raises:
        BadImage: absolute, a drive, `..`, a control character, a look-alike of `.` or `/` that spells one of these, or
            a component longer than 255 bytes.
    """
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    folded = unicodedata.normalize("NFKC", name.replace("\\", "/"))
    bad = (
        not parts
        or name.endswith(("/", "\\"))
        or folded.startswith("/")
        or re.match(r"^[A-Za-z]:", folded) is not None
        or any(ord(c) < 32 or ord(c) == 127 for c in name)
        or folded.count("/") != name.count("/") + name.count("\\")
        or ".." in folded.split("/")
        or any(len(os.fsencode(part)) > PART for part in parts)
    )
    if bad:
        shown = ascii(name[:100])
        raise BadImage(
            "bad_path", f"The name {shown} is no plain relative path, or leads out of its folder; rename it."
        )
    return "/".join(parts)


@dataclass(frozen=True)
class TreeSource:
    """Base class of sources over folders of files. `root` is a path, which is made absolute, or a URL."""

    root: str | Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", str(Tree.at(self.root)))  # absolute: tasks run in another working directory

    @cached_property
    def tree(self) -> Tree:
        return Tree.at(self.root)

    @property
    def unread(self) -> Counter[str]:
        """Number of files that were skipped, by file extension or reason; complete when `items` is exhausted."""
        return self.tree.unread

    def load(self, item: Item) -> bytes:
        """The bytes of the item's file; b"" for an item without a file."""
        item.refuse()
        return self.tree.read(item.where) if item.where else b""

    def feature(self, item: Item) -> np.ndarray | None:
        """None: image files have no precomputed features."""
        return None


def picture_item(modality: Modality, path: str, label: str | None, entry: Entry, pair: str | None = None) -> Item:
    """The item of the image file at `path`, which is also its key."""
    try:
        path.encode()
    except UnicodeEncodeError:
        key = path.encode(errors="backslashreplace").decode()
        name = None if label is None else label.encode(errors="backslashreplace").decode()
        problem = "bad_key: The name of the file is not valid UTF-8; rename it."
        return Item(modality, key, name, guard=entry.guard, problem=problem)
    where = "" if entry.problem else path
    return Item(modality, path, label, pair, where=where, guard=entry.guard, problem=entry.problem)


def misplaced(path: str, entry: Entry, expected: str) -> Item:
    """The bad row of an image in a place where the source expects none."""
    item = picture_item("photo", path, None, entry)
    return item if item.problem else replace(item, where="", problem=f"misplaced: {expected}")


def elsewhere(tree: Tree, claimed: Iterable[str], expected: str) -> Iterator[Item]:
    """Bad rows of the images outside the folders `claimed`, with a message where they were `expected`."""
    for path, entry in tree.images(skip=list(claimed)):
        yield misplaced(path, entry, f"The image lies outside of {expected}; move or remove it.")


def left_out(tree: Tree, folders: Iterable[str], reason: str) -> None:
    """Count the images in `folders` in `unread` for this `reason`: an option excludes them, or another copy is read."""
    for folder in folders:
        for _ in tree.images(folder):
            tree.unread[f"{folder}/ {reason}"] += 1


def class_items(
    tree: Tree, modality: Modality, folder: str, spelling: Callable[[str], str], unlabeled: bool = False
) -> Iterator[Item]:
    """Items of the images FOLDER/CLASS/FILE, also in folders below CLASS; `spelling` maps class names to labels.

    Args:
        unlabeled: whether images directly in FOLDER are rows without a class; otherwise they are bad rows.

    Raises:
        ConfigError: there is no image.
    """
    empty = True
    for path, entry in tree.images(folder):
        name, below, _ = path.removeprefix(f"{folder}/").partition("/")
        empty = empty and not (below or unlabeled)
        if below or unlabeled:
            yield picture_item(modality, path, spelling(name) if below else None, entry)
        else:
            yield misplaced(path, entry, f"The image lies in no class folder; move it into {folder}/CLASS/.")
    if empty:
        raise ConfigError(f"{tree}/{folder}: no images in class folders; expected {folder}/CLASS/NAME.jpg")
