"""Inspect DATA: counts, sizes, quarantine, and a contact sheet with a few rows of every class.

Counts are those of all rows, from the manifest. Sizes and images come from the first shards of each modality: rows are
in hashed order, so that any prefix is a uniform sample.
"""

import io
import textwrap
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Final

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw, ImageFont, ImageOps

from zsr.artifact import Artifact, FileEntry
from zsr.data.decode import BadImage, Limits, check_header, upright
from zsr.data.rows import MODALITIES

THUMB: Final = 72  # side of a thumbnail in pixels
GAP: Final = 4
NAME: Final = 180  # min width of a column in pixels, for the names
TITLE: Final = 16
COLUMNS: Final = 4
CLASSES: Final = 400  # max classes on a sheet; if there are more, every n-th in name order
SAMPLE: Final = 20_000  # max rows read per modality

Row = Mapping[str, Any]


@dataclass
class Sample:
    """Rows of one modality: sizes of all rows read, and a few rows of each class."""

    rows: int = 0
    bytes: list[int] = field(default_factory=list)
    pixels: list[int] = field(default_factory=list)
    characters: list[int] = field(default_factory=list)
    unpaired: int = 0
    shown: dict[str, list[Row]] = field(default_factory=dict)


def class_counts(shards: Iterable[FileEntry]) -> dict[str, dict[str, int]]:
    """Number of used rows by modality and class, from the metadata of the shards."""
    found: dict[str, Counter[str]] = {}
    for entry in shards:
        modality = entry.path.partition("=")[2].partition("/")[0]
        found.setdefault(modality, Counter()).update(entry.facts["classes"])
    return {modality: dict(sorted(found[modality].items())) for modality in MODALITIES if modality in found}


def sample(
    data: Artifact, modality: str, each: int, wanted: Collection[str] = frozenset(), most: int = SAMPLE
) -> Sample:
    """Read the first shards of `modality`, up to `most` rows; keep `each` rows per class and those of `wanted` keys."""
    seen = Sample()
    for entry in data.shards(modality):
        if seen.rows >= most:
            break
        for batch in data.read_table(entry.path).to_batches(max_chunksize=256):
            _take(seen, batch, each, wanted)
    return seen


def _take(seen: Sample, batch: pa.RecordBatch, each: int, wanted: Collection[str]) -> None:
    for row in batch.to_pylist():
        seen.rows += 1
        seen.unpaired += row["pair"] is None
        if row["image"] is not None:
            seen.bytes.append(len(row["image"]))
            with suppress(BadImage):  # such as HEIC, on a machine that does not read it
                header = check_header(row["image"], Limits())
                seen.pixels.append(header.width * header.height)
        if row["text"] is not None:
            seen.characters.append(len(row["text"]))
        shown = seen.shown.setdefault(row["label"] or "", [])
        if len(shown) < each or row["key"] in wanted or row["pair"] in wanted:
            shown.append(row)


def report(data: Artifact, samples: Mapping[str, Sample]) -> dict[str, Any]:
    """The report of `--inspect`: rows, classes, quarantine, differences from the published counts, and sizes."""
    return {
        "data": data.digest,
        "rows": dict(data.manifest["rows"]),
        "quarantine": dict(data.facts["quarantine"]),
        "differences": list(data.facts.get("differences", [])),
        "classes": class_counts(data.shards()),
        "sampled": {modality: _figures(seen) for modality, seen in samples.items()},
    }


def _figures(seen: Sample) -> dict[str, Any]:
    figures: dict[str, Any] = {"rows": seen.rows, "without_pair": seen.unpaired}
    for name in ("bytes", "pixels", "characters"):
        if values := getattr(seen, name):
            low, middle, high = np.percentile(values, [0, 50, 100]).astype(int).tolist()
            figures[name] = {"least": low, "median": middle, "most": high}
    return figures


