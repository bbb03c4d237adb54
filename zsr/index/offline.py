"""Answers to all items of an embeddings artifact, as an artifact: NEIGHBOURS, a shard beside each shard of queries.

`modality=sketch/part-NNNNN.parquet` has a row a hit; see `answers_table`. Finished shards of a killed run are kept.
"""

from dataclasses import asdict
from typing import Any

from ray.data import ActorPoolStrategy

from zsr import fault
from zsr.artifact import Artifact, Plan, Staging, Store
from zsr.cluster import map_pieces, resources
from zsr.embedding.shards import FREE, Prices, cost_of
from zsr.errors import StorageError
from zsr.index.answers import Asked, Searches, answer_block, answers_table
from zsr.index.ledger import Clock
from zsr.index.search import Searcher
from zsr.index.sharded import ShardedSearcher
from zsr.index.vectors import Vectors


def plan(index: Artifact, queries: Artifact, asked: Asked) -> Plan:
    """Keyed by index, queries and what is asked, the operating point as it is in the index."""
    point = index.facts["operating_point"]
    config = asdict(asked) | {"nprobe": asked.nprobe or point["nprobe"], "labels": sorted(asked.labels)}
    config |= {"refine_factor": asked.refine_factor or point["refine_factor"]}
    return Plan("neighbours", config, {"index": index.digest, "queries": queries.digest})


def search_all(
    index: Artifact,
    queries: Artifact,
    asked: Asked,
    output: Store,
    *,
    replicas: int = 0,
    workers: int | None = None,
    prices: Prices = FREE,
) -> tuple[Artifact, dict[str, Any]]:
    """Search for every item of `queries` and publish NEIGHBOURS; and what that took.

    Args:
        replicas: 0: each of `workers` actors (as many as there are CPUs if not given) maps all segments and answers for
            whole shards of queries. From 1 on the segments lie on the nodes, see `ShardedSearcher`: for an index that
            is too large for one machine.
        prices: of the CPU seconds that the answers took.

    Raises:
        ConfigError: queries of another space.
        StorageError: no node was left that holds some segment; what was answered before stays.
    """
    work = plan(index, queries, asked)
    if done := output.made(work):
        return done, {"reused": True}
    source, staging = Vectors.of(queries), output.staging(work)
    names = [entry.path for entry in source.shards]
    todo = [{"shard": i, "name": name} for i, name in enumerate(names) if staging.finished(name) is None]
    clock = Clock()
    if replicas:
        searcher = ShardedSearcher.open(f"{index.place}/objects/{index.digest}", replicas=replicas)
        searcher.check(queries)
        spent = [answered(searcher, source, asked, staging, piece) for piece in todo]
    else:
        size = max(1, min(len(todo), workers or int(resources().get("CPU", 1))))
        shared = {"index": index, "source": source, "asked": asked, "staging": staging}
        options: dict[str, Any] = {"compute": ActorPoolStrategy(size=size), "num_cpus": 1}
        spent = map_pieces("search", ShardSearcher, todo, fn_constructor_kwargs=shared, **options)
    entries = staging.all_finished(names)
    rows = {name: sum(int(entry.facts[name]) for entry in entries) for name in ("queries", "hits")}
    artifact = staging.seal(facts={**rows, "k": asked.k, "modality": queries.facts["modality"]})
    output.publish(artifact)
    asked_now = sum(one["queries"] for one in spent)
    told = clock.spent() | {"shards": len(todo), "tasks_cpu": round(sum(one["cpu"] for one in spent), 3)}
    told |= {"queries_per_second": round(asked_now / max(1e-9, told["wall"]), 1)}
    if asked_now and not replicas:  # hosts of segments keep no account of their CPU seconds
        told |= cost_of(told["tasks_cpu"] / asked_now, False, prices)
    return artifact, told | {"tasks_rss": max((one["rss"] for one in spent), default=0)}


class ShardSearcher:
    """A Ray actor that maps an index and answers for one shard of queries after the other."""

    def __init__(self, index: Artifact, source: Vectors, asked: Asked, staging: Staging) -> None:
        self.searcher = Searcher.of(index)
        self.searcher.check(source.artifact)
        self.source, self.asked, self.staging = source, asked, staging

    def __call__(self, piece: dict[str, Any]) -> dict[str, Any]:
        return answered(self.searcher, self.source, self.asked, self.staging, piece)


def answered(
    searcher: Searches, source: Vectors, asked: Asked, staging: Staging, piece: dict[str, Any]
) -> dict[str, Any]:
    """Stage the answers to one shard of queries; what that took.

    Raises:
        StorageError: a part of the gallery could not be searched.
    """
    clock = Clock()
    answers = answer_block(searcher, source.read(int(piece["shard"])), asked)
    if answers.hits.missing:
        raise StorageError(
            f"{piece['name']}: nobody holds {answers.hits.missing:.1%} of the gallery any more; add nodes or replicas "
            "and run the job again, which keeps the shards that were answered"
        )
    table = answers_table(answers)
    fault.here("search.shard")
    facts = {"queries": len(answers.ids), "hits": len(table)}
    staging.write_table(piece["name"], table, facts=facts)
    return {"rows": len(answers.ids), "queries": len(answers.ids), **clock.spent()}
