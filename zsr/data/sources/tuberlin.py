"""TU-Berlin Extended: the sketches of Eitz et al. (SIGGRAPH 2012) and the photos of Zhang et al. (CVPR 2016).

    ROOT/png/CLASS/1.png                 250 classes of 80 sketches (or sketches/, png_ready/, sketch/)
    ROOT/ImageResized/CLASS/*.jpg        204,489 photos (or images/, ImageResized_ready/, photo/)

Sketches and photos share no objects: rows have no pairs. Keys are paths below ROOT. The same class is spelt with
spaces, hyphens or underscores (`frying-pan`, `hot air balloon`), and differently in the two folders at times;
labels have one spelling.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from zsr.data.published import Published, Spellings, published
from zsr.data.rows import Modality
from zsr.data.sources import Item
from zsr.data.sources.tree import Tree, class_items
from zsr.errors import ConfigError

FOLDERS: Final[dict[Modality, tuple[str, ...]]] = {
    "sketch": ("png", "sketches", "png_ready", "sketch"),
    "photo": ("ImageResized", "images", "ImageResized_ready", "photo"),
}


@dataclass(frozen=True)
class TUBerlin:
    """`root` holds both archives, unpacked."""

    root: str | Path

    @property
    def facts(self) -> Mapping[str, Any]:
        return {
            "name": "tuberlin",
            "attribution": "TU-Berlin sketches, Eitz et al., SIGGRAPH 2012; photos, Zhang et al., CVPR 2016",
        }

    @property
    def published(self) -> Published:
        return published("tuberlin-extended")

    def items(self) -> Iterator[Item]:
        """Every sketch and photo.

        Raises:
            ConfigError: one of the two folders is missing or holds no picture.
        """
        tree, spelling = Tree.at(self.root), Spellings(self.published.classes)
        for modality, names in FOLDERS.items():
            folder = tree.first(*names)
            if folder is None:
                raise ConfigError(f"{tree}: no folder of {modality} pictures; expected one of {list(names)}")
            yield from class_items(tree, modality, folder, spelling)

    def load(self, item: Item) -> bytes:
        item.refuse()
        return Tree.at(self.root).read(item.where)

    def feature(self, item: Item) -> None:
        """TU-Berlin comes without features."""
        return None
