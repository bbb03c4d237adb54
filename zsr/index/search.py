"""Search: candidates by code, exact re-ranking from the stored vectors, parts of one item merged by best score."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from zsr.artifact import Artifact, Json, open_artifact, refuse_extension_types, write_atomically
from zsr.errors import ConfigError, DamagedArtifact
from zsr.index import engine
from zsr.index.vectors import Space, Vectors

INDEX: Final = "index.faiss"
LISTS: Final = "index.ivfdata"
GOLDEN: Final = "golden.parquet"
TUNED_K: Final = 10  # the operating point is measured at this k; a smaller one re-ranks no fewer candidates
RERANK_BYTES: Final = 64 << 20  # candidate vectors gathered at once


def ids_name(shard: int) -> str:
    """Name of the id map of shard `shard`."""
    return f"ids/part-{shard:05d}.parquet"


def refine_name(shard: int) -> str:
    """Name of the raw little-endian vectors of shard `shard`, row after row."""
    return f"refine/part-{shard:05d}.raw"


@dataclass(frozen=True, slots=True)
class Hits:
    """Neighbours of B queries, best first; padded with id -1, None and minus infinity where there are fewer than k.

    Attributes:
        ids: (B, k) int64.
        keys, labels: (B, k) object, str or None.
        scores: (B, k) float32, higher is nearer: inner product, or minus the Euclidean distance.
    """

    ids: np.ndarray
    keys: np.ndarray
    labels: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True, slots=True)
class Answers:
    """Hits for the items of an embeddings artifact, in the order in which the items first appear.

    Attributes:
        ids: (Q,) int64. keys, labels: (Q,) object. hits: Q rows.
    """

    ids: np.ndarray
    keys: np.ndarray
    labels: np.ndarray
    hits: Hits


class Searcher:
    """An opened index. Its lists and vectors are mapped from disk; ids, keys and labels are in memory."""

    def __init__(self, files: Mapping[str, Path], facts: Json) -> None:
        """Use `open` for a published index; this takes files that are already verified.

        Raises:
            DamagedArtifact: the files do not fit one another.
        """
        self.facts = facts
        self.files = files
        self.space = Space.of(facts, str(files[INDEX].parent))
        self.index = engine.open_split(files[INDEX], files[LISTS])
        shards = range(int(facts["shards"]))
        dtype = np.dtype(str(facts["refine_dtype"])).newbyteorder("<")
        self.refine = [_map_vectors(files[refine_name(i)], dtype, self.space.dim) for i in shards]
        self.starts = np.cumsum([0, *(len(vectors) for vectors in self.refine)])
        self.names = pa.concat_tables([_read_names(files[ids_name(i)]) for i in shards])
        self.ids = self.names.column("id").to_numpy()
        self._check_fit()

    @classmethod
    def open(cls, index_dir: str | Path) -> "Searcher":
        """The index at `index_dir`: a ROOT (its highest version that verifies) or an object. Every file is hashed.

        Raises:
            StorageError: nothing is there. DamagedArtifact: bytes are not what the manifest says.
        """
        return cls.of(open_artifact(index_dir, "index"))

    @classmethod
    def of(cls, artifact: Artifact) -> "Searcher":
        """The index in `artifact`. Raises DamagedArtifact."""
        return cls({entry.path: artifact.local(entry.path) for entry in artifact.files}, artifact.facts)

    def _check_fit(self) -> None:
        found = {
            "dim": self.index.d,
            "index rows": self.index.ntotal,
            "vectors": int(self.starts[-1]),
            "ids": len(self.ids),
        }
        rows = int(self.facts["ntotal"])
        wanted = {"dim": self.space.dim, "index rows": rows, "vectors": rows, "ids": rows}
        if found != wanted:
            raise DamagedArtifact(f"{self.files[INDEX].parent}: found {found}, expected {wanted}; build it again")

    @property
    def parts(self) -> int:
        """The most vectors that one item has."""
        return int(self.facts["parts"])

    def check(self, embeddings: Artifact) -> None:
        """Raise ConfigError if `embeddings` have another checkpoint, width, metric or normalisation."""
        where = str(embeddings.directory)
        self.space.require(Space.of(embeddings.facts, where), where)

    def search(self, queries: np.ndarray, k: int, nprobe: int | None = None, refine_factor: int | None = None) -> Hits:
        """The k nearest items.

        Args:
            queries: (B, D) float32, or (B, P, D) for queries of several parts, whose best one counts.
            nprobe: lists to look into; refine_factor: candidates to re-rank, in multiples of k. The published operating
                point if not given.

        Raises:
            ConfigError: queries of another shape, or a number below 1.
        """
        flat = queries.reshape(-1, queries.shape[-1]) if queries.ndim == 3 else queries
        found = self.nearest(flat, k * self.parts, nprobe, refine_factor)
        ordinals, scores = (part.reshape(len(queries), -1) for part in found)
        return self._resolve(*merge_best(ordinals, scores, self.ids, k))

    def search_embeddings(
        self, embeddings: Artifact, k: int, nprobe: int | None = None, refine_factor: int | None = None
    ) -> Answers:
        """The k nearest items of every item of `embeddings`; several parts of one query merge by best score.

        Raises:
            ConfigError: another checkpoint, width, metric or normalisation than the gallery's.
        """
        self.check(embeddings)
        source = Vectors.of(embeddings)
        found, names = [], []
        for shard in range(len(source.shards)):
            block = source.read(shard)
            names.append(block.names)
            found.append(self.nearest(block.vectors.astype(np.float32), k * self.parts, nprobe, refine_factor))
        table = pa.concat_tables(names)
        first, rows = _group(table.column("id").to_numpy())
        width = k * self.parts
        # one row of nothing at the end, which the padding of `rows` points at
        ordinals = np.concatenate([*(o for o, _ in found), np.full((1, width), -1)])
        scores = np.concatenate([*(s for _, s in found), np.full((1, width), -np.inf, np.float32)])
        flat = (len(rows), rows.shape[1] * width)
        hits = self._resolve(*merge_best(ordinals[rows].reshape(flat), scores[rows].reshape(flat), self.ids, k))
        ids, keys, labels = (table.column(c).take(pa.array(first)) for c in ("id", "key", "label"))
        return Answers(ids.to_numpy(), _objects(keys), _objects(labels), hits)

    def nearest(
        self, queries: np.ndarray, count: int, nprobe: int | None = None, refine_factor: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ordinals and exact scores of the `count` nearest vectors: two (B, count), padded with -1 and -inf."""
        factor = self.facts["operating_point"]["refine_factor"] if refine_factor is None else refine_factor
        probes = self.facts["operating_point"]["nprobe"] if nprobe is None else nprobe
        if min(count, factor, probes) < 1:
            raise ConfigError(f"k, nprobe and refine_factor must be at least 1; found {count}, {probes}, {factor}")
        ordinals, scores = self.candidates(queries, max(count, TUNED_K) * factor, probes)
        return merge_best(ordinals, scores, None, count)

    def candidates(self, queries: np.ndarray, depth: int, nprobe: int) -> tuple[np.ndarray, np.ndarray]:
        """Candidates in the order of their codes' distance, with exact scores: two (B, depth), padded."""
        if queries.ndim != 2 or queries.shape[1] != self.space.dim:
            raise ConfigError(f"queries are {queries.shape}, expected (B, {self.space.dim}) as in the gallery")
        queries = np.ascontiguousarray(queries, np.float32)
        depth = min(depth, int(self.starts[-1]))
        ordinals = engine.probe(self.index, queries, depth, min(nprobe, int(self.facts["nlist"])))
        scores = np.full(ordinals.shape, -np.inf, np.float32)
        step = max(1, RERANK_BYTES // (depth * self.space.dim * 4))
        for at in range(0, len(queries), step):
            block = slice(at, at + step)
            exact = engine.exact_scores(queries[block], self.vectors(ordinals[block]), self.space.metric)
            scores[block] = np.where(ordinals[block] >= 0, exact, -np.inf)
        return ordinals, scores

    def vectors(self, ordinals: np.ndarray) -> np.ndarray:
        """The stored vectors of `ordinals` (any shape) as float32 (..., D); zeros for -1."""
        flat = ordinals.reshape(-1)
        out = np.zeros((len(flat), self.space.dim), np.float32)
        shard = np.searchsorted(self.starts, flat, side="right") - 1
        for number in np.unique(shard[flat >= 0]):
            here = np.flatnonzero((shard == number) & (flat >= 0))
            out[here] = self.refine[number][flat[here] - self.starts[number]]
        return out.reshape(*ordinals.shape, self.space.dim)

    def _resolve(self, ordinals: np.ndarray, scores: np.ndarray) -> Hits:
        """Names of the items at `ordinals` (B, k)."""
        missing = ordinals < 0
        at = pa.array(np.where(missing, 0, ordinals).reshape(-1))
        ids = np.where(missing, -1, self.ids[np.where(missing, 0, ordinals)])
        named = [_objects(self.names.column(c).take(at)).reshape(ordinals.shape) for c in ("key", "label")]
        for column in named:
            column[missing] = None
        return Hits(ids, named[0], named[1], scores)


def answers_table(answers: Answers) -> pa.Table:
    """One row a hit: the query's id, key and label, the rank from 1, and the neighbour's id, key, label and score."""
    query, rank = np.nonzero(answers.hits.ids >= 0)
    hits = {name: getattr(answers.hits, name)[query, rank] for name in ("ids", "keys", "labels", "scores")}
    return pa.table(
        {
            "query_id": pa.array(answers.ids[query], pa.int64()),
            "query_key": pa.array(answers.keys[query], pa.string()),
            "query_label": pa.array(answers.labels[query], pa.string()),
            "rank": pa.array(rank + 1, pa.int32()),
            "id": pa.array(hits["ids"], pa.int64()),
            "key": pa.array(hits["keys"], pa.string()),
            "label": pa.array(hits["labels"], pa.string()),
            "score": pa.array(hits["scores"], pa.float32()),
        }
    )


def write_answers(answers: Answers, output: Path) -> None:
    """Write `answers_table` as parquet, or as a JSON list of its rows, by the suffix of `output`; whole or not at all.

    Raises:
        ConfigError: another suffix. DiskFull, StorageError: it cannot be written.
    """
    table = answers_table(answers)
    if output.suffix == ".json":
        data = json.dumps(table.to_pylist(), ensure_ascii=False).encode()
    else:
        require_suffix(output)
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
        data = buffer.getvalue().to_pybytes()
    write_atomically(output, data)


def require_suffix(output: Path) -> None:
    """Raise ConfigError unless `write_answers` knows how to write `output`."""
    if output.suffix not in (".json", ".parquet"):
        raise ConfigError(f"{output}: neighbours are written as .json or .parquet; give one of these suffixes")


def merge_best(
    ordinals: np.ndarray, scores: np.ndarray, ids: np.ndarray | None, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of each row, best first, ties by ordinal; of several candidates with one id only the best.

    Args:
        ordinals: (B, C) int64, -1 where there is no candidate. scores: (B, C) float32.
        ids: id of every ordinal, or None where each ordinal is an item of its own.

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
    """Rows sorted by score, with every later candidate of an id that was there before moved to the end and blanked."""
    named = np.where(ordinals >= 0, ids[ordinals], -1)
    by_id = np.argsort(named, axis=1, kind="stable")
    grouped = np.take_along_axis(named, by_id, 1)
    repeated = np.zeros(ordinals.shape, bool)
    np.put_along_axis(repeated, by_id[:, 1:], grouped[:, 1:] == grouped[:, :-1], 1)
    ordinals, scores = np.where(repeated, -1, ordinals), np.where(repeated, -np.inf, scores)
    order = np.argsort(repeated, axis=1, kind="stable")
    return np.take_along_axis(ordinals, order, 1), np.take_along_axis(scores, order, 1)


def _group(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First row of each distinct id, in order of appearance (Q,), and its rows (Q, P) padded with len(ids)."""
    _, first, group, counts = np.unique(ids, return_index=True, return_inverse=True, return_counts=True)
    by_group = np.argsort(group, kind="stable")
    place = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)
    rows = np.full((len(first), int(counts.max())), len(ids))
    rows[group[by_group], place] = by_group
    appearance = np.argsort(first)
    return first[appearance], rows[appearance]


def _objects(column: pa.ChunkedArray) -> np.ndarray:
    """Strings and nulls as an object array."""
    out = np.empty(len(column), object)
    out[:] = column.to_pylist()
    return out


def _map_vectors(path: Path, dtype: np.dtype[Any], dim: int) -> np.ndarray:
    """Raw vectors, (n, D), mapped read-only."""
    row = dtype.itemsize * dim
    if path.stat().st_size % row:
        raise DamagedArtifact(f"{path}: {path.stat().st_size} bytes are not whole rows of {row}; build the index again")
    return np.memmap(path, dtype, mode="r").reshape(-1, dim)


def _read_names(path: Path) -> pa.Table:
    """An id map that the caller has verified."""
    try:
        parquet = pq.ParquetFile(path, memory_map=False)
        refuse_extension_types(parquet.schema_arrow, str(path))
        return parquet.read()
    except (pa.ArrowException, OSError) as error:
        raise DamagedArtifact(f"{path}: not readable as parquet: {error}") from error
