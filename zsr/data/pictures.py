"""Tasks of an image stream: list rows, read them by shard and row number, decode and augment them.

torch is not imported here: it would delay the first batch of every Ray process that runs these tasks by seconds.

Shapes: R rows of a batch (all modalities, concatenated), S side in pixels.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from zsr.artifact import Artifact, refuse_extension_types
from zsr.data.augment import crop_and_mirror, uniform
from zsr.data.decode import BadImage, Limits, Pictures, decode
from zsr.data.rows import row_id
from zsr.errors import DamagedArtifact

CACHE: Final = 512 << 20  # bytes of encoded images that a process caches, in whole row groups
OPEN: Final = 64  # shards that a process keeps open
LISTED: Final = pa.schema(
    [("shard", pa.int32()), ("row", pa.int32()), ("id", pa.int64()), ("pair", pa.int64()), ("label", pa.int64())]
)


class Shard:
    """An open DATA shard whose bytes were verified.

    Attributes:
        path: its path on this machine.
        bounds: (G + 1,) first row of each of G row groups, and the number of rows.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self.file = pq.ParquetFile(path, pre_buffer=False)
            refuse_extension_types(self.file.schema_arrow, path)
        except DamagedArtifact:
            raise
        except Exception as error:  # registered extension types parse their metadata here, and may raise anything
            raise DamagedArtifact(f"{path}: not readable as parquet: {error}") from error
        about = self.file.metadata
        self.bounds = np.cumsum([0] + [about.row_group(g).num_rows for g in range(about.num_row_groups)])

    def group(self, number: int) -> pa.Array:
        """The encoded images of one row group."""
        return self._column(number).combine_chunks()

    def pictured(self) -> np.ndarray:
        """(N,) bool: which rows have an image. Images are read only if the footer's null counts do not suffice."""
        return np.concatenate([np.zeros(0, bool), *(self._has(g) for g in range(len(self.bounds) - 1))])

    def _has(self, number: int) -> np.ndarray:
        about = self.file.metadata.row_group(number).column(self.file.schema_arrow.get_field_index("image"))
        counts = about.statistics
        if counts is not None and counts.has_null_count and counts.null_count in (0, about.num_values):
            return np.full(int(np.diff(self.bounds)[number]), counts.null_count == 0)
        return np.asarray(self._column(number).is_valid())

    def _column(self, number: int) -> pa.ChunkedArray:
        return self.file.read_row_group(number, columns=["image"], use_threads=False).column(0)


@lru_cache(maxsize=OPEN)
def _opened(path: str) -> Shard:
    return Shard(path)


def shard(data: Artifact, name: str) -> Shard:
    """Shard `name`, verified once per process and kept open.

    Raises:
        DamagedArtifact: wrong size or hash, or not parquet.
    """
    return _opened(str(Path(data.local(name))))


def has_images(data: Artifact, modality: str) -> bool:
    """Whether any row of `modality` has an image; opens shards of DATA whose metadata does not count images."""
    return any(
        entry.facts["images"] if "images" in entry.facts else shard(data, entry.path).pictured().any()
        for entry in data.shards(modality)
    )


