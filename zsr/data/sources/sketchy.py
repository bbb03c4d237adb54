"""The Sketchy database (Sangkloy et al., SIGGRAPH 2016) in its published folder layout.

    ROOT/photo/CLASS/n02691156_10151.jpg
    ROOT/sketch/CLASS/n02691156_10151-3.png        drawn from the photo n02691156_10151

A sketch's `pair` is the key of the photo that it was drawn from. Keys are paths below ROOT.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from zsr.data.rows import Modality, canonical_label
from zsr.data.sources import Item, file_guard
from zsr.errors import ConfigError

SUFFIXES: Final = {".jpg", ".jpeg", ".png", ".webp"}
FOLDERS: Final[dict[str, Modality]] = {"photo": "photo", "sketch": "sketch"}


@dataclass(frozen=True)
class Sketchy:
    """`root` holds the folders photo and sketch."""

    root: Path

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"name": "sketchy", "attribution": "Sketchy database, Sangkloy et al., SIGGRAPH 2016; research use"}

    def items(self) -> Iterator[Item]:
        """Every picture under photo/ and sketch/.

        Raises:
            ConfigError: a folder is missing or holds no picture.
        """
        photos = {self._stem(path): path for path in self._files("photo")}
        for path in self._files("photo"):
            yield self._item(path, "photo", pair=None)
        for path in self._files("sketch"):
            photo = photos.get((path.parent.name, path.stem.rpartition("-")[0]))
            yield self._item(path, "sketch", pair=None if photo is None else str(photo.relative_to(self.root)))

    def load(self, item: Item) -> bytes:
        return (self.root / item.where).read_bytes()

    def feature(self, item: Item) -> None:
        """Sketchy comes without features."""
        return None

    @staticmethod
    def _stem(path: Path) -> tuple[str, str]:
        return path.parent.name, path.stem

    def _files(self, folder: str) -> list[Path]:
        place = self.root / folder
        if not place.is_dir():
            raise ConfigError(
                f"{place}: missing; --source sketchy wants ROOT/photo/CLASS/*.jpg and ROOT/sketch/CLASS/*.png"
            )
        files = sorted(path for path in place.glob("*/*") if path.suffix.lower() in SUFFIXES)
        if not files:
            raise ConfigError(
                f"{place}: no pictures in CLASS folders; expected {folder}/CLASS/NAME with {sorted(SUFFIXES)}"
            )
        return files

    def _item(self, path: Path, modality: Modality, pair: str | None) -> Item:
        key = str(path.relative_to(self.root))
        label = canonical_label(path.parent.name)
        return Item(modality, key, label, pair, where=key, guard=file_guard(path))
