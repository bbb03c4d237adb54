"""Build an index: plan -> sample -> train -> add -> merge -> tune -> verify -> publish.

Every stage leaves pieces with receipts in staging, so that a killed build resumes where it stopped. The bytes depend on
the embeddings, the queries and the plan only, not on the number of tasks, machines or restarts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np

from zsr import faults, progress
from zsr.artifact import Artifact, Plan, Staging, Store
from zsr.clock import Clock
from zsr.errors import ConfigError, DamagedArtifact
from zsr.executor import VECTORS, map_pieces
from zsr.index import faiss_backend
from zsr.index.building import benchmark, drift, report
from zsr.index.building.plan import Evidence, IndexConfig, IndexPlan, plan, unmeasured
from zsr.index.building.publish import Published, most_parts, publish, require_unique, verify, version_of
from zsr.index.building.tune import queries_of, tune
from zsr.index.ground_truth import GroundTruth, exact
from zsr.index.searching.searcher import GOLDEN, Searcher, golden_table
from zsr.index.storage import inverted_lists
from zsr.index.storage.embeddings import Vectors
from zsr.index.storage.segment import (
    INDEX,
    LISTS,
    REFINE,
    Segment,
    Spec,
    ids_name,
    list_sizes,
    refine_name,
    segment_name,
)

STAGES: Final = ("sample", "train", "add", "merge", "tune", "verify", "publish")
TEMPLATE: Final = "template.faiss"
CODEC: Final = "refine.faiss"


def added_name(shard: int) -> str:
    """Scratch piece: the index of one shard alone."""
    return f"add/part-{shard:05d}.faiss"


def evidence_plan(gallery: Vectors, queries: Vectors, config: IndexConfig) -> Plan:
    """The inputs and settings that determine the benchmark of the candidates."""
    shaped = config.model_dump(include={"recall_target", "max_index_memory_usage", "train_size", "seed"})
    parents = {"embeddings": gallery.artifact.digest, "queries": queries.artifact.digest}
    return Plan("index-plan", shaped, parents)


def kept_evidence(work: Plan, store: Store) -> list[Evidence] | None:
    """Measurements that an earlier run stored under `store`/plans, or None. Writes nothing."""
    kept = Store.at(f"{store}/plans")
    found = (kept.open(kept.digest_of(number)) for number in reversed(kept.versions()))
    done = next((artifact for artifact in found if artifact.plan == work.digest), None)
    return None if done is None else [Evidence(**row) for row in done.facts["evidence"]]


def measured(gallery: Vectors, queries: Vectors, config: IndexConfig, store: Store) -> list[Evidence]:
    """Benchmark the candidates, once per inputs and flags; the measurements are stored under `store`/plans.

    Raises:
        Infeasible: no candidate fits the budget.
    """
    work, kept = evidence_plan(gallery, queries, config), Store.at(f"{store}/plans")
    if done := kept.made(work):
        return [Evidence(**row) for row in done.facts["evidence"]]
    found = benchmark.measure(gallery, queries, config)
    kept.publish(kept.staging(work).seal(facts={"evidence": [row.as_json() for row in found]}))
    return found


class Unmeasured(ConfigError):
    """The index key depends on a benchmark that has not run yet."""


@dataclass(frozen=True)
class Job:
    """One build: its inputs, opened and checked for compatibility, and the index to build.

    Attributes:
        queries: what it is tuned on; the gallery itself if no queries were given.
    """

    gallery: Vectors
    queries: Vectors
    config: IndexConfig
    chosen: IndexPlan

    @classmethod
    def of(
        cls,
        embeddings: Artifact,
        queries: Artifact | None,
        config: IndexConfig,
        store: Store | None = None,
        *,
        measure: bool = True,
    ) -> "Job":
        """Plan the index of `embeddings`, to be tuned on `queries`.

        Args:
            queries: representative of later searches; None tunes on rows of the gallery.
            store: of the index; it also caches the measurements of candidates.
            measure: whether to benchmark candidates, which takes from seconds to minutes.

        Raises:
            Unmeasured: candidates must be benchmarked first, and `measure` is False.
            ConfigError: queries of another checkpoint, width or metric; a key that does not fit; Infeasible budgets.
        """
        gallery, sketches = Vectors.of(embeddings), Vectors.of(embeddings if queries is None else queries)
        gallery.space.require(sketches.space, str(sketches.artifact.directory))
        largest = max(np.diff(gallery.starts).tolist())
        count, dim, metric = gallery.rows, gallery.space.dim, gallery.space.metric
        evidence: list[Evidence] = []
        if config.index_key is None and unmeasured(count, dim, metric, config) is None:
            evidence = cls._evidence(gallery, sketches, config, store, measure)
        chosen = plan(count, dim, metric, config, largest_shard=largest, evidence=evidence)
        return cls(gallery, sketches, config, chosen)

    @staticmethod
    def _evidence(
        gallery: Vectors, queries: Vectors, config: IndexConfig, store: Store | None, measure: bool
    ) -> list[Evidence]:
        if not measure:
            known = None if store is None else kept_evidence(evidence_plan(gallery, queries, config), store)
            if known is None:
                raise Unmeasured("the candidates have not been benchmarked yet; `zsr index plan` does so")
            return known
        return (
            benchmark.measure(gallery, queries, config) if store is None else measured(gallery, queries, config, store)
        )

    def artifact_plan(self) -> Plan:
        """Specification of the index: everything that determines its bytes.

        Budgets and the number of workers are not in it: they only affect which index key and train size are chosen.
        """
        config = {
            "index_key": self.chosen.index_key,
            "train_size": self.chosen.train_size,
            "recall_target": self.config.recall_target,
            "seed": self.config.seed,
            "threads": self.config.threads,
            "segment_rows": self.config.segment_rows,
        }
        parents = {"embeddings": self.gallery.artifact.digest, "queries": self.queries.artifact.digest}
        return Plan("index", config, parents)

    @property
    def tuned_on(self) -> str:
        """The queries that recall is measured with: a modality, or rows of the gallery itself."""
        if self.queries.artifact.digest == self.gallery.artifact.digest:
            return "gallery rows"
        return str(self.queries.artifact.facts.get("modality", "queries"))

    @cached_property
    def segments(self) -> list[range]:
        """Runs of shards that share one file of lists."""
        return runs_of(self.gallery, self.config.segment_rows)

    def as_json(self) -> dict[str, Any]:
        """The build as `zsr index plan` prints it."""
        return {
            **self.chosen.as_json(),
            "stages": list(STAGES),
            "shards": len(self.gallery.shards),
            "segments": len(self.segments),
            "recall_target": self.config.recall_target,
            "tuned_on": self.tuned_on,
            "plan_digest": self.artifact_plan().digest,
        }


def runs_of(gallery: Vectors, most: int) -> list[range]:
    """Runs of consecutive shards with at most `most` rows in total; a larger shard is a run of its own."""
    runs, first = [], 0
    for shard in range(1, len(gallery.shards) + 1):
        if shard == len(gallery.shards) or gallery.starts[shard + 1] - gallery.starts[first] > most:
            runs.append(range(first, shard))
            first = shard
    return runs


def build(job: Job, store: Store) -> Published:
    """Build the index of `job` and publish it as a version of `store`; if the same job ran before, return its result.

    Raises:
        QualityGateFailed: the recall target cannot be met; nothing is published.
        DamagedArtifact: the bytes of an input or a staged piece do not match their digest.
        DiskFull, StorageError, AlreadyPublished: see `zsr.artifact`.
    """
    task = job.artifact_plan()
    if made := store.made(task, check=lambda artifact: verify(Searcher.of(artifact))):
        progress.up_to_date("index build", store, store.versions())
        return Published(made, version_of(store, made.digest))
    staging, clock, key = store.staging(task), report.BuildReport(), job.chosen.index_key
    report.note("%s", "; ".join(job.chosen.reasons))
    asked = job.queries.sample(queries_of(key), job.config.seed)  # first, so that a non-finite query fails early
    with clock.stage("sample"):
        clock.tasks("sample", sample(job, staging))
    with clock.stage("train"):
        train(job, staging)
    with clock.stage("add"):
        clock.tasks("add", add(job.gallery, key, staging, workers=job.config.num_workers))
    with clock.stage("merge"):
        merge_all(job, staging)
    with clock.stage("tune"):
        facts, tuned = finish(job, staging, asked)
    artifact = staging.seal(facts=facts, rows={"in": job.gallery.rows, "used": job.gallery.rows, "quarantined": 0})
    with clock.stage("verify"):
        published = publish(store, artifact)
    report.write(store, artifact, clock, job.chosen, tuned)
    return published


def sample(job: Job, staging: Staging) -> list[dict[str, Any]]:
    """Stage the training vectors, uniform over all shards and in row order, one Ray task per shard; return costs."""
    if staging.finished(CODEC, scratch=True):
        return []
    todo = [piece for piece in drawn(job) if staging.finished(sample_name(piece["shard"]), scratch=True) is None]
    shared = {"gallery": job.gallery, "staging": staging}
    options = {"fn_kwargs": shared, "num_cpus": 1, "concurrency": job.config.num_workers}
    small = job.gallery.rows_in(piece["shard"] for piece in todo) <= VECTORS
    rows = [len(piece["rows"]) for piece in todo]
    return map_pieces("sample", _sample_shard, todo, small=small, rows=rows, **options)


def drawn(job: Job) -> list[dict[str, Any]]:
    """The training rows of each shard, as work items."""
    return job.gallery.pieces(job.gallery.drawn(job.chosen.train_size, job.config.seed))


def sample_name(shard: int) -> str:
    """Scratch piece: the training vectors of one shard, float32, row after row."""
    return f"sample/part-{shard:05d}.raw"


def _sample_shard(piece: Mapping[str, Any], gallery: Vectors, staging: Staging) -> dict[str, Any]:
    """Stage the training vectors of one shard. Runs in a Ray task."""
    clock = Clock()
    staging.write(sample_name(piece["shard"]), gallery.picked(piece).tobytes(), scratch=True)
    return {"shard": piece["shard"], **clock.spent()}


def staged_sample(job: Job, staging: Staging) -> np.ndarray:
    """The training vectors (n, D) float32 that `sample` staged."""
    out = np.empty((job.chosen.train_size, job.gallery.space.dim), np.float32)
    at = 0
    for piece in drawn(job):
        rows = len(piece["rows"])
        path = inverted_lists.staged(staging, sample_name(piece["shard"]), scratch=True)
        out[at : at + rows] = np.fromfile(path, np.float32).reshape(rows, -1)
        at += rows
    return out


def train(job: Job, staging: Staging) -> None:
    """Stage the trained, empty template, the codec of the refine codes, and the sample's statistics for `drift`."""
    if staging.finished(CODEC, scratch=True):
        return
    vectors = staged_sample(job, staging)
    key = job.chosen.index_key
    with progress.stage("train", unit="") as shown, staging.piece(TEMPLATE, scratch=True) as path:
        shown.note = f"{key} on {len(vectors):,} vectors"
        faults.here("index.train")
        index = faiss_backend.train(key, job.chosen.metric, vectors, job.config.seed, job.config.threads)
        path.write_bytes(faiss_backend.to_bytes(index))
    # one in eight: the drift report needs averages, not every vector
    staging.write(drift.FOUND, drift.Spread.of(index, vectors[::8]).to_bytes(), scratch=True)
    codec = faiss_backend.refiner(key, vectors)
    staging.write(CODEC, faiss_backend.to_bytes(codec) if codec else b"", scratch=True)


