"""Change a published index without building it again: delete, add, rebuild on a changed gallery, compact.

Every change is a new version. Deletes and additions write only what is new and refer to the objects that hold the rest;
`compact` writes one self-contained object without the deleted vectors. All segments share the template, so that their
codes are comparable.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from zsr import faults
from zsr.artifact import Artifact, Plan, Staging, Store, sha256
from zsr.errors import AlreadyPublished, ConfigError, DamagedArtifact, QualityGateFailed, StorageError
from zsr.index import faiss_backend
from zsr.index.building import build, drift
from zsr.index.building.publish import Published, most_parts, publish, require_unique, verify, version_of
from zsr.index.building.tune import Point, at_point, tune
from zsr.index.ground_truth import DEPTH, GroundTruth, K, exact, floor_of
from zsr.index.searching.searcher import DEAD, GOLDEN, Searcher, golden_table
from zsr.index.storage import inverted_lists
from zsr.index.storage.embeddings import Vectors
from zsr.index.storage.segment import INDEX, LISTS, REFINE, Spec, ids_name, list_sizes, refine_name, segment_name

logger = logging.getLogger("zsr")

ATTEMPTS: Final = 5  # per change, when others publish concurrently
AGREEMENT: Final = 0.95  # min fraction of the live version's golden-query results that the new version must find
DRIFT_ROWS: Final = 8192
FEWEST_GOLDEN: Final = 30  # min queries whose neighbors are still known: fewer are too few to estimate recall


@dataclass(frozen=True)
class Live:
    """The current version, opened for a change.

    Attributes:
        newest: the highest version number when it was opened; the change is published as the next one or refused.
    """

    store: Store
    artifact: Artifact
    searcher: Searcher
    newest: int

    @classmethod
    def of(cls, store: Store) -> "Live":
        """Open the latest version of `store`. Raises StorageError, DamagedArtifact, ConfigError."""
        newest = max(store.versions(), default=0)  # first, so that `publish` detects versions published from now on
        artifact = store.latest()
        return cls(store, artifact, Searcher.of(artifact), newest)

    @property
    def rows(self) -> int:
        """Number of vectors, including deleted ones."""
        return len(self.searcher.ids)

    def specs(self) -> list[Spec]:
        """The segments as a later version refers to them."""
        return [replace(s.spec, object=s.spec.object or self.artifact.digest) for s in self.searcher.segments]


@dataclass(frozen=True, slots=True)
class Change:
    """Content of the new version.

    Attributes:
        specs: its segments. dead: deleted ordinals in these. truth: the golden queries' new neighbors.
        seen: distribution of the new vectors over the lists of the template.
    """

    specs: Sequence[Spec]
    dead: np.ndarray
    truth: GroundTruth
    seen: drift.Spread | None = None


@dataclass(frozen=True, slots=True)
class Changed:
    """The new version, and what was changed."""

    published: Published
    told: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """JSON output of the job."""
        return {**self.published.as_json(), **self.told}


def _from_newest(store: Store, change: Callable[[Live], Changed]) -> Changed:
    """Apply `change` to the newest version; retry if another version was published in the meantime.

    Raises:
        AlreadyPublished: in each of ATTEMPTS attempts.
    """
    for _ in range(1, ATTEMPTS):
        newest = max(store.versions(), default=0)
        try:
            return change(Live.of(store))
        except AlreadyPublished as error:
            logger.warning("%s; retrying now", error)
        except (DamagedArtifact, StorageError):  # a purge may remove the version that is being read
            if newest == max(store.versions(), default=0):
                raise
    return change(Live.of(store))


def _plan(live: Live, what: str, **inputs: str) -> Plan:
    return Plan("index", {"change": what}, {"index": live.artifact.digest, **inputs})


def delete(store: Store, ids: Collection[int]) -> Changed:
    """Publish a version without the items `ids`. Their vectors stay in the files until `compact` or `purge`.

    Items deleted before are only counted; if there are no others, the live version is returned.

    Raises:
        ConfigError: an id that is not in the index, or all items of the index.
        QualityGateFailed: the recall target cannot be met any more.
        AlreadyPublished: other changes were published first, in each of ATTEMPTS attempts.
    """
    return _from_newest(store, lambda live: _delete(live, ids))


def _delete(live: Live, ids: Collection[int]) -> Changed:
    wanted = np.unique(np.fromiter(ids, np.int64, len(ids)))
    if (missing := wanted[~np.isin(wanted, live.searcher.ids)]).size:
        raise ConfigError(
            f"{live.artifact.directory}: {len(missing)} of the ids to delete are not in the index, such as "
            f"{missing[:3].tolist()}; leave them out"
        )
    alive = live.searcher.live_ids
    due = wanted[np.isin(wanted, alive)]
    told = {"deleted": len(due), "already_deleted": len(wanted) - len(due)}
    if not len(due):
        return Changed(Published(live.artifact, version_of(live.store, live.artifact.digest)), told)
    if len(due) == len(alive):
        raise ConfigError(
            f"{live.artifact.directory}: all {len(due)} items would be deleted, and an index holds at least one; "
            "build an index of another gallery, or remove the directory"
        )
    dead = np.flatnonzero(np.isin(live.searcher.ids, due) | ~live.searcher.alive)
    work = _plan(live, "delete", ids=sha256(due.tobytes()))
    change = Change(live.specs(), dead, live.searcher.golden.without(dead))
    return _made(live, work, told, lambda _: change)


def add(store: Store, embeddings: Artifact, *, workers: int | None = None) -> Changed:
    """Publish a version with the items of `embeddings` added, encoded with the trained template in a new segment.

    Raises:
        ConfigError: another checkpoint, width or metric, or items that are in the index already.
        QualityGateFailed: the recall target cannot be met any more.
        AlreadyPublished: other changes were published first, in each of ATTEMPTS attempts.
    """
    return _from_newest(store, lambda live: _add(live, embeddings, workers))


def _add(live: Live, embeddings: Artifact, workers: int | None) -> Changed:
    gallery = Vectors.of(embeddings)
    live.searcher.space.require(gallery.space, str(embeddings.directory))
    work = _plan(live, "add", embeddings=embeddings.digest)
    dead = np.flatnonzero(~live.searcher.alive)
    return _extend(
        live, work, gallery, range(len(gallery.shards)), dead, workers, {"added": gallery.rows}, live.specs()
    )


def rebuild(store: Store, embeddings: Artifact, *, workers: int | None = None) -> Changed:
    """Publish a version with the current content of `embeddings`: unchanged shards are kept, others added or removed.

    Items that were deleted from the index stay deleted in the shards that are kept.

    Raises:
        ConfigError: another checkpoint, width or metric: such vectors need a new template.
        QualityGateFailed: the recall target cannot be met any more.
        AlreadyPublished: other changes were published first, in each of ATTEMPTS attempts.
    """
    return _from_newest(store, lambda live: _rebuild(live, embeddings, workers))


def _rebuild(live: Live, embeddings: Artifact, workers: int | None) -> Changed:
    gallery = Vectors.of(embeddings)
    live.searcher.space.require(gallery.space, str(embeddings.directory))
    wanted = {entry.sha256 for entry in gallery.shards}
    kept, alive = set(), live.searcher.alive
    for start, rows, source in _shards(live.searcher):
        if source in wanted:
            kept.add(source)
        else:
            alive[start : start + rows] = False
    fresh = [i for i, entry in enumerate(gallery.shards) if entry.sha256 not in kept]
    sizes = np.diff(gallery.starts)
    told = {
        "reused_shards": len(gallery.shards) - len(fresh),
        "reused_rows": int(sizes.sum() - sizes[fresh].sum()),
        "added_shards": len(fresh),
        "added_rows": int(sizes[fresh].sum()),
        "left_out_rows": int(live.searcher.alive.sum() - alive.sum()),
        "still_deleted": int((~live.searcher.alive & _in(live.searcher, kept)).sum()),
    }
    if not fresh and (alive == live.searcher.alive).all():
        return Changed(Published(live.artifact, version_of(live.store, live.artifact.digest)), told)
    work = _plan(live, "rebuild", embeddings=embeddings.digest)
    # the source of a removed shard is cleared, so that the shard can be added again later
    specs = [replace(s, sources=tuple(one if one in kept else "" for one in s.sources)) for s in live.specs()]
    return _extend(live, work, gallery, fresh, np.flatnonzero(~alive), workers, told, specs)


def _shards(searcher: Searcher) -> list[tuple[int, int, str]]:
    """First ordinal, number of rows and source of every shard of an index."""
    found = []
    for base, segment in zip(searcher.starts, searcher.segments, strict=False):
        bounds = [*segment.spec.starts, segment.spec.rows]
        found += [
            (int(base) + a, b - a, source)
            for a, b, source in zip(bounds, bounds[1:], segment.spec.sources, strict=False)
        ]
    return found


def _in(searcher: Searcher, sources: Collection[str]) -> np.ndarray:
    """(N,) bool over ordinals, True for vectors from one of `sources`."""
    mask = np.zeros(len(searcher.ids), bool)
    for start, rows, source in _shards(searcher):
        mask[start : start + rows] = source in sources
    return mask


def _extend(
    live: Live,
    work: Plan,
    gallery: Vectors,
    shards: Sequence[int],
    dead: np.ndarray,
    workers: int | None,
    told: Mapping[str, Any],
    specs: Sequence[Spec],
) -> Changed:
    """Add some shards of `gallery` as a new segment to the segments `specs`, with `dead` deleted."""
    if not len(shards):
        return _made(live, work, told, lambda _: Change(specs, dead, live.searcher.golden.without(dead)))

    def make(staging: Staging) -> Change:
        spec, joined, seen = _new_segment(live, staging, gallery, shards, dead, workers)
        return Change([*specs, spec], dead, joined, seen)

    return _made(live, work, told, make)


def _new_segment(
    live: Live, staging: Staging, gallery: Vectors, shards: Sequence[int], dead: np.ndarray, workers: int | None
) -> tuple[Spec, GroundTruth, drift.Spread | None]:
    """Stage a segment of some shards of `gallery`.

    Returns:
        Its spec, the golden queries' neighbors with its items and without `dead`, and the items' distribution over the
        lists of the template (None for exact search).
    """
    key = str(live.artifact.facts["index_key"])
    first = live.searcher.segments[0]
    staging.write(build.TEMPLATE, faiss_backend.template_of(first.files[INDEX]), scratch=True)
    codec = first.files[REFINE].read_bytes() if REFINE in first.files else b""
    staging.write(build.CODEC, codec, scratch=True)
    build.add(gallery, key, staging, shards=shards, workers=workers)
    _require_new(live, staging, gallery, shards, dead)
    build.merge(staging, segment_name(0), shards)
    spec = build.staged_spec(staging, segment_name(0))
    numbers = np.full(gallery.rows, -1)
    rows = np.concatenate([np.arange(gallery.starts[i], gallery.starts[i + 1]) for i in shards])
    numbers[rows] = live.rows + np.arange(len(rows))
    truth = live.searcher.golden.without(dead)
    joined = truth.joined(exact(gallery, truth.queries, shards=shards).renumbered(numbers))
    looked = np.sort(np.random.default_rng(0).permutation(rows)[:DRIFT_ROWS])
    template = faiss_backend.from_bytes(staging.read(build.TEMPLATE, scratch=True), build.TEMPLATE)
    # exact search has no lists or codes that could drift
    seen = None if faiss_backend.is_exact(key) else drift.Spread.of(template, gallery.take(looked))
    return spec, joined, seen


def _require_new(live: Live, staging: Staging, gallery: Vectors, shards: Sequence[int], dead: np.ndarray) -> None:
    """Raise ConfigError if an item staged by the add tasks is in the index already and not among `dead`."""
    kept = np.ones(live.rows, bool)
    kept[dead] = False
    held, there, first = live.searcher.ids[kept], 0, ""
    for shard in shards:
        table = pq.read_table(
            inverted_lists.staged(staging, f"add/{ids_name(shard)}", scratch=True), columns=["id", "key"]
        )
        again = np.flatnonzero(np.isin(table.column("id").to_numpy(), held))
        if not there and len(again):
            first = table.column("key")[int(again[0])].as_py()
        there += len(again)
    if there:
        raise ConfigError(
            f"{gallery.artifact.directory}: {there} of {gallery.rows} vectors are of items that are in the index "
            f"already, such as {first!r}; leave these out, delete them from the index first, or update the index to "
            "the current embeddings with `rebuild`"
        )


def _made(live: Live, work: Plan, told: Mapping[str, Any], make: Callable[[Staging], Change]) -> Changed:
    """Apply `work` to the live version and publish the result, or return it if that was done before.

    Args:
        told: further results for the job to print. The drift report of the change is added.

    Raises:
        AlreadyPublished: the live version is not the newest any more; nothing stays staged.
        QualityGateFailed: see `_publish`.
    """
    try:
        done = live.store.made(work, check=lambda artifact: verify(Searcher.of(artifact)), after=live.newest)
        if done is not None:
            return Changed(Published(done, version_of(live.store, done.digest)), {**told, **_drifted(live, done.facts)})
        published, seen = _publish(live, work, make(live.store.staging(work)))
    except AlreadyPublished:
        live.store.abandon(work)
        raise
    return Changed(published, {**told, **_drifted(live, published.artifact.facts), **seen})


def _drifted(live: Live, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The drift report in `facts`, if it differs from the live version's."""
    report = facts.get("drift")
    return {} if report is None or report == live.artifact.facts.get("drift") else {"drift": report}


