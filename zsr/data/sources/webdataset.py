"""WebDataset tars: what belongs together has one base name, and the ending says what it is.

    ROOT/00000.tar: a/17.jpg  a/17.txt  a/17.cls  a/17.json  a/18.jpg ...

Endings: jpg, jpeg, png, webp (a photo), sketch.png and the like (a sketch), photo.jpg (a photo beside a sketch),
txt (a text, UTF-8), cls (the class, as a name or a number), json (an object; label or class, text or caption).
Sketches and texts of a base name are paired with its photo. Keys are TAR/BASE.ENDING.

Tars are read from front to back, headers only, and never unpacked: an item remembers where its bytes lie, and
loading reads those alone. Packed tars (.tar.gz) do not allow that and are refused. Members that are no plain files,
or whose names leave the archive, are bad rows.
"""

import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Final

from zsr.artifact import safe_name
from zsr.data.decode import BadImage
from zsr.data.rows import Modality, canonical_label
from zsr.data.sources import Item
from zsr.data.sources.tree import Entry, Tree
from zsr.errors import ConfigError, DamagedArtifact

IMAGES: Final = frozenset(("jpg", "jpeg", "png", "webp", "gif", "bmp"))
SMALL: Final = 1 << 20  # bytes of a txt, cls or json member


@dataclass(frozen=True, slots=True)
class Member:
    """One file in a tar: its place in bytes, or what is wrong with it."""

    base: str
    ending: str
    start: int
    size: int
    problem: str = ""


@dataclass(frozen=True)
class WebDataset:
    """`root` holds the tars; an item's `where` is TAR|OFFSET:LENGTH."""

    root: str | Path

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"name": "webdataset", "attribution": ""}

    def items(self) -> Iterator[Item]:
        """The rows of every tar, in the order of names and members.

        Raises:
            ConfigError: no tar, or a packed one.
            DamagedArtifact: a file that is no tar.
        """
        tree = Tree.at(self.root)
        if packed := tree.files(".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"):
            raise ConfigError(
                f"{tree}/{packed[0].name}: packed; unpack the tars (gunzip *.gz), so that one row can be read"
            )
        tars = tree.files(".tar")
        if not tars:
            raise ConfigError(f"{tree}: no *.tar file")
        for tar in tars:
            with tree.open(tar.name) as handle:
                for group in _groups(f"{tree}/{tar.name}", handle):
                    yield from _rows(tar, handle, group)

    def load(self, item: Item) -> bytes:
        """The picture; b"" for a text."""
        item.refuse()
        if not item.where:
            return b""
        name, _, span = item.where.rpartition("|")
        start, length = map(int, span.split(":"))
        return Tree.at(self.root).read(name, start, length)

    def feature(self, item: Item) -> None:
        """Tars come without features."""
        return None


class _Headers:
    """What `tarfile` reads: headers only, so that one that claims to be huge is a damaged tar and not a full memory."""

    def __init__(self, handle: BinaryIO) -> None:
        self.seek, self.tell, self._read = handle.seek, handle.tell, handle.read

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= SMALL:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._read(size)


def _groups(where: str, handle: BinaryIO) -> Iterator[list[Member]]:
    """Runs of members with one base name."""
    group: list[Member] = []
    for member in _members(where, handle):
        if group and member.base != group[0].base:
            yield group
            group = []
        group.append(member)
    if group:
        yield group


def _members(where: str, handle: BinaryIO) -> Iterator[Member]:
    try:
        with tarfile.open(fileobj=_Headers(handle), mode="r:") as tar:  # type: ignore[call-overload]
            for info in tar:
                tar.members = []  # it would keep all of them
                if not info.isdir():
                    yield _member(info)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DamagedArtifact(f"{where}: not readable as a tar: {error}; fetch it again or leave it out") from error


def _member(info: tarfile.TarInfo) -> Member:
    folder, _, name = info.name.rpartition("/")
    stem, _, ending = name.partition(".")
    base = f"{folder}/{stem}" if folder else stem
    problem = "" if info.isreg() and not info.issparse() else "wrong_type: no plain file"
    try:
        safe_name(info.name)
        info.name.encode()
    except (DamagedArtifact, UnicodeEncodeError) as error:
        problem = f"bad_path: {error!s:.300}"
    return Member(base, ending.lower(), info.offset_data, info.size, problem)


def _rows(tar: Entry, handle: BinaryIO, group: list[Member]) -> Iterator[Item]:
    """The rows of the members of one base name; whatever is wrong with one of them is a bad row."""
    bad = [m for m in group if m.problem]
    texts: dict[str, str] = {}
    for member in (m for m in group if not m.problem and m.ending in ("txt", "cls", "json")):
        try:
            texts[member.ending] = _small(handle, member)
        except BadImage as error:
            bad.append(Member(member.base, member.ending, 0, 0, f"{error.kind}: {error}"))
    label, text, problem = _described(texts)
    images = [m for m in group if not m.problem and m.ending.rpartition(".")[2] in IMAGES]
    photo = next((_key(tar, m) for m in images if _modality(m) == "photo"), None)
    for member in images:
        modality = _modality(member)
        pair = None if modality == "photo" else photo
        where = f"{tar.name}|{member.start:015d}:{member.size}"
        yield Item(modality, _key(tar, member), label, pair, where, guard=tar.guard, problem=problem)
    if text is not None or (not images and not bad):
        key = _key(tar, Member(group[0].base, "txt", 0, 0))
        problem = problem or ("" if text is not None else "missing_value: neither a picture nor a text")
        yield Item("text", key, label, photo, text=text, guard=tar.guard, problem=problem)
    for member in bad:
        yield Item("photo", _key(tar, member), None, guard=tar.guard, problem=member.problem)


def _small(handle: BinaryIO, member: Member) -> str:
    if member.size > SMALL:
        raise BadImage("oversized", f"{member.ending} of {member.size} bytes, at most {SMALL} are read")
    back = handle.tell()  # tarfile goes on from here
    handle.seek(member.start)
    data = handle.read(member.size)
    handle.seek(back)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadImage("bad_text", f"{member.ending}: {error}") from error


def _described(texts: Mapping[str, str]) -> tuple[str | None, str | None, str]:
    """Label, text and problem as the members cls, txt and json say; json counts where the others are missing."""
    label, text, more = texts.get("cls"), texts.get("txt"), {}
    if "json" in texts:
        try:
            more = json.loads(texts["json"])
        except (ValueError, RecursionError) as error:
            return None, text, f"malformed: json: {error}"
    if not isinstance(more, dict):
        return None, text, f"wrong_type: json holds {type(more).__name__}, expected an object"
    label = more.get("label", more.get("class")) if label is None else label.strip()
    text = more.get("text", more.get("caption")) if text is None else text
    if not isinstance(label, str | int | None) or isinstance(label, bool) or not isinstance(text, str | None):
        return None, None, f"wrong_type: label {label!r:.40}, text {text!r:.40}; expected strings"
    return None if label in (None, "") else canonical_label(str(label)), text, ""


def _modality(member: Member) -> Modality:
    return "sketch" if PurePosixPath(member.ending).stem == "sketch" and "." in member.ending else "photo"


def _key(tar: Entry, member: Member) -> str:
    """TAR/BASE.ENDING, made plain where the archive's own names are not."""
    name = f"{tar.name.removesuffix('.tar')}/{member.base}" + (f".{member.ending}" if member.ending else "")
    return name.encode(errors="backslashreplace").decode().replace("\0", "\\0")
