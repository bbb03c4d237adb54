"""List the items of a source in the order of a seeded hash, by an external sort.

Items are read in runs, partitioned into buckets by the first bits of their order key, and spilled to an unlinked
temporary file, which disappears with the process. A bucket is a range of the order: reading bucket by bucket, each
sorted in memory, gives all rows in order, with equal ids next to each other. So memory holds one run or one bucket
(1/256 of a modality), and the result depends neither on the size of a run nor on the listing order of the source.

On disk (in TMPDIR) a row takes about the compressed size of its strings; docs/data.md has measurements.
"""

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from zsr import progress
from zsr.artifact import canonical, disk_errors
from zsr.data.rows import MODALITIES, order_key, row_id
from zsr.data.sources import Item, Source, Walked

RUN_ROWS: Final = 50_000
RUN_BYTES: Final = 32 << 20  # max bytes of texts in a run
BUCKET_BITS: Final = 8
LISTING: Final = pa.schema([(each.name, pa.string()) for each in fields(Item)])
PLACED: Final = LISTING.insert(0, pa.field("order", pa.uint64())).insert(0, pa.field("id", pa.int64()))
CONTENT: Final = ("modality", "key", "label", "pair", "text", "problem")
Span = tuple[int, int, int]  # of a batch in its file: offset, compressed bytes, uncompressed bytes


@dataclass(frozen=True)
class Bad:
    """A quarantined row: its intended shard, its id and key, and the reason."""

    shard: str
    row: int
    id: int
    key: str
    kind: str
    message: str

    def line(self) -> bytes:
        """One line of JSON."""
        return json.dumps(vars(self), sort_keys=True).encode() + b"\n"


def _nameless() -> IO[bytes]:
    return tempfile.TemporaryFile(prefix="zsr-listing-")


@dataclass
class Refused:
    """Rows quarantined by the listing, in an unlinked temporary file, since there may be as many as rows."""

    kinds: Counter[str] = field(default_factory=Counter)
    file: IO[bytes] = field(default_factory=_nameless)

    def __len__(self) -> int:
        return self.kinds.total()

    def __iter__(self) -> Iterator[Bad]:
        self.file.seek(0)
        for line in self.file:
            yield Bad(**json.loads(line))

    def add(self, modality: str, key: str, kind: str, message: str) -> None:
        self.kinds[kind] += 1
        self.file.seek(0, 2)
        self.file.write(Bad(f"modality={modality}", -1, row_id(modality, key), key, kind, message).line())


@dataclass
class Spill:
    """Arrow batches of the columns PLACED in an unlinked temporary file."""

    file: IO[bytes] = field(default_factory=_nameless)
    end: int = 0

    def add(self, batch: pa.RecordBatch) -> Span:
        """Append a batch and return its span. Raises DiskFull."""
        raw = batch.serialize()
        data = pa.compress(raw, "lz4", asbytes=True)
        with disk_errors(Path(tempfile.gettempdir()), len(data)):
            self.file.seek(self.end)
            self.file.write(data)
        self.end += len(data)
        return self.end - len(data), len(data), len(raw)

    def read(self, spans: Iterable[Span]) -> pa.Table:
        """The batches at `spans` as one table."""
        batches = []
        for offset, length, raw in spans:
            self.file.seek(offset)
            data = pa.decompress(self.file.read(length), raw, "lz4")
            batches.append(pa.ipc.read_record_batch(data, PLACED))
        return pa.Table.from_batches(batches, PLACED)


