"""A segment: inverted lists, refine codes and id map of a run of shards. An index version has one or more.

segment-NNNNN/index.faiss            the template: coarse quantizer, codebooks, and offset of each list
segment-NNNNN/index.ivfdata          per list: codes, then ordinals
segment-NNNNN/refine.faiss           codec of the refine codes, if the key has them
segment-NNNNN/refine/part-NNNNN.raw  refine codes or full vectors, row by row
segment-NNNNN/ids/part-NNNNN.parquet id, part, key, label; row i is ordinal i of the segment
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from zsr.artifact import Artifact, Json, Store, mapped
from zsr.errors import DamagedArtifact
from zsr.index import faiss_backend
from zsr.index.storage.embeddings import Space
from zsr.index.storage.id_map import IdMap

INDEX: Final = "index.faiss"
LISTS: Final = "index.ivfdata"
REFINE: Final = "refine.faiss"


def segment_name(number: int) -> str:
    """Folder of segment `number`."""
    return f"segment-{number:05d}"


def ids_name(shard: int) -> str:
    """Name, inside its segment, of the id map of shard `shard`."""
    return f"ids/part-{shard:05d}.parquet"


def refine_name(shard: int) -> str:
    """Name, inside its segment, of the refine codes or full vectors of shard `shard`."""
    return f"refine/part-{shard:05d}.raw"


@dataclass(frozen=True, slots=True)
class Spec:
    """One segment as listed in a manifest.

    Attributes:
        name: its folder. object: digest of the index object that holds it; empty for the object of the manifest.
        rows: number of vectors, including deleted ones.
        sources: SHA-256 of the embedding shards it was built from, in order; "" for one that is not in the gallery any
            more.
        starts: ordinal of the first row of each shard in the segment.
        dtype: of full vectors, as in the embeddings.
    """

    name: str
    object: str
    rows: int
    sources: tuple[str, ...]
    starts: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, facts: Json) -> "Spec":
        """Parse the JSON form."""
        return cls(**{**facts, "sources": tuple(facts["sources"]), "starts": tuple(facts["starts"])})

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "sources": list(self.sources), "starts": list(self.starts)}


class Segment:
    """An opened segment: lists, refine codes and id map are memory-mapped."""

    def __init__(self, files: Mapping[str, Path], spec: Spec, space: Space, key: str) -> None:
        """Open `files` (by their names inside the segment), which the caller has verified.

        Raises:
            DamagedArtifact: the files are inconsistent.
        """
        self.spec, self.files, self.space = spec, files, space
        self.where = str(files[INDEX].parent)
        stored = faiss_backend.open_split(files[INDEX], files[LISTS])
        self.stored = stored
        self.index = faiss_backend.packed(stored) if faiss_backend.parse(key)["fast"] else stored
        shards = range(len(spec.sources))
        self.codec = (
            faiss_backend.from_bytes(files[REFINE].read_bytes(), str(files[REFINE])) if REFINE in files else None
        )
        self.refine = [self._map(files[refine_name(i)]) for i in shards if refine_name(i) in files]
        self.names = IdMap.read([files[ids_name(i)] for i in shards])
        self._check_fit()

    def _map(self, path: Path) -> np.ndarray:
        """Refine codes (n, bytes) uint8, or full vectors (n, D), mapped read-only."""
        dtype = np.dtype(np.uint8) if self.codec else np.dtype(self.spec.dtype).newbyteorder("<")
        width = self.codec.sa_code_size() if self.codec else self.space.dim
        row = dtype.itemsize * width
        if path.stat().st_size % row:
            raise DamagedArtifact(
                f"{path}: {path.stat().st_size} bytes are not whole rows of {row}; build the index again"
            )
        return mapped(path, dtype).reshape(-1, width)

    def _check_fit(self) -> None:
        rows = self.spec.rows
        found = {"dim": self.index.d, "index rows": self.stored.ntotal, "ids": len(self.names)}
        wanted = {"dim": self.space.dim, "index rows": rows, "ids": rows}
        if self.refine:
            found["vectors"], wanted["vectors"] = sum(map(len, self.refine)), rows
        if found != wanted:
            raise DamagedArtifact(f"{self.where}: found {found}, expected {wanted}; build it again")

    @property
    def refine_bytes(self) -> int:
        """Bytes per vector that re-ranking reads; 0 without re-ranking."""
        return self.refine[0].itemsize * self.refine[0].shape[1] if self.refine else 0

    def vectors(self, ordinals: np.ndarray) -> np.ndarray:
        """The refine vectors of `ordinals` (N,) as float32 (N, D)."""
        out = np.zeros((len(ordinals), self.space.dim), np.float32)
        shard = np.searchsorted(self.spec.starts, ordinals, side="right") - 1
        for number in np.unique(shard):
            here = np.flatnonzero(shard == number)
            stored = self.refine[number][ordinals[here] - self.spec.starts[number]]
            out[here] = self.codec.sa_decode(np.ascontiguousarray(stored)) if self.codec else stored
        return out


def object_of(artifact: Artifact, spec: Spec) -> Artifact:
    """The object that holds the files of a segment of `artifact`."""
    return Store.at(artifact.place).open(spec.object) if spec.object else artifact


def segment_files(artifact: Artifact, spec: Spec) -> dict[str, Path]:
    """The verified files of a segment by their names inside it. Raises DamagedArtifact."""
    owner = object_of(artifact, spec)
    prefix = f"{spec.name}/"
    return {e.path.removeprefix(prefix): owner.local(e.path) for e in owner.files if e.path.startswith(prefix)}


def list_sizes(segments: Sequence[Segment]) -> np.ndarray:
    """Vectors in each list, summed over `segments`, (nlist,) int64."""
    return np.asarray(np.sum([faiss_backend.list_sizes(segment.stored) for segment in segments], axis=0))
