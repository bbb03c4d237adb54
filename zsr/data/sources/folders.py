"""The user's own folders of classes.

    ROOT/sketch/CLASS/NAME.png
    ROOT/photo/CLASS/NAME.jpg
    ROOT/text/CLASS/NAME.txt            UTF-8, a text a file

One modality is enough. Keys are paths below ROOT. Rows have no pairs: sketches whose file names tell their photos go
through the source `sketchy`, texts that belong to pictures through `pairs`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from zsr.data.decode import BadImage
from zsr.data.rows import MODALITIES, Modality, canonical_label
from zsr.data.sources import Item
from zsr.data.sources.tree import Tree, class_items, picture_item
from zsr.errors import ConfigError

TEXT_BYTES: Final = 1 << 20  # a text file beyond this is refused unread


@dataclass(frozen=True)
class Folders:
    """`root` holds a folder sketch, photo or text."""

    root: str | Path

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"name": "folders", "attribution": ""}

    def items(self) -> Iterator[Item]:
        """Every picture and text.

        Raises:
            ConfigError: ROOT holds none of the three folders, or one of them is empty.
        """
        tree = Tree.at(self.root)
        there = tree.folders()
        if not set(there) & set(MODALITIES):
            raise ConfigError(
                f"{tree}: found the folders {there[:8]}; expected {list(MODALITIES)}, one or more of them"
            )
        for modality in MODALITIES:
            if modality in there:
                yield from _texts(tree) if modality == "text" else _pictures(tree, modality)

    def load(self, item: Item) -> bytes:
        item.refuse()
        return Tree.at(self.root).read(item.where) if item.where else b""

    def feature(self, item: Item) -> None:
        """Folders come without features."""
        return None


def _pictures(tree: Tree, modality: Modality) -> Iterator[Item]:
    return class_items(tree, modality, modality, canonical_label)


def _texts(tree: Tree) -> Iterator[Item]:
    for name in tree.folders("text"):
        for entry in tree.entries(f"text/{name}"):
            if entry.name.endswith(".txt"):
                yield _text(tree, picture_item("text", f"text/{name}/{entry.name}", canonical_label(name), entry))


def _text(tree: Tree, item: Item) -> Item:
    """`item` with its text read, or with what is wrong with it."""
    text, problem = "", item.problem
    try:
        text = "" if problem else tree.read(item.where, cap=TEXT_BYTES).decode()
    except (OSError, UnicodeDecodeError, BadImage) as error:
        kind = error.kind if isinstance(error, BadImage) else "bad_text"
        problem = f"{kind}: {error}"
    return Item("text", item.key, item.label, text=text, guard=item.guard, problem=problem)
