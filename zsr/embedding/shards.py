"""Compute shards of features or embeddings with Ray actors, reuse unchanged shards, and predict the cost.

A shard of the last version in the same ROOT is reused, as a hard link or a copy, if its name and fingerprint are the
same. The fingerprint is a hash of the bytes of its DATA and FEATURES files, the weights and the settings. A reused
shard is bit-identical to a newly computed one, so the artifact gets the same digest either way.
"""

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar, cast

import ray
from ray.data import ActorPoolStrategy

from zsr import progress
from zsr.artifact import Artifact, FileEntry, Plan, Staging, Store, canonical, sha256
from zsr.cluster import connect
from zsr.devices import AUTO, Devices, DeviceSettings, capacity, choose
from zsr.embedding.prefetch import PROBE
from zsr.embedding.settings import Prices
from zsr.errors import DamagedArtifact, Infeasible, StorageError
from zsr.executor import map_pieces, runs_here
from zsr.process import ONE_ARENA

logger = logging.getLogger("zsr")

MADE_FROM: Final = "made_from"  # key of the fingerprint in the metadata of a file
STAGES: Final = ("read", "decode", "model", "write")
END: Final = object()
KEPT: Final = 256 << 20  # bytes that one process hashes in about the time that a worker takes to start
Item = TypeVar("Item")


def quarantine_name(shard: str) -> str:
    """Name of the file that lists the bad rows of `shard`."""
    return f"_quarantine/{shard}.jsonl"


def fingerprint(work: Plan, *read: FileEntry) -> str:
    """Digest of what determines a shard: the job without its data, and the files that are read for the shard."""
    parents = {kind: digest for kind, digest in work.parents.items() if kind not in ("data", "features")}
    about = {"kind": work.kind, "config": dict(work.config), "parents": parents, "files": [e.sha256 for e in read]}
    return sha256(canonical(about))


@dataclass
class Clocks:
    """Wall seconds that an actor spends on each of STAGES, which run sequentially in its one thread."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:  # count the time of bad images too
            self.seconds[name] += time.perf_counter() - began

    def each(self, name: str, items: Iterator[Item]) -> Iterator[Item]:
        """Yield `items`, and count the time to get them for a stage."""
        while True:
            with self.stage(name):
                item = next(items, END)
            if item is END:
                return
            yield cast(Item, item)


@dataclass(frozen=True)
class Tally:
    """Result of a run.

    Attributes:
        reused: number of shards reused from the last version. found: number of shards finished by an earlier run.
        results: for each computed shard: rows, bytes read, seconds of each of STAGES, and the decoders of the actor
            that computed it, see `prefetch.Decoders`.
        seconds: wall time, including the start of the actors. actors: their number. gpus: GPUs per actor.
    """

    reused: int = 0
    found: int = 0
    results: Sequence[Mapping[str, Any]] = ()
    seconds: float = 0.0
    actors: int = 0
    gpus: float = 0.0

    def report(self, prices: Prices) -> dict[str, Any]:
        """The report for the command's JSON line. `limit` is the stage with the most time of the actors."""
        shards = {"computed": len(self.results), "reused": self.reused, "finished_before": self.found}
        rows = sum(int(r["rows"]) for r in self.results)
        if not rows:
            return {"shards": shards}
        spent = {stage: sum(r["seconds"][stage] for r in self.results) for stage in STAGES}
        busy = sum(spent.values())
        decoders = max((r["decoders"] for r in self.results), key=lambda d: d["running"] or 0)
        per_row = cost_of(busy / rows, self.gpus, prices, 1 + (decoders["running"] or 0))
        return {
            "shards": shards,
            "rows_computed": rows,
            "rows_a_second": round(rows / self.seconds, 1),
            "rows_a_second_an_actor": round(rows / busy, 1),
            "start_and_waiting_share": round(max(0.0, 1 - busy / (self.seconds * self.actors)), 3),
            "bytes_read": sum(int(r["bytes"]) for r in self.results),
            "shares": {stage: round(seconds / busy, 3) for stage, seconds in spent.items()},
            "limit": max(spent, key=lambda stage: spent[stage]),
            **({"probe": decoders} if decoders["running"] is not None else {}),
            **per_row,
        }