@dataclass(frozen=True)
class Listing:
    """All items in order, on disk, with the metadata that a plan needs.

    Attributes:
        rows: number of rows by modality, without those in `refused`.
        labels: every class name, sorted.
        digest: digest of keys, labels, pairs, texts and problems, in order.
        guards: digest of the items' guards, in order.
        refused: rows with bad or duplicate keys (the first one is kept) or colliding ids.
        unread: number of input files that were skipped, by file extension or reason.
    """

    rows: dict[str, int]
    labels: tuple[str, ...]
    digest: str
    guards: str
    refused: Refused
    unread: dict[str, int]
    _spill: Spill
    _spans: dict[str, list[Span]]

    @property
    def count(self) -> int:
        return sum(self.rows.values()) + len(self.refused)

    def slices(self, size: int) -> Iterator[tuple[str, pa.Table]]:
        """Name and rows (columns LISTING) of each shard of `size` rows, modality by modality, in order."""
        for modality, spans in self._spans.items():
            number, rest = 0, LISTING.empty_table()
            for span in spans:
                rest = pa.concat_tables([rest, self._spill.read([span]).select(LISTING.names)])
                while len(rest) >= size:
                    yield shard_name(modality, number), rest.slice(0, size)
                    number, rest = number + 1, rest.slice(size)
            if len(rest):
                yield shard_name(modality, number), rest

    def sizes(self, size: int) -> dict[str, int]:
        """Number of rows of each shard of `slices`, by name, in order."""
        starts = [(modality, rows, at) for modality, rows in self.rows.items() for at in range(0, rows, size)]
        return {shard_name(modality, at // size): min(size, rows - at) for modality, rows, at in starts}

    def items(self) -> Iterator[Item]:
        """Every item, in order."""
        for _, table in self.slices(RUN_ROWS):
            yield from (Item(**row) for row in table.to_pylist())


def shard_name(modality: str, number: int) -> str:
    """Name of the (first) file of the slice `number` of a modality."""
    return f"modality={modality}/part-{number:05d}.parquet"


def listing(source: Source, seed: int) -> Listing:
    """List and order every item of `source`. Of duplicate keys or colliding ids only the first one is kept.

    Raises:
        DiskFull: the directory for temporary files (TMPDIR) is full.
    """
    refused, spill = Refused(), Spill()
    if isinstance(source, Walked):
        source.unread.clear()
    spans: dict[tuple[str, int], list[Span]] = {}
    with progress.stage("list"):
        for run in _runs(source.items(), refused):
            for place, batch in _bucketed(run, seed):
                spans.setdefault(place, []).append(spill.add(batch))
        unread = (
            {name: count for name, count in sorted(source.unread.items()) if count}
            if isinstance(source, Walked)
            else {}
        )
        return _ordered(spill, spans, refused, unread)


def _runs(items: Iterable[Item], refused: Refused) -> Iterator[list[Item]]:
    """Yield items with a valid key in runs of bounded size."""
    run: list[Item] = []
    size = 0
    for item in items:
        progress.advance()
        if problem := _unusable(item):
            refused.add(item.modality, str(item.key).encode(errors="backslashreplace").decode(), "bad_key", problem)
            continue
        run.append(item)
        size += len(item.text or "")
        if len(run) >= RUN_ROWS or size >= RUN_BYTES:
            yield run
            run, size = [], 0
    if run:
        yield run


def _unusable(item: Item) -> str:
    if not item.key or "\0" in item.key:
        return f"The key is {item.key!r}; expected a non-empty string without NUL."
    try:
        "".join(filter(None, (item.key, item.label, item.pair, item.where, item.text, item.problem))).encode()
    except UnicodeEncodeError as error:
        return f"The strings of the row {item.key!r} are not valid Unicode: {error.reason}."
    return ""


def _bucketed(run: list[Item], seed: int) -> Iterator[tuple[tuple[str, int], pa.RecordBatch]]:
    """Partition one run by (modality, bucket)."""
    for modality in sorted({item.modality for item in run}):
        items = [item for item in run if item.modality == modality]
        ids = np.array([row_id(modality, item.key) for item in items], dtype=np.int64)
        order = order_key(ids, seed)
        columns = [pa.array([getattr(item, name) for item in items], pa.string()) for name in LISTING.names]
        batch = pa.RecordBatch.from_arrays([pa.array(ids), pa.array(order), *columns], schema=PLACED)
        bucket = (order >> np.uint64(64 - BUCKET_BITS)).astype(np.int64)
        rows = np.argsort(bucket, kind="stable")
        starts = np.searchsorted(bucket[rows], np.arange((1 << BUCKET_BITS) + 1))
        batch = batch.take(pa.array(rows))
        for number in np.unique(bucket):
            start, end = int(starts[number]), int(starts[number + 1])
            yield (modality, int(number)), batch.slice(start, end - start)


def _ordered(
    spill: Spill, spans: dict[tuple[str, int], list[Span]], refused: Refused, unread: dict[str, int]
) -> Listing:
    """Sort bucket by bucket, quarantine duplicates, and compute the digests of the remaining rows."""
    result = Spill()
    placed: dict[str, list[Span]] = {}
    rows: Counter[str] = Counter()
    labels: set[str] = set()
    content, guards = hashlib.sha256(), hashlib.sha256()
    for modality, number in sorted(spans, key=lambda place: (MODALITIES.index(place[0]), place[1])):
        table = spill.read(spans[modality, number]).sort_by([(c, "ascending") for c in ("order", "key", "where")])
        table = _unique(table, modality, refused)
        content.update(canonical([table.column(name).to_pylist() for name in CONTENT]))
        guards.update(canonical(table.column("guard").to_pylist()))
        labels.update(name for name in pc.unique(table.column("label")).to_pylist() if name is not None)
        rows[modality] += len(table)
        placed.setdefault(modality, []).append(result.add(table.combine_chunks().to_batches()[0]))
    digests = content.hexdigest(), guards.hexdigest()
    return Listing(dict(rows), tuple(sorted(labels)), *digests, refused, unread, result, placed)


def _unique(table: pa.Table, modality: str, refused: Refused) -> pa.Table:
    """Keep the first row of every id of a sorted table; the others are added to `refused`."""
    order = table.column("order").to_numpy()
    again = np.append(False, order[1:] == order[:-1])
    if not again.any():
        return table
    first = 0
    keys: list[Any] = table.column("key").to_pylist()
    for row, repeated in enumerate(again):
        if not repeated:
            first = row
        elif keys[row] == keys[first]:
            message = f"The key {keys[row]!r} is that of another {modality} row, which is used; give this one its own."
            refused.add(modality, keys[row], "duplicate_key", message)
        else:
            message = f"The id of {keys[row]!r} equals that of {keys[first]!r}; rename one of them."
            refused.add(modality, keys[row], "id_collision", message)
    return table.filter(pa.array(~again))
