"""Where rows come from: one file a data set. A source lists its items, and loads the bytes of one.

Listing is cheap (names and sizes only) and runs on the driver; loading runs in Ray tasks, so a source must pickle.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from zsr.data.rows import Modality
from zsr.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Item:
    """One row before it is loaded.

    Attributes:
        modality, key, label, pair: see `rows`.
        where: what `Source.load` needs to find the bytes; "" for an item without a picture.
        text: the row's text.
        guard: changes when the content may have changed (size and modification time of a file).
    """

    modality: Modality
    key: str
    label: str | None
    pair: str | None = None
    where: str = ""
    text: str | None = None
    guard: str = ""


class Source(Protocol):
    """One data set. `facts` go into the manifest: name, version, licence, attribution."""

    @property
    def facts(self) -> Mapping[str, Any]: ...

    def items(self) -> Iterator[Item]:
        """Every item, in any order, with canonical labels."""
        ...

    def load(self, item: Item) -> bytes:
        """The encoded picture of `item`, b"" if it has none; called in a Ray task."""
        ...

    def feature(self, item: Item) -> np.ndarray | None:
        """The ready feature (D,) of `item`, for sources that bring their own; None otherwise."""
        ...


def file_guard(path: Path) -> str:
    """Size and modification time: enough to notice that a raw file was replaced."""
    info = path.stat()
    return f"{info.st_size}:{info.st_mtime_ns}"


def directory(path: Path | None, name: str) -> Path:
    """`path`, if it is a directory. Raises ConfigError naming the flag otherwise."""
    if path is None or not path.is_dir():
        raise ConfigError(f"--source {name} wants --input, a directory; found {path}")
    return path
