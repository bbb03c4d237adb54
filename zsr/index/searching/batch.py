"""Batch search: neighbors of all items of an embeddings artifact, as an artifact NEIGHBOURS with the same shards.

`modality=sketch/part-NNNNN.parquet` has one row per hit; see `answers_table`. A killed run resumes after its finished
shards. Every search mode gives the same bytes.
"""

import time
from dataclasses import asdict, replace
from typing import Any, Final

import ray

from zsr import faults, progress
from zsr.artifact import Artifact, Plan, Store
from zsr.clock import Clock
from zsr.cluster import connect, resources
from zsr.embedding.prefetch import PROBE
from zsr.embedding.settings import FREE, Prices
from zsr.embedding.shards import cost_of
from zsr.errors import StorageError
from zsr.executor import QUERIES, map_pieces, runs_here
from zsr.index.searching import list_major
from zsr.index.searching.list_major import Merged, Work, actors, rows_of
from zsr.index.searching.results import Searches, SearchParams, answer_block, answers_table, queries_of
from zsr.index.searching.searcher import Searcher, classes_of, resolved
from zsr.index.searching.sharded import ShardedSearcher
from zsr.index.storage.embeddings import Vectors

WARMED: Final = 256  # warm-up queries of `predict`, not timed
TRIED: Final = 2048  # queries per timed block of `predict`; smaller blocks are slower per query


def plan(index: Artifact, queries: Artifact, asked: SearchParams) -> Plan:
    """Plan keyed by index, queries and search parameters, with nprobe and refine_factor resolved from the index."""
    point = index.facts["operating_point"]
    config = asdict(asked) | {"nprobe": asked.nprobe or point["nprobe"], "labels": sorted(asked.labels)}
    config |= {"refine_factor": asked.refine_factor or point["refine_factor"]}
    return Plan("neighbours", config, {"index": index.digest, "queries": queries.digest})


def spelled(index: Artifact, asked: SearchParams) -> SearchParams:
    """`asked` with its labels in the spelling of the index. Raises ConfigError for a class that no item has."""
    return replace(asked, labels=resolved(asked.labels or None, lambda: classes_of(index)) or ())


def search_all(
    index: Artifact,
    queries: Artifact,
    asked: SearchParams,
    output: Store,
    *,
    replicas: int = 0,
    list_ranges: int = 0,
    workers: int | None = None,
    prices: Prices = FREE,
) -> tuple[Artifact, dict[str, Any]]:
    """Search for every item of `queries`, publish NEIGHBOURS, and return it with the cost of the search.

    Args:
        replicas: 0: each of `workers` actors (one per CPU if not given) maps all segments and answers whole shards of
            queries. 1 or more: replicas per segment, with the segments distributed over the nodes, see
            `ShardedSearcher`: for an index that is too large for one machine.
        list_ranges: if at least 1, the number of ranges in which the lists are scanned, see `searching.list_major`: for
            an index that is too large for memory.
        prices: of the CPU seconds used.

    Raises:
        ConfigError: queries of another space, a class that no item has, or parameters that list ranges do not support.
        StorageError: no shard actor is left for some segment; finished shards are kept.
    """
    if list_ranges:
        list_major.require(index, asked, replicas)
    asked = spelled(index, asked)
    planned = plan(index, queries, asked)
    if done := output.made(planned):
        progress.up_to_date("search", output, output.versions())
        return done, {"reused": True}
    source, staging = Vectors.of(queries), output.staging(planned)
    work = Work(index, source, asked, staging, min(list_ranges, int(index.facts["nlist"])))
    names = [entry.path for entry in source.shards]
    todo = [{"shard": i, "name": name} for i, name in enumerate(names) if staging.finished(name) is None]
    progress.found_finished("search", len(names) - len(todo), len(names))
    clock = Clock()
    spent = _by_nodes(work, todo, replicas) if replicas else _by_actors(work, todo, workers)
    entries = staging.all_finished(names)
    rows = {name: sum(int(entry.facts[name]) for entry in entries) for name in ("queries", "hits")}
    artifact = staging.seal(facts={**rows, "k": asked.k, "modality": queries.facts["modality"]})
    output.publish(artifact)
    asked_now = sum(one.get("queries", 0) for one in spent)
    told = clock.spent() | {"shards": len(todo), "tasks_cpu": round(sum(one["cpu"] for one in spent), 3)}
    told |= {"queries_per_second": round(asked_now / max(1e-9, told["wall"]), 1)}
    if asked_now and not replicas:  # shard actors do not record their CPU seconds
        told |= cost_of(told["tasks_cpu"] / asked_now, False, prices)
    told |= {"list_ranges": work.ranges} if work.ranges else {}
    return artifact, told | {"tasks_rss": max((one["rss"] for one in spent), default=0)}


