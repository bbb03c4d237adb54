"""Answers to the items of an embeddings artifact, and the file that they are written to."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from zsr.artifact import Artifact, write_atomically
from zsr.errors import ConfigError
from zsr.index.search import Hits, Searcher, merge_best, objects
from zsr.index.vectors import Vectors


@dataclass(frozen=True, slots=True)
class Answers:
    """Hits for some items, in the order in which the items first appear.

    Attributes:
        ids: (Q,) int64. keys, labels: (Q,) object. hits: Q rows.
    """

    ids: np.ndarray
    keys: np.ndarray
    labels: np.ndarray
    hits: Hits


def answer(
    searcher: Searcher,
    embeddings: Artifact,
    k: int,
    nprobe: int | None = None,
    refine_factor: int | None = None,
    *,
    wanted: np.ndarray | None = None,
) -> Answers:
    """The k nearest items of every item of `embeddings`; several parts of one query merge by best score.

    Args:
        wanted: see `Searcher.mask`.

    Raises:
        ConfigError: another checkpoint, width, metric or normalisation than the gallery's.
    """
    searcher.check(embeddings)
    source = Vectors.of(embeddings)
    found, names = [], []
    width = k * searcher.parts
    for shard in range(len(source.shards)):
        block = source.read(shard)
        names.append(block.names)
        found.append(searcher.nearest(block.vectors.astype(np.float32), width, nprobe, refine_factor, wanted=wanted))
    table = pa.concat_tables(names)
    first, rows = _group(table.column("id").to_numpy())
    # one row of nothing at the end, which the padding of `rows` points at
    ordinals = np.concatenate([*(o for o, _ in found), np.full((1, width), -1)])
    scores = np.concatenate([*(s for _, s in found), np.full((1, width), -np.inf, np.float32)])
    flat = (len(rows), rows.shape[1] * width)
    hits = searcher.resolve(*merge_best(ordinals[rows].reshape(flat), scores[rows].reshape(flat), searcher.ids, k))
    ids, keys, labels = (table.column(c).take(pa.array(first)) for c in ("id", "key", "label"))
    return Answers(ids.to_numpy(), objects(keys), objects(labels), hits)


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


def _group(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First row of each distinct id, in order of appearance (Q,), and its rows (Q, P) padded with len(ids)."""
    _, first, group, counts = np.unique(ids, return_index=True, return_inverse=True, return_counts=True)
    by_group = np.argsort(group, kind="stable")
    place = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)
    rows = np.full((len(first), int(counts.max())), len(ids))
    rows[group[by_group], place] = by_group
    appearance = np.argsort(first)
    return first[appearance], rows[appearance]
