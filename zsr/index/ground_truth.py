"""Exact nearest neighbors of sampled queries, the ground truth of recall."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from zsr import progress
from zsr.executor import QUERIES, VECTORS, map_pieces
from zsr.index import faiss_backend
from zsr.index.storage.embeddings import Vectors

K: Final = 10  # recall is recall@K
DEPTH: Final = 4 * K  # neighbors kept per query: spare ones replace deleted items and hold ties
SPARE: Final = 30  # extra candidates: faiss's batched scores are less exact than those that rank
TIE: Final = 1e-6  # relative: a neighbor as near as the K-th counts as a hit, whichever of two ties is listed
GROUPS: Final = 64  # max tasks, so that the size of their results does not grow with the number of shards


@dataclass(frozen=True, slots=True)
class GroundTruth:
    """Queries with their exact neighbors.

    Attributes:
        queries: (Q, D) float32.
        ordinals: (Q, N) int64, nearest first; -1 where the gallery has fewer.
        scores: (Q, N) float32, exact, higher is nearer; minus infinity where there is none.
        floor: (Q,) float32, the score down to which a list is complete; minus infinity if it holds the whole gallery.
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
        """Mean fraction of the k nearest among the first k of `found` (Q, C) ordinals; a tie with the k-th is a hit."""
        kth = self.scores[:, self.k - 1 : self.k]
        near = np.where(self.scores >= kth - TIE * np.maximum(1, np.abs(kth)), self.ordinals, -2)
        hits = (found[:, : self.k, None] == near[:, None, :]).any(axis=2).sum(axis=1)
        return float(round(hits.mean() / self.k, 6))

    def rows(self, chosen: np.ndarray | slice) -> "GroundTruth":
        """Some of the queries."""
        return GroundTruth(self.queries[chosen], self.ordinals[chosen], self.scores[chosen], self.floor[chosen])

    def without(self, dead: np.ndarray) -> "GroundTruth":
        """The ground truth after the ordinals `dead` are deleted."""
        gone = np.isin(self.ordinals, dead)
        order = np.argsort(gone, axis=1, kind="stable")
        ordinals = np.take_along_axis(np.where(gone, -1, self.ordinals), order, 1)
        scores = np.take_along_axis(np.where(gone, np.float32(-np.inf), self.scores), order, 1)
        return GroundTruth(self.queries, ordinals, scores, self.floor)

    def joined(self, other: "GroundTruth") -> "GroundTruth":
        """The neighbors of the same queries in the union of two galleries, down to where both lists are complete."""
        ordinals, scores = best(
            np.concatenate([self.ordinals, other.ordinals], axis=1),
            np.concatenate([self.scores, other.scores], axis=1),
            DEPTH,
        )
        floor = np.maximum(np.maximum(self.floor, other.floor), floor_of(ordinals, scores))
        known = scores >= floor[:, None]
        return GroundTruth(self.queries, np.where(known, ordinals, -1), np.where(known, scores, -np.inf), floor)

    def sure(self) -> "GroundTruth":
        """The queries whose K nearest neighbors are still known after deletes."""
        known = ((self.ordinals >= 0) & (self.scores >= self.floor[:, None])).sum(axis=1)
        return self.rows((known >= K) | np.isneginf(self.floor))

    def renumbered(self, numbers: np.ndarray) -> "GroundTruth":
        """The same neighbors, with ordinal i renumbered to numbers[i]."""
        return GroundTruth(
            self.queries, np.where(self.ordinals >= 0, numbers[self.ordinals], -1), self.scores, self.floor
        )


def best(ordinals: np.ndarray, scores: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` highest scores of each row and their ordinals, ties by ordinal."""
    order = np.lexsort((ordinals, -scores), axis=1)[:, :count]
    return np.take_along_axis(ordinals, order, 1), np.take_along_axis(scores, order, 1)


def floor_of(ordinals: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(Q,) last score of each full list (Q, N); minus infinity for lists that are not full: these are complete."""
    return np.where(ordinals[:, -1] >= 0, scores[:, -1], np.float32(-np.inf))


def grouped(shards: Sequence[int]) -> list[dict[str, Any]]:
    """Shards in at most GROUPS runs, as work items."""
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
    """Search the nearest neighbors of `queries` (Q, D) float32 exactly, in Ray tasks.

    Args:
        shards: shards to search; all if not given.
        share: fraction of each shard's rows to search, sampled with `seed`.
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
    """Nearest neighbors among the rows of some shards. Runs in a Ray task."""
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
    """Rows of a shard: all, or a uniform sample of the fraction `share` (at least one row), ascending."""
    rows = gallery.starts[shard + 1] - gallery.starts[shard]
    if share >= 1:
        return np.arange(rows)
    count = _count(gallery, shard, share)
    return np.sort(np.random.default_rng([seed, shard]).choice(rows, count, replace=False))


def _count(gallery: Vectors, shard: int, share: float) -> int:
    """Number of rows that `drawn` returns for a shard."""
    rows = gallery.starts[shard + 1] - gallery.starts[shard]
    return rows if share >= 1 else max(1, round(rows * share))
