"""List-major batch search, for an index that is larger than a machine's memory.

Queries probe lists at random, so every worker that answers whole queries reads all codes repeatedly. Here the inverted
lists are split into contiguous ranges of about equal bytes, and a task scans one range for all queries:

assign  one task per shard of queries: the lists to probe for each query
scan    one task per range: the best candidates in its lists, for each assigned shard of queries
merge   one task per shard of queries (`Merged`): the best candidates of all ranges, re-ranked and named as usual

The first two write scratch pieces in staging: a killed run resumes from them, they never enter the artifact, and they
are deleted with the staging when it is published.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ray.data import ActorPoolStrategy

from zsr import faults
from zsr.artifact import Artifact, Staging
from zsr.clock import Clock
from zsr.errors import ConfigError
from zsr.executor import map_pieces
from zsr.index import faiss_backend
from zsr.index.searching.results import SearchParams, queries_of
from zsr.index.searching.searcher import Hits, Labels, Searcher, flattened, merge_best, reach
from zsr.index.storage.embeddings import Vectors
from zsr.index.storage.inverted_lists import staged
from zsr.index.storage.segment import list_sizes

COLUMNS: Final = ("vectors", "lists", "distances")  # of a file of probed lists: the fields of `Probes`


def probes_name(shard: int) -> str:
    """Name of the scratch piece with the lists to probe for a shard of queries."""
    return f"assign/part-{shard:05d}.parquet"


def require(index: Artifact, asked: SearchParams, replicas: int) -> None:
    """Raise ConfigError for parameters that list ranges do not support."""
    key = str(index.facts["index_key"])
    if replicas:
        raise ConfigError("--list-ranges and --replicas exclude each other; give one of them")
    if asked.labels:
        raise ConfigError(
            "--labels probes more lists until k hits are found, which ranges do not support; leave --list-ranges out"
        )
    if faiss_backend.lists_interact(key):
        raise ConfigError(
            f"index key {key!r}: with such codes, faiss's results in one list depend on the other lists probed; "
            "leave --list-ranges out, or build with PQm, PQmxbits, SQ8, RaBitQ1 or Flat"
        )


@dataclass(frozen=True)
class Work:
    """A batch search; shared by all of its tasks.

    Attributes:
        ranges: number of ranges of lists; 0 for a search without ranges.
    """

    index: Artifact
    source: Vectors
    asked: SearchParams
    staging: Staging
    ranges: int

    @property
    def reach(self) -> tuple[int, int]:
        """Candidates and probed lists per query; see `zsr.index.searching.searcher.reach`."""
        facts, asked = self.index.facts, self.asked
        return reach(facts, asked.k * int(facts["parts"]), asked.nprobe, asked.refine_factor)

    def found_name(self, number: int, shard: int) -> str:
        """Name of the scratch piece with the candidates of range `number` of the lists for a shard of queries.

        It contains the number of ranges, since that determines which lists are in range `number`.
        """
        return f"scan/{number:05d}-of-{self.ranges:05d}/part-{shard:05d}.parquet"

    def lacks(self, name: str) -> bool:
        """Whether scratch piece `name` is not finished yet."""
        return self.staging.finished(name, scratch=True) is None

    def probes(self, shard: int) -> faiss_backend.Probes:
        """The lists to probe for a shard of queries. Raises DamagedArtifact."""
        table = self.read(probes_name(shard))
        return faiss_backend.Probes(*(_matrix(table.column(name)) for name in COLUMNS))

    def read(self, name: str) -> pa.Table:
        """Read the table in scratch piece `name`, after verifying its hash.

        Raises:
            DamagedArtifact: missing or damaged. A damaged piece is deleted, so that the next run computes it again.
        """
        return pq.read_table(staged(self.staging, name, scratch=True))


class Assigner:
    """A Ray actor that assigns the lists to probe for one shard of queries per call."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.searcher = Searcher.of(work.index, [0])  # all segments share the same centroids
        self.searcher.check(work.source.artifact)

    def __call__(self, piece: dict[str, Any]) -> dict[str, Any]:
        clock, shard = Clock(), int(piece["shard"])
        queries = flattened(queries_of(self.work.source.read(shard))[1])
        probes = self.searcher.coarse(queries, self.work.reach[1])
        columns = {name: _column(getattr(probes, name)) for name in COLUMNS}
        faults.here("search.assign")
        self.work.staging.write_table(probes_name(shard), pa.table(columns), scratch=True)
        return {"rows": len(queries), **clock.spent()}


class Scanner:
    """A Ray actor that scans one range of lists per call, for all `shards` of queries."""

    def __init__(self, work: Work, shards: list[int]) -> None:
        self.work, self.shards = work, shards

    @cached_property
    def searcher(self) -> Searcher:
        """Opened lazily: a killed run may have scanned everything already."""
        return Searcher.of(self.work.index)

    @cached_property
    def bounds(self) -> np.ndarray:
        """See `bounds_of`."""
        return bounds_of(list_sizes(self.searcher.segments), self.work.ranges)

    def __call__(self, piece: dict[str, Any]) -> dict[str, Any]:
        clock, number = Clock(), int(piece["range"])
        todo = [shard for shard in self.shards if self.work.lacks(self.work.found_name(number, shard))]
        return {"rows": sum(self._scan(number, shard) for shard in todo), **clock.spent()}

    def _scan(self, number: int, shard: int) -> int:
        """Search one range of lists for one shard of queries, and stage the candidates found.

        Args:
            number: of the range.
            shard: number of the shard of queries.

        Returns:
            how many of the shard's queries probe a list in the range.
        """
        rows, probes = self.work.probes(shard).within(*self.bounds[number : number + 2])
        # one extra candidate shows whether the last one that is kept ties with one that is cut off
        ordinals, scores = self.searcher.coded_in(probes, self.work.reach[0] + 1)
        query, rank = np.nonzero(ordinals >= 0)
        found = {"query": rows[query].astype(np.int32), "ordinal": ordinals[query, rank], "score": scores[query, rank]}
        faults.here("search.scan")
        self.work.staging.write_table(self.work.found_name(number, shard), pa.table(found), scratch=True)
        return len(rows)


