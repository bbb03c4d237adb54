"""Contact sheet of search results: one row per query, followed by its hits."""

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageDraw

from zsr.artifact import Artifact, write_atomically
from zsr.data.decode import BadImage, Limits, decode
from zsr.index.searching.results import Answers

SIDE: Final = 112
TEXT: Final = 30
GAP: Final = 8
ROWS: Final = 20  # max queries shown
SAME, OTHER, QUERY = "#2a7a2a", "#888888", "#0055aa"


def pictures_in(data: Artifact, modality: str, ids: set[int]) -> Iterator[tuple[int, bytes | None]]:
    """Id and encoded image of some rows of DATA; one pass over the shards."""
    wanted = pa.array(sorted(ids), pa.int64())
    for entry in data.shards(modality):
        table = data.read_table(entry.path, columns=["id", "image"])
        hits = table.filter(pc.is_in(table.column("id"), value_set=wanted))
        yield from zip(hits.column("id").to_pylist(), hits.column("image").to_pylist(), strict=True)


def draw(answers: Answers, found: Mapping[int, bytes | None], queries: Sequence[bytes | None], output: Path) -> None:
    """Write the first ROWS queries and their hits as PNG.

    Args:
        found: encoded image of each hit by id. queries: encoded image of each query; None gives an empty tile.
    """
    count, k = min(ROWS, len(answers.ids)), answers.hits.ids.shape[1]
    width, height = (k + 1) * (SIDE + GAP) + GAP, count * (SIDE + TEXT + GAP) + GAP
    sheet = Image.new("RGB", (width, height), "white")
    for row in range(count):
        label = answers.labels[row]
        _tile(sheet, (row, 0), queries[row], [answers.keys[row], label or ""], QUERY)
        for rank in range(k):
            if answers.hits.ids[row, rank] >= 0:
                theirs, score = answers.hits.labels[row, rank], answers.hits.scores[row, rank]
                colour = SAME if label is not None and theirs == label else OTHER
                picture = found.get(int(answers.hits.ids[row, rank]))
                _tile(sheet, (row, rank + 1), picture, [theirs or answers.hits.keys[row, rank], f"{score:.3f}"], colour)
    out = io.BytesIO()
    sheet.save(out, "PNG")
    write_atomically(output, out.getvalue())


def _tile(sheet: Image.Image, at: tuple[int, int], picture: bytes | None, lines: Sequence[str], colour: str) -> None:
    """Draw one image with its frame and the lines below it."""
    x, y = GAP + at[1] * (SIDE + GAP), GAP + at[0] * (SIDE + TEXT + GAP)
    pen = ImageDraw.Draw(sheet)
    try:
        if picture is not None:
            sheet.paste(Image.fromarray(decode(picture, SIDE, Limits())), (x, y))
    except BadImage:
        pen.text((x + 4, y + 4), "not readable", fill="black")
    pen.rectangle((x - 2, y - 2, x + SIDE + 1, y + SIDE + 1), outline=colour, width=2)
    for number, line in enumerate(lines):
        pen.text((x, y + SIDE + 3 + 12 * number), _fitted(pen, line), fill="black")


def _fitted(pen: ImageDraw.ImageDraw, line: str) -> str:
    """The end of `line` that fits under a tile: keys differ at their ends."""
    line = line.encode("ascii", "replace").decode()  # the built-in font has only ASCII
    while pen.textlength(line) > SIDE:
        line = line[1:]
    return line
