"""The gate between a built index and its readers: it must be whole and find what it found when it was tuned."""

import json
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from zsr.artifact import Artifact, Store, open_artifact
from zsr.data.features import vectors
from zsr.errors import ConfigError, DamagedArtifact, QualityGateFailed, StorageError
from zsr.index import engine
from zsr.index.search import GOLDEN, Searcher
from zsr.index.tune import Truth

RECALL_TOLERANCE: Final = 1e-3  # another processor may round a tie the other way


@dataclass(frozen=True, slots=True)
class Published:
    """An index and the version under which readers find it."""

    artifact: Artifact
    version: int

    def as_json(self) -> dict[str, Any]:
        """What a job prints."""
        facts = self.artifact.facts
        named = ("ntotal", "index_key", "operating_point", "imbalance", "dim", "metric", "checkpoint")
        return {
            "digest": self.artifact.digest,
            "version": self.version,
            "bytes": sum(entry.bytes for entry in self.artifact.files),
            "recall": facts["operating_point"]["recall_sketch"],
            **{name: facts[name] for name in named},
        }


def golden_table(truth: Truth) -> pa.Table:
    """Queries and their exact K-th scores, kept in the index so that any reader can measure its recall again."""
    matrix = pa.FixedSizeListArray.from_arrays(pa.array(truth.queries.reshape(-1)), truth.queries.shape[1])
    return pa.table({"query": matrix, "kth": pa.array(truth.kth)})


def _golden(searcher: Searcher) -> Truth:
    table = pq.read_table(searcher.files[GOLDEN])
    queries = vectors(table.column("query"), GOLDEN)
    return Truth(queries, table.column("kth").to_numpy(), int(searcher.facts["golden_k"]))


def verify(searcher: Searcher) -> None:
    """Check that every list is readable and every row is in exactly one, that names are unique, and that recall holds.

    Raises:
        DamagedArtifact: a row is missing, doubled or unnamed.
        QualityGateFailed: recall at the operating point is not what it was when the index was tuned.
    """
    where = searcher.files[GOLDEN].parent
    seen = np.zeros(len(searcher.ids), np.int64)
    for number in range(int(searcher.facts["nlist"])):
        ordinals = engine.list_ids(searcher.index, number)
        if ordinals.size and not 0 <= ordinals.min() <= ordinals.max() < len(seen):
            raise DamagedArtifact(f"{where}: list {number} holds rows outside of 0 .. {len(seen) - 1}; build it again")
        np.add.at(seen, ordinals, 1)
    if (wrong := np.flatnonzero(seen != 1)).size:
        raise DamagedArtifact(f"{where}: row {wrong[0]} is in {seen[wrong[0]]} lists, expected one; build it again")
    require_unique(searcher)
    _require_recall(searcher)


def require_unique(searcher: Searcher) -> None:
    """Raise ConfigError if two rows have the same id and part: a hit could not say which it is."""
    part = searcher.names.column("part").to_numpy()
    order = np.lexsort((part, searcher.ids))
    ids, part = searcher.ids[order], part[order]
    same = np.flatnonzero((ids[1:] == ids[:-1]) & (part[1:] == part[:-1]))
    if same.size:
        key = searcher.names.column("key")[int(order[same[0]])].as_py()
        raise ConfigError(f"two embeddings have id {ids[same[0]]} and part {part[same[0]]} (key {key!r}); embed again")


def _require_recall(searcher: Searcher) -> None:
    truth, point = _golden(searcher), searcher.facts["operating_point"]
    _, scores = searcher.nearest(truth.queries, truth.k)
    found, wanted = truth.recall(scores), float(point["recall_sketch"])
    if abs(found - wanted) > RECALL_TOLERANCE:
        raise QualityGateFailed(
            f"{searcher.files[GOLDEN].parent}: recall@{truth.k} of the golden queries is {found:.4f}, but {wanted:.4f} "
            "was measured when the index was tuned; not published"
        )


def publish(store: Store, artifact: Artifact) -> Published:
    """Reopen `artifact`, verify it, and make it the next version.

    Raises:
        DamagedArtifact, QualityGateFailed: see `verify`; nothing is published.
        AlreadyPublished: another publisher created the same version number first.
    """
    verify(Searcher.of(artifact))
    return Published(artifact, store.publish(artifact))


def history(store: Store) -> dict[int, str]:
    """Digest of every published version, by number."""
    found = {}
    for number in store.versions():
        pointer = json.loads((store.root / "versions" / str(number)).read_bytes()[:4096])
        found[number] = str(pointer["digest"])
    return found


def version_of(store: Store, digest: str) -> int:
    """The highest version that names `digest`. Raises StorageError if none does."""
    numbers = [number for number, found in history(store).items() if found == digest]
    if not numbers:
        raise StorageError(f"{store.root}: no version names {digest[:12]}; run the build again")
    return max(numbers)


def rollback(store: Store, version: int) -> Published:
    """Make the content of an earlier `version` the newest one, after verifying it. Later versions stay as they are.

    Raises:
        ConfigError: there is no such version.
        DamagedArtifact, QualityGateFailed: it is not what it was; nothing is published.
    """
    versions = history(store)
    if version not in versions:
        raise ConfigError(f"{store.root} has no version {version}; it has {sorted(versions)}")
    return publish(store, open_artifact(store.root / "objects" / versions[version], "index"))
