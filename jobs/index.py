"""Indexes: build, inspect, verify, rollback.

python -m jobs.index build --embeddings EMB --queries EMB --index-dir OUT
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from jobs._job import JobConfig, Results, main
from zsr.artifact import Store, open_artifact
from zsr.index.build import Job, build
from zsr.index.plan import IndexConfig
from zsr.index.publish import history, rollback, verify
from zsr.index.search import Searcher


class Build(JobConfig, IndexConfig):
    """Build an index of a gallery and tune it on sketches.

    Attributes:
        embeddings: EMB of the gallery, written by jobs.embed.
        queries: EMB of sketches of the same checkpoint; the recall target is held on these.
        index_dir: where the index versions are kept.
    """

    embeddings: Path
    queries: Path
    index_dir: Path

    def job(self) -> Job:
        """The build, planned."""
        config = IndexConfig.model_validate(self.model_dump(include=set(IndexConfig.model_fields)))
        embeddings = open_artifact(self.embeddings, "embeddings")
        return Job.of(embeddings, open_artifact(self.queries, "embeddings"), config)


class Inspect(JobConfig):
    """Show what an index holds, without reading its vectors.

    Attributes:
        index_dir: ROOT, or one object in it.
    """

    index_dir: Path


class Verify(Inspect):
    """Hash every file of an index, read every list, and measure the recall of its golden queries again."""


class Rollback(JobConfig):
    """Publish the content of an earlier version again, as the newest.

    Attributes:
        index_dir: ROOT of the index.
        version: number of the version to go back to.
    """

    index_dir: Path
    version: int


def do_build(config: Build) -> Results:
    return build(config.job(), Store.at(config.index_dir)).as_json()


def do_inspect(config: Inspect) -> Results:
    artifact = open_artifact(config.index_dir, "index")
    versions = {str(number): digest for number, digest in history(Store(artifact.root)).items()}
    size = sum(entry.bytes for entry in artifact.files)
    return {
        **artifact.facts,
        "digest": artifact.digest,
        "bytes": size,
        "parents": artifact.parents,
        "versions": versions,
    }


def do_verify(config: Verify) -> Results:
    artifact = open_artifact(config.index_dir, "index")
    verify(Searcher.of(artifact))
    return {"digest": artifact.digest, "verified": len(artifact.files), "ntotal": artifact.facts["ntotal"]}


def do_rollback(config: Rollback) -> Results:
    return rollback(Store.at(config.index_dir), config.version).as_json()


def plan_build(config: Build) -> Results:
    return config.job().as_json()


def plan_read(config: Inspect) -> Results:
    artifact = open_artifact(config.index_dir, "index")
    return {"would": "read", "digest": artifact.digest, "bytes": sum(entry.bytes for entry in artifact.files)}


def plan_rollback(config: Rollback) -> Results:
    versions = history(Store.at(config.index_dir))
    return {"would": "publish", "digest": versions.get(config.version), "as_version": max(versions, default=0) + 1}


Command = tuple[Any, Callable[[Any], Results], Callable[[Any], Results]]
COMMANDS: Final[Mapping[str, Command]] = {
    "build": (Build, plan_build, do_build),
    "inspect": (Inspect, plan_read, do_inspect),
    "verify": (Verify, plan_read, do_verify),
    "rollback": (Rollback, plan_rollback, do_rollback),
}


def run(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first word names, and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in COMMANDS:
        message = f"expected one of {list(COMMANDS)} and then --help or its flags; found {words[:1]}"
        print(f"error: {message}", file=sys.stderr)
        print(json.dumps({"error": message, "exit_code": 2}), flush=True)
        return 2
    return main(*COMMANDS[words[0]], argv=words[1:])


if __name__ == "__main__":
    sys.exit(run())
