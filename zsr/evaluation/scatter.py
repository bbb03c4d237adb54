"""Embeddings of both modalities in the plane, by t-SNE, for the report."""

from dataclasses import dataclass
from typing import Final

import numpy as np

from zsr.evaluation.protocol import Side
from zsr.models.protocol import Metric

MOST: Final = 400  # items of either modality; more only make a blot
LEAST: Final = 10


@dataclass(frozen=True)
class Scatter:
    """Where items stand in the plane, coordinates from 0 to 1.

    Attributes:
        model: whose embeddings.
        labels: classes, sorted.
        query, gallery: (x, y, index into labels) of the items drawn.
    """

    model: str
    labels: tuple[str, ...]
    query: tuple[tuple[float, float, int], ...]
    gallery: tuple[tuple[float, float, int], ...]


def scatter(model: str, query: Side, gallery: Side, metric: Metric, seed: int = 0) -> Scatter | None:
    """At most 400 items of either side, drawn by the seed, laid out by one t-SNE of both.

    t-SNE keeps neighbors together; distances between groups and their sizes mean nothing. It compares by the model's
    own metric; of several parts of an item the first is shown.

    Returns:
        None where scikit-learn is not installed (the extra `report`), or for fewer than 10 items.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        return None
    sides = [_some(side, seed) for side in (query, gallery)]
    rows = np.concatenate([side.embeddings for side in sides])
    if len(rows) < LEAST:
        return None
    if metric == "hamming":
        rows = np.unpackbits(rows, axis=1)
    layout = TSNE(
        metric={"cosine": "cosine", "l2": "euclidean", "hamming": "hamming"}[metric],
        init="random" if metric == "hamming" else "pca",
        perplexity=min(30.0, (len(rows) - 1) / 3),
        random_state=seed,
    )
    places = layout.fit_transform(rows.astype(np.float32))
    low, high = places.min(0), places.max(0)
    places = (places - low) / np.maximum(high - low, 1e-9)
    labels = tuple(sorted(query.classes | gallery.classes))
    points = [
        (round(float(x), 3), round(float(y), 3), labels.index(str(label)))
        for (x, y), label in zip(places, np.concatenate([side.labels for side in sides]), strict=True)
    ]
    count = len(sides[0])
    return Scatter(model, labels, tuple(points[:count]), tuple(points[count:]))


def _some(side: Side, seed: int) -> Side:
    first = np.flatnonzero(side.part == 0) if side.part is not None else np.arange(len(side))
    return side.rows(np.sort(np.random.default_rng(seed).permutation(first)[:MOST]))