def _publish(live: Live, work: Plan, change: Change) -> tuple[Published, dict[str, Any]]:
    """Tune, stage the rest, compare with the live version, and publish; also return the agreement of both versions.

    Raises:
        AlreadyPublished: the live version is not the newest any more.
        QualityGateFailed: see `delete`; or the golden-query results differ too much from the live version's.
    """
    staging = live.store.staging(work)
    faults.here("index.change")
    facts = {**live.artifact.facts, "segments": [spec.as_json() for spec in change.specs]}
    opened = {(spec.name, spec.object): s for spec, s in zip(live.specs(), live.searcher.segments, strict=True)}
    key, space = str(facts["index_key"]), live.searcher.space
    segments = [
        opened.get((spec.name, spec.object)) or build.staged_segment(staging, spec, space, key) for spec in change.specs
    ]
    searcher = Searcher(segments, facts, change.dead, {})
    require_unique(searcher)
    truth = _golden(live, searcher, change.truth)
    if change.seen is not None:
        facts["drift"] = drift.report(facts["trained_on"], change.seen, list_sizes(segments))
    facts |= _measured(searcher, truth, facts)
    searcher.facts = facts
    agreement = agree(live.searcher, searcher, truth)
    if len(change.dead):
        staging.write_table(DEAD, pa.table({"ordinal": pa.array(change.dead, pa.int64())}))
    staging.write_table(GOLDEN, golden_table(truth))
    count = int(searcher.alive.sum())
    artifact = staging.seal(facts=facts, rows={"in": len(searcher.ids), "used": count, "quarantined": 0})
    told = {"agreement": agreement, "golden_queries": len(truth.queries)}
    return publish(live.store, artifact, live.newest), told


