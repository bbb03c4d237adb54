"""Embeddings written by hand, in the form that zsr embed publishes."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from zsr import executor
from zsr.artifact import Artifact, Plan, Store
from zsr.data.rows import row_id

DIM = 32
CHECKPOINT = "c" * 64
KEY = "IVF64,PQ8x6,RFlat"  # codes that lose something, and whole vectors to re-rank them


@dataclass(frozen=True)
class World:
    """A gallery and its queries, with the vectors that they hold."""

    root: Path
    gallery: Artifact
    queries: Artifact
    photos: np.ndarray
    sketches: np.ndarray


def clustered(count: int, seed: int, *, shift: float = 0.0, dim: int = DIM) -> np.ndarray:
    """(count, dim) float32 of length one around 40 centres; `shift` moves them all off the gallery, as sketches are."""
    centres = np.random.default_rng(7).standard_normal((40, dim))
    rng = np.random.default_rng(seed)
    points = centres[rng.integers(0, 40, count)] + 0.6 * rng.standard_normal((count, dim))
    points += shift * np.random.default_rng(8).standard_normal(dim)
    return np.asarray(points / np.linalg.norm(points, axis=1, keepdims=True), np.float32)


def embeddings(
    root: Path,
    vectors: np.ndarray,
    modality: str,
    *,
    shards: int = 4,
    metric: str = "ip",
    checkpoint: str = CHECKPOINT,
    parts: int = 1,
    keys: Sequence[str] | None = None,
) -> Artifact:
    """Publish `vectors` under `root`; consecutive `parts` rows are parts of one item."""
    rows = np.arange(len(vectors))
    names = keys or [f"{modality}-{row // parts}" for row in rows]
    store = Store.at(root)
    staging = store.staging(Plan("embeddings", {"modality": modality, "metric": metric}, {"checkpoint": checkpoint}))
    for number, piece in enumerate(np.array_split(rows, shards)):
        matrix = vectors[piece]
        table = pa.table(
            {
                "id": pa.array([row_id(modality, names[row]) for row in piece], pa.int64()),
                "part": pa.array(piece % parts, pa.int16()),
                "key": pa.array([names[row] for row in piece], pa.string()),
                "label": pa.array([None if row % 5 == 0 else f"class-{row % 7}" for row in piece], pa.string()),
                "embedding": pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), matrix.shape[1]),
            }
        )
        staging.write_table(f"modality={modality}/part-{number:05d}.parquet", table, facts={"rows": len(piece)})
    facts = {
        "dim": vectors.shape[1],
        "metric": metric,
        "normalised": True,
        "checkpoint": checkpoint,
        "modality": modality,
        "rows": len(vectors),
    }
    artifact = staging.seal(facts=facts)
    store.publish(artifact)
    return artifact


def make_world(root: Path, *, photos: int, sketches: int, metric: str = "ip", shards: int = 4) -> World:
    """A gallery of photos and a set of shifted sketches."""
    gallery, queries = clustered(photos, 1), clustered(sketches, 2, shift=0.5)
    return World(
        root,
        embeddings(root / "gallery", gallery, "photo", shards=shards, metric=metric),
        embeddings(root / "queries", queries, "sketch", shards=1, metric=metric),
        gallery,
        queries,
    )


def exact_neighbours(queries: np.ndarray, gallery: np.ndarray, k: int, metric: str = "ip") -> np.ndarray:
    """Rows of the k nearest, (Q, k), by the definition."""
    if metric == "ip":
        distance = -(queries.astype(np.float64) @ gallery.astype(np.float64).T)
    else:
        distance = np.linalg.norm(queries[:, None, :].astype(np.float64) - gallery[None].astype(np.float64), axis=2)
    return np.asarray(np.argsort(distance, axis=1, kind="stable")[:, :k])


@dataclass(frozen=True)
class Ended:
    """How a job ended: its exit code (negative: the signal that killed it), results and standard error."""

    code: int
    results: dict[str, Any]
    errors: str


def run_job(name: str, *words: object, fault: str = "") -> Ended:
    """`python -m jobs.NAME` in a process of its own, on the Ray cluster of this session, with a fault point armed."""
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    if fault:
        environment |= {"ZSR_FAULT": fault, executor.VARIABLE: "ray"}  # in a worker, however small the work is
    ended = subprocess.run(
        [sys.executable, "-m", "zsr", name, *map(str, words)],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    lines = ended.stdout.strip().splitlines()
    results = json.loads(lines[-1]) if ended.returncode >= 0 and lines else {}
    return Ended(ended.returncode, results, ended.stderr)
