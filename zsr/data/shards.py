"""Ray Data streams over verified shards: rows in order with their features or images, without unseen classes.

Every stream preserves the order, so that the rows seen after n rows are a function of n alone.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from zsr import progress
from zsr.artifact import Artifact
from zsr.data.decode import Pictures
from zsr.data.features import vectors
from zsr.data.pictures import Decoded, decoded, shard
from zsr.data.rows import row_id
from zsr.errors import ConfigError
from zsr.executor import IMAGES, VECTORS, runs_here

logger = logging.getLogger("zsr")

ROW: Final = ("id", "key", "label", "pair")
DECODED: Final = 128  # images in one block of a stream: those of a whole shard would be hundreds of megabytes


Source = Artifact | Pictures


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive rows of one modality, with their features or images.

    Attributes:
        ids: (N,) int64.
        pairs: (N,) int64, id of the photo that the row belongs to; its own id if it has no pair.
        labels: (N,) int64 index into the classes of the stream.
        features: (N, D) float32, or images (N, H, W, 3) uint8 RGB.
        keys: N strings; only in streams with `keys`.
    """

    ids: np.ndarray
    pairs: np.ndarray
    labels: np.ndarray
    features: np.ndarray
    keys: tuple[str, ...] = ()


def stream(
    data: Artifact, source: Source, modality: str, classes: tuple[str, ...] | None, *, keys: bool = False
) -> Iterator[Block]:
    """Stream the rows of `modality` in shard order whose class is in `classes`; one block per shard, more for images.

    Rows of other classes are dropped before their features are read: nothing of an unseen row, not even a NaN, can
    reach a caller that requested seen classes.

    Args:
        source: FEATURES whose shards have the same names as those of `data`, or the preprocessing of images.
        classes: label i is classes[i]; None for every row, with label -1 throughout.

    Raises:
        ConfigError: the features were not computed from this data, or there is no shard of this modality.
    """
    names = _features_of(data, source, modality) if isinstance(source, Artifact) else _shards_of(data, modality)
    rows = sum(int(data.entry(name).facts["rows"]) for name in names)
    small = rows <= (VECTORS if isinstance(source, Artifact) else IMAGES)
    shared = (data, source, classes, keys)
    tables = (
        chain.from_iterable(_tables(name, *shared) for name in names) if runs_here(small) else _by_ray(names, shared)
    )
    yield from _blocks(tables, None if isinstance(source, Artifact) else source.resize.size)


def _tables(
    name: str, data: Artifact, source: Source, classes: tuple[str, ...] | None, keys: bool
) -> Iterator[pa.Table]:
    """One DATA shard joined with its features as one table, or with its decoded images as several."""
    if isinstance(source, Artifact):
        yield _table(*featured_rows(data, source, name, classes), classes, keys)
        return
    for rows, found in pictured_rows(data, source, name, classes):
        # explicit width instead of -1, which fails for 0 rows
        yield _table(rows, found.reshape(len(found), int(np.prod(found.shape[1:]))), classes, keys)


def _task(batch: Mapping[str, Any], *shared: Any) -> Iterator[pa.Table]:
    """`_tables` in a Ray task."""
    yield from _tables(str(batch["item"][0]), *shared)


def _by_ray(names: list[str], shared: tuple[Any, ...]) -> Iterator[pa.Table]:
    """`_tables` of every shard, in Ray tasks."""
    import ray  # takes seconds; not needed for small data

    from zsr.cluster import connect

    connect()
    items = ray.data.from_items(names, override_num_blocks=len(names))
    if isinstance(source := shared[1], Pictures):
        # set before the map, which copies it; a task emits a block as soon as it exceeds this size
        items.context.target_max_block_size = (DECODED - 1) * 3 * source.resize.size**2
    # Ray's own type admits one argument only
    dataset = items.map_batches(cast(Any, _task), fn_args=shared, batch_size=1, batch_format="numpy")
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield cast(pa.Table, batch)


def _features_of(data: Artifact, features: Artifact, modality: str) -> list[str]:
    """Names of the shards that have features."""
    if features.parents.get("data") != data.digest:
        raise ConfigError(
            f"features {features.digest[:12]} are of data {str(features.parents.get('data'))[:12]}, not of "
            f"{data.digest[:12]}; run zsr features on this data"
        )
    names = [entry.path for entry in data.shards(modality) if entry.path in {f.path for f in features.files}]
    if not names:
        raise ConfigError(
            f"features {features.digest[:12]} hold no {modality}; they hold {sorted(features.facts['rows'])}"
        )
    return names


def _shards_of(data: Artifact, modality: str) -> list[str]:
    names = [entry.path for entry in data.shards(modality)]
    if not names:
        raise ConfigError(f"data {data.digest[:12]} hold no {modality}; they hold {sorted(data.facts['rows'])}")
    return names