def _golden(live: Live, new: Searcher, truth: GroundTruth) -> GroundTruth:
    """The golden queries whose exact neighbors in the new version are still known.

    Raises:
        QualityGateFailed: too few to measure recall.
    """
    if faiss_backend.is_exact(str(new.facts["index_key"])):  # can search the neighbors again after any change
        ordinals, scores = new.nearest(truth.queries, DEPTH)
        return GroundTruth(truth.queries, ordinals, scores, floor_of(ordinals, scores))
    known, fewest = truth.sure(), min(FEWEST_GOLDEN, len(live.searcher.golden.queries))
    if len(known.queries) < fewest:
        raise QualityGateFailed(
            f"{live.artifact.directory}: after this change the exact neighbors of {len(known.queries)} golden queries "
            f"are still known, and recall requires {fewest}; build the index again"
        )
    return known


def _measured(searcher: Searcher, truth: GroundTruth, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata of the new version: the old operating point if it still meets the target, otherwise a new one."""
    target, point = float(facts["recall_target"]), Point(**facts["operating_point"])
    found = at_point(searcher, point, truth)
    curve = facts["curve"]
    counted = {"ntotal": int(searcher.alive.sum())}
    searcher.facts = {**facts, **counted}
    if found.recall_sketch < target:
        found, points = tune(searcher, truth, truth, target)
        curve = [p.as_json() for p in points]
    parts = most_parts(searcher)
    return {**counted, "parts": parts, "golden_k": truth.k, "operating_point": found.as_json(), "curve": curve}


def agree(old: Searcher, new: Searcher, truth: GroundTruth) -> float:
    """Fraction of the golden-query results of `old` that `new` also finds, among unchanged items; 1 if there are none.

    Raises:
        QualityGateFailed: below AGREEMENT: the new version is broken, whatever its recall.
    """
    before, after = (s.search(truth.queries, K) for s in (old, new))
    # a rebuild may reuse an id for a new vector, so kept items are identified by ordinals; a compaction keeps all
    there = new.alive[: len(old.ids)] & old.alive if len(new.ids) >= len(old.ids) else None
    held = np.isin(before.ids, new.live_ids if there is None else old.ids[there])
    worst = after.scores[:, -1:]
    # results displaced by nearer new items are no disagreement
    due = held & (before.scores > worst)
    found = (before.ids[:, :, None] == after.ids[:, None, :]).any(axis=2)
    # if every shard was replaced there is nothing to compare, and only recall is checked
    share = float(round((found & due).sum() / due.sum(), 6)) if due.any() else 1.0
    if share < AGREEMENT:
        raise QualityGateFailed(
            f"the new version finds {share:.3f} of the live version's results for its golden queries, expected "
            f"{AGREEMENT}; not published. Build the index again"
        )
    return share


def compact(store: Store) -> Changed:
    """Publish a version with one segment and without the vectors of deleted items; search results do not change.

    Raises:
        ConfigError: everything was deleted.
        AlreadyPublished: other changes were published first, in each of ATTEMPTS attempts.
    """
    return _from_newest(store, _compact)


def _compact(live: Live) -> Changed:
    alive = live.searcher.alive
    if not alive.any():
        raise ConfigError(f"{live.artifact.directory}: every item was deleted; build an index of another gallery")
    return _made(live, _plan(live, "compact"), {"dropped": int((~alive).sum())}, lambda staging: _whole(live, staging))


def _whole(live: Live, staging: Staging) -> Change:
    """Stage one segment with all vectors that are not deleted."""
    alive, name = live.searcher.alive, segment_name(0)
    numbers = np.where(alive, np.cumsum(alive) - 1, -1)
    first = live.searcher.segments[0]
    template = faiss_backend.from_bytes(faiss_backend.template_of(first.files[INDEX]), str(first.files[INDEX]))
    if REFINE in first.files:
        staging.write(f"{name}/{REFINE}", first.files[REFINE].read_bytes())
    parts = [
        inverted_lists.Added.split(segment.stored, segment.files[LISTS], numbers[a:b])
        for segment, a, b in zip(live.searcher.segments, live.searcher.starts, live.searcher.starts[1:], strict=False)
    ]
    sizes = inverted_lists.write(staging, f"{name}/{LISTS}", parts, faiss_backend.ivf_of(template).code_size)
    staging.write(f"{name}/{INDEX}", faiss_backend.with_lists_in(template, LISTS, sizes))
    _copy_live(staging, name, live.searcher)
    spec = build.staged_spec(staging, name)
    return Change([spec], np.empty(0, np.int64), live.searcher.golden.renumbered(numbers))


def _copy_live(staging: Staging, name: str, searcher: Searcher) -> None:
    """Stage ids and refine codes of vectors that are not deleted, shard by shard; empty shards are left out."""
    place, alive = 0, searcher.alive
    for base, segment in zip(searcher.starts, searcher.segments, strict=False):
        bounds = [*segment.spec.starts, segment.spec.rows]
        for number, source in enumerate(segment.spec.sources):
            a, b = bounds[number], bounds[number + 1]
            rows = np.flatnonzero(alive[int(base) + a : int(base) + b])
            if not len(rows):
                continue
            facts = {"rows": len(rows), "dtype": segment.spec.dtype, "source": source}
            staging.write_table(f"{name}/{ids_name(place)}", segment.names.take(a + rows), facts=facts)
            if segment.refine:
                stored = np.ascontiguousarray(segment.refine[number][rows])
                staging.write(f"{name}/{refine_name(place)}", stored.tobytes())
            place += 1
