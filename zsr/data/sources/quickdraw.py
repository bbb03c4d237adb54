"""Quick, Draw! (Google, CC BY 4.0): strokes rendered to images; and QuickDraw-Extended (Dey et al., CVPR 2019).

    ROOT/*.ndjson, *.ndjson.gz           one drawing per line, simplified or raw; the class is the line's `word`
    ROOT/*.bin                           Google's binary format; the class is the file's name
    ROOT/QuickDraw_sketches_final/CLASS/*.png    rendered already (or sketches/, sketch/)
    ROOT/QuickDraw_images_final/CLASS/*.jpg      photos (or images/, QuickDraw_images/, photo/)

At least one of these is required. The key of a drawing is CLASS/KEY_ID; if a class exists as ndjson and as bin, the
ndjson is read. A line that is not a drawing is a bad row. Drawings have no pairs.
"""

import gzip
import heapq
import itertools
import json
import logging
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Final, cast

import numpy as np
from pydantic import Field

from zsr.data.decode import BadImage
from zsr.data.drawing import Drawing, checked, draw
from zsr.data.published import Published, Spellings, published
from zsr.data.rows import Modality, order_key, row_id
from zsr.data.sources import Item
from zsr.data.sources.tree import Entry, Tree, TreeSource, class_items, elsewhere, left_out
from zsr.errors import ConfigError, DamagedArtifact

logger = logging.getLogger("zsr")

LINE: Final = 4 << 20  # max bytes of a line, to bound memory; a longer line is a bad row
RATIO: Final = 200  # max compression ratio of a gzip file of drawings; more is a decompression bomb
WHERE: Final = re.compile(r"(.+)\|(\d{15}):(\d+)")
STROKES: Final = (".ndjson", ".ndjson.gz", ".bin")
HEAD: Final = struct.Struct("<Q2sbIH")  # key_id, country, recognized, timestamp, strokes
FOLDERS: Final[dict[Modality, tuple[str, ...]]] = {
    "sketch": ("QuickDraw_sketches_final", "sketches", "sketch"),
    "photo": ("QuickDraw_images_final", "images", "QuickDraw_images", "photo"),
}


class QuickDrawOptions(Drawing):
    """Which drawings to read, and how to render them.

    Attributes:
        recognized: skip drawings that the game did not recognize.
        per_class: max drawings per class and file, sampled by a hash of their keys; 0 for all. Google has at least
            100,000 per class, QuickDraw-Extended 3,000.
    """

    recognized: bool = False
    per_class: int = Field(0, ge=0)


