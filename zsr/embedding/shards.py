"""Shards of pictures or features to shards of features or embeddings: what is kept of an earlier version, what is
computed, by which actors, and what that cost.

A shard is kept where the last version in the same ROOT has it from the same bytes: of DATA, of FEATURES, of the weights
and of whatever else shapes it. The result is the same in every bit, and so is its digest.
"""

import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ray.data import ActorPoolStrategy

from zsr.artifact import Artifact, FileEntry, Plan, Staging, Store, canonical, sha256
from zsr.cluster import gpus, map_pieces
from zsr.errors import DamagedArtifact, StorageError

logger = logging.getLogger("zsr")

MADE_FROM: Final = "made_from"  # the fact of a file that holds its fingerprint
STAGES: Final = ("read", "decode", "model", "write")


def quarantine_name(shard: str) -> str:
    """Where the rows of `shard` that could not be used are listed."""
    return f"_quarantine/{shard}.jsonl"


def fingerprint(work: Plan, *read: FileEntry) -> str:
    """What a shard is made from: everything that identifies the job but its data, and the files that are read."""
    parents = {kind: digest for kind, digest in work.parents.items() if kind not in ("data", "features")}
    about = {"kind": work.kind, "config": dict(work.config), "parents": parents, "files": [e.sha256 for e in read]}
    return sha256(canonical(about))


@dataclass
class Clocks:
    """Wall seconds that an actor spends on each of STAGES; they come one after the other on its one thread."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:  # a picture that does not decode takes its time, too
            self.seconds[name] += time.perf_counter() - began


@dataclass(frozen=True)
class Prices:
    """What an hour costs, in any currency. Zero prices nothing."""

    cpu_hour: float = 0.0
    gpu_hour: float = 0.0


FREE: Final = Prices()


@dataclass(frozen=True)
class Tally:
    """What a run did.

    Attributes:
        reused: shards taken from the last version. found: shards, or all of it, that a run before had finished.
        results: of each computed shard: rows, bytes that were read, and seconds of each of STAGES.
        seconds: wall, start-up of the actors included. actors: how many. gpu: whether each held a GPU.
    """

    reused: int = 0
    found: int = 0
    results: Sequence[Mapping[str, Any]] = ()
    seconds: float = 0.0
    actors: int = 0
    gpu: bool = False

    def report(self, prices: Prices) -> dict[str, Any]:
        """For the job's JSON line. `limit` is the stage that takes the most of an actor's time."""
        shards = {"computed": len(self.results), "reused": self.reused, "finished_before": self.found}
        rows = sum(int(r["rows"]) for r in self.results)
        if not rows:
            return {"shards": shards}
        spent = {stage: sum(r["seconds"][stage] for r in self.results) for stage in STAGES}
        busy = sum(spent.values())
        per_row = cost_of(busy / rows, self.gpu, prices)
        return {
            "shards": shards,
            "rows_computed": rows,
            "rows_a_second": round(rows / self.seconds, 1),
            "rows_a_second_an_actor": round(rows / busy, 1),
            "start_and_waiting_share": round(max(0.0, 1 - busy / (self.seconds * self.actors)), 3),
            "bytes_read": sum(int(r["bytes"]) for r in self.results),
            "shares": {stage: round(seconds / busy, 3) for stage, seconds in spent.items()},
            "limit": max(spent, key=lambda stage: spent[stage]),
            **per_row,
        }


def cost_of(seconds: float, gpu: bool, prices: Prices) -> dict[str, float]:
    """What a million rows take, at so many seconds of an actor (a CPU, and perhaps a GPU) a row."""
    hours = seconds * 1e6 / 3600
    cost = hours * (prices.cpu_hour + prices.gpu_hour * gpu)
    found = {"cpu_hours_a_million": round(hours, 3), **({"gpu_hours_a_million": round(hours, 3)} if gpu else {})}
    return {**found, "cost_a_million": round(cost, 4)} if cost else found


def compute(
    what: str,
    kind: type,
    wanted: Mapping[str, str],
    output: Store,
    staging: Staging,
    shared: Mapping[str, Any],
    actors: int,
) -> Tally:
    """Finish the shards `wanted` in `staging`; those of a killed run are there, those of the last version are kept.

    Args:
        kind: class of the actors: made with `shared`, `staging`; called with {"name": shard, "made_from": fingerprint}.
        wanted: fingerprints by name.
        actors: at most; a GPU each where the cluster has some, and never more than GPUs or shards.
    """
    todo = [name for name in wanted if staging.finished(name) is None]
    found = len(wanted) - len(todo)
    kept = _kept(f"{what}: reuse", {name: wanted[name] for name in todo}, output, staging)
    pieces = [{"name": name, MADE_FROM: wanted[name]} for name in todo if name not in kept]
    have = gpus()
    size = max(1, min(actors, len(pieces), have or actors))
    options = {"compute": ActorPoolStrategy(size=size), "num_cpus": 1, "num_gpus": 1 if have else 0}
    began = time.perf_counter()
    results = map_pieces(what, kind, pieces, fn_constructor_kwargs={**shared, "staging": staging}, **options)
    return Tally(len(kept), found, results, time.perf_counter() - began, size, bool(have))


def _kept(what: str, wanted: Mapping[str, str], output: Store, staging: Staging) -> set[str]:
    """Names of the shards that the last version had, and `staging` has now."""
    try:
        before = output.latest()
    except (StorageError, DamagedArtifact):  # nothing is published yet, or nothing that verifies
        return set()
    same = [{"name": e.path} for e in before.files if e.facts.get(MADE_FROM, "") == wanted.get(e.path)]
    kept = map_pieces(what, _keep, same, fn_kwargs={"before": before, "staging": staging})
    for piece in kept:
        if piece["damaged"]:
            logger.warning("%s is not kept, but computed anew: %s", piece["name"], piece["damaged"])
    return {piece["name"] for piece in kept if not piece["damaged"]}


def _keep(piece: dict[str, Any], before: Artifact, staging: Staging) -> dict[str, Any]:
    """Take one shard over if its bytes are sound, and say what is wrong with them otherwise. Runs in a Ray task."""
    name = piece["name"]
    entries = {entry.path: entry for entry in before.files}
    for path in (quarantine_name(name), name):  # the shard last: it is what tells that both are there
        if path in entries:
            try:
                source = before.local(path)
            except DamagedArtifact as error:
                return {"name": name, "damaged": str(error)}
            with staging.piece(path, facts=dict(entries[path].facts)) as place:
                linked(source, place)
    return {"name": name, "damaged": ""}


def linked(source: Path, place: Path) -> None:
    """The same file at `place`, which nobody writes to any more; a copy where the file system has no links."""
    try:
        os.link(source, place)
    except OSError:
        shutil.copyfile(source, place)
