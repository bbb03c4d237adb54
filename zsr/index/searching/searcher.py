"""Search: candidates by code over all segments, re-ranking by refine codes, best score per multi-vector item."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from zsr.artifact import Artifact, Json, open_artifact
from zsr.data.finite import require_finite
from zsr.data.published import Spellings
from zsr.errors import ConfigError
from zsr.index import faiss_backend
from zsr.index.ground_truth import GroundTruth, K
from zsr.index.storage.embeddings import Space
from zsr.index.storage.id_map import IdMap
from zsr.index.storage.segment import Segment, Spec, ids_name, object_of, segment_files

GOLDEN: Final = "golden.parquet"
DEAD: Final = "deleted.parquet"
RERANK_BYTES: Final = 64 << 20  # bytes of candidate vectors gathered at once
Labels = str | Collection[str] | None  # a class, or several, that a search is restricted to
WIDEN: Final = 4  # factor by which nprobe grows, repeatedly, for queries that a filter leaves with too few hits


@dataclass(frozen=True, slots=True)
class Hits:
    """Neighbors of B queries, best first; padded with id -1, None and minus infinity where there are fewer than k.

    Attributes:
        ids: (B, k) int64.
        keys, labels: (B, k) object, str or None.
        scores: (B, k) float32, higher is nearer: inner product, or minus the Euclidean distance, computed from the
            refine codes, or from the codes if nothing is re-ranked.
        missing: fraction of the gallery's vectors on unavailable shard actors; see `zsr.index.searching.sharded`.
    """

    ids: np.ndarray
    keys: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    missing: float = 0.0


def resolved(labels: Labels, known: Callable[[], Collection[str]]) -> tuple[str, ...] | None:
    """`labels` in the spelling of the index, without duplicates; None stays None.

    Args:
        known: returns the classes of the index; called only if there are labels.

    Raises:
        ConfigError: a class that is not in the index; the message names the closest ones.
    """
    if labels is None:
        return None
    spelling = Spellings(known())
    return tuple(sorted({spelling.known(label) for label in ([labels] if isinstance(labels, str) else labels)}))


def starts_of(specs: Sequence[Spec]) -> np.ndarray:
    """Ordinal of the first vector of each segment, and the total: (S + 1,) int64."""
    return np.cumsum([0, *(spec.rows for spec in specs)])


def reach(facts: Json, count: int, nprobe: int | None, refine_factor: int | None) -> tuple[int, int]:
    """Candidates to re-rank for `count` neighbors, and lists to probe; defaults are the published operating point.

    Raises:
        ConfigError: a number below 1.
    """
    # an index that is being tuned has no operating point yet
    factor = facts["operating_point"]["refine_factor"] if refine_factor is None else refine_factor
    probes = facts["operating_point"]["nprobe"] if nprobe is None else nprobe
    if min(count, factor, probes) < 1:
        raise ConfigError(f"k, nprobe and refine_factor must be at least 1; found {count}, {probes}, {factor}")
    return max(count, K) * factor, probes


class Searcher:
    """An opened index version.

    Lists, refine codes and id map are memory-mapped, so that memory does not grow with the gallery, except for one bit
    per vector if some are deleted, and one byte per vector while a filter is in use.

    Attributes:
        names: id map of the N vectors by ordinal.
        ids: (N,) int64, item of each vector.
        dead: ordinals of deleted vectors, ascending.
    """

    def __init__(self, segments: Sequence[Segment], facts: Json, dead: np.ndarray, files: Mapping[str, Path]) -> None:
        """Use `open` for a published index; this takes segments that are already opened.

        Args:
            files: of the version itself, outside of its segments.
        """
        self.segments, self.facts, self.dead, self.files = segments, facts, dead, files
        self.space = segments[0].space
        self.starts = starts_of([segment.spec for segment in segments])
        self.names = IdMap.joined([segment.names for segment in segments])
        self.ids = self.names.ids

    @classmethod
    def open(cls, index_dir: str | Path) -> "Searcher":
        """Open the index at `index_dir`: a ROOT (its highest version that verifies) or an object. Hashes every file.

        Raises:
            StorageError: there is no index. DamagedArtifact: bytes do not match the manifest.
        """
        return cls.of(open_artifact(index_dir, "index"))

    @classmethod
    def of(cls, artifact: Artifact, chosen: Sequence[int] | None = None) -> "Searcher":
        """Open the index in `artifact`. Raises DamagedArtifact.

        Args:
            chosen: numbers of the segments to open, ascending; ordinals then count the vectors of these segments only.
        """
        facts = artifact.facts
        space = Space.of(facts, str(artifact.directory))
        every = [Spec.of(spec) for spec in facts["segments"]]
        numbers = range(len(every)) if chosen is None else chosen
        specs = [every[i] for i in numbers]
        own = {e.path: artifact.local(e.path) for e in artifact.files if "/" not in e.path}
        files = [segment_files(artifact, spec) for spec in specs]  # all are hashed before one is parsed
        key = str(facts["index_key"])
        opened = [Segment(each, spec, space, key) for each, spec in zip(files, specs, strict=True)]
        dead = artifact.read_table(DEAD).column("ordinal").to_numpy() if DEAD in own else np.empty(0, np.int64)
        starts = starts_of(every)
        parts = [dead[(dead >= starts[i]) & (dead < starts[i + 1])] - starts[i] for i in numbers]
        moved = [part + start for part, start in zip(parts, starts_of(specs), strict=False)]
        return cls(opened, facts, np.concatenate([np.empty(0, np.int64), *moved]), own)

    @property
    def parts(self) -> int:
        """Max number of vectors per item."""
        return int(self.facts["parts"])

    @property
    def live_ids(self) -> np.ndarray:
        """Distinct ids of items that are not deleted."""
        return np.unique(self.ids[self.alive])

    @property
    def alive(self) -> np.ndarray:
        """(N,) bool over ordinals, True for vectors that are not deleted; a new array on each access."""
        mask = np.ones(len(self.ids), bool)
        mask[self.dead] = False
        return mask

    @cached_property
    def _undeleted(self) -> list[np.ndarray] | None:
        return self.bits(self.alive) if len(self.dead) else None

    def rows_of(self, segment: int) -> tuple[int, int]:
        """First ordinal of a segment, and one past its last."""
        return int(self.starts[segment]), int(self.starts[segment + 1])

    def bits(self, mask: np.ndarray) -> list[np.ndarray]:
        """`mask` (N,) over ordinals as one bitmap per segment."""
        pieces = zip(self.starts[:-1], self.starts[1:], strict=True)
        return [np.packbits(mask[a:b], bitorder="little") for a, b in pieces]

    def check(self, embeddings: Artifact) -> None:
        """Raise ConfigError if the checkpoint, width, metric or normalization of `embeddings` differs."""
        where = str(embeddings.directory)
        self.space.require(Space.of(embeddings.facts, where), where)

    def search(
        self,
        queries: np.ndarray,
        k: int,
        nprobe: int | None = None,
        refine_factor: int | None = None,
        *,
        labels: Labels = None,
        ids: Collection[int] | None = None,
    ) -> Hits:
        """Search the k nearest items.

        Args:
            queries: (B, D) float32, or (B, P, D) for multi-vector queries, whose best score counts.
            nprobe: lists to probe. refine_factor: candidates to re-rank, in multiples of k. Both default to the
                published operating point.
            labels: restrict to items of this class, or these classes, in any spelling. ids: restrict to these items.
                With a filter, a query probes more than `nprobe` lists if it needs them to find k items.

        Raises:
            ConfigError: queries of another shape or not finite, a number below 1, or a class that no item has.
        """
        flat = flattened(queries)
        found = self.nearest(flat, k * self.parts, nprobe, refine_factor, wanted=self.mask(labels, ids))
        return self.hits(found, len(queries), k)

    def hits(self, found: tuple[np.ndarray, np.ndarray], queries: int, k: int) -> Hits:
        """Hits from the ordinals and scores `found` for all vectors of `queries` queries."""
        ordinals, scores = (part.reshape(queries, part.size // queries if queries else part.shape[1]) for part in found)
        return self.resolve(*merge_best(ordinals, scores, self.ids, k))

    @cached_property
    def labels(self) -> frozenset[str]:
        """Classes of the items that are not deleted."""
        alive = self.alive if len(self.dead) else None
        found: set[str] = set()
        for start, column in zip(self.names.starts, self.names.column("label"), strict=False):
            kept = column if alive is None else column.filter(pa.array(alive[start : start + len(column)]))
            found.update(kept.unique().drop_null().to_pylist())
        return frozenset(found)

    def mask(self, labels: Labels = None, ids: Collection[int] | None = None) -> np.ndarray | None:
        """(N,) bool over ordinals, True for vectors that pass the filter and are not deleted; None without a filter.

        Raises:
            ConfigError: a class that no item has.
        """
        among = resolved(labels, lambda: self.labels)
        return self.admitted(among, ids)

    def admitted(self, labels: Collection[str] | None, ids: Collection[int] | None) -> np.ndarray | None:
        """`mask` for labels in the spelling of the index; a label that no item has matches nothing."""
        if labels is None and ids is None:
            return None
        mask = self.alive
        if labels is not None:
            among = pa.array(sorted(labels), pa.string())
            for start, column in zip(self.names.starts, self.names.column("label"), strict=False):
                mask[start : start + len(column)] &= pc.is_in(column, value_set=among).to_numpy(zero_copy_only=False)
        if ids is not None:
            mask &= np.isin(self.ids, np.fromiter(ids, np.int64, len(ids)))
        return mask

    def nearest(
        self,
        queries: np.ndarray,
        count: int,
        nprobe: int | None = None,
        refine_factor: int | None = None,
        *,
        wanted: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Search the `count` nearest vectors: ordinals and scores, two (B, count), padded with -1 and minus infinity.

        Args:
            wanted: (N,) bool, see `mask`.
        """
        depth, probes = reach(self.facts, count, nprobe, refine_factor)
        allowed, lists = None if wanted is None else self.bits(wanted), int(self.facts["nlist"])
        enough = 0 if wanted is None else min(count, int(wanted.sum()))
        ordinals, scores = unfilled(len(queries), count)
        left = np.arange(len(queries))
        while len(left):
            found = self.candidates(queries[left], depth, probes, allowed)
            ordinals[left], scores[left] = merge_best(*found, None, count)
            left = left[short(ordinals[left], enough)] if probes < lists else left[:0]
            probes *= WIDEN
        return ordinals, scores

    def candidates(
        self, queries: np.ndarray, depth: int, nprobe: int, allowed: list[np.ndarray] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Candidates in the order of `coded`, and their scores after re-ranking: two (B, depth), padded.

        Args:
            allowed: one bitmap per segment; all vectors that are not deleted if not given.
        """
        ordinals, scores = self.coded(queries, depth, nprobe, allowed)
        return ordinals, self.ranked(queries, ordinals, scores)

    def coded(
        self,
        queries: np.ndarray,
        depth: int,
        nprobe: int,
        allowed: list[np.ndarray] | None = None,
        *,
        segments: Sequence[int] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Candidates and their scores, both (B, depth), computed from the codes in the inverted lists; best first.

        Args:
            allowed: see `candidates`.
            segments: numbers of the segments to search; all if not given.
        """
        queries, lists = as_queries(queries, self.space.dim), self.lists(nprobe)

        def probe(index: Any, deep: int, bits: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
            return faiss_backend.probe(index, queries, deep, lists, bits)

        return self._over_segments(probe, depth, allowed, segments)

    def lists(self, nprobe: int) -> int:
        """`nprobe` capped at the number of lists."""
        return min(nprobe, int(self.facts["nlist"]))

    def coarse(self, queries: np.ndarray, nprobe: int) -> faiss_backend.Probes:
        """The lists that `coded` probes for queries (B, D): the same in all segments, which share their centroids."""
        return faiss_backend.coarse(self.segments[0].index, as_queries(queries, self.space.dim), self.lists(nprobe))

    def coded_in(self, probes: faiss_backend.Probes, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """As `coded`, in preassigned lists."""

        def probe(index: Any, deep: int, bits: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
            return faiss_backend.probe_assigned(index, probes, deep, bits)

        return self._over_segments(probe, depth)

    def _over_segments(
        self,
        probe: Callable[[Any, int, np.ndarray | None], tuple[np.ndarray, np.ndarray]],
        depth: int,
        allowed: list[np.ndarray] | None = None,
        segments: Sequence[int] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Merge the results of `probe(index, depth, bitmap)` over segments into one list."""
        bits = self._undeleted if allowed is None else allowed

        def over(number: int) -> tuple[np.ndarray, np.ndarray]:
            segment = self.segments[number]
            deep = min(depth, segment.spec.rows)
            ordinals, scores = probe(segment.index, deep, None if bits is None else bits[number])
            return np.where(ordinals >= 0, ordinals + self.starts[number], -1), scores

        first, *others = range(len(self.segments)) if segments is None else segments
        best = over(first)
        for number in others:  # sequentially, so that memory does not grow with the number of segments
            best = joined(best, over(number), depth)
        return best

    def ranked(self, queries: np.ndarray, ordinals: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Scores of candidates (B, C) from the refine codes; if there are none, `scores`, the result of `coded`."""
        if not self.segments[0].refine:
            return scores
        return self._refined(np.ascontiguousarray(queries, np.float32), ordinals)

    def _refined(self, queries: np.ndarray, ordinals: np.ndarray) -> np.ndarray:
        """Scores of candidates (B, C) by their refine vectors: (B, C) float32."""
        scores = np.full(ordinals.shape, -np.inf, np.float32)
        step = max(1, RERANK_BYTES // (max(1, ordinals.shape[1]) * self.space.dim * 4))
        for at in range(0, len(queries), step):
            block = slice(at, at + step)
            exact = faiss_backend.exact_scores(queries[block], self.vectors(ordinals[block]), self.space.metric)
            scores[block] = np.where(ordinals[block] >= 0, exact, -np.inf)
        return scores

    def vectors(self, ordinals: np.ndarray) -> np.ndarray:
        """The refine vectors of `ordinals` (any shape) as float32 (..., D); zeros for -1."""
        flat = ordinals.reshape(-1)
        out = np.zeros((len(flat), self.space.dim), np.float32)
        owner = np.searchsorted(self.starts, flat, side="right") - 1
        for number in np.unique(owner[flat >= 0]):
            here = np.flatnonzero((owner == number) & (flat >= 0))
            out[here] = self.segments[number].vectors(flat[here] - self.starts[number])
        return out.reshape(*ordinals.shape, self.space.dim)

    def resolve(self, ordinals: np.ndarray, scores: np.ndarray) -> Hits:
        """Hits with ids, keys and labels of the items at `ordinals` (B, k)."""
        missing = ordinals < 0
        at = np.where(missing, 0, ordinals)
        ids = np.where(missing, -1, self.ids[at])
        found = self.names.take(at.reshape(-1))
        named = [objects(found.column(name)).reshape(ordinals.shape) for name in ("key", "label")]
        for column in named:
            column[missing] = None
        return Hits(ids, named[0], named[1], scores)

    @cached_property
    def golden(self) -> GroundTruth:
        """The golden queries, which the index was tuned on, with their exact neighbors."""
        return golden_truth(pq.read_table(self.files[GOLDEN]), self.space.dim)


def classes_of(index: Artifact) -> frozenset[str]:
    """`Searcher.labels` without opening the index: only its id maps are hashed and read.

    Raises:
        DamagedArtifact: see `Artifact.read_table`.
    """
    specs = [Spec.of(spec) for spec in index.facts["segments"]]
    dead = index.read_table(DEAD).column("ordinal").to_numpy() if any(e.path == DEAD for e in index.files) else None
    found: set[str] = set()
    for spec, start in zip(specs, starts_of(specs), strict=False):
        owner = object_of(index, spec)
        tables = [owner.read_table(f"{spec.name}/{ids_name(shard)}") for shard in range(len(spec.sources))]
        column = pa.chunked_array([c for table in tables for c in table.column("label").chunks], pa.string())
        if dead is not None:
            kept = np.ones(spec.rows, bool)
            kept[dead[(dead >= start) & (dead < start + spec.rows)] - start] = False
            column = column.filter(pa.array(kept))
        found.update(column.unique().drop_null().to_pylist())
    return frozenset(found)


def golden_table(truth: GroundTruth) -> pa.Table:
    """Golden queries and their exact neighbors as a table, stored in the index so that readers can measure recall."""

    def column(matrix: np.ndarray) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), matrix.shape[1])

    return pa.table(
        {
            "query": column(truth.queries),
            "ordinals": column(truth.ordinals),
            "scores": column(truth.scores),
            "floor": pa.array(truth.floor),
        }
    )


def golden_truth(table: pa.Table, dim: int) -> GroundTruth:
    """The inverse of `golden_table`."""

    def matrix(name: str) -> np.ndarray:
        column = table.column(name).combine_chunks()
        return np.asarray(column.flatten()).reshape(len(table), -1)

    queries = matrix("query").reshape(-1, dim)
    return GroundTruth(queries, matrix("ordinals"), matrix("scores"), table.column("floor").to_numpy())


def as_queries(queries: np.ndarray, dim: int) -> np.ndarray:
    """Check and convert queries to (B, dim) float32. Raises ConfigError for another shape or non-finite values."""
    if queries.ndim != 2 or queries.shape[1] != dim:
        raise ConfigError(f"queries are {queries.shape}, expected (B, {dim}) as in the gallery")
    with np.errstate(over="ignore"):  # a float64 beyond float32 is refused below
        vectors = np.ascontiguousarray(queries, np.float32)
    require_finite(vectors, None, "queries", "Leave it out, or embed it again")
    return vectors


def flattened(queries: np.ndarray) -> np.ndarray:
    """Queries (B, D), or multi-vector queries (B, P, D), as (B * P, D)."""
    return queries.reshape(-1, queries.shape[-1]) if queries.ndim == 3 else queries


def unfilled(queries: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Ordinals and scores (queries, count) before anything is found."""
    return np.full((queries, count), -1, np.int64), np.full((queries, count), -np.inf, np.float32)


def short(ordinals: np.ndarray, enough: int) -> np.ndarray:
    """Mask (B,) of the rows of ordinals (B, C) with fewer than `enough` hits."""
    return np.asarray((ordinals >= 0).sum(axis=1) < enough)


def joined(
    one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray], depth: int
) -> tuple[np.ndarray, np.ndarray]:
    """Merge the candidates of two sets of segments, sorted by score, ties by ordinal."""
    ordinals, scores = (np.concatenate(pair, axis=1) for pair in zip(one, other, strict=True))
    order = np.lexsort((ordinals, -scores), axis=1)[:, :depth]
    return np.take_along_axis(ordinals, order, 1), np.take_along_axis(scores, order, 1)


def merge_best(
    ordinals: np.ndarray, scores: np.ndarray, ids: np.ndarray | None, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of each row, best first, ties by ordinal; only the best of several candidates with the same id.

    Args:
        ordinals: (B, C) int64, -1 where there is no candidate. scores: (B, C) float32.
        ids: id of every ordinal, or None if every ordinal is a separate item.

    Returns:
        ordinals and scores, both (B, k), padded with -1 and minus infinity.
    """
    scores = np.where(ordinals >= 0, scores, -np.inf).astype(np.float32)
    order = np.lexsort((ordinals, -scores), axis=1)
    ordinals, scores = np.take_along_axis(ordinals, order, 1), np.take_along_axis(scores, order, 1)
    if ids is not None:
        ordinals, scores = _first_of_each(ordinals, scores, ids)
    short = max(0, k - ordinals.shape[1])
    ordinals = np.pad(ordinals[:, :k], ((0, 0), (0, short)), constant_values=-1)
    return ordinals, np.pad(scores[:, :k], ((0, 0), (0, short)), constant_values=-np.inf)


def _first_of_each(ordinals: np.ndarray, scores: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keep the first candidate of each id per row (rows sorted by score); blank the others and move them to the end."""
    named, there = np.full(ordinals.shape, -1, np.int64), ordinals >= 0
    named[there] = ids[ordinals[there]]  # `ids` is empty if no shard actor answers
    by_id = np.argsort(named, axis=1, kind="stable")
    grouped = np.take_along_axis(named, by_id, 1)
    repeated = np.zeros(ordinals.shape, bool)
    np.put_along_axis(repeated, by_id[:, 1:], grouped[:, 1:] == grouped[:, :-1], 1)
    ordinals, scores = np.where(repeated, -1, ordinals), np.where(repeated, -np.inf, scores)
    order = np.argsort(repeated, axis=1, kind="stable")
    return np.take_along_axis(ordinals, order, 1), np.take_along_axis(scores, order, 1)


def objects(column: pa.ChunkedArray) -> np.ndarray:
    """A string column with nulls as an object array."""
    out = np.empty(len(column), object)
    out[:] = column.to_pylist()
    return out
