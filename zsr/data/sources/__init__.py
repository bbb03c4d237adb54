"""Where rows come from: one file a data set. A source lists its items, and loads the bytes of one.

Listing is lazy and cheap (names, sizes, lines of a table) and holds one folder in memory at a time; loading runs in Ray
tasks, so a source must pickle. A row that a source finds bad while it lists is listed all the same, with its `problem`:
`load` then raises it, and the row is quarantined like one that does not decode.
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
        where: what `Source.load` needs to find the bytes; "" for an item without a picture.
        text: the row's text.
        guard: changes when the content may have changed (size and modification time of a file).
        problem: "KIND: message" if the row is bad whatever its bytes are; "" otherwise.
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
        """Raise the item's problem, if it has one, as the BadImage that the quarantine wants."""
        if self.problem:
            kind, _, message = self.problem.partition(": ")
            raise BadImage(kind, message)


class Source(Protocol):
    """One data set. `facts` go into the manifest: name, version, licence, attribution, options that shape the rows."""

    @property
    def facts(self) -> Mapping[str, Any]: ...

    def items(self) -> Iterator[Item]:
        """Every item, one at a time, with canonical labels."""
        ...

    def load(self, item: Item) -> bytes:
        """The encoded picture of `item`, b"" if it has none; called in a Ray task.

        Raises:
            BadImage: the item has a problem, or its bytes are not to be had; the row is quarantined.
            OSError: the file cannot be read; the row is quarantined as unreadable.
        """
        ...

    def feature(self, item: Item) -> np.ndarray | None:
        """The ready feature (D,) of `item`, for sources that bring their own; None otherwise."""
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
        """Files that the last run of `items` passed over because they are no rows, by ending or reason."""
        ...


def differences(source: Source, counts: Counts) -> list[str]:
    """Where rows by modality and class differ from what is published about `source`; none for the user's own data."""
    return source.published.differences(counts) if isinstance(source, Known) else []


def file_guard(path: Path) -> str:
    """Size and modification time: enough to notice that a raw file was replaced."""
    info = path.stat()
    return f"{info.st_size}:{info.st_mtime_ns}"