def _blocks(tables: Iterator[pa.Table], size: int | None) -> Iterator[Block]:
    for table in tables:
        if len(table):
            found = vectors(table.column("feature"), "stream")
            yield Block(
                ids=table.column("id").to_numpy(),
                pairs=table.column("pair").to_numpy(),
                labels=table.column("label").to_numpy(),
                features=found if size is None else found.reshape(-1, size, size, 3),
                keys=tuple(table.column("key").to_pylist()) if "key" in table.column_names else (),
            )


def featured_rows(
    data: Artifact, features: Artifact, name: str, classes: tuple[str, ...] | None
) -> tuple[pa.Table, np.ndarray]:
    """The rows of shard `name` that have a feature, see `rows_of`, and their features (N, D) float32."""
    rows = rows_of(data, name, classes)
    vector = features.read_table(name)
    where = pc.index_in(rows.column("id"), value_set=vector.column("id").combine_chunks())
    rows = rows.filter(pc.is_valid(where))
    place = pc.drop_null(where).to_numpy().astype(np.int64)
    return rows, vectors(vector.column("feature"), name)[place].astype(np.float32)


def pictured_rows(
    data: Artifact, pictures: Pictures, name: str, classes: tuple[str, ...] | None
) -> Iterator[tuple[pa.Table, np.ndarray]]:
    """Yield the rows of shard `name` and their images (N, size, size, 3) uint8, in the parts of `encoded_rows`.

    `prepare` has decoded every image at a small size; one that fails at this size is skipped with a warning.
    """
    modality = name.partition("/")[0].partition("=")[2]
    for part in encoded_rows(data, name, classes):
        yield pictured(part, decoded(part.column("image").to_pylist(), pictures, modality), name)


def pictured(part: pa.Table, found: Decoded, name: str) -> tuple[pa.Table, np.ndarray]:
    """The rows of a part of shard `name` whose images were decoded, and the images; a warning for each other row."""
    for row, _, message in found.bad:
        logger.warning("%s: row %s is skipped: %s", name, part.column("key")[row], message)
    return part.take(pa.array(found.rows, pa.int64())), found.pixels


def encoded_rows(data: Artifact, name: str, classes: tuple[str, ...] | None) -> Iterator[pa.Table]:
    """Yield the rows of shard `name` with their encoded images, in tables of at most DECODED rows.

    If it has no row of `classes` (None: of any class), one empty table is yielded.
    """
    file, columns = shard(data, name).file, [*ROW, "image"]
    waiting = file.schema_arrow.empty_table().select(columns)
    for batch in file.iter_batches(DECODED, columns=columns, use_threads=False):
        waiting = pa.concat_tables([waiting, _of_classes(pa.Table.from_batches([batch]), classes)])
        while len(waiting) > DECODED:
            yield waiting[:DECODED]
            waiting = waiting[DECODED:]
    yield waiting


def rows_of(data: Artifact, name: str, classes: tuple[str, ...] | None) -> pa.Table:
    """Columns ROW of a DATA shard: all rows, or those of `classes`."""
    return _of_classes(shard(data, name).file.read(columns=list(ROW)), classes)


def _of_classes(rows: pa.Table, classes: tuple[str, ...] | None) -> pa.Table:
    if classes is None:
        return rows
    return rows.filter(pc.is_in(rows.column("label"), value_set=pa.array(list(classes), pa.string())))


def _table(rows: pa.Table, matrix: np.ndarray, classes: tuple[str, ...] | None, keys: bool) -> pa.Table:
    """The columns of a stream for N rows and their vectors (N, D)."""
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
    """A whole modality in memory, for small data sets, validation and tests.

    Attributes:
        ids, pairs, labels: (N,) int64. features: (N, D) float32 or (N, H, W, 3) uint8. keys: N strings.
    """

    ids: np.ndarray
    pairs: np.ndarray
    labels: np.ndarray
    features: np.ndarray
    keys: tuple[str, ...]


def collect(data: Artifact, source: Source, modality: str, classes: tuple[str, ...]) -> Rows:
    """Every row of `classes` in memory.

    Raises:
        ConfigError: there is none.
    """
    found = stream(data, source, modality, classes, keys=True)
    blocks = [block for _, block in progress.counted((len(block.ids), block) for block in found)]
    if not blocks:
        raise ConfigError(
            f"no {modality} row of the classes {list(classes)[:5]} ... has a feature or image; check the split"
        )
    return Rows(
        ids=np.concatenate([b.ids for b in blocks]),
        pairs=np.concatenate([b.pairs for b in blocks]),
        labels=np.concatenate([b.labels for b in blocks]),
        features=np.concatenate([b.features for b in blocks]),
        keys=tuple(key for b in blocks for key in b.keys),
    )
