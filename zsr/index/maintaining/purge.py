"""Remove deleted items from every file of an index, and verify it by a scan of the remaining files.

A delete hides an item; its codes and refine codes stay in the files of the versions that hold it. `purge` compacts,
removes all older versions and all staging, and then reads every remaining file. Freed disk blocks, copies elsewhere,
the embeddings and the images themselves are out of scope.
"""

import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from zsr.artifact import Artifact, Store, sha256
from zsr.errors import AlreadyPublished, DamagedArtifact, StorageError
from zsr.index import faiss_backend
from zsr.index.building.publish import Published, history, version_of
from zsr.index.maintaining import edit
from zsr.index.searching.searcher import Searcher
from zsr.index.storage.inverted_lists import Added
from zsr.index.storage.segment import LISTS, Segment


@dataclass(frozen=True, slots=True)
class Purged:
    """The remaining version and counts of what was removed.

    Attributes:
        items: items of older versions that are in no file any more. versions, objects: removed.
        scanned: bytes read for verification.
    """

    published: Published
    items: int
    versions: int
    objects: int
    scanned: int

    def as_json(self) -> dict[str, Any]:
        """JSON output of the job."""
        counts = {"purged": self.items, "versions_removed": self.versions, "objects_removed": self.objects}
        return {**self.published.as_json(), **counts, "bytes_scanned": self.scanned}


def purge(store: Store) -> Purged:
    """Remove everything that was deleted from all versions.

    Raises:
        DamagedArtifact: the scan still found deleted data; the message names the file.
        ConfigError: everything was deleted.
        AlreadyPublished: a concurrent change was published or is in progress; it is not lost.
        StorageError: the index is in an object store, whose old generations and mirrors only its owner can remove.
    """
    if store.url:
        raise StorageError(f"{store}: purge works on directories; copy the index, purge the copy, remove the bucket's")
    live = edit.Live.of(store)
    if len(live.searcher.dead) or len(live.searcher.segments) > 1:
        kept = edit.compact(store).published
        newest = kept.version
    else:
        kept, newest = Published(live.artifact, version_of(store, live.artifact.digest)), live.newest
    gone = _gone(store, kept.artifact)
    with store.exclusive():
        versions, objects = _remove_others(store, kept, newest)
    scanned = scan(store, kept.artifact, Searcher.of(kept.artifact), gone)
    return Purged(kept, len(gone.ids), versions, objects, scanned)


@dataclass(frozen=True, slots=True)
class Gone:
    """Data that the scan must not find: ids, and digests of codes and refine codes of items in older versions.

    Attributes:
        ids: of items that are not in the newest version any more.
        rows: digest of one vector's code or refine code -> how often it may still occur: the number of remaining items
            with the same bytes.
    """

    ids: frozenset[int]
    rows: dict[str, int]


def _objects(store: Store) -> list[Artifact]:
    """Every distinct index object that a version points to."""
    return [store.open(digest) for digest in sorted(set(history(store).values()))]


def _gone(store: Store, newest: Artifact) -> Gone:
    stays = Searcher.of(newest)
    live = set(stays.live_ids.tolist())
    ids: set[int] = set()
    rows: Counter[str] = Counter()
    for artifact in _objects(store):
        for segment in Searcher.of(artifact).segments:
            names = segment.names.ids
            lost = ~np.isin(names, stays.live_ids)
            ids |= set(names[lost].tolist()) - live
            rows.update(dict.fromkeys(digests(segment, lost), 0))
    twins = Counter(d for s in stays.segments for d in digests(s, np.ones(s.spec.rows, bool)) if d in rows)
    return Gone(frozenset(ids), {digest: twins[digest] for digest in rows})


def digests(segment: Segment, wanted: np.ndarray) -> Iterator[str]:
    """Digests of the refine codes and of the codes (with their list) of the ordinals in the mask `wanted` (rows,)."""
    bounds = [*segment.spec.starts, segment.spec.rows]
    for number, stored in enumerate(segment.refine):
        chosen = np.flatnonzero(wanted[bounds[number] : bounds[number + 1]])
        yield from (sha256(row.tobytes()) for row in stored[chosen])
    for number, codes, ordinals in _lists(segment):
        yield from (sha256(f"{number} ".encode() + code.tobytes()) for code in codes[wanted[ordinals]])


def _lists(segment: Segment) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Number, codes (n, bytes) and ordinals (n,) of every list."""
    lists = Added.split(segment.stored, segment.files[LISTS], np.arange(segment.spec.rows))
    size = faiss_backend.ivf_of(segment.stored).code_size
    for number in range(len(lists.sizes)):
        yield number, *lists.entries(number, size)


def _remove_others(store: Store, kept: Published, newest: int) -> tuple[int, int]:
    """Remove staging, every version but `kept`, then every object but its own. The caller holds the store exclusively.

    Args:
        newest: the highest version number when the purge began; differs from `kept` if that version is damaged.

    Raises:
        AlreadyPublished: a change was published since, or is in progress; it may refer to what would be removed.
    """
    numbers = store.versions()
    if numbers[-1] != newest:
        raise AlreadyPublished(f"{store}: version {numbers[-1]} was published during the purge; run the purge again")
    store.remove_staging()
    others = [number for number in numbers if number != kept.version]
    for number in others:
        (store.root / "versions" / str(number)).unlink()
    removed = [path for path in (store.root / "objects").iterdir() if path.name != kept.artifact.digest]
    for path in removed:
        shutil.rmtree(path)
    return len(others), len(removed)


def scan(store: Store, newest: Artifact, searcher: Searcher, gone: Gone) -> int:
    """Read all remaining files and return the number of bytes read.

    Raises:
        DamagedArtifact: a deleted id, a code or refine code without a live item, or a file that no manifest lists.
    """
    listed = {newest.directory / entry.path for entry in newest.files} | {newest.directory / "manifest.json"}
    for folder in ("objects", "staging"):
        for path in (p for p in (store.root / folder).rglob("*") if p.is_file()):
            if path not in listed:
                raise DamagedArtifact(f"{path}: left behind after a purge, and no manifest lists it; remove it")
    held = set(searcher.ids.tolist())
    if found := held & gone.ids:
        raise DamagedArtifact(f"{newest.directory}: ids {sorted(found)[:3]} were deleted and are still there")
    for segment in searcher.segments:
        _scan_lists(segment)
        left = Counter(d for d in digests(segment, np.ones(segment.spec.rows, bool)) if d in gone.rows)
        if more := [digest for digest, count in left.items() if count > gone.rows[digest]]:
            raise DamagedArtifact(f"{segment.where}: {len(more)} codes of deleted items are still there")
    return sum(entry.bytes for entry in newest.files)


def _scan_lists(segment: Segment) -> None:
    """Raise DamagedArtifact unless the lists hold exactly one code for each row of the id map, and no other byte."""
    seen = np.zeros(segment.spec.rows, np.int64)
    for _, _, ordinals in _lists(segment):
        seen[ordinals] += 1
    size = faiss_backend.ivf_of(segment.stored).code_size + faiss_backend.ID_BYTES
    if (seen != 1).any() or segment.files[LISTS].stat().st_size != len(seen) * size:
        raise DamagedArtifact(f"{segment.files[LISTS]}: holds codes without a row; build the index again")
