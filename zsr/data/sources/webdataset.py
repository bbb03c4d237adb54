"""WebDataset tars: members of one sample share a base name, and the extension gives their type.

    ROOT/00000.tar: a/17.jpg  a/17.txt  a/17.cls  a/17.json  a/18.jpg ...

Extensions: jpg, png and other image extensions (a photo), sketch.png and the like (a sketch), photo.jpg (a photo in a
sample with a sketch), txt (a text, UTF-8), cls (the class, as a name or a number), json (an object; label or class,
text or caption). Sketches and texts are paired with the photo of their sample. Keys are TAR/BASE.EXTENSION.

Listing reads the headers of a tar sequentially and never unpacks it: an item holds the offset of its bytes, and loading
reads only those. The members of a sample may be anywhere in their tar: the member list of one tar is held in memory.
Compressed tars (.tar.gz) are rejected. Members that are not regular files, or whose names lead out of the archive, are
bad rows.
"""

import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Final

from zsr.data.decode import BadImage
from zsr.data.rows import Modality, canonical_label
from zsr.data.sources import Item
from zsr.data.sources.tree import (
    HEAD,
    TreeSource,
    begins_like_an_image,
    called_like_an_image,
    may_be_an_image,
    misplaced,
    plain_name,
)
from zsr.errors import ConfigError, DamagedArtifact

SMALL: Final = 1 << 20  # max bytes of a txt, cls or json member
DESCRIPTIONS: Final = frozenset(("txt", "cls", "json"))
PACKED: Final = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True, slots=True)
class Member:
    """One file in a tar: its offset and size in bytes, or its problem."""

    base: str
    ending: str
    start: int
    size: int
    problem: str = ""
    is_image: bool = False


@dataclass(frozen=True, slots=True)
class Tar:
    """One tar: its path below the root, and its guard."""

    path: str
    guard: str

    @property
    def name(self) -> str:
        """The prefix of the keys."""
        return self.path[: -len(".tar")]


@dataclass(frozen=True)
class WebDataset(TreeSource):
    """Source over a `root` with tars, also in folders; an item's `where` is TAR|OFFSET:LENGTH."""

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"name": "webdataset", "attribution": ""}

    def items(self) -> Iterator[Item]:
        """Yield the rows of every tar, in the order of names and members.

        Raises:
            ConfigError: no tar, or a compressed one.
            DamagedArtifact: a file that is not a tar.
        """
        tree, empty = self.tree, True
        for path, entry in tree.files(lambda path: path.lower().endswith((".tar", *PACKED))):
            if path.lower().endswith(PACKED):
                raise ConfigError(f"{tree}/{path}: compressed; decompress it (gunzip *.gz) for random access to rows")
            if not path.lower().endswith(".tar"):
                yield misplaced(path, entry, "The image lies beside the tars, and in none of them; move or remove it.")
                continue
            empty = False
            with tree.open(path) as handle:
                for group in _groups(f"{tree}/{path}", handle, tree.unread):
                    yield from _rows(Tar(path, entry.guard), handle, group)
        if empty:
            raise ConfigError(f"{tree}: no *.tar file")

    def load(self, item: Item) -> bytes:
        """The encoded image; b"" for a text."""
        item.refuse()
        if not item.where:
            return b""
        name, _, span = item.where.rpartition("|")
        start, length = map(int, span.split(":"))
        return self.tree.read(name, start, length)


class _Headers:
    """File object for `tarfile` that reads small headers only: one that claims to be huge must not fill the memory."""

    def __init__(self, handle: BinaryIO) -> None:
        self.seek, self.tell, self._read = handle.seek, handle.tell, handle.read

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= SMALL:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._read(size)


def _groups(where: str, handle: BinaryIO, unread: Counter[str]) -> Iterator[list[Member]]:
    """The members of each base name, from anywhere in the tar; other members are counted in `unread`."""
    groups: dict[str, list[Member]] = {}
    for member in _members(where, handle):
        name = PurePosixPath(member.base).name
        if name.startswith(".") or not (member.problem or member.is_image or member.ending in DESCRIPTIONS):
            unread[f"{PurePosixPath(f'_.{member.ending}').suffix or 'no ending'} in tars"] += 1
        else:
            groups.setdefault(member.base, []).append(member)
    yield from groups.values()


def _members(where: str, handle: BinaryIO) -> Iterator[Member]:
    try:
        with tarfile.open(fileobj=_Headers(handle), mode="r:") as tar:  # type: ignore[call-overload]
            for info in tar:
                tar.members = []  # otherwise tarfile keeps all of them
                if not info.isdir():
                    yield _member(info, handle)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DamagedArtifact(f"{where}: not readable as a tar: {error}; download it again or remove it") from error


