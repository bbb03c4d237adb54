"""The gate between a built index and its readers: it must be whole and find what it found when it was tuned."""

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

SHARE: Final = 1 << 22  # ids that are sorted at once
RECALL_TOLERANCE: Final = 1e-3  # another processor may round a tie the other way


@dataclass(frozen=True, slots=True)
class Published:
    """An index and the version under which readers find it."""

    artifact: Artifact
    version: int

    def as_json(self) -> dict[str, Any]:
        """What a job prints."""
        facts = self.artifact.facts
        named = ("ntotal", "index_key", "exact", "operating_point", "imbalance", "dim", "metric", "checkpoint")
        return {
            "version": self.version,
            "bytes": sum(entry.bytes for entry in self.artifact.files),
            "recall": facts["operating_point"]["recall_sketch"],
            **{name: facts[name] for name in named if name in facts},  # "exact" is newer than some indexes
        }


def verify(searcher: Searcher) -> None:
    """Check that every list is readable and every row is in exactly one, that names are unique, and that recall holds.

    Raises:
        DamagedArtifact: a row is missing, doubled or unnamed.
        QualityGateFailed: recall at the operating point is not what it was when the index was tuned.
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
    """The most vectors that one item has, and at least 1; a share of the ids at a time, since every build asks."""
    shares, alive, parts = -(-len(searcher.ids) // SHARE), searcher.alive, 1
    for share in range(shares):
        ids = np.sort(searcher.ids[alive & (searcher.ids % shares == share)])
        while len(ids) > parts and (ids[parts:] == ids[:-parts]).any():
            parts += 1
    return parts


def require_unique(searcher: Searcher) -> None:
    """Raise ConfigError if two rows that are not deleted have the same id and part: a hit could not say which it is."""
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
    """Reopen `artifact`, verify it, and make it the next version.

    Args:
        after: the newest version that it may follow, where it was made from that one; see `Store.publish`.

    Raises:
        DamagedArtifact, QualityGateFailed: see `verify`; nothing is published.
        AlreadyPublished: another publisher created the version first.
    """
    verify(Searcher.of(artifact))
    with store.exclusive():
        if not artifact.complete():  # an earlier version's, which was about to be published again
            raise AlreadyPublished(f"{artifact.directory}: removed by a purge meanwhile; see which versions are left")
        return Published(artifact, store.publish(artifact, after))


def history(store: Store) -> dict[int, str]:
    """Digest of every published version, by number; one whose file is damaged names none and is left out."""
    found = {}
    for number in store.versions():
        with suppress(DamagedArtifact):
            found[number] = store.digest_of(number)
    return found


def version_of(store: Store, digest: str) -> int:
    """The highest version that names `digest`. Raises StorageError if none does."""
    numbers = [number for number, found in history(store).items() if found == digest]
    if not numbers:
        raise StorageError(f"{store}: no version names {digest[:12]}; run the build again")
    return max(numbers)


def rollback(store: Store, version: int) -> Published:
    """Make the content of an earlier `version` the newest one, after verifying it. Later versions stay as they are.

    Raises:
        ConfigError: there is no such version.
        DamagedArtifact, QualityGateFailed: it is not what it was; nothing is published.
        AlreadyPublished: a change was published meanwhile, which the rollback would undo unseen.
    """
    newest, versions = max(store.versions(), default=0), history(store)
    if version not in versions:
        raise ConfigError(f"{store} has no version {version}; it has {sorted(versions)}")
    return publish(store, open_artifact(f"{store}/objects/{versions[version]}", "index"), newest)
