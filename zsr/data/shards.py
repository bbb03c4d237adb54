"""Ray Data streams over verified shards: rows in order, joined with their features, unseen classes left out.

Every stream is order-preserving, so that what a reader has seen after n rows is a function of n alone.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import Dataset

from zsr.artifact import Artifact
from zsr.cluster import connect
from zsr.data.features import vectors
from zsr.data.rows import row_id
from zsr.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive rows of one modality, joined with their features.

    Attributes:
        ids: (N,) int64.
        pairs: (N,) int64, id of the photo that the row belongs to; its own id where it has no pair.
        labels: (N,) int64 index into the classes that the stream was asked for.
        features: (N, D) float32.
        keys: N strings; only in streams that ask for them.
    """

    ids: np.ndarray
    pairs: np.ndarray
    labels: np.ndarray
    features: np.ndarray
    keys: tuple[str, ...] = ()


def stream(
    data: Artifact, features: Artifact, modality: str, classes: tuple[str, ...] | None, *, keys: bool = False
) -> Iterator[Block]:
    """Rows of `modality` in shard order whose class is in `classes`, one block a shard.

    A class outside of `classes` is dropped before its features are looked at: nothing of an unseen row, not even a NaN,
    can reach a caller that asked for seen classes.

    Args:
        data, features: artifacts whose shards have the same names.
        classes: label i is classes[i]; None takes every row, with label -1 throughout.

    Raises:
        ConfigError: the features were not made from this data.
    """
    if features.parents.get("data") != data.digest:
        raise ConfigError(
            f"features {features.digest[:12]} were made from data {str(features.parents.get('data'))[:12]}, not from "
            f"{data.digest[:12]}; run jobs.features on this data"
        )
    names = [entry.path for entry in data.shards(modality) if entry.path in {f.path for f in features.files}]
    if not names:
        raise ConfigError(
            f"features {features.digest[:12]} hold no {modality}; they hold {sorted(features.facts['rows'])}"
        )
    connect()
    dataset = ray.data.from_items(names, override_num_blocks=len(names)).map_batches(
        cast(Any, _join),  # Ray's own type admits one argument only
        fn_args=(data, features, classes, keys),
        batch_size=1,
        batch_format="numpy",
    )
    yield from _blocks(dataset)


def _blocks(dataset: Dataset) -> Iterator[Block]:
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        table = cast(pa.Table, batch)
        if len(table):
            yield Block(
                ids=table.column("id").to_numpy(),
                pairs=table.column("pair").to_numpy(),
                labels=table.column("label").to_numpy(),
                features=vectors(table.column("feature"), "stream"),
                keys=tuple(table.column("key").to_pylist()) if "key" in table.column_names else (),
            )


def _join(
    batch: Mapping[str, Any], data: Artifact, features: Artifact, classes: tuple[str, ...] | None, keys: bool
) -> pa.Table:
    """One DATA shard joined with its features. Runs in a Ray task."""
    name = str(batch["item"][0])
    rows = data.read_table(name, columns=["id", "key", "label", "pair"])
    if classes is not None:
        rows = rows.filter(pc.is_in(rows.column("label"), value_set=pa.array(list(classes), pa.string())))
    vector = features.read_table(name)
    where = pc.index_in(rows.column("id"), value_set=vector.column("id").combine_chunks())
    rows = rows.filter(pc.is_valid(where))
    matrix = vectors(vector.column("feature"), name)[pc.drop_null(where).to_numpy().astype(np.int64)].astype(np.float32)
    ids = rows.column("id").to_numpy()
    pairs = [
        own if key is None else row_id("photo", key)
        for own, key in zip(ids, rows.column("pair").to_pylist(), strict=True)
    ]
    index = {label: i for i, label in enumerate(classes or ())}
    columns = {
        "id": pa.array(ids, pa.int64()),
        "pair": pa.array(pairs, pa.int64()),
        "label": pa.array([index.get(label, -1) for label in rows.column("label").to_pylist()], pa.int64()),
        "feature": pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), matrix.shape[1]),
    }
    if keys:
        columns["key"] = rows.column("key").combine_chunks()
    return pa.table(columns)


@dataclass(frozen=True, slots=True)
class Rows:
    """A whole modality in memory: what small sets, validation and tests use.

    Attributes:
        ids, pairs, labels: (N,) int64. features: (N, D) float32. keys: N strings.
    """

    ids: np.ndarray
    pairs: np.ndarray
    labels: np.ndarray
    features: np.ndarray
    keys: tuple[str, ...]


def collect(data: Artifact, features: Artifact, modality: str, classes: tuple[str, ...]) -> Rows:
    """Every row of `classes` in one table.

    Raises:
        ConfigError: there is none.
    """
    blocks = list(stream(data, features, modality, classes, keys=True))
    if not blocks:
        raise ConfigError(f"no {modality} row of the classes {list(classes)[:5]} ... has a feature; check the split")
    return Rows(
        ids=np.concatenate([b.ids for b in blocks]),
        pairs=np.concatenate([b.pairs for b in blocks]),
        labels=np.concatenate([b.labels for b in blocks]),
        features=np.concatenate([b.features for b in blocks]),
        keys=tuple(key for b in blocks for key in b.keys),
    )