def _member(info: tarfile.TarInfo, handle: BinaryIO) -> Member:
    problem = "" if info.isreg() and not info.issparse() else "wrong_type: The member is no plain file."
    path = info.name
    try:
        path = plain_name(info.name)
        path.encode()
    except BadImage as error:
        problem = f"bad_path: {error}"
    except UnicodeEncodeError:
        problem = "bad_path: The name of the member is not valid UTF-8; rename it."
    folder, _, name = path.rpartition("/")
    # the whole name of a hidden file is its base name: ._17.jpg belongs to no sample
    stem, _, ending = name.partition(".") if not name.startswith(".") else (name, "", "")
    base = f"{folder}/{stem}" if folder else stem
    is_image = not problem and (
        called_like_an_image(name)
        or (may_be_an_image(name) and ending not in DESCRIPTIONS and begins_like_an_image(_peek(handle, info)))
    )
    return Member(base, ending.lower(), info.offset_data, info.size, problem, is_image)


def _peek(handle: BinaryIO, info: tarfile.TarInfo) -> bytes:
    """The first bytes of a member."""
    back = handle.tell()  # tarfile continues from here
    handle.seek(info.offset_data)
    head = handle.read(min(HEAD, info.size))
    handle.seek(back)
    return head


def _rows(tar: Tar, handle: BinaryIO, group: list[Member]) -> Iterator[Item]:
    """The rows of the members of one base name; a member with a problem is a bad row."""
    bad = [m for m in group if m.problem]
    texts: dict[str, str] = {}
    twice = ""
    for member in (m for m in group if not m.problem and not m.is_image):
        try:
            content = _small(handle, member)
        except BadImage as error:
            bad.append(Member(member.base, member.ending, 0, 0, f"{error.kind}: {error}"))
            continue
        if texts.setdefault(member.ending, content) != content:
            twice = f"conflict: The tar holds two different members {member.base}.{member.ending}; keep one of them."
    label, text, problem = _described(texts)
    problem = twice or problem
    images = [m for m in group if m.is_image]
    photo = next((_key(tar, m) for m in images if _modality(m) == "photo"), None)
    for member in images:
        modality = _modality(member)
        pair = None if modality == "photo" else photo
        where = f"{tar.path}|{member.start:015d}:{member.size}"
        yield Item(modality, _key(tar, member), label, pair, where, guard=tar.guard, problem=problem)
    if text is not None or (not images and not bad):
        key = _key(tar, Member(group[0].base, "txt", 0, 0))
        problem = problem or ("" if text is not None else "missing_value: There is neither an image nor a text.")
        yield Item("text", key, label, photo, text=text, guard=tar.guard, problem=problem)
    for member in bad:
        yield Item("photo", _key(tar, member), None, guard=tar.guard, problem=member.problem)


def _small(handle: BinaryIO, member: Member) -> str:
    if member.size > SMALL:
        raise BadImage("oversized", f"The {member.ending} has {member.size} bytes; at most {SMALL} are read.")
    handle.seek(member.start)
    data = handle.read(member.size)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadImage("bad_text", f"The {member.ending} is not UTF-8: {error}.") from error


def _described(texts: Mapping[str, str]) -> tuple[str | None, str | None, str]:
    """Label, text and problem from the members cls, txt and json; json is used where the others are missing."""
    label, text, more = texts.get("cls"), texts.get("txt"), {}
    if "json" in texts:
        try:
            more = json.loads(texts["json"])
        except (ValueError, RecursionError) as error:
            return None, text, f"malformed: The json cannot be read: {error}."
    if not isinstance(more, dict):
        return None, text, f"wrong_type: The json holds {type(more).__name__}; expected an object."
    label = more.get("label", more.get("class")) if label is None else label.strip()
    text = more.get("text", more.get("caption")) if text is None else text
    if not isinstance(label, str | int | None) or isinstance(label, bool) or not isinstance(text, str | None):
        return None, None, f"wrong_type: The label is {label!r:.40}, the text {text!r:.40}; expected strings."
    return None if label in (None, "") else canonical_label(str(label)), text, ""


def _modality(member: Member) -> Modality:
    return "sketch" if PurePosixPath(member.ending).stem == "sketch" and "." in member.ending else "photo"


def _key(tar: Tar, member: Member) -> str:
    """TAR/BASE.EXTENSION, with undecodable characters escaped."""
    name = f"{tar.name}/{member.base}" + (f".{member.ending}" if member.ending else "")
    return name.encode(errors="backslashreplace").decode().replace("\0", "\\0")
