"""User data of image-text pairs: tables of texts and image paths, and images in folders of classes.

    ROOT/ANY.jsonl              {"image": "shop/12.jpg", "text": "ripe bananas", "label": "banana"}, one object per line
    ROOT/ANY.csv                the same with a header line; .tsv with tabs
    ROOT/train/metadata.csv     Hugging Face's image folders: `file_name` is the image
    ROOT/photo/CLASS/*.jpg      more images, whose class is the folder (optional)

A line has an image (a path relative to the table's folder), a text, or both; `file_name`, `class` and `caption` are
read if `image`, `label` and `text` are missing. A line with both becomes a photo row and a text row whose `pair` is the
photo; an image in several lines is one photo row with several texts. The key of a photo is its path below ROOT, that of
a text FILE:LINE. An unusable line is a bad row with that key, as is an image outside photo/CLASS that no line names.
The paths of all images are held in memory.
"""

import csv
import json
import logging
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final

from zsr.data.decode import BadImage
from zsr.data.rows import canonical_label
from zsr.data.sources import Item
from zsr.data.sources.tree import (
    Entry,
    Tree,
    TreeSource,
    called_like_an_image,
    misplaced,
    picture_item,
    plain_name,
)
from zsr.errors import ConfigError

COLUMNS: Final = {"image": ("image", "file_name"), "text": ("text", "caption"), "label": ("label", "class")}
KNOWN: Final = frozenset(name for names in COLUMNS.values() for name in names)
JSON_LINES: Final = (".jsonl", ".ndjson")
DELIMITERS: Final = {".csv": ",", ".tsv": "\t"}
LINE: Final = 16 << 20  # max bytes of one line, to bound memory
LABEL: Final = 200  # max characters
UTF16: Final = (b"\xff\xfe", b"\xfe\xff")

logger = logging.getLogger("zsr")


@dataclass(frozen=True)
class Pairs(TreeSource):
    """Source over a `root` with tables and images."""

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"name": "pairs", "attribution": ""}

    def items(self) -> Iterator[Item]:
        """Yield the photo rows of all lines and folders, and the text rows of all lines.

        Raises:
            ConfigError: no table; a table without a header, or with its images in another column; or UTF-16.
        """
        tree, found = self.tree, _Found(self.tree)
        tables = [path for path, _ in tree.walk() if _is_table(path)]
        tree.unread.clear()  # the whole folder is walked again below
        if not tables:
            raise ConfigError(
                f"{tree}: no *.jsonl, *.csv or *.tsv; expected a table with the columns {sorted(KNOWN)}; for images "
                "without texts use --source folders"
            )
        for table in tables:
            for number, row in _rows(tree, table):
                yield from _items(found, table, number, row)
        for path, entry in tree.files(lambda path: path in found.labels or _is_table(path)):
            if path not in found.labels and not _is_table(path):
                yield _unnamed(path, entry)


def _is_table(path: str) -> bool:
    return PurePosixPath(path).suffix.lower() in (*JSON_LINES, *DELIMITERS)


def _unnamed(path: str, entry: Entry) -> Item:
    """The row of an image that no line names: its class is its folder below photo/, or it is a bad row."""
    top, _, below = path.partition("/")
    name, in_class, _ = below.partition("/")
    if top.casefold() == "photo" and in_class:
        return picture_item("photo", path, canonical_label(name), entry)
    return misplaced(path, entry, "No line that can be used names the image, and it lies outside of photo/CLASS/.")


class _Found:
    """The images named by lines so far: their `labels` by path, and the spelling of paths on disk."""

    def __init__(self, tree: Tree) -> None:
        self.labels: dict[str, str | None] = {}
        self._tree = tree
        self._folders = {"": ""}
        self._listed: str | None = None
        self._entries: dict[str, Entry] = {}

    def image(self, path: str) -> tuple[str, Entry | None]:
        """Path and entry of the file `path`, or of one whose name differs only in Unicode form or case.

        The entry is None if there is no such file.
        """
        folder, _, name = path.rpartition("/")
        if folder not in self._folders:
            self._folders[folder] = self.image(folder)[0]
        folder = self._folders[folder]
        if folder != self._listed:
            # tables usually list images folder by folder, so caching one folder is enough
            entries = self._tree.entries(folder)
            self._listed = folder
            self._entries = {_alike(entry.name): entry for entry in entries} | {entry.name: entry for entry in entries}
        entry = self._entries.get(name) or self._entries.get(_alike(name))
        name = entry.name if entry else name
        return (f"{folder}/{name}" if folder else name), entry


