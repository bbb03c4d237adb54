"""Published facts of the data sets: class names, rows per class, and one spelling of class names.

`published.json` holds the lists. Differences are reported, not rejected: working with a subset is legitimate, but the
user must know that it is one.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib import resources
from typing import Any, Final

from zsr.data.rows import canonical_label
from zsr.errors import ConfigError

SHOWN: Final = 5  # max classes named in a message

Counts = Mapping[str, Mapping[str, int]]  # rows by modality and class


def squeezed(name: str) -> str:
    """Normalize a class name to its letters and digits in lower case, which is equal for all spellings of a class.

    >>> squeezed("hot-air_balloon") == squeezed("Hot Air Balloon") == "hotairballoon"
    True
    """
    return re.sub(r"[\W_]+", "", name.casefold())


class Spellings:
    """Known class names, looked up under any spelling that differs only in case, spaces and punctuation."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._by_squeezed: dict[str, list[str]] = {}
        for name in sorted(self._names):
            self._by_squeezed.setdefault(squeezed(name), []).append(name)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def __call__(self, name: str) -> str:
        """The known spelling of `name`; its canonical one if it is unknown or ambiguous."""
        label = canonical_label(name)
        found = self._by_squeezed.get(squeezed(name), [])
        return found[0] if label not in self._names and len(found) == 1 else label

    def known(self, name: str) -> str:
        """The known spelling of `name`.

        Raises:
            ConfigError: it is unknown or ambiguous; the message names the closest ones.
        """
        label = name if name in self._names else self(name)
        if label in self._names:
            return label
        near = get_close_matches(squeezed(name), self._by_squeezed, SHOWN, 0.5)
        shown = [each for close in near for each in self._by_squeezed[close]] or sorted(self._names)[:SHOWN]
        raise ConfigError(
            f"class {name!r} is not among the {len(self._names)} known ones; {'did you mean' if near else 'such as'} "
            f"{', '.join(map(repr, shown)) or 'none: no item has a label'}"
        )


@dataclass(frozen=True)
class Published:
    """Description of one data set by its authors or by later papers.

    Attributes:
        name: name of the data set and its layout, such as sketchy-extended.
        classes: canonical names.
        source: source of the counts.
        totals: rows by modality.
        each: rows per class by modality; a single number applies to every class.
        compared: whether to compare row counts; False for user images that only have its layout and class names.
    """

    name: str
    classes: tuple[str, ...]
    source: str = ""
    totals: Mapping[str, int] = field(default_factory=dict)
    each: Mapping[str, int | Mapping[str, int]] = field(default_factory=dict)
    compared: bool = True

    def is_of(self, names: Iterable[str]) -> bool:
        """Whether `names` is not empty and all of them are published classes, under any spelling."""
        spelling, labels = Spellings(self.classes), list(names)
        return bool(labels) and all(spelling(name) in spelling for name in labels)

    def differences(self, counts: Counts) -> list[str]:
        """Differences between `counts` (rows by modality and class) and the published ones, one sentence each."""
        if not self.compared:
            return []
        found = {label for rows in counts.values() for label in rows}
        known = set(self.classes)
        lines = []
        if missing := sorted(known - found):
            lines.append(f"{len(missing)} of {len(known)} classes are missing: {_some(missing)}")
        if unknown := sorted(found - known):
            lines.append(f"{len(unknown)} classes are not among the published ones: {_some(unknown)}")
        for modality in sorted(set(self.totals) | set(self.each)):
            lines += self._compare(modality, counts.get(modality, {}), sorted(known & found))
        return [f"{self.name}: {line}" for line in lines]

    def _compare(self, modality: str, rows: Mapping[str, int], labels: list[str]) -> list[str]:
        lines, total = [], sum(rows.values())
        if modality in self.totals and total != self.totals[modality]:
            lines.append(f"{total} {modality} rows, published are {self.totals[modality]}")
        each = self.each.get(modality)
        if each is not None:
            expected = {label: each if isinstance(each, int) else each[label] for label in labels}
            off = [label for label in labels if rows.get(label, 0) != expected[label]]
            shown = [f"{label} {rows.get(label, 0)} for {expected[label]}" for label in off]
            if off:
                lines.append(f"{modality} rows of {len(off)} classes differ: {_some(shown)}")
        return lines


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


@cache
def published(name: str) -> Published:
    """The entry `name` of published.json: sketchy, sketchy-extended, tuberlin-extended or quickdraw.

    Raises:
        KeyError: no such entry; names are constants of the sources.
    """
    content: dict[str, Any] = json.loads(resources.files("zsr.data").joinpath("published.json").read_text())[name]
    return Published(name, tuple(content["classes"]), content["source"], content["totals"], content["each"])
