"""Build and maintain indexes: plan, build, add, delete, rebuild, compact, purge, inspect, verify, rollback.

zsr index build --embeddings EMB --queries EMB --index-dir OUT
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from zsr.artifact import Store, open_artifact
from zsr.commands.base import JobConfig, Results, made, main, overview, wrote
from zsr.errors import ConfigError
from zsr.index.building.build import Job, Unmeasured, build
from zsr.index.building.plan import IndexConfig
from zsr.index.building.publish import Published, history, rollback, verify
from zsr.index.maintaining import edit
from zsr.index.maintaining.purge import Purged, purge
from zsr.index.searching.searcher import Searcher
from zsr.storage import read_text


class Build(JobConfig, IndexConfig):
    """Build an index of a gallery and tune it on queries.

    Attributes:
        embeddings: EMB of the gallery, written by zsr embed.
        queries: EMB of queries from the same checkpoint, such as sketches, on which the recall target is measured. By
            default gallery rows are the queries, which overestimates the recall of an approximate index.
        index_dir: directory of the index versions.
    """

    embeddings: Path
    queries: Path | None = None
    index_dir: Path

    def job(self) -> Job:
        """The planned build."""
        config = IndexConfig.model_validate(self.model_dump(include=set(IndexConfig.model_fields)))
        embeddings = open_artifact(self.embeddings, "embeddings")
        queries = None if self.queries is None else open_artifact(self.queries, "embeddings")
        return Job.of(embeddings, queries, config, Store.at(self.index_dir), measure=not self.dry_run)


class Benchmark(Build):
    """Benchmark the candidate indexes, and keep the measurements for the build."""


class Inspect(JobConfig):
    """Show what an index holds, without reading its vectors.

    Attributes:
        index_dir: ROOT of the index, or one object in it.
    """

    index_dir: Path


class Verify(Inspect):
    """Check the hash of every file, read every list, and measure the recall of the golden queries again."""


class Delete(Inspect):
    """Hide items from every search. Their vectors stay in the files until `compact`, in older versions until `purge`.

    Attributes:
        keys: keys of the items.
        keys_from: a UTF-8 text file with one key per line.
    """

    keys: tuple[str, ...] = ()
    keys_from: Path | None = None

    def ids(self) -> list[int]:
        """Ids of the items, including those already deleted.

        Raises:
            ConfigError: no key, an unreadable file, or a key that is not in the index.
        """
        wanted = {*self.keys, *self._listed()}
        if not wanted:
            raise ConfigError("nothing to delete; give --keys or --keys-from")
        searcher = Searcher.open(self.index_dir)
        found: dict[str, int] = {}
        for batch in searcher.names.batches:
            held = batch.filter(pc.is_in(batch.column("key"), value_set=pa.array(sorted(wanted), pa.string())))
            found |= dict(zip(held.column("key").to_pylist(), held.column("id").to_pylist(), strict=True))
        if missing := sorted(wanted - found.keys()):
            raise ConfigError(
                f"{self.index_dir}: {len(missing)} of {len(wanted)} keys are not in the index, such as {missing[:3]}; "
                "nothing was deleted"
            )
        return list(found.values())

    def _listed(self) -> list[str]:
        text = "" if self.keys_from is None else read_text(self.keys_from, "--keys-from")
        return [line for line in text.splitlines() if line]


class Add(Inspect):
    """Add the items of more embeddings, without training the index again.

    Attributes:
        embeddings: EMB of the same checkpoint.
        num_workers: max shards to add in parallel.
    """

    embeddings: Path
    num_workers: int | None = None


class Rebuild(Add):
    """Update the index to what the embeddings hold now; unchanged shards are reused."""


class Compact(Inspect):
    """Write a version without the vectors of deleted items; search results stay the same."""


class Purge(Inspect):
    """Compact, remove every older version, and verify by a scan that no data of deleted items is left."""


class Rollback(JobConfig):
    """Publish an earlier version again, as the newest.

    Attributes:
        index_dir: ROOT of the index.
        version: number of the version to restore.
    """

    index_dir: Path
    version: int


def changed(config: Build | Inspect | Rollback, done: Published | edit.Changed | Purged) -> Results:
    """Results of a command that published a version."""
    published = done if isinstance(done, Published) else done.published
    return made(published.artifact, config.index_dir, **done.as_json())


def do_build(config: Build) -> Results:
    return changed(config, build(config.job(), Store.at(config.index_dir)))


def do_inspect(config: Inspect) -> Results:
    artifact = open_artifact(config.index_dir, "index")
    versions = {str(number): digest for number, digest in history(Store.at(artifact.place)).items()}
    size = sum(entry.bytes for entry in artifact.files)
    return made(artifact, config.index_dir) | {
        **artifact.facts,
        "bytes": size,
        "parents": artifact.parents,
        "versions": versions,
    }


def do_verify(config: Verify) -> Results:
    artifact = open_artifact(config.index_dir, "index")
    verify(Searcher.of(artifact))
    return made(artifact, config.index_dir, verified=len(artifact.files), ntotal=artifact.facts["ntotal"])


def do_delete(config: Delete) -> Results:
    return changed(config, edit.delete(Store.at(config.index_dir), config.ids()))


def do_add(config: Add) -> Results:
    embeddings = open_artifact(config.embeddings, "embeddings")
    return changed(config, edit.add(Store.at(config.index_dir), embeddings, workers=config.num_workers))


def do_rebuild(config: Rebuild) -> Results:
    embeddings = open_artifact(config.embeddings, "embeddings")
    return changed(config, edit.rebuild(Store.at(config.index_dir), embeddings, workers=config.num_workers))


def do_compact(config: Compact) -> Results:
    return changed(config, edit.compact(Store.at(config.index_dir)))


def do_purge(config: Purge) -> Results:
    return changed(config, purge(Store.at(config.index_dir)))


def do_plan(config: Benchmark) -> Results:
    return wrote(None, "index-plan", **config.job().as_json())


def do_rollback(config: Rollback) -> Results:
    return changed(config, rollback(Store.at(config.index_dir), config.version))


def plan_build(config: Build) -> Results:
    try:
        return config.job().as_json()
    except Unmeasured as why:
        return {"index_key": None, "reasons": [str(why)]}


def plan_read(config: Inspect) -> Results:
    artifact = open_artifact(config.index_dir, "index")
    return {"would": "read", "digest": artifact.digest, "bytes": sum(entry.bytes for entry in artifact.files)}


def plan_delete(config: Delete) -> Results:
    ids = np.unique(np.array(config.ids(), np.int64))
    alive = int(np.isin(ids, Searcher.open(config.index_dir).live_ids).sum())
    return {"would": "delete", "items": alive, "already_deleted": len(ids) - alive}


def plan_add(config: Add) -> Results:
    return {**plan_read(config), "would": "add", "rows": open_artifact(config.embeddings, "embeddings").facts["rows"]}


def plan_purge(config: Purge) -> Results:
    versions = history(Store.at(config.index_dir))
    return {**plan_read(config), "would": "compact and remove versions", "versions": sorted(versions)[:-1]}


def plan_rollback(config: Rollback) -> Results:
    versions = history(Store.at(config.index_dir))
    return {"would": "publish", "digest": versions.get(config.version), "as_version": max(versions, default=0) + 1}


Command = tuple[Any, Callable[[Any], Results], Callable[[Any], Results]]
COMMANDS: Final[Mapping[str, Command]] = {
    "plan": (Benchmark, plan_build, do_plan),
    "build": (Build, plan_build, do_build),
    "add": (Add, plan_add, do_add),
    "delete": (Delete, plan_delete, do_delete),
    "rebuild": (Rebuild, plan_add, do_rebuild),
    "compact": (Compact, plan_read, do_compact),
    "purge": (Purge, plan_purge, do_purge),
    "inspect": (Inspect, plan_read, do_inspect),
    "verify": (Verify, plan_read, do_verify),
    "rollback": (Rollback, plan_rollback, do_rollback),
}


def run(argv: Sequence[str]) -> int:
    if argv and argv[0] in COMMANDS:
        return main(*COMMANDS[argv[0]], argv[1:], f"zsr index {argv[0]}")
    about = {n: " ".join(str(kind.__doc__).partition("Attributes:")[0].split()) for n, (kind, _, _) in COMMANDS.items()}
    return overview("zsr index", about, argv)
