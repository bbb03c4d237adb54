"""Exact neighbours of some queries: what recall is measured against."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from zsr import progress
from zsr.executor import QUERIES, VECTORS, map_pieces
from zsr.index import faiss_backend
from zsr.index.storage.embeddings import Vectors

K: Final = 10  # recall is recall@K
DEPTH: Final = 4 * K  # neighbours kept of each query: enough for equals, and for what a delete takes away
SPARE: Final = 30  # more proposals than are kept: the fast scores that propose are less exact than those that decide
TIE: Final = 1e-6  # relative: a neighbour as near as the K-th counts, whichever of two equals was listed
GROUPS: Final = 64  # tasks at most: what they return is bounded whatever the number of shards


@dataclass(frozen=True, slots=True)
class GroundTruth:
    """Queries with their exact neighbours.

    Attributes:
        queries: (Q, D) float32.
        ordinals: (Q, N) int64, nearest first; -1 where the gallery has fewer.
        scores: (Q, N) float32, exact, higher is nearer; minus infinity where there is none.
        floor: (Q,) float32, the score down to which a list is whole; minus infinity where it holds all there is.
    """

    queries: np.ndarray
    ordinals: np.ndarray
    scores: np.ndarray
    floor: np.ndarray

    @property
    def k(self) -> int:
        """min(K, gallery rows)."""
        return int(min(K, (self.ordinals >= 0).sum(axis=1).max(initial=0)))

    def recall(self, found: np.ndarray) -> float:
        """Mean share of the k nearest among the first k of `found` (Q, C) ordinals, equals counted as equal."""
        kth = self.scores[:, self.k - 1 : self.k]
        near = np.where(self.scores >= kth - TIE * np.maximum(1, np.abs(kth)), self.ordinals, -2)
        hits = (found[:, : self.k, None] == near[:, None, :]).any(axis=2).sum(axis=1)
        return float(round(hits.mean() / self.k, 6))

    def rows(self, chosen: np.ndarray | slice) -> "GroundTruth":
        """Some of the queries."""
        return GroundTruth(self.queries[chosen], self.ordinals[chosen], self.scores[chosen], self.floor[chosen])

    def without(self, dead: np.ndarray) -> "GroundTruth":
        """What is left when the ordinals `dead` are gone."""
        gone = np.isin(self.ordinals, dead)
        order = np.argsort(gone, axis=1, kind="stable")
        ordinals = np.take_along_axis(np.where(gone, -1, self.ordinals), order, 1)
        scores = np.take_along_axis(np.where(gone, np.float32(-np.inf), self.scores), order, 1)
        return GroundTruth(self.queries, ordinals, scores, self.floor)

    def joined(self, other: "GroundTruth") -> "GroundTruth":
        """The neighbours of the same queries in two galleries together, as far down as both lists are whole."""
        ordinals, scores = best(
            np.concatenate([self.ordinals, other.ordinals], axis=1),
            np.concatenate([self.scores, other.scores], axis=1),
            DEPTH,
        )
        floor = np.maximum(np.maximum(self.floor, other.floor), floor_of(ordinals, scores))
        known = scores >= floor[:, None]
        return GroundTruth(self.queries, np.where(known, ordinals, -1), np.where(known, scores, -np.inf), floor)

    def sure(self) -> "GroundTruth":
        """Those queries whose K nearest are known, deletes and all."""
        known = ((self.ordinals >= 0) & (self.scores >= self.floor[:, None])).sum(axis=1)
        return self.rows((known >= K) | np.isneginf(self.floor))

    def renumbered(self, numbers: np.ndarray) -> "GroundTruth":
        """With ordinal i called numbers[i]."""
        return GroundTruth(
            self.queries, np.where(self.ordinals >= 0, numbers[self.ordinals], -1), self.scores, self.floor
        )


def best(ordinals: np.ndarray, scores: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` highest scores of each row and their ordinals, ties by ordinal."""
    order = np.lexsort((ordinals, -scores), axis=1)[:, :count]
    return np.take_along_axis(ordinals, order, 1), np.take_along_axis(scores, order, 1)