def add(
    gallery: Vectors, key: str, staging: Staging, *, shards: Sequence[int] | None = None, workers: int | None = None
) -> list[dict[str, Any]]:
    """Stage the index, id map and refine codes of the shards, one Ray task each, and return what each task cost.

    Args:
        shards: numbers of the shards; all if not given. Segment names are assigned by `merge`.
    """
    chosen = range(len(gallery.shards)) if shards is None else shards
    todo = [{"shard": i} for i in chosen if not all(_finished(staging, name) for name in scratch_names(i, key))]
    progress.found_finished("add", len(chosen) - len(todo), len(chosen))
    shared = {"gallery": gallery, "staging": staging, "key": key}
    rows = [gallery.starts[piece["shard"] + 1] - gallery.starts[piece["shard"]] for piece in todo]
    options = {"small": sum(rows) <= VECTORS, "num_cpus": 1, "concurrency": workers}
    return map_pieces("add", _add_shard, todo, rows=rows, fn_kwargs=shared, **options)


def scratch_names(shard: int, key: str) -> list[str]:
    """The scratch pieces that an add task writes."""
    parts = faiss_backend.parse(key)
    refine = [f"add/{refine_name(shard)}"] if parts["refine"] or parts["exact"] else []
    return [added_name(shard), f"add/{ids_name(shard)}", *refine]


