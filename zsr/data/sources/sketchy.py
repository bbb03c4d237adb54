"""The Sketchy database (Sangkloy et al., SIGGRAPH 2016), and its extension by more photos (Liu et al., CVPR 2017).

    ROOT/photo/CLASS/n02691156_10151.jpg            flat
    ROOT/sketch/CLASS/n02691156_10151-3.png         drawn from the photo n02691156_10151

    ROOT/photo/tx_000000000000/CLASS/...            as published; ROOT may also hold 256x256/ or
    rendered_256x256/256x256/ ROOT/sketch/tx_000000000000/CLASS/... ROOT/EXTEND_image_sketchy/CLASS/...
    the extension (or extended_photo/): 73,002 photos

A sketch's `pair` is the key of the photo that it was drawn from. Keys are paths below ROOT. The extension holds
12,499 of the 12,500 photos of the original already: `photos` says which are taken.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict

from zsr.data.published import Published, Spellings, published
from zsr.data.sources import Item
from zsr.data.sources.tree import Entry, Tree, picture_item
from zsr.errors import ConfigError

EXTENDED: Final = ("EXTEND_image_sketchy", "extended_photo", "EXTEND_image_sketchy_ready")
PREFIXES: Final = ("", "256x256/", "rendered_256x256/256x256/")


class SketchyOptions(BaseModel):
    """What is taken of the Sketchy database.

    Attributes:
        photos: auto takes the extension where it is there, and the original otherwise; original, extended; union
            adds to the extension what it lacks of the original; doubled takes both whole, as the file lists of SAKE
            and of later papers do: base photos then stand twice in the gallery (85,502 rows).
        rendering: of sketches and original photos, where ROOT has several; 000 is the drawing as it was on its canvas,
            tx_000100000000, which Yelamarthi et al. use, is centred on the object's box.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    photos: Literal["auto", "original", "extended", "union", "doubled"] = "auto"
    rendering: str = "tx_000000000000"


@dataclass(frozen=True)
class Sketchy:
    """`root` holds photo and sketch, and EXTEND_image_sketchy where photos of the extension are wanted."""

    root: str | Path
    options: SketchyOptions = field(default_factory=SketchyOptions)

    @property
    def facts(self) -> Mapping[str, Any]:
        return {
            "name": "sketchy",
            "attribution": "Sketchy database, Sangkloy et al., SIGGRAPH 2016; research use",
            "photos": [PurePosixPath(folder).name for folder in self._photo_folders],
            "sketches": self._folder("sketch"),
        }

    @property
    def published(self) -> Published:
        return published("sketchy" if self._extended not in self._photo_folders else "sketchy-extended")

    def items(self) -> Iterator[Item]:
        """Photos and sketches, class by class.

        Raises:
            ConfigError: a folder is missing or holds no picture; or there are several renderings, and not the
            wanted one.
        """
        sketches, spelling = self._folder("sketch"), Spellings(self.published.classes)
        counts = {"photo": 0, "sketch": 0}
        for name in self._classes:
            photos = list(self._photos(name))
            by_stem = {PurePosixPath(path).stem: path for path, _ in reversed(photos)}
            for path, entry in photos:
                counts["photo"] += 1
                yield picture_item("photo", path, spelling(name), entry)
            for entry in self._tree.pictures(f"{sketches}/{name}"):
                counts["sketch"] += 1
                pair = by_stem.get(PurePosixPath(entry.name).stem.rpartition("-")[0])
                yield picture_item("sketch", f"{sketches}/{name}/{entry.name}", spelling(name), entry, pair)
        for modality, count in counts.items():
            if not count:
                raise ConfigError(f"{self._tree}: no {modality} pictures; expected {modality}/CLASS/NAME")

    def load(self, item: Item) -> bytes:
        item.refuse()
        return self._tree.read(item.where)

    def feature(self, item: Item) -> None:
        """Sketchy comes without features."""
        return None

    @cached_property
    def _tree(self) -> Tree:
        return Tree.at(self.root)

    @cached_property
    def _extended(self) -> str | None:
        return self._tree.first(*(f"{prefix}{name}" for prefix in PREFIXES for name in EXTENDED))

    @cached_property
    def _photo_folders(self) -> tuple[str, ...]:
        """Where photos lie, the one that pairs point into first."""
        wanted, extended = self.options.photos, self._extended
        if wanted == "original" or (wanted == "auto" and extended is None):
            return (self._folder("photo"),)
        if extended is None:
            raise ConfigError(f"{self._tree}: no {EXTENDED[0]}; --sketchy.photos {wanted} wants it beside photo/")
        return (extended,) if wanted in ("auto", "extended") else (extended, self._folder("photo"))

    @cached_property
    def _classes(self) -> list[str]:
        folders = (*self._photo_folders, self._folder("sketch"))
        return sorted({name for folder in folders for name in self._tree.folders(folder)})

    def _folder(self, modality: str) -> str:
        """Where the pictures of `modality` lie in folders of classes."""
        place = self._tree.first(*(f"{prefix}{modality}" for prefix in PREFIXES))
        if place is None:
            raise ConfigError(
                f"{self._tree}/{modality}: missing; --source sketchy wants ROOT/photo/CLASS/*.jpg and "
                "ROOT/sketch/CLASS/*.png, or the folders as published"
            )
        renderings = [name for name in self._tree.folders(place) if name.startswith("tx_")]
        if renderings and self.options.rendering not in renderings:
            raise ConfigError(f"{place} has the renderings {renderings}; --sketchy.rendering names one of them")
        return f"{place}/{self.options.rendering}" if renderings else place

    def _photos(self, name: str) -> Iterator[tuple[str, Entry]]:
        """Paths of the photos in the class folder `name`; each base name once, unless they are to stand twice."""
        taken: set[str] = set()
        for folder in self._photo_folders:
            for entry in self._tree.pictures(f"{folder}/{name}"):
                if entry.name not in taken or self.options.photos == "doubled":
                    taken.add(entry.name)
                    yield f"{folder}/{name}/{entry.name}", entry