@dataclass(frozen=True)
class QuickDraw(TreeSource):
    """Source over a `root` with stroke files, folders of images, or both; `where` of strokes is FILE|OFFSET:LENGTH."""

    options: QuickDrawOptions = field(default_factory=QuickDrawOptions)

    @property
    def facts(self) -> Mapping[str, Any]:
        own = not self._files() and not any(folder.startswith("QuickDraw") for folder in self._folders().values())
        attribution = "Quick, Draw! by Google, CC BY 4.0; photos, where there are any, Dey et al., CVPR 2019"
        return {
            "name": "images in the layout of Quick, Draw!" if own else "quickdraw",
            "attribution": "" if own else attribution,
            "drawing": dict(self.options.facts),
        }

    @property
    def published(self) -> Published:
        return published("quickdraw")

    def items(self) -> Iterator[Item]:
        """Yield every drawing and image.

        Raises:
            ConfigError: ROOT has none of the files and folders; or a gzip file is a decompression bomb.
        """
        tree, spelling = self.tree, Spellings(self.published.classes)
        files, folders = self._files(), self._folders()
        if not files and not folders:
            raise ConfigError(f"{tree}: no *.ndjson, *.ndjson.gz or *.bin, and no folders of images")
        for file in files:
            yield from self._chosen(self._drawings(tree, file, files, spelling))
        for modality, folder in folders.items():
            yield from class_items(tree, modality, folder, spelling)
        claimed = list(folders.values())
        for modality, folder in folders.items():
            copies = [name for name in tree.named(*FOLDERS[modality]) if name not in claimed]
            left_out(tree, copies, f"(another copy: {folder}/ is read)")
            claimed += copies
        yield from elsewhere(tree, claimed, f"the folders {[names[0] for names in FOLDERS.values()]}")
        tree.unread.subtract(_ending(file.name) for file in files)

    def load(self, item: Item) -> bytes:
        """The drawing as PNG, or the encoded image."""
        item.refuse()
        tree, strokes = self.tree, WHERE.fullmatch(item.where)
        if strokes is None:
            return tree.read(item.where)
        name, offset, length = strokes[1], int(strokes[2]), int(strokes[3])
        data = _inflated(tree, name, offset, length) if _packed(name) else tree.read(name, offset, length)
        return draw(checked(_line(data)["drawing"] if _ending(name) != ".bin" else _binary_strokes(data)), self.options)

    def _files(self) -> list[Entry]:
        return [each for each in self.tree.entries() if not each.is_folder and each.name.lower().endswith(STROKES)]

    def _folders(self) -> dict[Modality, str]:
        """Folders of images, by modality."""
        found = {modality: self.tree.first(*names) for modality, names in FOLDERS.items()}
        return {modality: folder for modality, folder in found.items() if folder is not None}

    def _drawings(self, tree: Tree, file: Entry, files: list[Entry], spelling: Spellings) -> Iterator[Item]:
        if _ending(file.name) != ".bin":
            yield from self._lines(tree, file, spelling)
        elif {f"{file.name[:-4]}.ndjson", f"{file.name[:-4]}.ndjson.gz"} & {_lower_ending(each.name) for each in files}:
            logger.warning("%s/%s is skipped: the same class is read from ndjson", tree, file.name)
        else:
            yield from self._records(tree, file, spelling(file.name[:-4].removeprefix("full_binary_")))

    def _chosen(self, items: Iterator[Item]) -> Iterator[Item]:
        """Up to `per_class` items of each class, sampled by a hash of their ids; all bad lines are kept."""
        if not self.options.per_class:
            yield from items
            return
        best: dict[str | None, list[tuple[int, int, Item]]] = {}
        for number, item in enumerate(items):
            if item.problem:
                yield item
                continue
            place = -int(order_key(np.array([row_id("sketch", item.key)]), seed=0)[0])
            heap = best.setdefault(item.label, [])
            push = heapq.heappush if len(heap) < self.options.per_class else heapq.heappushpop
            push(heap, (place, -number, item))
        for label in sorted(best, key=str):
            yield from (item for _, _, item in sorted(best[label], reverse=True, key=lambda entry: entry[:2]))

    def _lines(self, tree: Tree, file: Entry, spelling: Spellings) -> Iterator[Item]:
        with _plain(tree, file) as handle:
            for number, (start, length, line) in enumerate(_read_lines(tree, file, handle), 1):
                if length > LINE:
                    yield _bad(file, number, f"oversized: a line of more than {LINE} bytes")
                elif line.strip():
                    yield from self._item(file, number, line, f"{file.name}|{start:015d}:{length}", spelling)

    def _item(self, file: Entry, number: int, line: bytes, where: str, spelling: Spellings) -> Iterator[Item]:
        try:
            row = _line(line)
        except BadImage as error:
            yield _bad(file, number, f"{error.kind}: {error}")
            return
        if row.get("recognized", True) or not self.options.recognized:
            label = spelling(row["word"])
            yield Item("sketch", f"{label}/{row['key_id']}", label, where=where, guard=file.guard)

    def _records(self, tree: Tree, file: Entry, label: str) -> Iterator[Item]:
        with tree.open(file.name) as handle:
            for number in itertools.count(1):
                start, head = handle.tell(), handle.read(HEAD.size)
                if not head:
                    return
                try:
                    key, _, recognized, _, strokes = HEAD.unpack(head)
                    _skip_strokes(handle, strokes)
                except struct.error as error:
                    raise DamagedArtifact(
                        f"{tree}/{file.name}: ends within drawing {number}; download it again, or truncate it to "
                        f"{start} bytes"
                    ) from error
                if recognized or not self.options.recognized:
                    where = f"{file.name}|{start:015d}:{handle.tell() - start}"
                    yield Item("sketch", f"{label}/{key}", label, where=where, guard=file.guard)