def _finished(staging: Staging, name: str) -> bool:
    return staging.finished(name, scratch=True) is not None


def _add_shard(piece: Mapping[str, Any], gallery: Vectors, staging: Staging, key: str) -> dict[str, Any]:
    """Add one shard to the template. Runs in a Ray task."""
    clock = Clock()
    shard = int(piece["shard"])
    block = gallery.read(shard)
    vectors = block.vectors.astype(np.float32, copy=False)
    name = str(staging.path(TEMPLATE, scratch=True))
    index = faiss_backend.from_bytes(staging.read(TEMPLATE, scratch=True), name)
    with faiss_backend.threads(1):
        index.add_with_ids(vectors, np.arange(len(vectors), dtype=np.int64))
    with staging.piece(added_name(shard), scratch=True) as path:
        faults.here("index.add")
        path.write_bytes(faiss_backend.to_bytes(index))
    facts = {"rows": len(vectors), "dtype": block.vectors.dtype.name, "source": gallery.shards[shard].sha256}
    if refine := _refine(block.vectors, staging, key):
        staging.write(f"add/{refine_name(shard)}", refine, scratch=True)
    staging.write_table(f"add/{ids_name(shard)}", block.names, scratch=True, facts=facts)
    return {"shard": shard, **clock.spent()}


