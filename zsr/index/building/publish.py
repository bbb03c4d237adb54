"""Publish an index after verification: every row in exactly one list, and recall equal to the tuned value."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from zsr import progress
from zsr.artifact import Artifact, Store, open_artifact
from zsr.errors import AlreadyPublished, ConfigError, DamagedArtifact, QualityGateFailed, StorageError
from zsr.index import faiss_backend
from zsr.index.ground_truth import K
from zsr.index.searching.searcher import Searcher
from zsr.index.storage.segment import Segment

SHARE: Final = 1 << 22  # ids sorted at once
RECALL_TOLERANCE: Final = 1e-3  # another CPU may break ties differently


@dataclass(frozen=True, slots=True)
class Published:
    """An index and its version number."""

    artifact: Artifact
    version: int

    def as_json(self) -> dict[str, Any]:
        """JSON output of the job."""
        facts = self.artifact.facts
        named = ("ntotal", "index_key", "exact", "operating_point", "imbalance", "dim", "metric", "checkpoint")
        return {
            "version": self.version,
            "bytes": sum(entry.bytes for entry in self.artifact.files),
            "recall": facts["operating_point"]["recall_sketch"],
            **{name: facts[name] for name in named if name in facts},  # "exact" is newer than some indexes
        }


def verify(searcher: Searcher) -> None:
    """Check that lists are readable, every row is in exactly one, (id, part) is unique, and recall is as tuned.

    Raises:
        DamagedArtifact: a row is missing, duplicated or out of range.
        QualityGateFailed: recall at the operating point differs from the tuned value.
    """
    with progress.stage("verify", sum(segment.spec.rows for segment in searcher.segments)):
        for segment in searcher.segments:
            _require_each_once(segment)
            progress.advance(segment.spec.rows)
        require_unique(searcher)
        _require_recall(searcher)


def _require_each_once(segment: Segment) -> None:
    seen = np.zeros(segment.spec.rows, bool)
    for number in range(faiss_backend.ivf_of(segment.stored).nlist):
        ordinals = np.sort(faiss_backend.list_ids(segment.stored, number))
        if ordinals.size and not 0 <= ordinals[0] <= ordinals[-1] < len(seen):
            raise DamagedArtifact(
                f"{segment.where}: list {number} holds rows outside of 0 .. {len(seen) - 1}; build it again"
            )
        again = np.concatenate([ordinals[1:][ordinals[1:] == ordinals[:-1]], ordinals[seen[ordinals]]])
        if again.size:
            raise DamagedArtifact(f"{segment.where}: row {again[0]} is listed twice, expected once; build it again")
        seen[ordinals] = True
    if not seen.all():
        raise DamagedArtifact(f"{segment.where}: row {np.flatnonzero(~seen)[0]} is in no list; build it again")


def most_parts(searcher: Searcher) -> int:
    """Max number of vectors per item, at least 1. Sorts SHARE ids at a time to bound the memory of every build."""
    shares, alive, parts = -(-len(searcher.ids) // SHARE), searcher.alive, 1
    for share in range(shares):
        ids = np.sort(searcher.ids[alive & (searcher.ids % shares == share)])
        while len(ids) > parts and (ids[parts:] == ids[:-parts]).any():
            parts += 1
    return parts


def require_unique(searcher: Searcher) -> None:
    """Raise ConfigError if two live rows have the same id and part: a hit would be ambiguous."""
    if most_parts(searcher) == 1:
        return
    live = np.flatnonzero(searcher.alive)
    ids, part = searcher.ids[live], np.concatenate([c.to_numpy() for c in searcher.names.column("part")])[live]
    order = np.lexsort((part, ids))
    same = np.flatnonzero((ids[order][1:] == ids[order][:-1]) & (part[order][1:] == part[order][:-1]))
    if same.size:
        row = order[same[0]]
        key = searcher.names.take(live[[row]]).column("key")[0].as_py()
        raise ConfigError(f"two embeddings have id {ids[row]} and part {part[row]} (key {key!r}); embed again")


def _require_recall(searcher: Searcher) -> None:
    truth, point = searcher.golden, searcher.facts["operating_point"]
    found, wanted = truth.recall(searcher.nearest(truth.queries, K)[0]), float(point["recall_sketch"])
    if abs(found - wanted) > RECALL_TOLERANCE:
        raise QualityGateFailed(
            f"{searcher.segments[0].where}: recall@{truth.k} of the golden queries is {found:.4f}, but {wanted:.4f} "
            "was measured when the index was tuned; not published"
        )


def publish(store: Store, artifact: Artifact, after: int | None = None) -> Published:
    """Reopen `artifact`, verify it, and publish it as the next version.

    Args:
        after: the version that `artifact` was derived from; no newer one may exist; see `Store.publish`.

    Raises:
        DamagedArtifact, QualityGateFailed: see `verify`; nothing is published.
        AlreadyPublished: another publisher created the version first.
    """
    verify(Searcher.of(artifact))
    with store.exclusive():
        if not artifact.complete():  # the object of an earlier version that was to be published again
            raise AlreadyPublished(f"{artifact.directory}: removed by a concurrent purge; see which versions are left")
        return Published(artifact, store.publish(artifact, after))


def history(store: Store) -> dict[int, str]:
    """Digest of every published version by number; versions whose file is damaged are left out."""
    found = {}
    for number in store.versions():
        with suppress(DamagedArtifact):
            found[number] = store.digest_of(number)
    return found


def version_of(store: Store, digest: str) -> int:
    """The highest version that points to `digest`. Raises StorageError if none does."""
    numbers = [number for number, found in history(store).items() if found == digest]
    if not numbers:
        raise StorageError(f"{store}: no version points to {digest[:12]}; run the build again")
    return max(numbers)


def rollback(store: Store, version: int) -> Published:
    """Publish the content of an earlier `version` as the newest, after verifying it. Later versions are kept.

    Raises:
        ConfigError: there is no such version.
        DamagedArtifact, QualityGateFailed: it fails verification; nothing is published.
        AlreadyPublished: a change was published concurrently, which the rollback would silently undo.
    """
    newest, versions = max(store.versions(), default=0), history(store)
    if version not in versions:
        raise ConfigError(f"{store} has no version {version}; it has {sorted(versions)}")
    return publish(store, open_artifact(f"{store}/objects/{versions[version]}", "index"), newest)
