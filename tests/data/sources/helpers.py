"""Small raw files in the layouts of the data sets, and the rows that a source finds in them."""

import io
from collections.abc import Iterable
from pathlib import Path

import pytest
from PIL import Image

from zsr.data.decode import BadImage
from zsr.data.sources import Item, Source

SHARED = Path(__file__).parents[4] / "shared" / "data"


def jpeg(colour: tuple[int, int, int] = (200, 10, 10)) -> bytes:
    """A JPEG of 8 pixels a side."""
    encoded = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(encoded, "JPEG")
    return encoded.getvalue()


def files(root: Path, *paths: str) -> Path:
    """Pictures at these paths below `root`."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(jpeg())
    return root


def rows(source: Source) -> dict[tuple[str, str], Item]:
    """The items of `source` by modality and key, each of which is its own."""
    items = list(source.items())
    found: dict[tuple[str, str], Item] = {(item.modality, item.key): item for item in items}
    assert len(found) == len(items)
    return found


def labels(items: Iterable[Item]) -> set[str | None]:
    return {item.label for item in items}


def refused(source: Source, item: Item) -> str:
    """The kind under which loading `item` refuses it."""
    with pytest.raises(BadImage) as error:
        source.load(item)
    return error.value.kind