def cost_of(seconds: float, gpus: float, prices: Prices, cpus: int = 1) -> dict[str, float]:
    """Hours and cost per million rows, given `seconds` per row of an actor with `cpus` CPUs and `gpus` GPUs."""
    hours = seconds * 1e6 / 3600
    cost = hours * (prices.cpu_hour * cpus + prices.gpu_hour * gpus)
    found = {"cpu_hours_a_million": round(hours * cpus, 3)}
    found |= {"gpu_hours_a_million": round(hours * gpus, 3)} if gpus else {}
    return {**found, "cost_a_million": round(cost, 4)} if cost else found


class Maker(Protocol):
    """Interface of an actor: compute the rows of a shard."""

    def made(self, name: str, clocks: Clocks) -> Iterator[tuple[int, Any]]:
        """Compute shard `name` in parts; yields the number of input rows of each part, and its result."""
        ...


def forecast(
    kind: Callable[..., Maker],
    rows: Mapping[str, int],
    shared: Mapping[str, Any],
    actors: int | None,
    prices: Prices,
    devices: Devices,
) -> dict[str, Any]:
    """Predict time and cost of computing `rows`, by running a few seconds of the first shard of each modality.

    A Ray task computes the same as one of `compute`'s actors, on the same device, and writes nothing.

    Args:
        rows: number of rows of each modality, by the name of a shard of the modality.
        actors: see `compute`.
    """
    size = actor_count(actors, devices)
    devices.say(size)
    rates = rates_of(kind, shared, list(rows), devices)
    busy = {name: count * sum(rates[name].values()) for name, count in rows.items()}
    spent = {stage: sum(count * rates[name][stage] for name, count in rows.items()) for stage in STAGES}
    every = sum(rows.values())
    found = {
        "actors": size,
        "seconds_a_row": {name.partition("/")[0]: round(sum(r.values()), 6) for name, r in rates.items()},
    }
    if not every or not sum(busy.values()):
        return found
    whole = cost_of(sum(busy.values()) / every, devices.gpus, prices)
    priced = {"cost": round(whole["cost_a_million"] * every / 1e6, 4)} if "cost_a_million" in whole else {}
    return {
        **found,
        "limit": max(spent, key=lambda stage: spent[stage]),
        "hours": round(sum(busy.values()) / size / 3600, 4),
        **whole,
        **priced,
    }


def rates_of(
    kind: Callable[..., Maker], shared: Mapping[str, Any], names: Sequence[str], devices: Devices
) -> dict[str, dict[str, float]]:
    """Seconds per row of STAGES for each shard, by a Ray task with the device of one worker."""
    connect()
    task = ray.remote(num_cpus=1, num_gpus=devices.gpus)(_rates)
    rates: dict[str, dict[str, float]] = ray.get(task.remote(kind, shared, names))
    return rates


