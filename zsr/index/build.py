"""Build an index: plan -> sample -> train -> add -> merge -> tune -> verify -> publish.

Every stage leaves pieces with receipts in staging, so that a killed build goes on where it stopped. The bytes depend on
the embeddings, the queries and the plan, not on how many tasks ran, on how many machines, or how often one was killed.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import pyarrow as pa

from zsr import fault
from zsr.artifact import CHUNK, Artifact, Plan, Staging, Store
from zsr.cluster import map_pieces
from zsr.errors import DamagedArtifact
from zsr.index import engine
from zsr.index.plan import IndexConfig, IndexPlan, plan
from zsr.index.publish import Published, golden_table, publish, require_unique, verify, version_of
from zsr.index.search import GOLDEN, INDEX, LISTS, Searcher, ids_name, refine_name
from zsr.index.tune import QUERIES, Truth, exact, tune
from zsr.index.vectors import Vectors

STAGES: Final = ("sample", "train", "add", "merge", "tune", "verify", "publish")
TEMPLATE: Final = "template.faiss"


def added_name(shard: int) -> str:
    """Scratch piece: the index of one shard alone."""
    return f"add/part-{shard:05d}.faiss"


@dataclass(frozen=True)
class Job:
    """One build: its inputs, opened and found to belong together, and what will be made of them."""

    gallery: Vectors
    queries: Vectors
    config: IndexConfig
    chosen: IndexPlan

    @classmethod
    def of(cls, embeddings: Artifact, queries: Artifact, config: IndexConfig) -> "Job":
        """Plan the index of `embeddings`, to be tuned on `queries`.

        Raises:
            ConfigError: queries of another checkpoint, width or metric; a key that does not fit; Infeasible budgets.
        """
        gallery, sketches = Vectors.of(embeddings), Vectors.of(queries)
        gallery.space.require(sketches.space, str(queries.directory))
        largest = max(np.diff(gallery.starts).tolist())
        chosen = plan(gallery.rows, gallery.space.dim, gallery.space.metric, config, largest_shard=largest)
        return cls(gallery, sketches, config, chosen)

    def artifact_plan(self) -> Plan:
        """What shapes the bytes: budgets and the number of workers do so only through the plan that they led to."""
        config = {
            "index_key": self.chosen.index_key,
            "train_size": self.chosen.train_size,
            "recall_target": self.config.recall_target,
            "seed": self.config.seed,
            "threads": self.config.threads,
        }
        parents = {"embeddings": self.gallery.artifact.digest, "queries": self.queries.artifact.digest}
        return Plan("index", config, parents)

    def as_json(self) -> dict[str, Any]:
        """What a build would do."""
        return {
            **self.chosen.as_json(),
            "stages": list(STAGES),
            "shards": len(self.gallery.shards),
            "recall_target": self.config.recall_target,
            "plan_digest": self.artifact_plan().digest,
        }


def build(job: Job, store: Store) -> Published:
    """The index that `job` describes, as a version of `store`; the one made before if the same job ran already.

    Raises:
        QualityGateFailed: the recall target cannot be met; nothing is published.
        DamagedArtifact: an input or a staged piece is not what was written.
        DiskFull, StorageError, AlreadyPublished: see `zsr.artifact`.
    """
    task = job.artifact_plan()
    if made := store.made(task, check=lambda artifact: verify(Searcher.of(artifact))):
        return Published(made, version_of(store, made.digest))
    staging = store.staging(task)
    train(job, staging)
    add(job, staging)
    merge(job, staging)
    facts = finish(job, staging)
    artifact = staging.seal(facts=facts, rows={"in": job.gallery.rows, "used": job.gallery.rows, "quarantined": 0})
    return publish(store, artifact)


def staged(staging: Staging, name: str, *, scratch: bool = False) -> Path:
    """Path of a finished piece, hashed again: what a killed run left may have been damaged since.

    Raises:
        DamagedArtifact: it is missing or damaged. A damaged piece is forgotten, so that the next run makes it again.
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


def train(job: Job, staging: Staging) -> None:
    """Stage the trained, empty template."""
    if staging.finished(TEMPLATE, scratch=True):
        return
    sample = job.gallery.sample(job.chosen.train_size, job.config.seed)
    with staging.piece(TEMPLATE, scratch=True) as path:
        fault.here("index.train")
        index = engine.train(job.chosen.index_key, job.chosen.metric, sample, job.config.seed, job.config.threads)
        path.write_bytes(engine.to_bytes(index))


def add(job: Job, staging: Staging) -> None:
    """Stage the index, id map and vectors of every shard, one Ray task each."""
    todo = [{"shard": i} for i in range(len(job.gallery.shards)) if not _added(staging, i)]
    map_pieces(
        "add",
        _add_shard,
        todo,
        fn_kwargs={"gallery": job.gallery, "staging": staging},
        num_cpus=1,
        concurrency=job.config.num_workers,
    )


def _added(staging: Staging, shard: int) -> bool:
    return all(
        staging.finished(name, scratch=scratch)
        for name, scratch in ((added_name(shard), True), (ids_name(shard), False), (refine_name(shard), False))
    )


