"""Restrict a source to a list of classes: rows of other classes are quarantined."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from zsr.data.published import Published, Spellings
from zsr.data.sources import Item, Known, Source, Walked
from zsr.errors import ConfigError
from zsr.storage import read_text


@dataclass(frozen=True)
class Restricted:
    """`source` with labels restricted to `classes` and spelled like them. Rows without a label are kept."""

    source: Source
    classes: tuple[str, ...]

    @property
    def facts(self) -> Mapping[str, Any]:
        return {**self.source.facts, "allowed_classes": list(self.classes)}

    @property
    def published(self) -> Published:
        return self.source.published if isinstance(self.source, Known) else Published("--classes", self.classes)

    @property
    def unread(self) -> Counter[str]:
        return self.source.unread if isinstance(self.source, Walked) else Counter()

    def items(self) -> Iterator[Item]:
        """Yield the source's items; those of other classes have a problem."""
        spelling = Spellings(self.classes)
        for item in self.source.items():
            label = None if item.label is None else spelling(item.label)
            if item.problem or label is None or label in spelling:
                yield replace(item, label=label)
            else:
                problem = f"unknown_class: {item.label!r} is none of the {len(self.classes)} classes of --classes"
                yield replace(item, label=None, problem=problem)

    def load(self, item: Item) -> bytes:
        item.refuse()
        return self.source.load(item)

    def feature(self, item: Item) -> np.ndarray | None:
        """The source's feature of `item`."""
        return self.source.feature(item)


def restricted(source: Source, classes: str) -> Source:
    """`source` restricted by the flag `classes`: "" for all, "published", or a file with one name per line.

    Raises:
        ConfigError: the source has no published list; the file is missing, empty or names a class twice.
    """
    if not classes:
        return source
    if classes == "published":
        if not isinstance(source, Known):
            raise ConfigError(
                f"--classes published: no list is known for the source {source.facts['name']}; give a file"
            )
        return Restricted(source, source.published.classes)
    lines = [line.strip() for line in read_text(classes, "--classes").splitlines() if line.strip()]
    names = sorted({Spellings(())(line) for line in lines})
    if not names or len(names) < len(lines):
        raise ConfigError(f"--classes {classes}: {len(lines)} lines, {len(names)} distinct classes; expected each once")
    return Restricted(source, tuple(names))