def _alike(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _items(found: _Found, table: str, number: int, row: Mapping[str, Any] | str) -> Iterator[Item]:
    """The rows of one line; `row` holds its values, or the message of a problem."""
    at = f"{table}:{number}"
    entry: Entry | None = None
    try:
        if isinstance(row, str):
            raise BadImage("malformed", row)
        image, text, label = _values(row, at)
        if image:
            folder = table.rpartition("/")[0]
            image, entry = found.image(f"{folder}/{image}" if folder else image)
        if image and found.labels.get(image, label) != label:
            before = found.labels[image]
            raise BadImage(
                "conflict", f"The label is {label!r}, but {image} was {before!r} in a line before; give it one label."
            )
    except BadImage as error:
        yield Item("text", at, None, problem=f"{error.kind}: {error}")
        return
    if image and image not in found.labels:
        found.labels[image] = label
        yield _photo(image, label, entry)
    if text or not image:
        yield Item("text", at, label, pair=image or None, text=text)


def _photo(path: str, label: str | None, entry: Entry | None) -> Item:
    if entry is None:
        return Item("photo", path, label, problem="unreadable: A line names the image, but there is no such file.")
    return picture_item("photo", path, label, entry)


def _values(row: Mapping[str, Any], at: str) -> tuple[str, str, str | None]:
    """Image, text and label of a line.

    Raises:
        BadImage: unusable values.
        ConfigError: the image is in another column.
    """
    values = {
        ours: next((row[name] for name in names if row.get(name) is not None), None) for ours, names in COLUMNS.items()
    }
    if _number(values["label"]):
        values["label"] = str(values["label"])
    for name, value in values.items():
        if not isinstance(value, str | None):
            raise BadImage("wrong_type", f"The {name} is {type(value).__name__} {value!r:.40}; expected a string.")
    if not row.keys() & set(COLUMNS["image"]):
        _refuse_other_columns(row, at)
    image, text, label = (value or "" for value in values.values())
    if not image and values["text"] is None:
        raise BadImage(
            "missing_value", f"There is neither image nor text; the columns are {sorted(map(str, row))[:8]}."
        )
    if len(label) > LABEL or not _plain(label):
        raise BadImage(
            "bad_label", f"The label has {len(label)} characters; expected at most {LABEL}, none of them control."
        )
    try:
        image = plain_name(image) if image else ""
        (image + text).encode()
    except UnicodeEncodeError as error:
        raise BadImage("bad_text", "The line is not UTF-8; convert the table.") from error
    return image, text, canonical_label(label) or None


def _refuse_other_columns(row: Mapping[str, Any], at: str) -> None:
    """Raise ConfigError if a column that is not read names images: they would be silently left out."""
    for name, value in row.items():
        if name not in KNOWN and isinstance(value, str) and "\n" not in value and called_like_an_image(value):
            raise ConfigError(
                f"{at}: the column {name!r} names an image ({value[:80]!r}), but images are read from "
                f"{list(COLUMNS['image'])}; rename the column"
            )


def _number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _plain(label: str) -> bool:
    return all(character.isprintable() for character in label)


def _rows(tree: Tree, path: str) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    """Line number, and values or a problem, of every line of a table; unknown columns are logged once.

    Raises:
        ConfigError: see `_csv`; or UTF-16.
    """
    suffix, extra = PurePosixPath(path).suffix.lower(), set[str]()
    for number, row in _csv(tree, path, DELIMITERS[suffix]) if suffix in DELIMITERS else _jsonl(tree, path):
        if not isinstance(row, str):
            extra.update(map(str, row.keys() - KNOWN))
        yield number, row
    if extra:
        logger.warning("%s/%s: ignored columns: %s", tree, path, ", ".join(sorted(extra)[:20]))


def _lines(tree: Tree, path: str) -> Iterator[str | None]:
    """The lines of a table; None for a line that is too long. Bytes that are not UTF-8 become surrogates."""
    with tree.open(path) as handle:
        first = True
        while line := handle.readline(LINE):
            if first and line.startswith(UTF16):
                raise ConfigError(f"{tree}/{path}: is UTF-16, expected UTF-8; save it as UTF-8")
            if len(line) < LINE or line.endswith(b"\n"):
                yield line.decode("utf-8-sig" if first else "utf-8", "surrogateescape")
            else:
                while (line := handle.readline(LINE)) and not line.endswith(b"\n"):
                    pass
                yield None
            first = False


def _jsonl(tree: Tree, path: str) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    for number, line in enumerate(_lines(tree, path), 1):
        if line is None:
            yield number, f"The line has more than {LINE} bytes."
        elif line.strip():
            yield number, _object(line)


def _object(line: str) -> Mapping[str, Any] | str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"The line is not JSON: {error}."
    return row if isinstance(row, dict) else f"The line is {type(row).__name__}; expected an object a line."


def _csv(tree: Tree, path: str, delimiter: str) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    csv.field_size_limit(LINE)  # LINE bounds memory already; a long text must be quarantined, not raise csv.Error
    too_long: set[int] = set()
    reader = csv.DictReader(_cut(_lines(tree, path), too_long), strict=True, delimiter=delimiter)
    try:
        columns = list(reader.fieldnames or ())
    except csv.Error as error:
        raise ConfigError(f"{tree}/{path}: header: {error}; expected columns of {sorted(KNOWN)}") from error
    if not set(columns) & KNOWN:
        raise ConfigError(f"{tree}/{path}: found the columns {columns[:8]}; expected some of {sorted(KNOWN)}")
    while True:
        try:
            row: Mapping[Any, Any] = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield reader.reader.line_num, f"The line is not CSV: {error}."
            continue
        if reader.line_num in too_long:
            yield reader.line_num, f"The line has more than {LINE} bytes."
        elif None in row:
            more = len(row[None])
            yield reader.line_num, f"The line has {more} values more than columns; put quotes around texts with commas."
        else:
            yield reader.line_num, row


def _cut(lines: Iterator[str | None], too_long: set[int]) -> Iterator[str]:
    """`lines` for the CSV parser; the numbers (from 1) of lines that are too long are added to `too_long`."""
    for number, line in enumerate(lines, 1):
        if line is None:
            too_long.add(number)
        yield line or "-\n"  # the parser skips empty lines, and the row would be lost
