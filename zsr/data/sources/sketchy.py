"""The Sketchy database (Sangkloy et al., SIGGRAPH 2016), and its extension with more photos (Liu et al., CVPR 2017).

    ROOT/photo/CLASS/n02691156_10151.jpg            flat
    ROOT/sketch/CLASS/n02691156_10151-3.png         drawn from the photo n02691156_10151

    ROOT/photo/tx_000000000000/CLASS/...            as published; also below ROOT/256x256/ or
    ROOT/sketch/tx_000000000000/CLASS/...           ROOT/rendered_256x256/256x256/
    ROOT/EXTEND_image_sketchy/CLASS/...             the extension (or extended_photo/): 73,002 photos

A sketch's `pair` is the key of the photo that it was drawn from. Keys are paths below ROOT. The extension includes
12,499 of the 12,500 original photos: the option `photos` selects which are read.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict

from zsr.data.published import Published, Spellings, published
from zsr.data.sources import Item
from zsr.data.sources.tree import Entry, TreeSource, called_like_an_image, elsewhere, left_out, picture_item
from zsr.errors import ConfigError

EXTENDED: Final = ("EXTEND_image_sketchy", "extended_photo", "EXTEND_image_sketchy_ready")
PREFIXES: Final = ("", "256x256/", "rendered_256x256/256x256/")
SKETCH_NAME: Final = re.compile(r"n\d{8}_\d+-\d+\.png", re.IGNORECASE)  # names of all sketches of the database


def _is_image(entry: Entry) -> bool:
    return not entry.is_folder and called_like_an_image(entry.name)


class SketchyOptions(BaseModel):
    """Which photos and which rendering of the Sketchy database to read.

    Attributes:
        photos: original; extended; auto reads the extension if it is there, otherwise the original; union adds to the
            extension the original photos that it lacks; doubled reads all of both, as the file lists of SAKE and of
            later papers do: the original photos are then in the gallery twice (85,502 rows).
        rendering: rendering of sketches and original photos, if ROOT has several; tx_000000000000 is the drawing as it
            was on its canvas, tx_000100000000 (used by Yelamarthi et al.) is centered on the object's bounding box.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    photos: Literal["auto", "original", "extended", "union", "doubled"] = "auto"
    rendering: str = "tx_000000000000"


