"""The user's own image-text pairs: tables of texts, and pictures that they name or that lie in folders of classes.

    ROOT/ANY.jsonl              {"image": "shop/12.jpg", "text": "ripe bananas", "label": "banana"}, an object a line
    ROOT/ANY.csv                the same with a header line
    ROOT/photo/CLASS/*.jpg      further pictures, whose class is the folder (optional)

A line has an image (a path below ROOT), a text, or both; `class` is read where `label` is missing. Both make a photo
row and a text row whose `pair` is the photo; an image that stands in several lines is one photo row with several texts.
The key of a photo is its path below ROOT, that of a text FILE:LINE.
"""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from zsr.data.rows import canonical_label
from zsr.data.sources import Item, file_guard
from zsr.errors import ConfigError

SUFFIXES: Final = {".jpg", ".jpeg", ".png", ".webp"}
COLUMNS: Final = ("image", "text", "label", "class")


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a table and where it stands, as FILE:LINE."""

    at: str
    image: str
    text: str
    label: str | None


@dataclass(frozen=True)
class Pairs:
    """`root` holds the tables and the pictures."""

    root: Path

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"name": "pairs", "attribution": ""}

    def items(self) -> Iterator[Item]:
        """Photo rows of all lines and folders, and text rows of all lines.

        Raises:
            ConfigError: no table; a line that is not readable, has neither image nor text, leaves ROOT, or gives an
                image a second label.
        """
        photos: dict[str, str | None] = {}
        for line in self._lines():
            if line.image and line.image in photos and photos[line.image] != line.label:
                raise ConfigError(
                    f"{self.root}/{line.at}: label {line.label!r}, but {line.image} was {photos[line.image]!r} before; "
                    "give one image one label"
                )
            if line.image:
                photos[line.image] = line.label
            if line.text or not line.image:
                yield Item("text", line.at, line.label, pair=line.image or None, text=line.text)
        for path in sorted(self.root.glob("photo/*/*")):
            if path.suffix.lower() in SUFFIXES:
                photos.setdefault(path.relative_to(self.root).as_posix(), canonical_label(path.parent.name))
        for key, label in photos.items():
            yield Item("photo", key, label, where=key, guard=self._guard(key))

    def load(self, item: Item) -> bytes:
        return (self.root / item.where).read_bytes() if item.where else b""

    def feature(self, item: Item) -> None:
        """Pairs come without features."""
        return None

    def _guard(self, key: str) -> str:
        # a picture that is not there is a bad row, which loading finds and quarantines
        path = self.root / key
        return file_guard(path) if path.is_file() else ""

    def _lines(self) -> Iterator[Line]:
        tables = sorted(path for path in self.root.iterdir() if path.suffix in (".jsonl", ".csv"))
        if not tables:
            raise ConfigError(
                f"{self.root}: no *.jsonl and no *.csv; expected a table with the columns {list(COLUMNS)}"
            )
        for table in tables:
            rows = _jsonl(table) if table.suffix == ".jsonl" else _csv(table)
            for number, row in rows:
                yield self._line(f"{table.name}:{number}", row)

    def _line(self, at: str, row: Mapping[str, Any]) -> Line:
        image, text = (str(row.get(name) or "") for name in ("image", "text"))
        if not image and "text" not in row:
            raise ConfigError(f"{self.root}/{at}: neither image nor text; its columns are {sorted(row)[:8]}")
        path = Path(image)
        if path.is_absolute() or ".." in path.parts:
            raise ConfigError(f"{self.root}/{at}: image {image!r}; expected a path below {self.root}")
        label = row.get("label", row.get("class"))
        name = path.as_posix() if image else ""
        return Line(at, name, text, None if label in (None, "") else canonical_label(str(label)))


def _jsonl(table: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with table.open(encoding="utf-8") as handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{table}:{number}: not JSON: {error}; mend the line or leave it out") from error
            if not isinstance(row, dict):
                raise ConfigError(f"{table}:{number}: found {type(row).__name__}, expected an object a line")
            yield number, row


def _csv(table: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with table.open(encoding="utf-8-sig", newline="") as handle:
        reader = csv.DictReader(handle, strict=True)
        try:
            for row in reader:
                yield reader.line_num, {name: value for name, value in row.items() if name is not None}
        except csv.Error as error:
            raise ConfigError(f"{table}:{reader.line_num}: {error}; mend the line or leave it out") from error
