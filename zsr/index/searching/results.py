"""Search results for the items of an embeddings artifact, as a table and as a file."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from zsr.artifact import Artifact, write_atomically
from zsr.errors import ConfigError
from zsr.index.searching.searcher import Hits, Labels, objects
from zsr.index.storage.embeddings import Block, Vectors


@dataclass(frozen=True, slots=True)
class Answers:
    """Hits of some query items, in order of first appearance.

    Attributes:
        ids: (Q,) int64. keys, labels: (Q,) object. hits: Q rows.
    """

    ids: np.ndarray
    keys: np.ndarray
    labels: np.ndarray
    hits: Hits


class Searches(Protocol):
    """A `Searcher` or a `ShardedSearcher`."""

    def check(self, embeddings: Artifact) -> None: ...

    def search(
        self,
        queries: np.ndarray,
        k: int,
        nprobe: int | None = None,
        refine_factor: int | None = None,
        *,
        labels: Labels = None,
    ) -> Hits: ...


@dataclass(frozen=True, slots=True)
class SearchParams:
    """Search parameters for all queries; see `Searcher.search`. Empty `labels` do not filter."""

    k: int
    nprobe: int | None = None
    refine_factor: int | None = None
    labels: tuple[str, ...] = ()

    def of(self, searcher: Searches, queries: np.ndarray) -> Hits:
        """Search for queries (B, D) or (B, P, D)."""
        return searcher.search(queries, self.k, self.nprobe, self.refine_factor, labels=self.labels or None)


def answer(searcher: Searches, embeddings: Artifact, asked: SearchParams) -> Answers:
    """Search for every item of `embeddings`; a multi-vector query counts the best score of its vectors.

    Raises:
        ConfigError: the checkpoint, width, metric or normalization differs from the gallery's.
    """
    searcher.check(embeddings)
    source = Vectors.of(embeddings)
    blocks = [source.read(shard) for shard in range(len(source.shards))]
    whole = Block(pa.concat_tables([b.names for b in blocks]), np.concatenate([b.vectors for b in blocks]))
    return answer_block(searcher, whole, asked)


def answer_block(searcher: Searches, block: Block, asked: SearchParams) -> Answers:
    """Search for the items of one block; all vectors of an item must be in it."""
    first, queries = queries_of(block)
    hits = asked.of(searcher, queries)
    ids, keys, labels = (block.names.column(c).take(pa.array(first)) for c in ("id", "key", "label"))
    return Answers(ids.to_numpy(), objects(keys), objects(labels), hits)


def queries_of(block: Block) -> tuple[np.ndarray, np.ndarray]:
    """First row of each item of one block, in order of appearance (Q,), and its vectors (Q, P, D) float32."""
    first, rows = _group(block.names.column("id").to_numpy())
    return first, block.vectors.astype(np.float32)[rows]


def answers_table(answers: Answers) -> pa.Table:
    """One row per hit: the query's id, key and label, the rank from 1, and the neighbor's id, key, label and score."""
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
    """Write `answers_table` atomically, as parquet or as a JSON list of rows, depending on the suffix of `output`.

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


def into_file(output: Path) -> bool:
    """Whether `output` is a single file, and not the ROOT of an artifact.

    A suffix of letters only means a file, unless it is a directory; in neighbours-v1.0, ".0" is part of the name.
    """
    return output.suffix[1:].isalpha() and not output.is_dir()


def require_suffix(output: Path) -> None:
    """Raise ConfigError unless `write_answers` supports the suffix of `output`."""
    if output.suffix not in (".json", ".parquet"):
        raise ConfigError(
            f"--output {output}: a file of neighbors is .json or .parquet, found {output.suffix!r}; give one of "
            "these, or no suffix for the ROOT of an artifact"
        )


def _group(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First row of each distinct id, in order of appearance (Q,), and its rows (Q, P), padded with the first."""
    _, first, group, counts = np.unique(ids, return_index=True, return_inverse=True, return_counts=True)
    by_group = np.argsort(group, kind="stable")
    place = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)
    rows = np.repeat(first[:, None], int(counts.max()), axis=1)
    rows[group[by_group], place] = by_group
    appearance = np.argsort(first)
    return first[appearance], rows[appearance]