def floor_of(ordinals: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(Q,) the last score of each full list (Q, N); minus infinity for the others, which hold all there is."""
    return np.where(ordinals[:, -1] >= 0, scores[:, -1], np.float32(-np.inf))


def grouped(shards: Sequence[int]) -> list[dict[str, Any]]:
    """Shards in at most GROUPS runs, as pieces of work."""
    runs = np.array_split(np.asarray(shards), min(len(shards), GROUPS))
    return [{"shards": run.tolist()} for run in runs]


def exact(
    gallery: Vectors,
    queries: np.ndarray,
    *,
    depth: int = DEPTH,
    share: float = 1.0,
    seed: int = 0,
    shards: Sequence[int] | None = None,
) -> GroundTruth:
    """The nearest of `queries` (Q, D) float32 by exact search, in Ray tasks.

    Args:
        shards: where to look; everywhere if not given.
        share: of the rows of each shard that are looked at, drawn by `seed`.
    """
    shared = {"gallery": gallery, "queries": queries, "depth": depth, "share": share, "seed": seed}
    pieces = grouped(range(len(gallery.shards)) if shards is None else shards)
    rows = [sum(_count(gallery, shard, share) for shard in piece["shards"]) for piece in pieces]
    small = sum(rows) <= VECTORS and len(queries) <= QUERIES
    found = map_pieces("exact search", _exact_shards, pieces, small=small, rows=rows, fn_kwargs=shared)
    ordinals = [np.frombuffer(f["ordinals"], np.int64).reshape(len(queries), -1) for f in found]
    scores = [np.frombuffer(f["scores"], np.float32).reshape(len(queries), -1) for f in found]
    near = best(np.concatenate(ordinals, axis=1), np.concatenate(scores, axis=1), depth)
    short = ((0, 0), (0, max(0, depth - near[0].shape[1])))
    padded = np.pad(near[0], short, constant_values=-1), np.pad(near[1], short, constant_values=-np.inf)
    return GroundTruth(queries, *padded, floor_of(*padded))


def _exact_shards(
    piece: Mapping[str, Any], gallery: Vectors, queries: np.ndarray, depth: int, share: float, seed: int
) -> dict[str, Any]:
    """The nearest among the rows of some shards. Runs in a Ray task."""
    ordinals, scores = np.full((len(queries), 0), -1), np.full((len(queries), 0), -np.inf, np.float32)
    numbers: Sequence[int] = piece["shards"]
    for shard in numbers:
        rows = drawn(gallery, shard, share, seed)
        vectors = gallery.read(shard).vectors[rows].astype(np.float32)
        progress.advance(len(rows))
        near = faiss_backend.exact_nearest(queries, vectors, depth, SPARE, gallery.space.metric)
        joined = np.concatenate([ordinals, gallery.starts[shard] + rows[near[0]]], axis=1)
        ordinals, scores = best(joined, np.concatenate([scores, near[1]], axis=1), depth)
    return {"ordinals": ordinals.tobytes(), "scores": scores.tobytes()}


def drawn(gallery: Vectors, shard: int, share: float, seed: int) -> np.ndarray:
    """Rows of a shard: all, or a uniform share of at least one, in order."""
    rows = gallery.starts[shard + 1] - gallery.starts[shard]
    if share >= 1:
        return np.arange(rows)
    count = _count(gallery, shard, share)
    return np.sort(np.random.default_rng([seed, shard]).choice(rows, count, replace=False))


def _count(gallery: Vectors, shard: int, share: float) -> int:
    """How many rows of a shard `drawn` takes."""
    rows = gallery.starts[shard + 1] - gallery.starts[shard]
    return rows if share >= 1 else max(1, round(rows * share))
