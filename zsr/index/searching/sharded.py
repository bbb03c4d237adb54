"""Sharded search: segments on one shard actor per node, scatter-gather, and failover to replicas.

Every node with CPUs runs one shard actor, which opens some of the segments; each segment is on as many shard actors as
there are replicas. A query is sent to one shard actor per segment. If it does not answer, the next replica is tried; if
none is left, the result states the fraction of the gallery that is missing. Ray restarts a lost shard actor, on another
node if necessary, and it is used again as soon as it answers. A new version is opened by the same shard actors while
the old one still serves.

Candidates are selected by their codes over all segments, as in `Searcher`, so the results are the same.
"""

import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from zsr import faults
from zsr.artifact import Artifact, Store, open_artifact
from zsr.cluster import connect
from zsr.errors import ConfigError, StorageError
from zsr.index import faiss_backend
from zsr.index.searching.searcher import (
    WIDEN,
    Hits,
    Labels,
    Searcher,
    as_queries,
    flattened,
    merge_best,
    objects,
    reach,
    resolved,
    short,
    starts_of,
    unfilled,
)
from zsr.index.storage.embeddings import Space
from zsr.index.storage.segment import Spec

logger = logging.getLogger("zsr")

PATIENCE: Final = 60.0  # timeout in seconds of a shard actor's call; then replicas are tried
OPENING: Final = 3600.0  # timeout in seconds to hash and open the segments of a shard actor
BLOCK: Final = 1024  # queries per call of a shard actor; up to twice as many in the last one
GATHERED: Final = 256 << 20  # max bytes of candidates gathered from all shard actors per block
CANDIDATE: Final = 24  # bytes per candidate in `Candidates`


@dataclass(frozen=True, slots=True)
class Wanted:
    """A filter, with the arguments of `Searcher.mask`."""

    labels: frozenset[str] | None = None
    ids: frozenset[int] | None = None


@dataclass(frozen=True, slots=True)
class Candidates:
    """Candidates of B queries in some segments.

    Attributes:
        ordinals: (B, C) int64, numbers of the vectors in the whole gallery; -1 if there are fewer than C candidates.
        codes: (B, C) float32, scores computed from the codes in the inverted lists; these select the candidates.
        scores: (B, C) float32, scores after re-ranking with the refine codes; equal to `codes` if there are none.
        ids: (B, C) int64, ids of the items.
        admitted: number of vectors in these segments that pass the filter.
    """

    ordinals: np.ndarray
    codes: np.ndarray
    scores: np.ndarray
    ids: np.ndarray
    admitted: int


@dataclass(frozen=True, slots=True)
class Held:
    """The segments `numbers` of the index version at `place`, as assigned to one shard actor."""

    place: str
    numbers: tuple[int, ...]


