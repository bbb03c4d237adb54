"""Embeddings as input of an index: verified shards, numbered rows, and their embedding space."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Final

import numpy as np
import pyarrow as pa

from zsr.artifact import Artifact, FileEntry, Json
from zsr.data.features import vectors
from zsr.data.finite import require_finite
from zsr.errors import ConfigError, DamagedArtifact
from zsr.executor import VECTORS, stream_pieces

METRICS: Final = ("ip", "l2")


@dataclass(frozen=True, slots=True)
class Space:
    """Embedding space: what two sets of vectors must share for distances between them to be meaningful.

    Attributes:
        dim: D, the length of a vector.
        metric: "ip" (inner product) or "l2" (Euclidean).
        normalised: whether every vector has length one.
        checkpoint: digest of the checkpoint that computed the vectors.
    """

    dim: int
    metric: str
    normalised: bool
    checkpoint: str

    @classmethod
    def of(cls, facts: Json, where: str) -> "Space":
        """The space in the metadata `facts` of an artifact.

        Raises:
            DamagedArtifact: an entry is missing.
            ConfigError: a metric that an IVF index of float vectors does not support.
        """
        try:
            space = cls(int(facts["dim"]), str(facts["metric"]), bool(facts["normalised"]), str(facts["checkpoint"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedArtifact(f"{where}: its manifest lacks {error}; write it again with zsr embed") from error
        if space.metric not in METRICS:
            raise ConfigError(
                f"{where}: the metric is {space.metric!r}; an index supports {list(METRICS)}. Search binary codes "
                "exactly with zsr evaluate, or embed with a model whose metric is one of these"
            )
        return space

    def require(self, other: "Space", where: str) -> None:
        """Raise ConfigError with both values if `other` (found at `where`) is a different space."""
        for name in ("checkpoint", "dim", "metric", "normalised"):
            found, wanted = getattr(other, name), getattr(self, name)
            if found != wanted:
                raise ConfigError(
                    f"{where}: {name} is {found!r} but the gallery has {wanted!r}; embed both with the same checkpoint"
                )


@dataclass(frozen=True, slots=True)
class Block:
    """The rows of one shard.

    Attributes:
        names: N rows of `id int64, part int16, key string, label string`.
        vectors: (N, D) float16 or float32, as stored.
    """

    names: pa.Table
    vectors: np.ndarray


@dataclass(frozen=True)
class Vectors:
    """The rows of an embeddings artifact, numbered 0 .. rows-1 in shard order. Reads one shard at a time."""

    artifact: Artifact
    space: Space

    @classmethod
    def of(cls, artifact: Artifact) -> "Vectors":
        """The vectors of `artifact`.

        Raises:
            ConfigError: binary codes, or no rows.
            DamagedArtifact: the manifest lacks an entry.
        """
        where = str(artifact.directory)
        found = cls(artifact, Space.of(artifact.facts, where))
        if found.rows == 0:
            raise ConfigError(f"{where} holds no embedding; check the input of zsr embed")
        return found

    @cached_property
    def shards(self) -> tuple[FileEntry, ...]:
        """The non-empty shards, in name order."""
        return tuple(entry for entry in self.artifact.shards() if self._count(entry))

    def _count(self, entry: FileEntry) -> int:
        try:
            return int(entry.facts["rows"])
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedArtifact(
                f"{self.artifact.directory / entry.path}: its manifest entry has no row count; write it with zsr embed"
            ) from error

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Number of the first row of each shard, followed by the total."""
        return tuple(np.cumsum([0, *(self._count(entry) for entry in self.shards)]).tolist())

    @property
    def rows(self) -> int:
        return self.starts[-1]

    def read(self, shard: int) -> Block:
        """Read and verify shard number `shard`.

        Raises:
            DamagedArtifact: wrong bytes, columns, width or row count.
            ConfigError: a non-finite value, or a vector too long for float32 distances; the message names its key.
        """
        name = self.shards[shard].path
        where = f"{self.artifact.directory / name}"
        table = self.artifact.read_table(name)
        if missing := {"id", "part", "key", "label", "embedding"} - set(table.column_names):
            raise DamagedArtifact(f"{where}: no columns {sorted(missing)}; found {table.column_names}")
        matrix = vectors(table.column("embedding"), where)
        expected = (self.starts[shard + 1] - self.starts[shard], self.space.dim)
        if matrix.shape != expected or matrix.dtype not in (np.float16, np.float32):
            raise DamagedArtifact(f"{where}: found {matrix.shape} {matrix.dtype}, expected {expected} of float16 or 32")
        fix = "Check its input and the checkpoint, and embed again"
        require_finite(matrix, table.column("key"), where, fix)
        return Block(table.select(["id", "part", "key", "label"]), matrix)

    def sample(self, count: int, seed: int) -> np.ndarray:
        """Sample min(count, rows) rows uniformly without replacement over all shards, in row order: (n, D) float32."""
        return self.take(self.drawn(count, seed))

    def drawn(self, count: int, seed: int) -> np.ndarray:
        """The ordinals that `sample` returns, ascending."""
        if count >= self.rows:
            return np.arange(self.rows)
        return np.sort(np.random.default_rng(seed).choice(self.rows, count, replace=False, shuffle=False))

    def take(self, ordinals: np.ndarray) -> np.ndarray:
        """The vectors of ascending `ordinals` (n,) as float32 (n, D); all of them are held in memory."""
        pieces = self.pieces(ordinals)
        out = np.empty((len(ordinals), self.space.dim), np.float32)
        at = 0
        sizes = [len(piece["rows"]) for piece in pieces]
        small = self.rows_in(piece["shard"] for piece in pieces) <= VECTORS
        picked = stream_pieces("sample", _pick, pieces, small=small, rows=sizes, fn_kwargs={"source": self})
        for piece, found in zip(pieces, picked, strict=True):
            rows = len(piece["rows"])
            out[at : at + rows] = np.frombuffer(found["vectors"], np.float32).reshape(rows, -1)
            at += rows
        return out

    def pieces(self, ordinals: np.ndarray) -> list[dict[str, Any]]:
        """Split ascending `ordinals` (n,) into work items: `shard` and its `rows`."""
        bounds = np.searchsorted(ordinals, self.starts)
        return [
            {"shard": i, "rows": (ordinals[a:b] - self.starts[i]).tolist()}
            for i, (a, b) in enumerate(pairwise(bounds))
            if b > a
        ]

    def rows_in(self, shards: Iterable[int]) -> int:
        """Total number of rows in some shards."""
        return sum(self.starts[shard + 1] - self.starts[shard] for shard in shards)

    def picked(self, piece: Mapping[str, Any]) -> np.ndarray:
        """The vectors (n, D) float32 of one work item of `pieces`."""
        rows: Sequence[int] = piece["rows"]
        return np.asarray(self.read(int(piece["shard"])).vectors[np.asarray(rows)], np.float32)


def _pick(piece: Mapping[str, Any], source: Vectors) -> dict[str, Any]:
    """Some rows of one shard as float32 bytes. Runs in a Ray task."""
    return {"vectors": source.picked(piece).tobytes()}
