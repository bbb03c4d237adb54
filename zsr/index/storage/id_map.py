"""Id map: the item of each vector of an index (id, part, key, label), memory-mapped.

An artifact stores it as parquet, which does not allow access to single rows. When an index is opened, it is converted
once to Arrow and numpy data in unlinked temporary files below TMPDIR, which the OS deletes when the process ends.
Memory does not grow with the gallery.
"""

import mmap
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from zsr.artifact import disk_errors, refuse_extension_types
from zsr.errors import DamagedArtifact

ROWS: Final = 131_072  # per batch


@dataclass(frozen=True)
class IdMap:
    """Id map of N vectors by ordinal.

    Attributes:
        ids: (N,) int64, of the items.
        batches: N rows of id, part, key and label, in batches.
        starts: (batches + 1,) ordinal of the first row of each batch, and N.
    """

    ids: np.ndarray
    batches: Sequence[pa.RecordBatch]
    starts: np.ndarray

    @classmethod
    def read(cls, files: Sequence[Path]) -> "IdMap":
        """Read and concatenate id map files, which the caller has verified.

        Raises:
            DamagedArtifact: a file is not readable as parquet, has an extension type, or other columns than the first.
            DiskFull, StorageError: not enough space below TMPDIR.
        """
        schema = _opened(files[0]).schema_arrow
        whole = _mapped(lambda out: _write(out, schema, files))
        pa.default_memory_pool().release_unused()  # the decoded parquet data
        reader = pa.ipc.open_file(whole)
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        return cls(_ids(batch.column("id").to_numpy() for batch in batches), batches, _starts(batches))

    @classmethod
    def joined(cls, parts: Sequence["IdMap"]) -> "IdMap":
        """Concatenate id maps."""
        if len(parts) == 1:
            return parts[0]
        batches = [batch for part in parts for batch in part.batches]
        return cls(_ids(part.ids for part in parts), batches, _starts(batches))

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, ordinals: np.ndarray) -> pa.Table:
        """The rows of `ordinals` (n,), in their order: n rows of id, part, key and label."""
        owner = np.searchsorted(self.starts, ordinals, side="right") - 1
        grouped = np.argsort(owner, kind="stable")
        held, first = np.unique(owner[grouped], return_index=True)
        rows = np.split(ordinals[grouped], first[1:]) if len(held) else []
        found = [
            self.batches[number].take(pa.array(own - self.starts[number]))
            for number, own in zip(held, rows, strict=True)
        ]
        back = np.empty(len(grouped), np.int64)
        back[grouped] = np.arange(len(grouped))
        table = pa.Table.from_batches(found, self.batches[0].schema)
        return table.combine_chunks().take(pa.array(back))

    def column(self, name: str) -> Iterator[pa.Array]:
        """A column, one batch at a time."""
        for batch in self.batches:
            yield batch.column(name)


def _opened(path: Path) -> pq.ParquetFile:
    try:
        parquet = pq.ParquetFile(path, memory_map=False)
    except (pa.ArrowException, OSError) as error:
        raise DamagedArtifact(f"{path}: not readable as parquet: {error}") from error
    refuse_extension_types(parquet.schema_arrow, str(path))
    return parquet


def _write(out: IO[bytes], schema: pa.Schema, files: Sequence[Path]) -> None:
    """Write all `files` as one Arrow file, at most one row group at a time."""
    with pa.ipc.new_file(out, schema) as writer:
        for path in files:
            with _opened(path) as parquet:
                if parquet.schema_arrow != schema:
                    raise DamagedArtifact(f"{path}: columns {parquet.schema_arrow.names}, expected {schema.names}")
                for batch in _read(path, parquet):
                    writer.write_batch(batch)


def _read(path: Path, parquet: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
    try:
        yield from parquet.iter_batches(ROWS, use_threads=False)
    except (pa.ArrowException, OSError) as error:  # an error of the file being read, not of the one being written
        raise DamagedArtifact(f"{path}: not readable as parquet: {error}") from error


def _ids(pieces: Iterable[np.ndarray]) -> np.ndarray:
    """Concatenate ids in a mapped file of their own: numpy requires one contiguous array."""

    def write(out: IO[bytes]) -> None:
        for piece in pieces:
            out.write(np.ascontiguousarray(piece, np.int64).data)

    return np.frombuffer(_mapped(write), np.int64)


def _starts(batches: Sequence[pa.RecordBatch]) -> np.ndarray:
    return np.cumsum([0, *map(len, batches)])


def _mapped(write: Callable[[IO[bytes]], None]) -> pa.Buffer:
    """Run `write` on an unlinked temporary file and memory-map the result."""
    folder = Path(tempfile.gettempdir())
    with disk_errors(folder / "id map of an opened index"), tempfile.TemporaryFile(dir=folder) as file:
        write(file)
        file.flush()
        size = file.tell()
        return pa.py_buffer(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b"")