def predict(
    index: Artifact, queries: Artifact, asked: SearchParams, *, workers: int | None = None, prices: Prices = FREE
) -> dict[str, Any]:
    """Predict the cost of `search_all` with actors that map the whole index, from a few seconds of the first shard.

    A Ray task opens the index as they would, which hashes it, and writes nothing. Rows are vectors; a multi-vector
    query has several. `hours` is wall time with one CPU per worker, without the time to start workers and to open the
    index.

    Raises:
        ConfigError: queries of another space, or a class that no item has.
    """
    connect()
    asked = spelled(index, asked)
    source = Vectors.of(queries)
    seconds: float = ray.get(ray.remote(num_cpus=1)(_seconds_a_row).remote(index, source, asked))
    size = max(1, min(len(source.shards), workers or int(resources().get("CPU", 1))))
    hours = seconds * int(queries.facts["rows"]) / 3600
    whole = cost_of(seconds, False, prices)
    priced = {"cost": round(hours * prices.cpu_hour, 4)} if prices.cpu_hour else {}
    return {"seconds_a_row": seconds, "workers": size, "hours": round(hours / size, 6), **whole, **priced}


def _seconds_a_row(index: Artifact, source: Vectors, asked: SearchParams) -> float:
    """Wall seconds per row, measured on the first shard. Runs in a Ray task."""
    searcher = Searcher.of(index)
    searcher.check(source.artifact)
    queries = queries_of(source.read(0))[1]
    asked.of(searcher, queries[:WARMED])  # warm-up, which also opens what is opened lazily
    timed = queries[WARMED:] if len(queries) > WARMED else queries
    rows, began = 0, time.perf_counter()
    for at in range(0, len(timed), TRIED):
        block = timed[at : at + TRIED]
        asked.of(searcher, block)
        rows += block.shape[0] * block.shape[1]
        if time.perf_counter() - began >= PROBE:
            break
    return (time.perf_counter() - began) / rows


def _by_nodes(work: Work, todo: list[dict[str, Any]], replicas: int) -> list[dict[str, Any]]:
    """Answer some shards of queries with the shard actors of the segments."""
    searcher = ShardedSearcher.open(f"{work.index.place}/objects/{work.index.digest}", replicas=replicas)
    searcher.check(work.source.artifact)
    with progress.stage("search", sum(rows_of(work, todo)), "queries"):
        return [answered(searcher, work, piece) for piece in todo]


def _by_actors(work: Work, todo: list[dict[str, Any]], workers: int | None) -> list[dict[str, Any]]:
    """Answer some shards of queries with actors that map the index, after scanning it by range if requested."""
    rows = rows_of(work, todo)
    small = sum(rows) <= QUERIES
    most = workers or (1 if runs_here(small) and not work.ranges else int(resources().get("CPU", 1)))
    scanned = list_major.scan(work, [int(piece["shard"]) for piece in todo], most) if work.ranges else []
    options = {"small": small, "rows": rows, "unit": "queries", "fn_constructor_kwargs": {"work": work}}
    return scanned + map_pieces("search", ShardSearcher, todo, **options, **actors(todo, most))


class ShardSearcher:
    """A Ray actor that maps an index and answers one shard of queries per call."""

    def __init__(self, work: Work) -> None:
        self.work, self.searcher = work, Searcher.of(work.index)
        self.searcher.check(work.source.artifact)

    def __call__(self, piece: dict[str, Any]) -> dict[str, Any]:
        merged = Merged(self.work, self.searcher, int(piece["shard"]))
        return answered(merged if self.work.ranges else self.searcher, self.work, piece)


def answered(searcher: Searches, work: Work, piece: dict[str, Any]) -> dict[str, Any]:
    """Search and stage the hits of one shard of queries, and return the cost.

    Raises:
        StorageError: part of the gallery could not be searched.
    """
    clock = Clock()
    answers = answer_block(searcher, work.source.read(int(piece["shard"])), work.asked)
    if answers.hits.missing:
        raise StorageError(
            f"{piece['name']}: no shard actor is left for {answers.hits.missing:.1%} of the gallery; add nodes or "
            "replicas and run the job again: finished shards are kept"
        )
    progress.advance(sum(rows_of(work, [piece])))
    table = answers_table(answers)
    faults.here("search.shard")
    facts = {"queries": len(answers.ids), "hits": len(table)}
    work.staging.write_table(piece["name"], table, facts=facts)
    return {"rows": len(answers.ids), "queries": len(answers.ids), **clock.spent()}
