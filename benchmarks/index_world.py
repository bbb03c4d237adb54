"""The synthetic gallery of the index benchmarks, written as embeddings: clusters of very different sizes, in order.

Two thousand clusters with power-law sizes in a latent space of 48 dimensions, lifted to D dimensions with some noise
in all of them, of unit length, written class by class. Sketches are drawn from the same clusters and shifted, all the
same way, off the gallery.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from zsr.artifact import Artifact, Plan, Store
from zsr.data.rows import row_id
from zsr.executor import map_pieces

CLUSTERS: Final = 2000
LATENT: Final = 48
WITHIN: Final = 0.5  # spread inside a cluster; the centres have 1
NOISE: Final = 0.15
SHIFT: Final = 0.5
SHARD: Final = 65_536
CHECKPOINT: Final = "b" * 64
AGAIN: Final = 1_000_000  # added to the seed of what is drawn anew


@dataclass(frozen=True)
class World:
    """Its size: gallery vectors, dimensions, sketches.

    `changed` names shards that are drawn anew; `scattered` is the share of rows, of all shards, that are.
    """

    count: int
    dim: int
    sketches: int = 1000
    changed: tuple[int, ...] = ()
    scattered: float = 0.0

    def shares(self) -> np.ndarray:
        """(CLUSTERS,) share of the gallery in each cluster."""
        rng = np.random.default_rng(1)
        size = rng.permutation(np.arange(1, CLUSTERS + 1) ** -0.8)
        return np.asarray(size / size.sum())

    def vectors(self, clusters: np.ndarray, seed: int, *, shifted: bool) -> np.ndarray:
        """(n, dim) float32 of unit length, one in each of `clusters` (n,)."""
        fixed = np.random.default_rng(2)
        centres = fixed.standard_normal((CLUSTERS, LATENT)).astype(np.float32)
        lift = np.linalg.qr(fixed.standard_normal((self.dim, LATENT)))[0].T.astype(np.float32)
        off = SHIFT * np.sqrt(LATENT / self.dim) * fixed.standard_normal(self.dim)
        rng = np.random.default_rng([3, seed])
        points = centres[clusters] + np.float32(WITHIN) * rng.standard_normal((len(clusters), LATENT), np.float32)
        lifted = points @ lift + np.float32(NOISE) * rng.standard_normal((len(clusters), self.dim), np.float32)
        lifted += np.float32(shifted) * off.astype(np.float32)
        return np.asarray(lifted / np.linalg.norm(lifted, axis=1, keepdims=True), np.float32)

    def shard(self, number: int) -> pa.Table:
        """Rows of gallery shard `number`."""
        bounds = np.cumsum(np.random.default_rng(4).multinomial(self.count, self.shares()))
        rows = np.arange(number * SHARD, min(self.count, (number + 1) * SHARD))
        clusters = np.searchsorted(bounds, rows, side="right")
        seed = number + (AGAIN if number in self.changed else 0)
        vectors = self.vectors(clusters, seed, shifted=False)
        if self.scattered:
            some = np.random.default_rng([6, number]).random(len(rows)) < self.scattered
            vectors[some] = self.vectors(clusters[some], number + AGAIN, shifted=False)
        return table("photo", rows, clusters, vectors)

    def queries(self, number: int) -> pa.Table:
        """Rows of shard `number` of the sketches."""
        rows = np.arange(number * SHARD, min(self.sketches, (number + 1) * SHARD))
        clusters = np.random.default_rng(5).choice(CLUSTERS, self.sketches, p=self.shares())[rows]
        return table("sketch", rows, clusters, self.vectors(clusters, 2 * AGAIN + number, shifted=True))


def table(modality: str, rows: np.ndarray, clusters: np.ndarray, vectors: np.ndarray) -> pa.Table:
    """EMB rows."""
    keys = [f"{modality}-{row}" for row in rows]
    return pa.table(
        {
            "id": pa.array([row_id(modality, key) for key in keys], pa.int64()),
            "part": pa.array(np.zeros(len(rows), np.int16)),
            "key": pa.array(keys, pa.string()),
            "label": pa.array([f"class-{cluster}" for cluster in clusters], pa.string()),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1]),
        }
    )


def write(world: World, place: Path, modality: str) -> Artifact:
    """Publish the gallery (`photo`) or the sketches under `place`; what is there already is kept."""
    config = {"benchmark": modality, "count": world.count, "dim": world.dim, "sketches": world.sketches}
    plan = Plan("embeddings", {**config, "changed": list(world.changed), "scattered": world.scattered})
    store = Store.at(place)
    if done := store.made(plan):
        return done
    staging = store.staging(plan)
    shards = -(-(world.count if modality == "photo" else world.sketches) // SHARD)
    todo = [{"shard": i} for i in range(shards) if staging.finished(name_of(modality, i)) is None]
    map_pieces("write", _write, todo, fn_kwargs={"world": world, "modality": modality, "staging": staging})
    facts = {
        "dim": world.dim,
        "metric": "ip",
        "normalised": True,
        "checkpoint": CHECKPOINT,
        "modality": modality,
        "rows": world.count if modality == "photo" else world.sketches,
    }
    artifact = staging.seal(facts=facts)
    store.publish(artifact)
    return artifact


def name_of(modality: str, shard: int) -> str:
    """Name of an embedding shard."""
    return f"modality={modality}/part-{shard:05d}.parquet"


def _write(piece: dict[str, Any], world: World, modality: str, staging: Any) -> dict[str, Any]:
    number = int(piece["shard"])
    rows = world.shard(number) if modality == "photo" else world.queries(number)
    staging.write_table(name_of(modality, number), rows, facts={"rows": len(rows)})
    return {"shard": number}
