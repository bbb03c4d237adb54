"""Inverted lists as bytes: read from the indexes of single shards, written sequentially into one file.

faiss's own merge memory-maps its output, so that a full disk kills the process; here it raises a write error.
"""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zsr import faults
from zsr.artifact import CHUNK, Json, Staging, mapped
from zsr.errors import DamagedArtifact
from zsr.index import faiss_backend


@dataclass(frozen=True, slots=True)
class Added:
    """Lists of codes and ordinals on disk, to be merged into an index.

    Attributes:
        data: (bytes,) uint8, memory-mapped.
        sizes: (nlist,) vectors in each list. offsets: (nlist,) start of the list's codes; its ordinals follow them.
        numbers: (rows,) int64, the merged ordinal for each local one; -1 drops the vector. None shifts the ordinals.
    """

    data: np.ndarray
    sizes: np.ndarray
    offsets: np.ndarray
    numbers: np.ndarray | None = None

    @classmethod
    def open(cls, path: Path) -> "Added":
        """Open the lists of a single-file index, which the caller has verified."""
        index = faiss_backend.open_whole(path)
        return cls(mapped(path, np.dtype(np.uint8)), faiss_backend.list_sizes(index), faiss_backend.list_offsets(index))

    @classmethod
    def split(cls, index: Any, path: Path, numbers: np.ndarray) -> "Added":
        """Open the lists at `path` of an opened index; ordinal i becomes numbers[i]."""
        sizes, offsets = faiss_backend.list_sizes(index), faiss_backend.list_offsets(index)
        return cls(mapped(path, np.dtype(np.uint8)), sizes, offsets, numbers)

    def entries(self, number: int, code_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Codes (n, bytes) and ordinals (n,) of list `number`, mapped."""
        size, start = int(self.sizes[number]), int(self.offsets[number])
        middle, end = start + size * code_size, start + size * (code_size + faiss_backend.ID_BYTES)
        return self.data[start:middle].reshape(size, code_size), self.data[middle:end].view(np.int64)


def write(staging: Staging, name: str, parts: Sequence[Added], code_size: int) -> np.ndarray:
    """Stage the lists of all `parts` as one file, and return the number of vectors in each list, (nlist,) int64.

    Within a list the parts are in order: a fixed order makes a rebuild byte-identical.
    """
    starts = np.cumsum([0, *(_rows(part) for part in parts)])
    sizes = np.zeros(len(parts[0].sizes), np.int64)
    with staging.piece(name) as path, open(path, "wb", buffering=CHUNK) as out:
        faults.here("index.merge")
        for number in range(len(sizes)):
            codes, ordinals = [], []
            for part, start in zip(parts, starts, strict=False):
                for code, ordinal in _kept(part, number, code_size, int(start)):
                    codes.append(code)
                    ordinals.append(ordinal)
            for block in (*codes, *ordinals):
                out.write(np.ascontiguousarray(block).data)
            sizes[number] = sum(map(len, ordinals))
    return sizes


def _rows(part: Added) -> int:
    """By how much a part shifts the ordinals of those that follow; 0 if it has explicit `numbers`."""
    return int(part.sizes.sum()) if part.numbers is None else 0


def _kept(part: Added, number: int, code_size: int, start: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    codes, ordinals = part.entries(number, code_size)
    if not len(ordinals):
        return
    if part.numbers is None:
        yield codes, ordinals + start
        return
    moved = part.numbers[ordinals]
    yield codes[moved >= 0], moved[moved >= 0]


def copy(staging: Staging, source: str, name: str, facts: Json) -> None:
    """Copy a scratch piece to a piece of the artifact, after verifying its hash."""
    if staging.finished(name) is None:
        with staging.piece(name, facts=dict(facts)) as path:
            shutil.copyfile(staged(staging, source, scratch=True), path)


def staged(staging: Staging, name: str, *, scratch: bool = False) -> Path:
    """Path of a finished piece after verifying its hash, since pieces of a killed run may have been damaged.

    Raises:
        DamagedArtifact: it is missing or damaged. A damaged piece is dropped, so that the next run writes it again.
    """
    entry, path = staging.finished(name, scratch=scratch), staging.path(name, scratch=scratch)
    if entry is None:
        raise DamagedArtifact(f"{path}: not finished; run the job again")
    with open(path, "rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != entry.sha256:
        staging.drop(name, scratch=scratch)
        raise DamagedArtifact(f"{path}: sha256 {found[:12]}, its receipt says {entry.sha256[:12]}; run the job again")
    return path