def _add_shard(piece: Mapping[str, Any], gallery: Vectors, staging: Staging) -> dict[str, Any]:
    """Add one shard to the template. Runs in a Ray task."""
    shard = int(piece["shard"])
    block = gallery.read(shard)
    ordinals = np.arange(gallery.starts[shard], gallery.starts[shard + 1], dtype=np.int64)
    name = str(staging.path(TEMPLATE, scratch=True))
    index = engine.from_bytes(staging.read(TEMPLATE, scratch=True), name)
    with engine.threads(1):
        index.add_with_ids(block.vectors.astype(np.float32), ordinals)
    facts = {"rows": len(ordinals), "dtype": block.vectors.dtype.name}
    with staging.piece(added_name(shard), scratch=True) as path:
        fault.here("index.add")
        path.write_bytes(engine.to_bytes(index))
    little_endian = block.vectors.astype(block.vectors.dtype.newbyteorder("<"), copy=False)
    staging.write(refine_name(shard), little_endian.tobytes(), facts=facts)
    staging.write_table(ids_name(shard), block.names.add_column(0, "ordinal", pa.array(ordinals)), facts=facts)
    return {"shard": shard}


def merge(job: Job, staging: Staging) -> None:
    """Stage one index of all shards, its lists in a file of their own. Memory does not grow with the gallery.

    The lists are written front to back, so a full disk is an error of a write; faiss's own merge maps the output into
    memory, where a full disk kills the process.
    """
    if staging.finished(LISTS) and staging.finished(INDEX):
        return
    shards = [Added.open(staged(staging, added_name(i), scratch=True)) for i in range(len(job.gallery.shards))]
    template = engine.from_bytes(staging.read(TEMPLATE, scratch=True), str(staging.path(TEMPLATE, scratch=True)))
    with staging.piece(LISTS) as path, open(path, "wb", buffering=CHUNK) as out:
        fault.here("index.merge")
        _write_lists(out, shards, engine.ivf_of(template).code_size)
    sizes = np.sum([shard.sizes for shard in shards], axis=0)
    staging.write(INDEX, engine.with_lists_in(template, LISTS, sizes))


@dataclass(frozen=True, slots=True)
class Added:
    """The index of one shard as bytes on disk.

    Attributes:
        data: (bytes,) uint8, mapped.
        sizes: (nlist,) vectors in each list. offsets: (nlist,) where its codes start; its ids follow them.
    """

    data: np.ndarray
    sizes: np.ndarray
    offsets: np.ndarray

    @classmethod
    def open(cls, path: Path) -> "Added":
        index = engine.open_whole(path)
        return cls(np.memmap(path, np.uint8, mode="r"), engine.list_sizes(index), engine.list_offsets(index))


def _write_lists(out: BinaryIO, shards: Sequence[Added], code_size: int) -> None:
    """List after list: the codes of all shards in shard order, then their ids."""
    for number in range(len(shards[0].sizes)):
        for before, width in ((0, code_size), (code_size, engine.ID_BYTES)):
            for shard in shards:
                size = int(shard.sizes[number])
                start = int(shard.offsets[number]) + size * before
                out.write(shard.data[start : start + size * width].data)


def finish(job: Job, staging: Staging) -> dict[str, Any]:
    """Tune the staged index, stage its golden queries, and return the facts of its manifest.

    Raises:
        QualityGateFailed: the recall target cannot be met.
        ConfigError: two rows have the same id and part.
    """
    facts = _facts(job, staging)
    names = [name for name in staging.pieces() if name != GOLDEN]
    searcher = Searcher({name: staged(staging, name) for name in names}, facts)
    require_unique(searcher)
    sizes = engine.list_sizes(searcher.index)
    sketches, own = _truths(job)
    point, curve = tune(searcher, sketches, own, job.config.recall_target)
    staging.write_table(GOLDEN, golden_table(sketches))
    return {
        **facts,
        "parts": int(np.unique(searcher.ids, return_counts=True)[1].max()),
        "imbalance": round(float(len(sizes) * np.square(sizes / sizes.sum()).sum()), 6),
        "golden_k": sketches.k,
        "operating_point": point.as_json(),
        "curve": [p.as_json() for p in curve],
    }


def _facts(job: Job, staging: Staging) -> dict[str, Any]:
    entries = [staging.finished(refine_name(i)) for i in range(len(job.gallery.shards))]
    types = sorted({str(entry.facts["dtype"]) for entry in entries if entry is not None})
    if len(types) != 1:
        raise DamagedArtifact(f"{job.gallery.artifact.directory}: shards of different types {types}; embed again")
    return {
        **asdict(job.gallery.space),
        "ntotal": job.gallery.rows,
        "shards": len(entries),
        "index_key": job.chosen.index_key,
        "nlist": job.chosen.nlist,
        "refine_dtype": types[0],
    }


def _truths(job: Job) -> tuple[Truth, Truth]:
    """Exact neighbours of real queries, and of gallery vectors."""
    sketches = job.queries.sample(QUERIES, job.config.seed)
    own = job.gallery.sample(QUERIES, job.config.seed + 1)
    both = exact(job.gallery, np.concatenate([sketches, own]))
    n = len(sketches)
    return Truth(sketches, both.kth[:n], both.k), Truth(own, both.kth[n:], both.k)
