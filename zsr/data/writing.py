"""Write one slice of the listing to DATA shards of bounded size: load, check, write; or quarantine.

A slice has `rows_per_shard` rows. Images are loaded in the order of the source's files, so that each is read once, into
a spool that moves to disk beyond 64 MiB. Rows are then written in their order, in row groups of bounded bytes, to one
file or, beyond `bytes_per_shard`, to several: part-00007.parquet, part-00007_001.parquet ... So the memory of a task
does not depend on the size of images, a reader can read single row groups, and a slice can be rewritten independently.
"""

import json
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from zsr import faults, progress
from zsr.artifact import Staging, canonical
from zsr.data.decode import BadImage, Limits, decode
from zsr.data.listing import Bad
from zsr.data.rows import SCHEMA, row_id
from zsr.data.sources import Item, Source

PROBE: Final = 32  # side in pixels for the check that an image can be decoded completely, which is cheap at this size
TEXT_CAP: Final = 100_000  # max characters
SPOOL: Final = 64 << 20  # max bytes of loaded images that a task holds in memory
ROW_GROUP: Final = 1 << 20  # max bytes of a row group, unless one row has more; a stream reads one per sampled row
LAYOUT: Final = 2  # version of the file layout of this module; part of the plan


@dataclass(frozen=True, slots=True)
class Good:
    """A row to write: its item and id, and the offset and length of its image in the spool."""

    item: Item
    identity: int
    start: int
    length: int

    @property
    def bytes(self) -> int:
        texts = (self.item.key, self.item.label, self.item.pair, self.item.text)
        return 8 + self.length + sum(len(text.encode()) for text in texts if text)


def slice_of(name: str) -> str:
    """The slice of shard `name`, which is named by its first file.

    >>> slice_of("modality=photo/part-00007_001.parquet")
    'modality=photo/part-00007.parquet'
    """
    return re.sub(r"_\d{3,}\.parquet$", ".parquet", name)


def staged_items(staging: Staging, name: str) -> list[Item]:
    """The items that the listing assigned to the slice `name`."""
    data = staging.read(f"listing/{name}", scratch=True)
    return [Item(**row) for row in pq.read_table(pa.BufferReader(data)).to_pylist()]


def files_of(staging: Staging, name: str) -> list[str]:
    """The shards that the slice `name` was written to; empty while any of them is missing."""
    if staging.finished(f"slices/{name}.json", scratch=True) is None:
        return []
    names: list[str] = json.loads(staging.read(f"slices/{name}.json", scratch=True))
    return names if all(staging.finished(each) for each in names) else []


def write_slice(piece: dict[str, Any], source: Source, staging: Staging, bytes_per_shard: int) -> dict[str, Any]:
    """Load, check and stage the rows of one slice and its quarantine. Runs in a Ray task."""
    name = str(piece["name"])
    with tempfile.SpooledTemporaryFile(max_size=SPOOL) as spool:
        good, bad = _load_all(source, staged_items(staging, name), name, spool)
        if bad:
            staging.write(f"_quarantine/{name}.jsonl", b"".join(each.line() for each in bad))
        faults.here("prepare.shard")
        groups = _parted([row.bytes for row in good], ROW_GROUP)
        sizes = [sum(row.bytes for row in good[start:end]) for start, end in groups]
        files = [
            [good[a:b] for a, b in groups[start:end]] for start, end in _parted(sizes, bytes_per_shard) or [(0, 0)]
        ]
        names = [name, *(name.replace(".parquet", f"_{i:03d}.parquet") for i in range(1, len(files)))]
        for file, rows in zip(names, files, strict=True):
            _write(staging, file, rows, spool, len(bad) if file == name else 0)
    staging.write(f"slices/{name}.json", canonical(names), scratch=True)
    return {"name": name, "rows": len(good), "quarantined": len(bad)}


def _load_all(source: Source, items: list[Item], name: str, spool: IO[bytes]) -> tuple[list[Good], list[Bad]]:
    """Good and bad rows, in the order of the listing; images are written to `spool`."""
    good: dict[int, Good] = {}
    bad: dict[int, Bad] = {}
    end = 0
    for row, item in sorted(enumerate(items), key=lambda pair: pair[1].where):
        progress.advance()
        identity = row_id(item.modality, item.key)
        try:
            data = _checked(source, item)
        except BadImage as error:
            bad[row] = Bad(name, row, identity, item.key, error.kind, str(error))
            continue
        spool.write(data)
        good[row] = Good(item, identity, end, len(data))
        end += len(data)
    return [good[row] for row in sorted(good)], [bad[row] for row in sorted(bad)]


def _checked(source: Source, item: Item) -> bytes:
    """The bytes of `item`, whose image was decoded as a check. Raises BadImage with the quarantine's kind."""
    try:
        data = source.load(item)
        feature = source.feature(item)
    except OSError as error:
        raise BadImage("unreadable", f"The file cannot be read: {error.strerror or error}.") from error
    if data:
        pixels = decode(data, PROBE, Limits())
        if item.modality == "sketch" and pixels.min() == 255:
            raise BadImage("blank", "nothing but white; light strokes on a transparent ground vanish: make them dark")
    elif item.where and item.text is None and feature is None:
        raise BadImage("empty", "The file or cell holds 0 bytes; expected an encoded image.")
    if item.text is not None and (not item.text.strip() or len(item.text) > TEXT_CAP or "\0" in item.text):
        raise BadImage(
            "bad_text", f"The text has {len(item.text)} characters; expected 1 to {TEXT_CAP}, no NUL, not blank."
        )
    return data


def _parted(sizes: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """Split `sizes` greedily into consecutive non-empty ranges that each sum to at most `limit`, if possible.

    >>> _parted([2, 2, 9, 1], 4)
    [(0, 2), (2, 3), (3, 4)]
    """
    ranges, start, held = [], 0, 0
    for at, size in enumerate(sizes):
        if at > start and held + size > limit:
            ranges.append((start, at))
            start, held = at, 0
        held += size
    return [*ranges, (start, len(sizes))] if sizes else []


def _write(staging: Staging, name: str, groups: list[list[Good]], spool: IO[bytes], quarantined: int) -> None:
    classes = Counter(row.item.label for group in groups for row in group if row.item.label is not None)
    facts = {
        "rows": sum(map(len, groups)),
        "quarantined": quarantined,
        "images": sum(row.length > 0 for group in groups for row in group),
        "classes": {str(label): classes[label] for label in sorted(classes)},
    }
    # encoded images do not compress; the statistics of their column tell a stream how many rows have none
    packing = {column: "none" if column == "image" else "zstd" for column in SCHEMA.names}
    with (
        staging.piece(name, facts=facts) as path,
        pq.ParquetWriter(
            path,
            SCHEMA,
            compression=packing,
            use_dictionary=["label"],
            write_statistics=["id", "image"],
            write_page_checksum=True,
        ) as writer,
    ):
        for group in groups:
            writer.write_table(pa.Table.from_pylist([_row(row, spool) for row in group], schema=SCHEMA))


def _row(good: Good, spool: IO[bytes]) -> dict[str, Any]:
    spool.seek(good.start)
    item = good.item
    return {
        "id": good.identity,
        "key": item.key,
        "label": item.label,
        "pair": item.pair,
        "image": spool.read(good.length) or None,
        "text": item.text,
    }
