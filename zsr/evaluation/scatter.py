"""2-D t-SNE of the embeddings of both modalities, for the report."""

from dataclasses import dataclass
from typing import Final

import numpy as np

from zsr.evaluation.protocol import Side
from zsr.models.protocol import Metric

MOST: Final = 400  # max items per modality, to keep the plot readable
LEAST: Final = 10


@dataclass(frozen=True)
class Scatter:
    """2-D positions of items, coordinates from 0 to 1.

    Attributes:
        model: name of the model.
        labels: classes, sorted.
        query, gallery: (x, y, index into labels) of the sampled items.
    """

    model: str
    labels: tuple[str, ...]
    query: tuple[tuple[float, float, int], ...]
    gallery: tuple[tuple[float, float, int], ...]


def scatter(model: str, query: Side, gallery: Side, metric: Metric, seed: int = 0) -> Scatter | None:
    """Lay out a sample of at most 400 items per side by one joint t-SNE.

    t-SNE preserves neighborhoods; distances between clusters and cluster sizes mean nothing. It uses the model's
    metric; of a multi-vector item the first vector is shown.

    Returns:
        None if scikit-learn is not installed (the extra `report`), or for fewer than 10 items.
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