@dataclass(frozen=True)
class Merged:
    """A searcher for one shard of queries, which merges the candidates that were found in each range of lists."""

    work: Work
    searcher: Searcher
    shard: int

    def check(self, embeddings: Artifact) -> None:
        """See `Searcher.check`."""
        self.searcher.check(embeddings)

    def search(
        self,
        queries: np.ndarray,
        k: int,
        nprobe: int | None = None,
        refine_factor: int | None = None,
        *,
        labels: Labels = None,
    ) -> Hits:
        """The k nearest items of the shard's queries (B, D) or (B, P, D); the other parameters are those of the scan.

        Raises:
            DamagedArtifact: the candidates of a range were damaged; the next run scans it again.
        """
        flat = flattened(queries)
        ordinals, codes = self._coded(len(flat))
        scores = self.searcher.ranked(flat, ordinals, codes)
        return self.searcher.hits(merge_best(ordinals, scores, None, k * self.searcher.parts), len(queries), k)

    def _coded(self, queries: int) -> tuple[np.ndarray, np.ndarray]:
        """The result of `Searcher.coded` for the shard, except for the order: ordinals and code scores, two (B, depth).

        If the last candidate kept ties with the first one cut off, faiss's choice depends on the order of the lists.
        Such queries are searched again in all of their lists.
        """
        depth = self.work.reach[0]
        best = np.full((queries, depth + 1), -1), np.full((queries, depth + 1), -np.inf, np.float32)
        for number in range(self.work.ranges):
            _keep(best, self.work.read(self.work.found_name(number, self.shard)))
        order = np.argsort(-best[1], axis=1)
        ordinals, codes = (np.take_along_axis(matrix, order, 1) for matrix in best)
        tied = np.flatnonzero((codes[:, -1] == codes[:, -2]) & (ordinals[:, -1] >= 0))
        ordinals, codes = ordinals[:, :-1], codes[:, :-1]
        if len(tied):
            probes = self.work.probes(self.shard).take(tied)
            ordinals[tied], codes[tied] = self.searcher.coded_in(probes, depth)
        return ordinals, codes


def scan(work: Work, shards: list[int], workers: int) -> list[dict[str, Any]]:
    """Assign and scan some shards of queries with `workers` actors, and return the costs.

    Raises:
        ConfigError: queries of another space.
        DamagedArtifact: a scratch piece is damaged; it is deleted, so that the next run computes it again.
    """
    todo = [{"shard": shard} for shard in shards if work.lacks(probes_name(shard))]
    given = {"rows": rows_of(work, todo), "unit": "queries", "fn_constructor_kwargs": {"work": work}}
    spent = map_pieces("assign", Assigner, todo, **given, **actors(todo, workers))
    ranges = [{"range": number} for number in range(work.ranges if shards else 0)]
    given = {"unit": "ranges", "fn_constructor_kwargs": {"work": work, "shards": shards}}
    return spent + map_pieces("scan", Scanner, ranges, **given, **actors(ranges, workers))


def rows_of(work: Work, pieces: list[dict[str, Any]]) -> list[int]:
    """Number of query vectors in each of some shards."""
    starts = work.source.starts
    return [starts[piece["shard"] + 1] - starts[piece["shard"]] for piece in pieces]


def actors(pieces: list[dict[str, Any]], workers: int) -> dict[str, Any]:
    """Options of `map_pieces` for at most `workers` actors with one CPU each."""
    return {"compute": ActorPoolStrategy(size=max(1, min(len(pieces), workers))), "num_cpus": 1}


def bounds_of(sizes: np.ndarray, count: int) -> np.ndarray:
    """First list of each of `count` contiguous ranges, and the number of lists: (count + 1,) int64.

    Args:
        sizes: (nlist,) int64, vectors in each list; all vectors have the same number of bytes.
    """
    ends = np.cumsum(sizes)
    cuts = np.searchsorted(ends, ends[-1] * np.arange(1, count) / count)
    return np.asarray([0, *cuts, len(sizes)])


def _keep(best: tuple[np.ndarray, np.ndarray], table: pa.Table) -> None:
    """Merge the candidates of one range of lists into `best`, in place."""
    query, ordinal, score = (table.column(name).to_numpy() for name in ("query", "ordinal", "score"))
    rows, start, count = np.unique(query, return_index=True, return_counts=True)
    if not len(rows):
        return
    at = np.repeat(np.arange(len(rows)), count), np.arange(len(query)) - np.repeat(start, count)
    wide, deep = int(count.max()), best[0].shape[1]
    ordinals = np.concatenate([best[0][rows], np.full((len(rows), wide), -1)], axis=1)
    scores = np.concatenate([best[1][rows], np.full((len(rows), wide), -np.inf, np.float32)], axis=1)
    ordinals[:, deep:][at], scores[:, deep:][at] = ordinal, score
    kept = np.argpartition(-scores, deep - 1, axis=1)[:, :deep]
    best[0][rows], best[1][rows] = (np.take_along_axis(matrix, kept, 1) for matrix in (ordinals, scores))


def _column(matrix: np.ndarray) -> pa.Array:
    """A matrix (n, W) as a column of n lists."""
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), matrix.shape[1])


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    """The inverse of `_column`."""
    lists = column.combine_chunks()
    return np.asarray(lists.flatten()).reshape(len(lists), -1)
