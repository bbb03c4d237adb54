"""The user's own image-text pairs: tables of texts, and pictures that they name or that lie in folders of classes.

    ROOT/ANY.jsonl              {"image": "shop/12.jpg", "text": "ripe bananas", "label": "banana"}, an object a line
    ROOT/ANY.csv                the same with a header line
    ROOT/photo/CLASS/*.jpg      further pictures, whose class is the folder (optional)

A line has an image (a path below ROOT), a text, or both; `class` is read where `label` is missing. Both make a photo
row and a text row whose `pair` is the photo; an image that stands in several lines is one photo row with several texts.
The key of a photo is its path below ROOT, that of a text FILE:LINE. A line that cannot be used is a bad row of that
key. The paths of all images are held in memory.
"""

import csv
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from zsr.artifact import safe_name
from zsr.data.decode import BadImage
from zsr.data.rows import canonical_label
from zsr.data.sources import Item
from zsr.data.sources.tree import Entry, Tree, picture_item
from zsr.errors import ConfigError, DamagedArtifact

COLUMNS: Final = ("image", "text", "label", "class")
LINE: Final = 16 << 20  # bytes of one line; more is not held in memory
LABEL: Final = 200  # characters


@dataclass(frozen=True)
class Pairs:
    """`root` holds the tables and the pictures."""

    root: str | Path

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"name": "pairs", "attribution": ""}

    def items(self) -> Iterator[Item]:
        """Photo rows of all lines and folders, and text rows of all lines.

        Raises:
            ConfigError: no table, or one without a header.
        """
        tree = Tree.at(self.root)
        tables = tree.files(".jsonl", ".csv")
        if not tables:
            raise ConfigError(f"{tree}: no *.jsonl and no *.csv; expected a table with the columns {list(COLUMNS)}")
        photos: dict[str, str | None] = {}
        folders: dict[str, dict[str, Entry]] = {}
        for table in tables:
            for number, row in _jsonl(tree, table) if table.name.endswith(".jsonl") else _csv(tree, table):
                yield from _items(tree, f"{table.name}:{number}", row, photos, folders)
        for name in tree.folders("photo"):
            for entry in tree.pictures(f"photo/{name}"):
                if (path := f"photo/{name}/{entry.name}") not in photos:
                    yield picture_item("photo", path, canonical_label(name), entry)

    def load(self, item: Item) -> bytes:
        item.refuse()
        return Tree.at(self.root).read(item.where) if item.where else b""

    def feature(self, item: Item) -> None:
        """Pairs come without features."""
        return None


def _items(
    tree: Tree,
    at: str,
    row: Mapping[str, Any] | str,
    photos: dict[str, str | None],
    folders: dict[str, dict[str, Entry]],
) -> Iterator[Item]:
    """The rows of one line, which is its values or what is wrong with it. `photos` are those of the lines before."""
    try:
        if isinstance(row, str):
            raise BadImage("malformed", row)
        image, text, label = _values(row)
        if image and photos.get(image, label) != label:
            raise BadImage("conflict", f"label {label!r}, but {image} was {photos[image]!r} before; give it one label")
    except BadImage as error:
        yield Item("text", at, None, problem=f"{error.kind}: {error}")
        return
    if image and image not in photos:
        photos[image] = label
        yield Item("photo", image, label, where=image, guard=_guard(tree, image, folders))
    if text or not image:
        yield Item("text", at, label, pair=image or None, text=text)


def _values(row: Mapping[str, Any]) -> tuple[str, str, str | None]:
    """Image, text and label of a line. Raises BadImage for values that cannot be used."""
    label = row.get("label", row.get("class"))
    values = {"image": row.get("image"), "text": row.get("text"), "label": str(label) if _number(label) else label}
    for name, value in values.items():
        if not isinstance(value, str | None):
            raise BadImage("wrong_type", f"{name} is {type(value).__name__} {value!r:.40}, expected a string")
    image, text, label = (value or "" for value in values.values())
    if not image and values["text"] is None:
        raise BadImage("missing_value", f"neither image nor text; its columns are {sorted(map(str, row))[:8]}")
    if len(label) > LABEL or not _plain(label):
        raise BadImage("bad_label", f"label of {len(label)} characters; expected at most {LABEL}, none of them control")
    try:
        image = str(safe_name(image)) if image else ""
        (image + text).encode()
    except DamagedArtifact as error:
        raise BadImage("bad_path", f"image: {error!s:.300}") from error
    except UnicodeEncodeError as error:
        raise BadImage("bad_text", "not UTF-8") from error
    return image, text, canonical_label(label) or None


def _number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _plain(label: str) -> bool:
    return all(character.isprintable() for character in label)


def _guard(tree: Tree, path: str, folders: dict[str, dict[str, Entry]]) -> str:
    """The mark of a picture; "" for one that is not there, which loading finds and quarantines."""
    folder, name = os.path.split(path)
    if folder not in folders:
        folders.clear()  # tables go folder by folder as a rule; one at a time is kept
        folders[folder] = {entry.name: entry for entry in tree.entries(folder)}
    entry = folders[folder].get(name)
    return entry.guard if entry else ""


def _lines(tree: Tree, table: Entry) -> Iterator[str | None]:
    """The lines of a table; None for one that is too long. Bytes that are no UTF-8 become surrogates."""
    with tree.open(table.name) as handle:
        while line := handle.readline(LINE):
            if len(line) < LINE or line.endswith(b"\n"):
                yield line.decode("utf-8", "surrogateescape")
                continue
            while (line := handle.readline(LINE)) and not line.endswith(b"\n"):
                pass
            yield None


def _jsonl(tree: Tree, table: Entry) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    for number, line in enumerate(_lines(tree, table), 1):
        if line is None:
            yield number, f"a line of more than {LINE} bytes"
        elif line.strip():
            yield number, _object(line)


def _object(line: str) -> Mapping[str, Any] | str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    return row if isinstance(row, dict) else f"found {type(row).__name__}, expected an object a line"


def _csv(tree: Tree, table: Entry) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    csv.field_size_limit(LINE)  # the cap on lines bounds memory; a text that is merely long is a row to quarantine
    too_long: set[int] = set()
    reader = csv.DictReader(_cut(_lines(tree, table), too_long), strict=True)
    try:
        columns = [name.lstrip("\ufeff") for name in reader.fieldnames or ()]
        reader.fieldnames = columns
    except csv.Error as error:
        raise ConfigError(f"{tree}/{table.name}: its header: {error}; expected columns of {list(COLUMNS)}") from error
    if not set(columns) & set(COLUMNS):
        raise ConfigError(f"{tree}/{table.name}: the columns {columns[:8]}; expected some of {list(COLUMNS)}")
    while True:
        try:
            row: Mapping[Any, Any] = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield reader.reader.line_num, str(error)
            continue
        if reader.line_num in too_long:
            yield reader.line_num, f"a line of more than {LINE} bytes"
        elif None in row:
            yield reader.line_num, f"{len(row[None])} values more than columns; put quotes around texts with commas"
        else:
            yield reader.line_num, row


def _cut(lines: Iterator[str | None], too_long: set[int]) -> Iterator[str]:
    """`lines` for the parser of tables, which counts from 1; numbers of those that are missing go to `too_long`."""
    for number, line in enumerate(lines, 1):
        if line is None:
            too_long.add(number)
        yield line or "-\n"  # an empty one would be skipped, and its row would vanish