class Cache:
    """LRU cache of the encoded images of row groups, of at most `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self.held: OrderedDict[tuple[str, int], pa.Array] = OrderedDict()

    def picture(self, of: Shard, row: int) -> bytes | None:
        """The encoded image of one row; None if it has none."""
        number = int(np.searchsorted(of.bounds, row, side="right")) - 1
        key = (of.path, number)
        if key not in self.held:
            self.held[key] = of.group(number)
            self.bytes += self.held[key].nbytes
        self.held.move_to_end(key)
        while self.bytes > self.limit and len(self.held) > 1:
            self.bytes -= self.held.popitem(last=False)[1].nbytes
        found: bytes | None = self.held[key][row - int(of.bounds[number])].as_py()
        return found


_cache = Cache(CACHE)  # one per process


def pixels(encoded: bytes | None, pictures: Pictures, modality: str) -> np.ndarray:
    """Decode an image and preprocess it by `pictures`, (S, S, 3) uint8 RGB.

    Raises:
        BadImage: see `decode`.
    """
    return pictures.look(modality, decode(encoded or b"", pictures.resize, Limits()))


@dataclass(frozen=True, slots=True)
class Decoded:
    """Decoded and preprocessed images.

    Attributes:
        rows: indices, among the images given, of the n that were decoded.
        pixels: (n, S, S, 3) uint8 of those.
        bad: index, kind and message of each of the others.
    """

    rows: list[int]
    pixels: np.ndarray
    bad: list[tuple[int, str, str]]


def decoded(images: Sequence[bytes | None], pictures: Pictures, modality: str) -> Decoded:
    """`pixels` of several images."""
    rows: list[int] = []
    bad: list[tuple[int, str, str]] = []
    side = pictures.resize.size
    found = np.empty((len(images), side, side, 3), np.uint8)
    for row, image in enumerate(images):
        try:
            found[len(rows)] = pixels(image, pictures, modality)
            rows.append(row)
        except BadImage as error:
            bad.append((row, error.kind, str(error)))
    return Decoded(rows, found[: len(rows)], bad)


@dataclass(frozen=True)
class Work:
    """Arguments shared by all tasks of a stream.

    Attributes:
        names: shards by number.
        augment: whether to crop and flip each image at random.
        slots: (R,) index of each row in the global batch, which seeds its augmentation.
    """

    data: Artifact
    names: tuple[str, ...]
    pictures: Pictures
    augment: bool
    slots: np.ndarray


def list_rows(item: Mapping[str, Any], data: Artifact, classes: tuple[str, ...]) -> pa.Table:
    """List the rows of one shard that have an image and a label among `classes`, without decoding images.

    Args:
        item: `name` and `number` of the shard.

    Returns:
        LISTED: number of the shard, row in it, id, pair (id of the photo that it belongs to, or its own id), label
        (index in `classes`), in row order.
    """
    name, number = str(item["name"][0]), int(item["number"][0])
    at = shard(data, name)
    rows = at.file.read(columns=["id", "label", "pair"])
    index = {label: i for i, label in enumerate(classes)}
    label_N = np.array([index.get(label, -1) for label in rows.column("label").to_pylist()], np.int64)
    kept = np.flatnonzero((label_N >= 0) & at.pictured())
    ids = rows.column("id").to_numpy()[kept]
    keys = rows.column("pair").take(pa.array(kept)).to_pylist()
    pairs = [own if key is None else row_id("photo", key) for own, key in zip(ids.tolist(), keys, strict=True)]
    columns = [np.full(len(kept), number), kept, ids, np.array(pairs, np.int64), label_N[kept]]
    return pa.table(columns, LISTED.names).cast(LISTED)


class Decoder:
    """Decode consecutive batches of one rank per call, each as a table of one row.

    An actor, so that its cache is reused by its next calls, and so that no more processes than CPUs decode.
    """

    def __init__(self, work: Work) -> None:
        self.work = work

    def __call__(self, item: Mapping[str, Any]) -> Iterator[pa.Table]:
        """Decode the batches of `item`.

        Args:
            item: `places`, bytes of (batches, R, 2) int32, shard number and row of each image; `seeds`, bytes of
                (batches,) int64; `first`, the number of the first batch.

        Yields:
            Columns number; decoded, the number of images decoded for it; pixels, R * S * S * 3 of uint8.

        Raises:
            DamagedArtifact: a shard differs from its manifest, or an image that `prepare` decoded cannot be decoded.
        """
        work = self.work
        places = np.frombuffer(item["places"][0], np.int32).reshape(-1, len(work.slots), 2)
        seeds = np.frombuffer(item["seeds"][0], np.int64)
        uses = Counter((n, row) for n, row in places.reshape(-1, 2).tolist())
        shards = {n: shard(work.data, work.names[n]) for n in sorted({n for n, _ in uses})}
        held: dict[tuple[int, int], np.ndarray] = {}
        for number, (batch_R2, seed) in enumerate(zip(places, seeds, strict=True), int(item["first"][0])):
            batch = [(n, row) for n, row in batch_R2.tolist()]
            new = set(batch) - held.keys()
            held |= {(n, row): _decoded(work, shards[n], n, row) for n, row in sorted(new)}
            found = _augmented(work, [held[place] for place in batch], int(seed))
            uses.subtract(batch)
            held = {place: picture for place, picture in held.items() if uses[place]}
            yield pa.table({"number": [number], "decoded": [len(new)], "pixels": _one_row(found)})


def _decoded(work: Work, at: Shard, number: int, row: int) -> np.ndarray:
    name = work.names[number]
    modality = name.partition("/")[0].partition("=")[2]
    try:
        return pixels(_cache.picture(at, row), work.pictures, modality)
    except BadImage as error:
        raise DamagedArtifact(
            f"{work.data.directory / name}: row {row} was decoded by zsr prepare, but now: {error}; prepare it again"
        ) from error


def _augmented(work: Work, pictures: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """The images of a batch, augmented if requested, as (R, S, S, 3)."""
    if not work.augment:
        return np.stack(pictures)
    draws = uniform(seed, work.slots)
    return np.stack([crop_and_mirror(picture, draw) for picture, draw in zip(pictures, draws, strict=True)])


def _one_row(pixels_RSS3: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(pixels_RSS3.reshape(-1)), pixels_RSS3.size)
