"""Search over the nodes that hold the segments: scatter to one actor a node, gather, replicas where one is lost.

Every node of the cluster that has CPUs gets an actor, a host, which opens some of the segments; a segment lies on as
many hosts as there are replicas. A query goes to one host for each segment. Where a host does not answer, the next
replica of its segments is asked; where none is left, the answer says which share of the gallery is missing from it. Ray
starts a lost host again, on another node if it has to, and it is asked again as soon as it answers. A new version is
opened by the same hosts beside the old one, and then asked.

Candidates are chosen by their codes over all segments, as `Searcher` does, so the answers are the same.
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

from zsr import fault
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

PATIENCE: Final = 60.0  # seconds that a host may take for one batch; then its replicas are asked
OPENING: Final = 3600.0  # seconds that a host may take to hash and open its segments
BLOCK: Final = 1024  # queries that a host answers in one call; up to twice as many in the last one
GATHERED: Final = 256 << 20  # bytes of candidates that all hosts may send for a block
CANDIDATE: Final = 24  # bytes of one in `Candidates`


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a filter admits, as `Searcher.mask` takes it."""

    labels: frozenset[str] | None = None
    ids: frozenset[int] | None = None


@dataclass(frozen=True, slots=True)
class Candidates:
    """Of B queries, from some segments.

    Attributes:
        ordinals: (B, C) int64 over the whole gallery, -1 where there is none.
        codes, scores: (B, C) float32, by the codes, and as they are ranked.
        ids: (B, C) int64, of the items.
        admitted: vectors that the filter leaves in these segments.
    """

    ordinals: np.ndarray
    codes: np.ndarray
    scores: np.ndarray
    ids: np.ndarray
    admitted: int


@dataclass(frozen=True, slots=True)
class Held:
    """Segments `numbers` of the index version that lies at `place`."""

    place: str
    numbers: tuple[int, ...]


