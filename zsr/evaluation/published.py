"""Published results on the published splits, with their numbers of queries and gallery items.

`published.json` holds only figures that are corroborated or taken from a source that states them; each has its source,
its protocol, and its metric by the names of `metrics`. Doubtful figures (unknown class list, unknown divisor, values
below chance) are left out. None of these figures was measured here.
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from zsr.data import splits
from zsr.evaluation.report import Published


@dataclass(frozen=True)
class Counts:
    """Number of queries and gallery items of one published list, and its source."""

    queries: int
    gallery: int
    by: str


def split_name(unseen: tuple[str, ...]) -> str | None:
    """The published split with exactly these unseen classes, or None; equal class counts are not enough."""
    return next((name for name, entry in splits.published().items() if set(entry["unseen"]) == set(unseen)), None)


def figures(unseen: tuple[str, ...], protocol: str) -> tuple[Published, ...]:
    """Published scores on the split with these unseen classes, under the same protocol."""
    return tuple(
        Published(entry["name"], entry["source"], entry["scores"])
        for entry in _entry(unseen)["figures"]
        if entry["protocol"] == protocol
    )


def compare_counts(unseen: tuple[str, ...], queries: int, gallery: int) -> str:
    """One sentence comparing the evaluated rows with the published lists; empty for other splits."""
    name = split_name(unseen)
    if name is None:
        return ""
    known = [Counts(**entry) for entry in _entry(unseen)["counts"]]
    if not known:
        return f"{name}: no published number of queries and photos is known."
    for counts in known:
        if (counts.queries, counts.gallery) == (queries, gallery):
            return f"{name}: queries and gallery have the same sizes as in {counts.by}."
    parts = [
        f"{_differ(queries - c.queries, 'queries')} and {_differ(gallery - c.gallery, 'gallery items')} against {c.by} "
        f"({c.queries:,} x {c.gallery:,})"
        for c in known
    ]
    return f"{name}: here {'; '.join(parts)}. Published figures were measured on other rows."


def _differ(difference: int, what: str) -> str:
    return (
        f"{abs(difference):,} {'more' if difference > 0 else 'fewer'} {what}" if difference else f"equally many {what}"
    )


def _entry(unseen: tuple[str, ...]) -> dict[str, Any]:
    return _content().get(split_name(unseen) or "", {"counts": [], "figures": []})


@cache
def _content() -> dict[str, dict[str, Any]]:
    text = resources.files("zsr.evaluation").joinpath("published.json").read_text()
    content: dict[str, dict[str, Any]] = json.loads(text)
    return content