def _ending(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _lower_ending(name: str) -> str:
    """`name` with its extension (one of STROKES) in lower case, to compare the files of a class."""
    ending = next((each for each in STROKES if name.lower().endswith(each)), "")
    return name[: len(name) - len(ending)] + ending


def _packed(name: str) -> bool:
    return _ending(name) == ".gz"


def _bad(file: Entry, number: int, problem: str) -> Item:
    return Item("sketch", f"{file.name}:{number}", None, guard=file.guard, problem=problem)


def _read_lines(tree: Tree, file: Entry, handle: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """Offset, length and bytes of every line; only the beginning of a line that is too long."""
    offset = 0
    try:
        while line := handle.readline(LINE):
            length, rest = len(line), line
            while len(rest) == LINE and not rest.endswith(b"\n"):
                rest = handle.readline(LINE)
                length += max(1, len(rest))
            yield offset, length, line
            offset += length
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DamagedArtifact(f"{tree}/{file.name}: {error}; download it again") from error


def _line(line: bytes) -> dict[str, Any]:
    """One line of ndjson with a word, a key and a drawing. Raises BadImage for anything else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadImage("malformed", f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise BadImage("wrong_type", f"{type(row).__name__}, expected an object a line")
    if missing := [name for name in ("word", "key_id", "drawing") if name not in row]:
        raise BadImage("missing_value", f"no {missing}")
    if not isinstance(row["word"], str) or not isinstance(row["key_id"], str | int):
        raise BadImage("wrong_type", f"word {row['word']!r:.40}, key_id {row['key_id']!r:.40}; expected strings")
    return row


def _skip_strokes(handle: BinaryIO, strokes: int) -> None:
    for _ in range(strokes):
        (points,) = struct.unpack("<H", handle.read(2))
        if len(handle.read(2 * points)) < 2 * points:
            raise struct.error("truncated")


def _binary_strokes(data: bytes) -> list[np.ndarray]:
    """Strokes (2, P) of one record of the binary format: for each a uint16 count, then the x and the y as uint8."""
    strokes, at = [], HEAD.size
    for _ in range(HEAD.unpack_from(data)[-1]):
        (points,) = struct.unpack_from("<H", data, at)
        strokes.append(np.frombuffer(data, np.uint8, 2 * points, at + 2).reshape(2, points))
        at += 2 + 2 * points
    return strokes


class _Bounded(gzip.GzipFile):
    """A gzip file that raises ConfigError beyond RATIO times its size, against decompression bombs."""

    ceiling: int = 0

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() > self.ceiling:
            raise ConfigError(f"{self.name}: more than {RATIO} times its size unpacked; this is not a file of drawings")
        return super().read(size)

    def readline(self, size: int | None = -1) -> bytes:
        if self.tell() > self.ceiling:
            raise ConfigError(f"{self.name}: more than {RATIO} times its size unpacked; this is not a file of drawings")
        return super().readline(size)


def _plain(tree: Tree, file: Entry) -> BinaryIO:
    """Open `file`, decompressed if its name ends in .gz."""
    return _unpacked(tree, file.name) if _packed(file.name) else tree.open(file.name)


def _unpacked(tree: Tree, name: str) -> BinaryIO:
    raw = tree.open(name)
    packed = raw.seek(0, 2)
    raw.seek(0)
    handle = _Bounded(filename=name, fileobj=raw)
    handle.ceiling = RATIO * packed + LINE
    return cast(BinaryIO, handle)


@lru_cache(maxsize=2)
def _kept_open(tree: Tree, name: str) -> BinaryIO:
    return _unpacked(tree, name)


def _inflated(tree: Tree, name: str, offset: int, length: int) -> bytes:
    """Bytes of a gzip file, which stays open: rows of a shard are loaded in the order of the file."""
    handle = _kept_open(tree, name)
    handle.seek(offset)
    return handle.read(length)
