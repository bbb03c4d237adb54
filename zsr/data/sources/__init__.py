"""Data sources, one file per data set. A source lists its items and loads the bytes of single items.

Listing is lazy and cheap (names, sizes, lines of a table) and holds one folder in memory at a time; loading runs in Ray
tasks, so a source must be picklable. A row found bad during listing is still listed, with its `problem`: `load` then
raises it, and the row is quarantined like one that cannot be decoded.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from zsr.data.decode import BadImage
from zsr.data.published import Counts, Published
from zsr.data.rows import Modality


@dataclass(frozen=True, slots=True)
class Item:
    """One row before it is loaded.

    Attributes:
        modality, key, label, pair: see `rows`.
        where: location of the bytes for `Source.load`; "" for an item without an image.
        text: the row's text.
        guard: changes when the content may have changed (size and modification time of a file).
        problem: "KIND: message" if the row is bad regardless of its bytes; "" otherwise.
    """

    modality: Modality
    key: str
    label: str | None
    pair: str | None = None
    where: str = ""
    text: str | None = None
    guard: str = ""
    problem: str = ""

    def refuse(self) -> None:
        """Raise the item's problem, if it has one, as a BadImage, so that the row is quarantined."""
        if self.problem:
            kind, _, message = self.problem.partition(": ")
            raise BadImage(kind, message)


class Source(Protocol):
    """One data set. `facts` enter the manifest: name, version, license, attribution, options that affect the rows."""

    @property
    def facts(self) -> Mapping[str, Any]: ...

    def items(self) -> Iterator[Item]:
        """Yield every item, with canonical labels."""
        ...

    def load(self, item: Item) -> bytes:
        """The encoded image of `item`, b"" if it has none; called in a Ray task.

        Raises:
            BadImage: the item has a problem, or its bytes are not available; the row is quarantined.
            OSError: the file cannot be read; the row is quarantined as unreadable.
        """
        ...

    def feature(self, item: Item) -> np.ndarray | None:
        """The precomputed feature (D,) of `item`, for sources that include features; None otherwise."""
        ...


@runtime_checkable
class Known(Protocol):
    """A source of a published data set."""

    @property
    def published(self) -> Published: ...


@runtime_checkable
class Walked(Protocol):
    """A source over folders of files."""

    @property
    def unread(self) -> Counter[str]:
        """Number of files that the last run of `items` skipped, by file extension or reason."""
        ...


def differences(source: Source, counts: Counts) -> list[str]:
    """Differences between the row counts per modality and class and the published ones; none for user data."""
    return source.published.differences(counts) if isinstance(source, Known) else []


def file_guard(path: Path) -> str:
    """Size and modification time of a raw file, to detect that it was replaced."""
    info = path.stat()
    return f"{info.st_size}:{info.st_mtime_ns}"