@dataclass(frozen=True)
class Sketchy(TreeSource):
    """Source over a `root` with photo and sketch, and with EXTEND_image_sketchy for photos of the extension."""

    options: SketchyOptions = field(default_factory=SketchyOptions)

    @property
    def facts(self) -> Mapping[str, Any]:
        return {
            "name": "sketchy" if self._is_the_database else "images in the layout of Sketchy",
            "attribution": "Sketchy database, Sangkloy et al., SIGGRAPH 2016; research use"
            if self._is_the_database
            else "",
            "photos": [PurePosixPath(folder).name for folder in self._photo_folders],
            "sketches": self._folder("sketch"),
        }

    @property
    def published(self) -> Published:
        found = published("sketchy" if self._extended not in self._photo_folders else "sketchy-extended")
        return replace(found, compared=self._is_the_database)

    def items(self) -> Iterator[Item]:
        """Yield photos and sketches, class by class.

        Raises:
            ConfigError: a folder is missing or holds no image; or it lacks the requested rendering.
        """
        counts = {"photo": 0, "sketch": 0}
        for label, names in self._classes.items():
            photos = list(self._photos(names))
            by_stem = {PurePosixPath(path).stem: path for path, _ in reversed(photos)}
            for path, entry in photos:
                counts["photo"] += 1
                yield picture_item("photo", path, label, entry)
            for path, entry in self._images(self._folder("sketch"), names):
                counts["sketch"] += 1
                pair = by_stem.get(PurePosixPath(path).stem.rpartition("-")[0])
                yield picture_item("sketch", path, label, entry, pair)
        for modality, count in counts.items():
            if not count:
                raise ConfigError(f"{self.tree}: no {modality} images; expected {modality}/CLASS/NAME")
        yield from self._rest()

    def _rest(self) -> Iterator[Item]:
        """Bad rows of images outside class folders; images that the options exclude are counted in `unread`."""
        tree, taken = self.tree, {*self._photo_folders, self._folder("sketch")}
        claimed = {f"{folder}/{name}" for folder in taken for name in tree.folders(folder)}
        for place in tree.named(*(f"{prefix}{name}" for prefix in PREFIXES for name in ("photo", "sketch", *EXTENDED))):
            if place in taken:
                continue
            chosen = [folder for folder in taken if folder.startswith(f"{place}/")]
            others = (
                [f"{place}/{name}" for name in tree.folders(place) if name.startswith("tx_")] if chosen else [place]
            )
            option = f"rendering {self.options.rendering}" if chosen else f"photos {self.options.photos}"
            left_out(tree, set(others) - taken, f"(--sketchy.{option})")
            claimed.update(set(others) - taken)
        yield from elsewhere(tree, claimed, "the class folders of photo/ and sketch/")

    @cached_property
    def _is_the_database(self) -> bool:
        """Whether the sketches are named as in the database; otherwise its license and counts do not apply."""
        folder = self._folder("sketch")
        classes = (self.tree.entries(f"{folder}/{name}") for name in self.tree.folders(folder))
        first = next((found for entries in classes if (found := [e.name for e in entries if _is_image(e)])), [])
        return bool(first) and all(map(SKETCH_NAME.fullmatch, first))

    @cached_property
    def _extended(self) -> str | None:
        return self.tree.first(*(f"{prefix}{name}" for prefix in PREFIXES for name in EXTENDED))

    @cached_property
    def _photo_folders(self) -> tuple[str, ...]:
        """Folders of photos, first the one that pairs refer to."""
        wanted, extended = self.options.photos, self._extended
        if wanted == "original" or (wanted == "auto" and extended is None):
            return (self._folder("photo"),)
        if extended is None:
            raise ConfigError(f"{self.tree}: no {EXTENDED[0]}; --sketchy.photos {wanted} requires it next to photo/")
        return (extended,) if wanted in ("auto", "extended") else (extended, self._folder("photo"))

    @cached_property
    def _classes(self) -> dict[str, list[str]]:
        """Folder names of each class, by label: the two modalities may spell a class differently."""
        folders, spelling = (*self._photo_folders, self._folder("sketch")), Spellings(self.published.classes)
        found: dict[str, list[str]] = {}
        for name in sorted({name for folder in folders for name in self.tree.folders(folder)}):
            found.setdefault(spelling(name), []).append(name)
        return found

    def _place(self, modality: str) -> str | None:
        return self.tree.first(*(f"{prefix}{modality}" for prefix in PREFIXES))

    def _folder(self, modality: str) -> str:
        """The folder of `modality` that holds the class folders."""
        place = self._place(modality)
        if place is None:
            raise ConfigError(
                f"{self.tree}/{modality}: missing; --source sketchy requires ROOT/photo/CLASS/*.jpg and "
                "ROOT/sketch/CLASS/*.png, or the folders as published; for your own images use --source folders"
            )
        renderings = [name for name in self.tree.folders(place) if name.startswith("tx_")]
        if renderings and self.options.rendering not in renderings:
            raise ConfigError(f"{place} has the renderings {renderings}; --sketchy.rendering must be one of them")
        return f"{place}/{self.options.rendering}" if renderings else place

    def _images(self, folder: str, names: list[str]) -> Iterator[tuple[str, Entry]]:
        for name in names:
            yield from self.tree.images(f"{folder}/{name}")

    def _photos(self, names: list[str]) -> Iterator[tuple[str, Entry]]:
        """Paths of a class's photos; a photo in both folders is listed once, unless `photos` is doubled."""
        first, *others = self._photo_folders
        taken: set[str] = set()
        for path, entry in self._images(first, names):
            taken.add(PurePosixPath(path).name)
            yield path, entry
        for folder in others:
            for path, entry in self._images(folder, names):
                if self.options.photos == "doubled" or PurePosixPath(path).name not in taken:
                    yield path, entry
                else:
                    self.tree.unread[f"{folder}/ (--sketchy.photos {self.options.photos})"] += 1