def _refine(vectors: np.ndarray, staging: Staging, key: str) -> bytes:
    """Refine codes or full vectors as the key requires; empty if it has no refine codes."""
    if faiss_backend.parse(key)["exact"]:
        return vectors.astype(vectors.dtype.newbyteorder("<"), copy=False).tobytes()
    codec = staging.read(CODEC, scratch=True)
    if not codec:
        return b""
    with faiss_backend.threads(1):
        stored = faiss_backend.from_bytes(codec, CODEC).sa_encode(vectors.astype(np.float32, copy=False))
    return bytes(stored.tobytes())


def merge_all(job: Job, staging: Staging) -> None:
    """Stage every segment; see `merge`."""
    starts = job.gallery.starts
    with progress.stage("merge", job.gallery.rows):
        for number, run in enumerate(job.segments):
            merge(staging, segment_name(number), run)
            progress.advance(starts[run.stop] - starts[run.start])


def merge(staging: Staging, segment: str, shards: Sequence[int]) -> None:
    """Stage one segment from the indexes of its shards. Memory does not grow with the number of vectors."""
    codec = staging.read(CODEC, scratch=True)
    if codec:
        staging.write(f"{segment}/{REFINE}", codec)
    for place, shard in enumerate(shards):
        names = {ids_name: ids_name(shard), refine_name: refine_name(shard)}
        for name, source in names.items():
            if (entry := staging.finished(f"add/{source}", scratch=True)) is not None:
                inverted_lists.copy(staging, f"add/{source}", f"{segment}/{name(place)}", entry.facts)
    if staging.finished(f"{segment}/{INDEX}") and staging.finished(f"{segment}/{LISTS}"):
        return
    added = [inverted_lists.Added.open(inverted_lists.staged(staging, added_name(i), scratch=True)) for i in shards]
    template = faiss_backend.from_bytes(staging.read(TEMPLATE, scratch=True), str(staging.path(TEMPLATE, scratch=True)))
    sizes = inverted_lists.write(staging, f"{segment}/{LISTS}", added, faiss_backend.ivf_of(template).code_size)
    staging.write(f"{segment}/{INDEX}", faiss_backend.with_lists_in(template, LISTS, sizes))


