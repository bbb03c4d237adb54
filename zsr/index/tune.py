"""Recall@10 against exact search over nprobe and refine_factor, and the cheapest operating point that meets the target.

Sketches are far from photos in the embedding space, so recall measured with gallery vectors flatters an index: both are
measured, and the target is held on the sketches.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np

from zsr import fault
from zsr.cluster import map_pieces
from zsr.errors import QualityGateFailed
from zsr.index import engine
from zsr.index.search import TUNED_K as K
from zsr.index.search import Searcher
from zsr.index.vectors import Vectors

QUERIES: Final = 1000  # of each kind: recall@10 of 0.9 is then known to about 0.01
REFINE_FACTORS: Final = (1, 2, 4, 8, 16, 32)
MOST_SCANNED: Final = 250_000  # vectors a query; beyond it a scan of the codes is no better than exact search
TIE: Final = 1e-6  # relative: a neighbour as near as the tenth counts, whichever of two equals was listed


@dataclass(frozen=True, slots=True)
class Point:
    """One setting and what it costs and finds.

    Attributes:
        recall_sketch, recall_self: recall@10 of real queries and of gallery vectors.
        scanned: vectors whose codes are compared with a query, on average.
        read: bytes of codes, ids and re-ranked vectors that a query touches, on average; the cost that is minimised.
    """

    nprobe: int
    refine_factor: int
    recall_sketch: float
    recall_self: float
    scanned: float
    read: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Truth:
    """Queries with the exact score of their K-th neighbour: enough to measure recall with equals counted as equal.

    Attributes:
        queries: (Q, D) float32. kth: (Q,) float32; minus infinity where the gallery has fewer than K vectors.
        k: min(K, gallery rows).
    """

    queries: np.ndarray
    kth: np.ndarray
    k: int

    def recall(self, scores: np.ndarray) -> float:
        """Mean share of the k nearest among the best k of `scores` (Q, C), exact scores of whatever was found."""
        best = -np.sort(-scores, axis=1)[:, : self.k]
        near = best >= (self.kth - TIE * np.maximum(1, np.abs(self.kth)))[:, None]
        return float(round((near & np.isfinite(best)).sum(axis=1).mean() / self.k, 6))


def exact(gallery: Vectors, queries: np.ndarray) -> Truth:
    """The truth for `queries` (Q, D) float32 by exact search over every shard, one Ray task each."""
    k = min(K, gallery.rows)
    pieces = [{"shard": shard} for shard in range(len(gallery.shards))]
    found = map_pieces("exact search", _exact_shard, pieces, fn_kwargs={"gallery": gallery, "queries": queries})
    scores = np.concatenate([np.frombuffer(f["scores"], np.float32).reshape(len(queries), -1) for f in found], axis=1)
    return Truth(queries, -np.sort(-scores, axis=1)[:, k - 1], k)


def _exact_shard(piece: Mapping[str, Any], gallery: Vectors, queries: np.ndarray) -> dict[str, Any]:
    """Exact scores of the K nearest of one shard. Runs in a Ray task."""
    vectors = gallery.read(int(piece["shard"])).vectors.astype(np.float32)
    metric = gallery.space.metric
    depth = min(len(vectors), 4 * K)
    out = np.empty((len(queries), min(len(vectors), K)), np.float32)
    with engine.threads(1):
        for at in range(0, len(queries), 256):
            block = queries[at : at + 256]
            rough = block @ vectors.T
            if metric == "l2":
                # the expanded square cancels badly, so it only proposes; the exact scores below decide
                rough = 2 * rough - np.einsum("nd,nd->n", vectors, vectors)
            near = np.argpartition(-rough, depth - 1, axis=1)[:, :depth]
            scores = engine.exact_scores(block, vectors[near], metric)
            out[at : at + 256] = -np.sort(-scores, axis=1)[:, : out.shape[1]]
    return {"scores": out.tobytes()}


def tune(searcher: Searcher, sketches: Truth, own: Truth, target: float) -> tuple[Point, tuple[Point, ...]]:
    """The point that reads the fewest bytes a query among those whose recall on the sketches meets `target`; the curve.

    Raises:
        QualityGateFailed: none does; the message names the best.
    """
    fault.here("index.tune")
    curve = measure(searcher, sketches, own)
    for point in sorted(curve, key=lambda p: (p.read, p.nprobe, p.refine_factor)):
        if point.recall_sketch >= target:
            # a shorter search may break ties of codes another way than the long one that the curve was read from
            found = [
                truth.recall(searcher.nearest(truth.queries, K, point.nprobe, point.refine_factor)[1])
                for truth in (sketches, own)
            ]
            if found[0] >= target:
                return replace(point, recall_sketch=found[0], recall_self=found[1]), curve
    best = max(curve, key=lambda point: point.recall_sketch)
    raise QualityGateFailed(
        f"{searcher.facts['index_key']} reaches recall@{K} {best.recall_sketch:.3f} on the sketches (nprobe "
        f"{best.nprobe}, refine factor {best.refine_factor}; {best.recall_self:.3f} on gallery vectors), below "
        f"--recall-target {target}; nothing was published. Give a longer code (a larger PQ), fewer lists or a lower "
        "target"
    )


def measure(searcher: Searcher, sketches: Truth, own: Truth) -> tuple[Point, ...]:
    """The curve: every power of two of nprobe, up to all lists or MOST_SCANNED, with every refine factor."""
    rows, space = int(searcher.facts["ntotal"]), searcher.space
    factors = [f for f in REFINE_FACTORS if f == 1 or K * f // 2 < rows]
    code_bytes = engine.ivf_of(searcher.index).code_size + engine.ID_BYTES
    points = []
    for nprobe, scanned in _nprobes(searcher, sketches.queries):
        found = [searcher.candidates(t.queries, K * factors[-1], nprobe)[1] for t in (sketches, own)]
        for factor in factors:
            recall = [t.recall(f[:, : K * factor]) for t, f in zip((sketches, own), found, strict=True)]
            ranked = min(K * factor, rows) * space.dim * searcher.refine[0].itemsize
            read = round(scanned * code_bytes + ranked, 1)
            points.append(Point(nprobe, factor, recall[0], recall[1], round(scanned, 1), read))
    return tuple(points)


def _nprobes(searcher: Searcher, queries: np.ndarray) -> list[tuple[int, float]]:
    """Values of nprobe to try, each with the vectors that a query scans."""
    nlist = int(searcher.facts["nlist"])
    values = [2**i for i in range(nlist.bit_length()) if 2**i <= nlist]
    values += [] if values[-1] == nlist else [nlist]
    costs = list(zip(values, engine.scanned(searcher.index, queries, values), strict=True))
    return costs[:1] + [pair for pair in costs[1:] if pair[1] <= MOST_SCANNED]
