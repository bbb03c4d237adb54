"""TU-Berlin Extended: the sketches of Eitz et al. (SIGGRAPH 2012) and the photos of Zhang et al. (CVPR 2016).

    ROOT/png/CLASS/1.png                 250 classes of 80 sketches (or sketches/, png_ready/, sketch/)
    ROOT/ImageResized/CLASS/*.jpg        204,489 photos (or images/, ImageResized_ready/, photo/)

Sketches and photos show different objects, so rows have no pairs. Keys are paths below ROOT. Class names have spaces,
hyphens or underscores (`frying-pan`, `hot air balloon`), sometimes differently in the two folders; labels have one
spelling.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from zsr.data.published import Published, Spellings, published
from zsr.data.rows import Modality
from zsr.data.sources import Item
from zsr.data.sources.tree import TreeSource, class_items, elsewhere, left_out
from zsr.errors import ConfigError

FOLDERS: Final[dict[Modality, tuple[str, ...]]] = {
    "sketch": ("png", "sketches", "png_ready", "sketch"),
    "photo": ("ImageResized", "images", "ImageResized_ready", "photo"),
}
SKETCH_NAME: Final = re.compile(r"\d+\.png", re.IGNORECASE)


@dataclass(frozen=True)
class TUBerlin(TreeSource):
    """Source over a `root` with both archives, unpacked."""

    @property
    def facts(self) -> Mapping[str, Any]:
        if not self._is_the_database:
            return {"name": "images in the layout of TU-Berlin", "attribution": ""}
        return {
            "name": "tuberlin",
            "attribution": "TU-Berlin sketches, Eitz et al., SIGGRAPH 2012; photos, Zhang et al., CVPR 2016",
        }

    @cached_property
    def _is_the_database(self) -> bool:
        """Whether classes and sketches are named as in the database; otherwise its authors are not attributed."""
        folders = self._folders()
        classes = {name for folder in folders.values() for name in self.tree.folders(folder)}
        sketches = self.tree.entries(f"{folders['sketch']}/{next(iter(self.tree.folders(folders['sketch'])), '')}")
        named = all(SKETCH_NAME.fullmatch(entry.name) for entry in sketches)
        return published("tuberlin-extended").is_of(classes) and named

    @property
    def published(self) -> Published:
        return published("tuberlin-extended")

    def items(self) -> Iterator[Item]:
        """Yield every sketch and photo.

        Raises:
            ConfigError: one of the two folders is missing or holds no image.
        """
        spelling, folders = Spellings(self.published.classes), self._folders()
        for modality, folder in folders.items():
            yield from class_items(self.tree, modality, folder, spelling)
        claimed = list(folders.values())
        for modality, folder in folders.items():
            copies = [name for name in self.tree.named(*FOLDERS[modality]) if name not in claimed]
            left_out(self.tree, copies, f"(another copy: {folder}/ is read)")
            claimed += copies
        yield from elsewhere(self.tree, claimed, f"{' and '.join(f'{name}/' for name in folders.values())}")

    def _folders(self) -> dict[Modality, str]:
        """The folder of each modality. Raises ConfigError if one is missing."""
        found: dict[Modality, str] = {}
        for modality, names in FOLDERS.items():
            folder = self.tree.first(*names)
            if folder is None:
                raise ConfigError(f"{self.tree}: no folder of {modality} images; expected one of {list(names)}")
            found[modality] = folder
        return found