class Part:
    """Some segments of one version, opened on first use."""

    def __init__(self, held: Held, threads: int) -> None:
        self.held, self.numbers, self.threads = held, held.numbers, threads
        self.masks: dict[Wanted, np.ndarray | None] = {}

    @cached_property
    def searcher(self) -> Searcher:
        return Searcher.of(open_artifact(self.held.place, "index"), self.numbers)

    @cached_property
    def shifts(self) -> np.ndarray:
        """Offset from each segment's local ordinals to those of the whole gallery."""
        every = starts_of([Spec.of(spec) for spec in self.searcher.facts["segments"]])
        return np.asarray(every[list(self.numbers)] - self.searcher.starts[:-1])

    def open(self) -> None:
        """Open the segments. Raises DamagedArtifact."""
        _ = self.shifts

    def _mask(self, wanted: Wanted) -> np.ndarray | None:
        if wanted not in self.masks:
            self.masks = {
                wanted: self.searcher.admitted(wanted.labels, wanted.ids)
            }  # only the latest: consecutive calls tend to share a filter
        return self.masks[wanted]

    def candidates(
        self, queries: np.ndarray, depth: int, nprobe: int, wanted: Wanted, numbers: Sequence[int]
    ) -> Candidates:
        """The best `depth` candidates in the segments `numbers`."""
        searcher, mask = self.searcher, self._mask(wanted)
        at = [self.numbers.index(number) for number in numbers]
        bits = None if mask is None else searcher.bits(mask)
        admitted = sum(int(mask[a:b].sum()) for a, b in map(searcher.rows_of, at)) if mask is not None else 0
        with faiss_backend.threads(self.threads):
            own, codes = searcher.coded(queries, depth, nprobe, bits, segments=at)
            scores = searcher.ranked(queries, own, codes)
        found = own >= 0
        segment = np.searchsorted(searcher.starts, np.where(found, own, 0), side="right") - 1
        ordinals = np.where(found, own + self.shifts[segment], -1)
        return Candidates(ordinals, codes, scores, np.where(found, searcher.ids[own], -1), admitted)

    def labels(self, numbers: Sequence[int]) -> frozenset[str]:
        """Classes of all items in the segments of this object, of which `numbers` are some."""
        return self.searcher.labels

    def names(self, ordinals: np.ndarray, numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Keys and labels of vectors (n,) of segment numbers[0], as objects."""
        own = ordinals - self.shifts[self.numbers.index(numbers[0])]
        rows = self.searcher.names.take(own)
        return objects(rows.column("key")), objects(rows.column("label"))


class ShardActor:
    """The actor of one node. Every call names its segments, so that a restarted actor needs no state to answer it."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.parts: dict[Held, Part] = {}

    def _part(self, held: Held) -> Part:
        return self.parts.setdefault(held, Part(held, self.threads))

    def ready(self, held: Held) -> str:
        """Open the segments and return the id of the node that this actor runs on. Raises DamagedArtifact."""
        self._part(held).open()
        return str(ray.get_runtime_context().get_node_id())

    def forget(self, held: Held) -> None:
        """Close the segments of a version that is no longer served."""
        self.parts.pop(held, None)

    def candidates(self, held: Held, *words: Any) -> Candidates:
        """See Part."""
        return self._part(held).candidates(*words)

    def labels(self, held: Held, *words: Any) -> frozenset[str]:
        """See Part."""
        return self._part(held).labels(*words)

    def names(self, held: Held, *words: Any) -> tuple[np.ndarray, np.ndarray]:
        """See Part."""
        faults.here("search.names")
        return self._part(held).names(*words)


@dataclass
class Serving:
    """The shard actors that serve one version.

    Attributes:
        hosts: handles of the shard actors. nodes: where each runs, as reported by the actor: if its node has no free
            CPUs, Ray starts it on another.
        held: the segments of each.
        replicas: for each segment, the numbers of its shard actors, in the order in which they are tried.
        down: shard actors that did not answer, each with a pending `ready` call that shows when it does again.
        labels: classes of the items, once they are known.
    """

    artifact: Artifact
    hosts: Sequence[Any]
    nodes: list[str]
    held: Sequence[Held]
    replicas: Sequence[Sequence[int]]
    down: dict[int, Any] = field(default_factory=dict)
    turn: int = 0
    labels: frozenset[str] | None = None

    @cached_property
    def starts(self) -> np.ndarray:
        """(S + 1,) see `starts_of`."""
        return starts_of([Spec.of(spec) for spec in self.artifact.facts["segments"]])

    @cached_property
    def sizes(self) -> np.ndarray:
        """(S,) number of vectors in each segment."""
        return np.diff(self.starts)

    def lost(self, host: int, error: Exception) -> None:
        """Mark shard actor `host` as down until it answers again."""
        logger.warning(
            "shard actor %d of index %s did not answer: %s", host, self.artifact.digest[:12], type(error).__name__
        )
        self.down[host] = self.hosts[host].ready.remote(self.held[host])

    def recover(self) -> None:
        """Use shard actors again that have recovered."""
        for host, ref in list(self.down.items()):
            if ray.wait([ref], timeout=0)[0]:
                try:
                    self.nodes[host] = ray.get(ref)
                    del self.down[host]
                except RayActorError:
                    self.down[host] = self.hosts[host].ready.remote(self.held[host])

    def scatter(
        self, method: str, segments: Collection[int], shared: Sequence[Any], patience: float
    ) -> tuple[list[Any], set[int]]:
        """Call `method(*shared, segments)` on one shard actor per segment, trying replicas on failure.

        Returns:
            The results of all calls that succeeded, and the segments without an answer.
        """
        self.recover()
        self.turn += 1
        left = {s: [h for h in self._order(s) if h not in self.down] for s in segments}
        done: list[Any] = []
        missing: set[int] = set()
        while left:
            missing |= {s for s, hosts in left.items() if not hosts}
            by_host: dict[int, list[int]] = {}
            for s in sorted(left):
                if left[s]:
                    by_host.setdefault(left[s][0], []).append(s)
            calls = {h: getattr(self.hosts[h], method).remote(self.held[h], *shared, its) for h, its in by_host.items()}
            until = time.monotonic() + patience
            for host, ref in calls.items():
                try:
                    done.append(ray.get(ref, timeout=max(0.0, until - time.monotonic())))
                    for s in by_host[host]:
                        del left[s]
                except (RayActorError, GetTimeoutError) as error:
                    self.lost(host, error)
            left = {s: [h for h in hosts if h not in self.down] for s, hosts in left.items() if s not in missing}
        return done, missing

    def _order(self, segment: int) -> list[int]:
        """Replicas of a segment, round-robin: a different one first each time."""
        hosts = self.replicas[segment]
        at = self.turn % len(hosts)
        return [*hosts[at:], *hosts[:at]]


class ShardedSearcher:
    """An index version served by several nodes; results are those of `Searcher`. Not thread-safe."""

    def __init__(self, store: Store, serving: Serving, replicas: int, threads: int, patience: float) -> None:
        """Use `open`."""
        self.store, self._serving = store, serving
        self.replicas, self.threads, self.patience = replicas, threads, patience

    @classmethod
    def open(
        cls, index_dir: str | Path, *, replicas: int = 2, threads: int = 1, patience: float = PATIENCE
    ) -> "ShardedSearcher":
        """Open the index at `index_dir`, in storage that all nodes can read, on all nodes of the cluster with CPUs.

        Args:
            index_dir: a ROOT (its highest version that verifies) or an object.
            replicas: shard actors per segment, at most one per node.
            threads: search threads of each shard actor, and the CPUs that it reserves.
            patience: timeout in seconds of a shard actor for one batch.

        Raises:
            ConfigError: fewer than one replica. StorageError: there is no index, or no node has CPUs.
            DamagedArtifact: bytes do not match the manifest.
        """
        if replicas < 1:
            raise ConfigError(f"replicas must be at least 1; found {replicas}")
        artifact = open_artifact(index_dir, "index")
        store = Store.at(artifact.place)
        return cls(store, serve(artifact, replicas, threads), replicas, threads, patience)

    @property
    def artifact(self) -> Artifact:
        """The version being served."""
        return self._serving.artifact

    def refresh(self) -> bool:
        """Switch to the newest version, if there is a newer one; the old one serves until the new one is open."""
        latest = self.store.latest()
        if latest.digest == self.artifact.digest:
            return False
        old, self._serving = self._serving, serve(latest, self.replicas, self.threads, self._serving)
        for actor, held in zip(old.hosts, old.held, strict=True):
            actor.forget.remote(held)
        return True

    def check(self, embeddings: Artifact) -> None:
        """Raise ConfigError if the checkpoint, width, metric or normalization of `embeddings` differs."""
        where = str(embeddings.directory)
        Space.of(self.artifact.facts, str(self.artifact.directory)).require(Space.of(embeddings.facts, where), where)

    def search(
        self,
        queries: np.ndarray,
        k: int,
        nprobe: int | None = None,
        refine_factor: int | None = None,
        *,
        labels: Labels = None,
        ids: Collection[int] | None = None,
    ) -> Hits:
        """Search the k nearest items, as `Searcher.search`.

        `missing` is the fraction of the gallery whose shard actors were unavailable for the search or for the lookup of
        keys and labels; in the second case hits have neither key nor label.

        Raises:
            ConfigError: queries of another shape or not finite, a number below 1, or a class that no item has.
            DamagedArtifact: a restarted shard actor found damaged bytes.
        """
        among = resolved(labels, self._labels)
        wanted = Wanted(None if among is None else frozenset(among), None if ids is None else frozenset(ids))
        facts, width = self.artifact.facts, queries.shape[1] if queries.ndim == 3 else 1
        count = k * int(facts["parts"])
        depth, probes = reach(facts, count, nprobe, refine_factor)
        found = [
            self._block(queries[at:end], k, count, depth, probes, wanted)
            for at, end in blocks_of(len(queries), max(1, at_once(depth, len(self._serving.hosts)) // width))
        ]
        return Hits(
            np.concatenate([hits.ids for hits in found]),
            np.concatenate([hits.keys for hits in found]),
            np.concatenate([hits.labels for hits in found]),
            np.concatenate([hits.scores for hits in found]),
            max(hits.missing for hits in found),
        )

    def _labels(self) -> frozenset[str]:
        """Classes of the items that are not deleted, collected from the shard actors.

        Raises:
            StorageError: no shard actor answers for some segment, so the classes are incomplete.
        """
        serving = self._serving
        if serving.labels is None:
            found, missing = serving.scatter("labels", range(len(serving.sizes)), (), self.patience)
            if missing:
                raise StorageError(
                    f"{len(missing)} of {len(serving.sizes)} segments have no shard actor that answers, so the classes "
                    "of the index are not known; try again later, or search without labels"
                )
            serving.labels = frozenset().union(*found)
        return serving.labels

    def _block(self, queries: np.ndarray, k: int, count: int, depth: int, probes: int, wanted: Wanted) -> Hits:
        """`search` for one block of queries."""
        serving, facts = self._serving, self.artifact.facts
        flat, lists = as_queries(flattened(queries), int(facts["dim"])), int(facts["nlist"])
        ordinals, scores = unfilled(len(flat), count)
        told: list[Candidates] = []
        lost: set[int] = set()
        left = np.arange(len(flat))
        while len(left):
            shared = ray.put(flat[left])  # stored once, not once per shard actor
            parts, missing = serving.scatter(
                "candidates", range(len(serving.sizes)), (shared, depth, probes, wanted), self.patience
            )
            ordinals[left], scores[left] = merge_best(*gathered(parts, len(left), depth), None, count)
            told, lost = told + parts, lost | missing
            enough = min(count, sum(part.admitted for part in parts))
            left = left[short(ordinals[left], enough)] if wanted != Wanted() and probes < lists else left[:0]
            probes *= WIDEN
        known, owners = named_by(told)
        # replace ordinals by their positions in `known`, which keeps their order: the ids of all vectors are not here
        places = np.where(ordinals >= 0, np.searchsorted(known, ordinals), -1)
        rows = (len(queries), -1)
        places, scores = merge_best(places.reshape(rows), scores.reshape(rows), owners, k)
        hits, nameless = self._named(serving, places, scores, known, owners)
        return replace(hits, missing=float(serving.sizes[sorted(lost | nameless)].sum() / serving.sizes.sum()))

    def _named(
        self, serving: Serving, places: np.ndarray, scores: np.ndarray, known: np.ndarray, owners: np.ndarray
    ) -> tuple[Hits, set[int]]:
        """Look up keys and labels of the items at `places` (B, k) of `known` on their shard actors.

        Returns:
            The hits, and the segments whose last shard actor was lost after the search: no key or label for their hits.
        """
        keys, labels = np.full(places.shape, None, object), np.full(places.shape, None, object)
        there = places >= 0
        ids = np.full(places.shape, -1, np.int64)
        ids[there] = owners[places[there]]
        ordinals = np.full(places.shape, -1, np.int64)
        ordinals[there] = known[places[there]]
        segment = np.searchsorted(serving.starts, ordinals, side="right") - 1
        nameless: set[int] = set()
        for number in np.unique(segment[there]).tolist():
            here = there & (segment == number)
            found, lost = serving.scatter("names", [number], (ordinals[here],), self.patience)
            for named in found:
                keys[here], labels[here] = named
            nameless |= lost
        return Hits(ids, keys, labels, scores), nameless


def at_once(depth: int, hosts: int) -> int:
    """Queries per block: few enough to answer before the timeout, and that the candidates of all shard actors fit the
    memory of the gathering process.
    """
    return max(1, min(BLOCK, GATHERED // (CANDIDATE * depth * hosts)))


def blocks_of(count: int, size: int) -> list[tuple[int, int]]:
    """Start and end of each block; the last is up to twice as long, since faiss rounds centroid distances differently
    for a few queries than for many.
    """
    starts = range(0, max(1, count // size) * size, size)
    return list(zip(starts, [*starts[1:], count], strict=True))


def gathered(parts: Sequence[Candidates], queries: int, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """The `depth` best candidates by code over all shard actors, and their re-ranked scores: two (B, C)."""
    if not parts:
        return np.full((queries, 1), -1, np.int64), np.full((queries, 1), -np.inf, np.float32)
    ordinals, codes, scores = (
        np.concatenate([getattr(part, name) for part in parts], axis=1) for name in ("ordinals", "codes", "scores")
    )
    order = np.lexsort((ordinals, -codes), axis=1)[:, :depth]
    return np.take_along_axis(ordinals, order, 1), np.take_along_axis(scores, order, 1)


def named_by(parts: Sequence[Candidates]) -> tuple[np.ndarray, np.ndarray]:
    """The distinct ordinals found, ascending, and the ids of their items: two (n,) int64."""
    if not parts:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    ordinals, ids = (np.concatenate([getattr(part, name).ravel() for part in parts]) for name in ("ordinals", "ids"))
    known, first = np.unique(ordinals, return_index=True)
    there = known >= 0
    return known[there], ids[first][there]


def all_nodes() -> list[dict[str, Any]]:
    """Ray's description of every node."""
    connect()
    found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return found


def serve(artifact: Artifact, replicas: int, threads: int, before: Serving | None = None) -> Serving:
    """Open the segments of a version on one shard actor per node, and wait for them.

    Args:
        before: of another version; its shard actors are reused on nodes that still exist, since a second actor per node
            would reserve the CPUs twice while both versions are open.

    Raises:
        StorageError: no node has CPUs. DamagedArtifact: bytes do not match the manifest.
    """
    nodes = sorted(n["NodeID"] for n in all_nodes() if n["Alive"] and n["Resources"].get("CPU", 0) >= threads)
    if not nodes:
        raise StorageError(f"no node has {threads} CPUs for a shard actor; add nodes, or request fewer threads")
    segments = len(artifact.facts["segments"])
    copies = min(replicas, len(nodes))
    replicas_of = [[(segment + copy) % len(nodes) for copy in range(copies)] for segment in range(segments)]
    place = f"{artifact.place}/objects/{artifact.digest}"
    held = [
        Held(place, tuple(segment for segment in range(segments) if number in replicas_of[segment]))
        for number in range(len(nodes))
    ]
    there = dict(zip(before.nodes, before.hosts, strict=True)) if before is not None else {}
    hosts = [there.get(node) or started(node, threads) for node in nodes]
    serving = Serving(artifact, hosts, nodes, held, replicas_of)
    refs = [one.ready.remote(its) for one, its in zip(hosts, held, strict=True)]
    for number, ref in enumerate(refs):
        try:
            serving.nodes[number] = ray.get(ref, timeout=OPENING)
        except (RayActorError, GetTimeoutError) as error:
            serving.lost(number, error)
    return serving


def started(node: str, threads: int) -> Any:
    """Start a shard actor on the node with this id; if the node is lost, Ray restarts it on another."""
    options = {
        "num_cpus": threads,
        "max_restarts": -1,
        "max_concurrency": 2,  # so that it answers health checks while it searches
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True),
    }
    return ray.remote(ShardActor).options(**options).remote(threads)