def sheet(samples: Mapping[str, Sample], each: int) -> Image.Image:
    """The contact sheet: per class its name and up to `each` rows of every modality side by side, in columns.

    Photos that sketches were drawn from come first, in the order of the sketches; likewise the texts of photos.
    """
    names = sorted({name for seen in samples.values() for name in seen.shown})
    if len(names) > CLASSES:
        names = [names[i] for i in np.linspace(0, len(names) - 1, CLASSES).astype(int)]
    rows = {name: {modality: _in_order(samples, modality, name, each) for modality in samples} for name in names}
    widest = {m: THUMB * max((len(found[m]) for found in rows.values()), default=0) for m in samples}
    offsets = dict(zip(widest, accumulate(widest.values(), lambda x, width: x + width + GAP, initial=0), strict=False))
    columns = min(COLUMNS, max(1, len(names)))
    lines = max(1, -(-len(names) // columns))
    width = max(NAME, sum(widest.values()) + GAP * len(samples)) + 3 * GAP
    page = Image.new("RGB", (columns * width, TITLE + lines * (THUMB + TITLE + GAP)), "white")
    for number, name in enumerate(names):
        # column by column
        x, y = number // lines * width + GAP, number % lines * (THUMB + TITLE + GAP)
        for modality, offset in offsets.items():
            if y == 0:
                ImageDraw.Draw(page).text((x + offset, 2), modality, fill=(150, 60, 0), font=_font())
            for place, row in enumerate(rows[name][modality]):
                page.paste(_thumb(row), (x + offset + place * THUMB, y + 2 * TITLE))
        ImageDraw.Draw(page).text((x, y + TITLE), _shown(name) or "(no class)", fill="black", font=_font())
    return page


def _in_order(samples: Mapping[str, Sample], modality: str, name: str, each: int) -> list[Row]:
    """The rows of a class to show, first those paired with rows shown before (photos of sketches, texts of photos)."""
    rows = samples[modality].shown.get(name, [])
    if modality == "text" and "photo" in samples:
        before, link = [row["key"] for row in _in_order(samples, "photo", name, each)], "pair"
    else:
        sketches = samples["sketch"].shown if modality == "photo" and "sketch" in samples else {}
        before, link = [row["pair"] for row in sketches.get(name, [])[:each]], "key"
    place = {key: number for number, key in reversed(list(enumerate(before)))}
    return sorted(rows, key=lambda row: place.get(row[link], len(before)))[:each]


def _thumb(row: Row) -> Image.Image:
    """The thumbnail of a row: its image, or its text; gray if it has neither."""
    inner = THUMB - 2
    framed = Image.new("RGB", (THUMB, THUMB), (210, 210, 210))
    if row["image"] is not None:
        framed.paste(_fitted(row["image"], inner), (1, 1))
    elif row["text"] is not None:
        paper = Image.new("RGB", (inner, inner), "white")
        lines = textwrap.wrap(_shown(row["text"][:200]), 13)[:7]
        ImageDraw.Draw(paper).multiline_text((2, 1), "\n".join(lines), fill="black", font=_font(9), spacing=1)
        framed.paste(paper, (1, 1))
    return framed


def _fitted(image: bytes, side: int) -> Image.Image:
    """The image within `side` pixels, with its aspect ratio, on white; a red line if it cannot be decoded here."""
    paper = Image.new("RGB", (side, side), "white")
    try:
        paper = ImageOps.pad(Image.fromarray(upright(image, Limits(), 2 * side)), paper.size, color="white")
    except BadImage:
        ImageDraw.Draw(paper).line((0, 0, side, side), fill="red")
    return paper


def _shown(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)


def _font(size: int = 11) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def png(page: Image.Image) -> bytes:
    """The page as PNG bytes."""
    encoded = io.BytesIO()
    page.save(encoded, "PNG", optimize=True)
    return encoded.getvalue()


def look(data: Artifact, each: int) -> tuple[dict[str, Any], bytes]:
    """The report, and the contact sheet as PNG with `each` rows per class and modality."""
    samples: dict[str, Sample] = {}
    for modality in (m for m in MODALITIES if data.shards(m)):
        shown = [row for seen in samples.values() for rows in seen.shown.values() for row in rows]
        samples[modality] = sample(data, modality, each, {row[k] for row in shown for k in ("key", "pair")} - {None})
    return report(data, samples), png(sheet(samples, each))
