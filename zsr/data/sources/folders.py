"""User data in folders of classes.

    ROOT/sketch/CLASS/NAME.png          also in folders below CLASS
    ROOT/photo/CLASS/NAME.jpg
    ROOT/photo/NAME.jpg                 without a class, which a gallery does not need
    ROOT/text/CLASS/NAME.txt            UTF-8, one text per file

One modality is enough; folder names are case-insensitive. Keys are paths below ROOT. Rows have no pairs: use the source
`sketchy` for sketches whose file names identify their photos, and `pairs` for texts that belong to images.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final

from zsr.data.decode import BadImage
from zsr.data.rows import MODALITIES, canonical_label
from zsr.data.sources import Item
from zsr.data.sources.tree import (
    Tree,
    TreeSource,
    called_like_an_image,
    class_items,
    elsewhere,
    misplaced,
    picture_item,
)
from zsr.errors import ConfigError

TEXT_BYTES: Final = 1 << 20  # max bytes of a text file; a larger one is a bad row and not read


@dataclass(frozen=True)
class Folders(TreeSource):
    """Source over a `root` with the folders sketch, photo or text."""

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"name": "folders", "attribution": ""}

    def items(self) -> Iterator[Item]:
        """Yield every image and text.

        Raises:
            ConfigError: ROOT holds none of the three folders, or one of them is empty.
        """
        tree = self.tree
        there = {modality: tree.named(modality) for modality in MODALITIES}
        if not any(there.values()):
            raise ConfigError(
                f"{tree}: found {_found(tree)}; expected at least one of the folders {list(MODALITIES)}, such as "
                "photo/CLASS/NAME.jpg, or photo/NAME.jpg for a gallery without classes"
            )
        for modality, folders in there.items():
            for folder in folders:
                if modality == "text":
                    yield from _texts(tree, folder)
                else:
                    yield from class_items(tree, modality, folder, canonical_label, unlabeled=True)
        claimed = [folder for folders in there.values() for folder in folders]
        yield from elsewhere(tree, claimed, "the folders sketch/ and photo/")


def _found(tree: Tree) -> str:
    entries = tree.entries()
    images = sum(called_like_an_image(entry.name) for entry in entries if not entry.is_folder)
    return f"the folders {[entry.name for entry in entries if entry.is_folder][:8]} and {images} images"


def _texts(tree: Tree, folder: str) -> Iterator[Item]:
    for path, entry in tree.files(lambda path: PurePosixPath(path).suffix.lower() == ".txt", folder):
        if PurePosixPath(path).suffix.lower() == ".txt":
            name, below, _ = path.removeprefix(f"{folder}/").partition("/")
            yield _text(tree, picture_item("text", path, canonical_label(name) if below else None, entry))
        else:
            yield misplaced(path, entry, "The image lies in the folder of texts; move it into photo/ or sketch/.")


def _text(tree: Tree, item: Item) -> Item:
    """`item` with its text, or with the problem that occurred when reading it."""
    text, problem = "", item.problem
    try:
        text = "" if problem else tree.read(item.where, cap=TEXT_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"bad_text: The text is not UTF-8 (byte {error.object[error.start]:#x} at {error.start}); convert it."
    except OSError as error:
        problem = f"unreadable: The text cannot be read: {error.strerror or error}."
    except BadImage as error:
        problem = f"{error.kind}: {error}"
    return Item("text", item.key, item.label, text=text, guard=item.guard, problem=problem)