def staged_spec(staging: Staging, segment: str) -> Spec:
    """The manifest's entry of a staged segment.

    Raises:
        DamagedArtifact: its shards hold vectors of different types.
    """
    names = [n for n in staging.pieces() if n.startswith(f"{segment}/ids/")]
    entries = [staging.finished(name) for name in names]
    facts = [entry.facts for entry in entries if entry is not None]
    types = sorted({str(f["dtype"]) for f in facts})
    if len(types) != 1:
        raise DamagedArtifact(f"{staging.directory}: shards of different types {types}; embed again")
    starts = np.cumsum([0, *(int(f["rows"]) for f in facts)]).tolist()
    return Spec(segment, "", starts[-1], tuple(str(f["source"]) for f in facts), tuple(starts[:-1]), types[0])


def staged_segment(staging: Staging, spec: Spec, gallery_space: Any, key: str) -> Segment:
    """Verify the hashes of a staged segment and open it."""
    prefix = f"{spec.name}/"
    files = {
        n.removeprefix(prefix): inverted_lists.staged(staging, n) for n in staging.pieces() if n.startswith(prefix)
    }
    return Segment(files, spec, gallery_space, key)


def finish(job: Job, staging: Staging, asked: np.ndarray) -> tuple[dict[str, Any], report.Tuning]:
    """Tune the staged index, stage its golden queries, and return the metadata of its manifest.

    Args:
        asked: (Q, D) float32, queries to tune on.

    Raises:
        QualityGateFailed: the recall target cannot be met.
        ConfigError: two rows have the same id and part.
    """
    specs = [staged_spec(staging, segment_name(i)) for i in range(len(job.segments))]
    key = job.chosen.index_key
    facts = {
        **asdict(job.gallery.space),
        "ntotal": job.gallery.rows,
        "segments": [spec.as_json() for spec in specs],
        "index_key": key,
        "exact": job.chosen.exact,
        "nlist": job.chosen.nlist,
        "tuned_on": job.tuned_on,
        "recall_target": job.config.recall_target,
        "evidence": [evidence.lasting() for evidence in job.chosen.evidence],
        "trained_on": drift.Spread.from_bytes(staging.read(drift.FOUND, scratch=True)).as_json(),
    }
    segments = [staged_segment(staging, spec, job.gallery.space, key) for spec in specs]
    searcher = Searcher(segments, facts, np.empty(0, np.int64), {})
    require_unique(searcher)
    sketches, own = truths(job.gallery, asked, queries_of(key), job.config.seed)
    with progress.stage("tune", unit="settings"):
        point, curve = tune(searcher, sketches, own, job.config.recall_target)
    staging.write_table(GOLDEN, golden_table(sketches))
    facts |= {
        "parts": most_parts(searcher),
        "imbalance": drift.imbalance(list_sizes(segments)),
        "golden_k": sketches.k,
        "operating_point": point.as_json(),
        "curve": [p.as_json() for p in curve],
    }
    return facts, report.Tuning.of(Searcher(segments, facts, np.empty(0, np.int64), {}), sketches, point, curve)


def truths(gallery: Vectors, sketches: np.ndarray, count: int, seed: int) -> tuple[GroundTruth, GroundTruth]:
    """Exact neighbors of queries (Q, D) float32, and of `count` gallery vectors."""
    own = gallery.sample(count, seed + 1)
    both = exact(gallery, np.concatenate([sketches, own]))
    return both.rows(slice(len(sketches))), both.rows(slice(len(sketches), None))