class Part:
    """Some segments of one version. They are opened when they are first needed."""

    def __init__(self, held: Held, threads: int) -> None:
        self.held, self.numbers, self.threads = held, held.numbers, threads
        self.masks: dict[Wanted, np.ndarray | None] = {}

    @cached_property
    def searcher(self) -> Searcher:
        return Searcher.of(open_artifact(self.held.place, "index"), self.numbers)

    @cached_property
    def shifts(self) -> np.ndarray:
        """What each segment's own ordinals lack to those of the whole gallery."""
        every = starts_of([Spec.of(spec) for spec in self.searcher.facts["segments"]])
        return np.asarray(every[list(self.numbers)] - self.searcher.starts[:-1])

    def open(self) -> None:
        """Raises DamagedArtifact."""
        _ = self.shifts

    def _mask(self, wanted: Wanted) -> np.ndarray | None:
        if wanted not in self.masks:
            self.masks = {
                wanted: self.searcher.admitted(wanted.labels, wanted.ids)
            }  # the last one: filters come in runs
        return self.masks[wanted]

    def candidates(
        self, queries: np.ndarray, depth: int, nprobe: int, wanted: Wanted, numbers: Sequence[int]
    ) -> Candidates:
        """The best `depth` of the segments `numbers`."""
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
        """Classes of all items that these segments hold; `numbers` are among them."""
        return self.searcher.labels

    def names(self, ordinals: np.ndarray, numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Keys and labels of vectors (n,) of segment numbers[0], as objects."""
        own = ordinals - self.shifts[self.numbers.index(numbers[0])]
        rows = self.searcher.names.take(own)
        return objects(rows.column("key")), objects(rows.column("label"))


class ShardActor:
    """An actor of one node. Every call says what it is about, so that a host that Ray started again needs no more."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.parts: dict[Held, Part] = {}

    def _part(self, held: Held) -> Part:
        return self.parts.setdefault(held, Part(held, self.threads))

    def ready(self, held: Held) -> str:
        """Open the segments; the id of the node that this host runs on. Raises DamagedArtifact."""
        self._part(held).open()
        return str(ray.get_runtime_context().get_node_id())

    def forget(self, held: Held) -> None:
        """Close what is no longer asked for."""
        self.parts.pop(held, None)

    def candidates(self, held: Held, *words: Any) -> Candidates:
        """See Part."""
        return self._part(held).candidates(*words)

    def labels(self, held: Held, *words: Any) -> frozenset[str]:
        """See Part."""
        return self._part(held).labels(*words)

    def names(self, held: Held, *words: Any) -> tuple[np.ndarray, np.ndarray]:
        """See Part."""
        fault.here("search.names")
        return self._part(held).names(*words)


@dataclass
class Serving:
    """The hosts of one version.

    Attributes:
        hosts: actors. nodes: where each runs, as it said itself: a node without free CPUs has its host on another.
        held: what each holds.
        replicas: of each segment, the numbers of its hosts, in the order in which they are asked.
        down: hosts that did not answer, each with the call that will tell when it does again.
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
        """(S,) vectors of each segment."""
        return np.diff(self.starts)

    def lost(self, host: int, error: Exception) -> None:
        """Leave `host` out until it answers again."""
        logger.warning("host %d of index %s did not answer: %s", host, self.artifact.digest[:12], type(error).__name__)
        self.down[host] = self.hosts[host].ready.remote(self.held[host])

    def recover(self) -> None:
        """Take back the hosts that answer again."""
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
        """Call `method(*shared, its segments)` of one host for each segment.

        Returns:
            what every host that answered said, and the segments that nobody answered for.
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
        """Replicas of a segment, a different one first each time."""
        hosts = self.replicas[segment]
        at = self.turn % len(hosts)
        return [*hosts[at:], *hosts[:at]]


class ShardedSearcher:
    """An index version that lies on several nodes; see `Searcher` for what a search gives. Not for several threads."""

    def __init__(self, store: Store, serving: Serving, replicas: int, threads: int, patience: float) -> None:
        """Use `open`."""
        self.store, self._serving = store, serving
        self.replicas, self.threads, self.patience = replicas, threads, patience

    @classmethod
    def open(
        cls, index_dir: str | Path, *, replicas: int = 2, threads: int = 1, patience: float = PATIENCE
    ) -> "ShardedSearcher":
        """Open the index at `index_dir`, storage that all nodes reach, on the nodes of the cluster that have CPUs.

        Args:
            index_dir: a ROOT (its highest version that verifies) or an object.
            replicas: hosts of each segment, at most one a node.
            threads: of a host's searches, and the CPUs that it asks for.
            patience: seconds that a host may take for one batch.

        Raises:
            ConfigError: no replica wanted. StorageError: nothing is there, or no node has CPUs.
            DamagedArtifact: bytes are not what the manifest says.
        """
        if replicas < 1:
            raise ConfigError(f"replicas must be at least 1; found {replicas}")
        artifact = open_artifact(index_dir, "index")
        store = Store.at(artifact.place)
        return cls(store, serve(artifact, replicas, threads), replicas, threads, patience)

    @property
    def artifact(self) -> Artifact:
        """The version that answers."""
        return self._serving.artifact

    def refresh(self) -> bool:
        """Take over the newest version, if there is a newer one; the old one answers until all of it is open."""
        latest = self.store.latest()
        if latest.digest == self.artifact.digest:
            return False
        old, self._serving = self._serving, serve(latest, self.replicas, self.threads, self._serving)
        for actor, held in zip(old.hosts, old.held, strict=True):
            actor.forget.remote(held)
        return True

    def check(self, embeddings: Artifact) -> None:
        """Raise ConfigError if `embeddings` have another checkpoint, width, metric or normalisation."""
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
        """The k nearest items, as `Searcher.search`; `missing` is the share of the gallery that nobody was asked about,
        or whose hosts were lost before they named what they had found: such hits have neither key nor label.

        Raises:
            ConfigError: queries of another shape or not finite, a number below 1, or a class that no item has.
            DamagedArtifact: a host that was started again found damaged bytes.
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
        """Classes of the items that are not deleted, as the hosts know them.

        Raises:
            StorageError: nobody answers for some segment, so that a class may be there or not.
        """
        serving = self._serving
        if serving.labels is None:
            found, missing = serving.scatter("labels", range(len(serving.sizes)), (), self.patience)
            if missing:
                raise StorageError(
                    f"{len(missing)} of {len(serving.sizes)} segments have no host that answers, so that the classes "
                    "of the index are not known; ask again later, or without labels"
                )
            serving.labels = frozenset().union(*found)
        return serving.labels

    def _block(self, queries: np.ndarray, k: int, count: int, depth: int, probes: int, wanted: Wanted) -> Hits:
        """`search` for few queries."""
        serving, facts = self._serving, self.artifact.facts
        flat, lists = as_queries(flattened(queries), int(facts["dim"])), int(facts["nlist"])
        ordinals, scores = unfilled(len(flat), count)
        told: list[Candidates] = []
        lost: set[int] = set()
        left = np.arange(len(flat))
        while len(left):
            shared = ray.put(flat[left])  # once, and not once a host
            parts, missing = serving.scatter(
                "candidates", range(len(serving.sizes)), (shared, depth, probes, wanted), self.patience
            )
            ordinals[left], scores[left] = merge_best(*gathered(parts, len(left), depth), None, count)
            told, lost = told + parts, lost | missing
            enough = min(count, sum(part.admitted for part in parts))
            left = left[short(ordinals[left], enough)] if wanted != Wanted() and probes < lists else left[:0]
            probes *= WIDEN
        known, owners = named_by(told)
        # numbered by their places among the known, in the same order, since nobody here has the ids of all
        places = np.where(ordinals >= 0, np.searchsorted(known, ordinals), -1)
        rows = (len(queries), -1)
        places, scores = merge_best(places.reshape(rows), scores.reshape(rows), owners, k)
        hits, nameless = self._named(serving, places, scores, known, owners)
        return replace(hits, missing=float(serving.sizes[sorted(lost | nameless)].sum() / serving.sizes.sum()))

    def _named(
        self, serving: Serving, places: np.ndarray, scores: np.ndarray, known: np.ndarray, owners: np.ndarray
    ) -> tuple[Hits, set[int]]:
        """Hits of the items at `places` (B, k) of `known`, whose keys and labels their hosts know; and the segments
        whose last host was lost since it found them: their hits have neither.
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
    """Queries of a block: few enough that a host answers within its patience, and that what all hosts say fits the
    memory of the process that gathers it, however many they are.
    """
    return max(1, min(BLOCK, GATHERED // (CANDIDATE * depth * hosts)))


def blocks_of(count: int, size: int) -> list[tuple[int, int]]:
    """From where to where each block goes; the last is up to twice as long, since faiss rounds the distances to the
    centroids of a few queries otherwise than those of many.
    """
    starts = range(0, max(1, count // size) * size, size)
    return list(zip(starts, [*starts[1:], count], strict=True))


def gathered(parts: Sequence[Candidates], queries: int, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """The `depth` best by their codes of all hosts, and the scores that rank them: two (B, C)."""
    if not parts:
        return np.full((queries, 1), -1, np.int64), np.full((queries, 1), -np.inf, np.float32)
    ordinals, codes, scores = (
        np.concatenate([getattr(part, name) for part in parts], axis=1) for name in ("ordinals", "codes", "scores")
    )
    order = np.lexsort((ordinals, -codes), axis=1)[:, :depth]
    return np.take_along_axis(ordinals, order, 1), np.take_along_axis(scores, order, 1)


def named_by(parts: Sequence[Candidates]) -> tuple[np.ndarray, np.ndarray]:
    """Every ordinal that was found, ascending, and the id of its item: two (n,) int64."""
    if not parts:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    ordinals, ids = (np.concatenate([getattr(part, name).ravel() for part in parts]) for name in ("ordinals", "ids"))
    known, first = np.unique(ordinals, return_index=True)
    there = known >= 0
    return known[there], ids[first][there]


def all_nodes() -> list[dict[str, Any]]:
    """What Ray knows of every node."""
    connect()
    found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return found


def serve(artifact: Artifact, replicas: int, threads: int, before: Serving | None = None) -> Serving:
    """Have a host on every node open its segments of a version, and wait for them.

    Args:
        before: of another version, whose hosts are used where their nodes are still there: a second host on each node
            would need its CPUs twice while both versions are open.

    Raises:
        StorageError: no node has CPUs. DamagedArtifact: bytes are not what the manifest says.
    """
    nodes = sorted(n["NodeID"] for n in all_nodes() if n["Alive"] and n["Resources"].get("CPU", 0) >= threads)
    if not nodes:
        raise StorageError(f"no node has {threads} CPUs to hold segments; add nodes, or ask for fewer threads")
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
    """A host on the node with this id; when the node is lost, Ray starts it on another."""
    options = {
        "num_cpus": threads,
        "max_restarts": -1,
        "max_concurrency": 2,  # so that it says that it lives while it searches
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True),
    }
    return ray.remote(ShardActor).options(**options).remote(threads)