def _rates(kind: Callable[..., Maker], shared: Mapping[str, Any], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Seconds per row of STAGES for each shard, without warm-up if it has several parts. Runs in a Ray task."""
    maker, found = kind(**shared), {}
    for name in names:
        clocks, seen = Clocks(), 0
        for number, (count, _) in enumerate(maker.made(name, clocks)):
            seen += count
            if number and sum(clocks.seconds.values()) >= PROBE:
                break
            if not number:  # warm-up: the first part is slow, and only used if it is the only one
                first, seen_first = dict(clocks.seconds), seen
                clocks.seconds, seen = dict.fromkeys(STAGES, 0.0), 0
        if not seen:
            clocks.seconds, seen = first, seen_first
        found[name] = {stage: clocks.seconds[stage] / max(1, seen) for stage in STAGES}
    return found


def compute(
    what: str,
    kind: type,
    wanted: Mapping[str, str],
    output: Store,
    staging: Staging,
    shared: Mapping[str, Any],
    actors: int | None,
    decoders: int | None = None,
    device: DeviceSettings = AUTO,
    rows: Mapping[str, int] | None = None,
    few: int = 0,
) -> Tally:
    """Compute the shards `wanted` in `staging`, except those finished by a killed run or reused from the last version.

    Args:
        kind: class of the actors: constructed with `shared`, `staging` and `decoders`, its max number of decoding
            tasks; called with {"name": shard, "made_from": fingerprint}.
        wanted: fingerprints by name.
        actors: max number of actors; None for as many as fit in the cluster, now or when its autoscaler has started
            nodes. Never more than shards, nor than fit on the GPUs.
        decoders: see `room_to_decode`.
        device: device of the actors.
        rows: rows of each shard, for progress; None to count shards.
        few: number of rows up to which this process computes them instead of actors, see `executor`.

    Raises:
        Infeasible: see `room_to_decode` and `devices.choose`.
    """
    todo = [name for name in wanted if staging.finished(name) is None]
    found = len(wanted) - len(todo)
    kept = _kept(f"{what}: reuse", {name: wanted[name] for name in todo}, output, staging)
    pieces = [{"name": name, MADE_FROM: wanted[name]} for name in todo if name not in kept]
    progress.found_finished(what, found, len(wanted), reused=len(kept))
    devices = choose(device)
    sizes = None if rows is None else [rows[piece["name"]] for piece in pieces]
    small = sizes is not None and sum(sizes) <= few and not decoders
    size = 1 if runs_here(small, devices.gpus) else max(1, min(actor_count(actors, devices), len(pieces)))
    options = {"compute": ActorPoolStrategy(size=size), "num_cpus": 1, "num_gpus": devices.gpus}
    options["runtime_env"] = ONE_ARENA
    most = 0 if runs_here(small, devices.gpus) else room_to_decode(size, decoders, devices)
    if pieces:
        devices.say(size)
    began = time.perf_counter()
    shared = {**shared, "staging": staging, "decoders": most}
    results = map_pieces(what, kind, pieces, small=small, rows=sizes, fn_constructor_kwargs=shared, **options)
    return Tally(len(kept), found, results, time.perf_counter() - began, size, devices.gpus)


def actor_count(actors: int | None, devices: Devices) -> int:
    """Number of actors to start for the flag value `actors`; on GPUs never more than fit."""
    if actors is None:
        return devices.cores or devices.most
    return min(actors, devices.most) if devices.gpus else actors


def room_to_decode(actors: int, decoders: int | None, devices: Devices) -> int:
    """Max decoding tasks of each of `actors`: as many as requested, or for models on GPUs as there are free CPUs for.

    CPUs of nodes that the autoscaler can start count, since waiting tasks start them.

    Raises:
        Infeasible: there are fewer CPUs than requested, so that tasks would wait forever.
    """
    if not devices.gpus and not decoders:  # decoding tasks would take the CPUs of the models
        return 0
    room = (capacity().cpus() - actors) // actors
    if decoders is not None and decoders > room:
        raise Infeasible(
            f"{decoders} decoding tasks for each of {actors} actors, but CPUs for only {max(0, room)}; use --decoders "
            f"{max(0, room)}, fewer --num-workers, or add nodes"
        )
    return max(0, room) if decoders is None else decoders


def _kept(what: str, wanted: Mapping[str, str], output: Store, staging: Staging) -> set[str]:
    """Reuse shards of the last version in `staging`; returns their names."""
    try:
        before = output.latest()
    except (StorageError, DamagedArtifact):  # no version is published, or none verifies
        return set()
    same = [{"name": e.path} for e in before.files if e.facts.get(MADE_FROM, "") == wanted.get(e.path)]
    small = sum(before.entry(piece["name"]).bytes for piece in same) <= KEPT
    kept = map_pieces(what, _keep, same, small=small, fn_kwargs={"before": before, "staging": staging})
    for piece in kept:
        if piece["damaged"]:
            logger.warning("%s is not reused, but computed again: %s", piece["name"], piece["damaged"])
    return {piece["name"] for piece in kept if not piece["damaged"]}


def _keep(piece: dict[str, Any], before: Artifact, staging: Staging) -> dict[str, Any]:
    """Reuse one shard if its bytes verify, otherwise return the error. Runs in a Ray task."""
    name = piece["name"]
    entries = {entry.path: entry for entry in before.files}
    for path in (quarantine_name(name), name):  # the shard last, since its receipt marks both as finished
        if path in entries:
            try:
                source = before.local(path)
            except DamagedArtifact as error:
                return {"name": name, "damaged": str(error)}
            with staging.piece(path, facts=dict(entries[path].facts)) as place:
                linked(source, place)
    return {"name": name, "damaged": ""}


def linked(source: Path, place: Path) -> None:
    """Hard-link `source` to `place`, or copy it if the file system has no links. The file is immutable."""
    try:
        os.link(source, place)
    except OSError:
        shutil.copyfile(source, place)
