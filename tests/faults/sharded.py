"""Search over three nodes, one of which is killed: `make faults`, and with few queries in the tests.

    python -m tests.faults.sharded [--queries 100000] [--photos 30000]

Six segments on three local nodes. With two replicas a node is killed during the search: every answer has to equal that
of the merged index, in every bit. With one, the answers have to name the share of the gallery that is missing, at once
and without waiting for ever, be whole again when Ray has started the lost host elsewhere, and be empty when all hosts
are gone. In the end a version without some items is taken over. Exit status 0 when all of it holds.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.cluster_utils import Cluster

from tests.index.helpers import KEY, clustered, make_world
from zsr.artifact import Store
from zsr.cluster import set_data_context
from zsr.index.building.build import Job, build
from zsr.index.building.plan import IndexConfig
from zsr.index.maintaining import edit
from zsr.index.searching.searcher import Hits, Searcher
from zsr.index.searching.sharded import ShardedSearcher
from zsr.process import setup

SEGMENTS = 6
BATCH = 2500  # more than hosts are asked about at once
PATIENCE = 30.0  # seconds; a killed node is noticed much earlier
AGAIN = 120.0  # seconds until the lost host answers again


def same(found: Hits, wanted: Hits) -> bool:
    """Whether two answers are equal in every bit."""
    return all(np.array_equal(getattr(found, n), getattr(wanted, n)) for n in ("ids", "keys", "labels", "scores"))


def run(root: Path, photos: int, count: int) -> bool:
    """Everything above."""
    setup()
    cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 200 << 20})
    nodes = [cluster.add_node(num_cpus=2, object_store_memory=200 << 20) for _ in range(3)]
    ray.init(cluster.address, log_to_driver=False, logging_level=40, runtime_env={"env_vars": {"PYTHONPATH": "."}})
    set_data_context()
    try:
        return searched(root, cluster, nodes, photos, count)
    finally:
        ray.shutdown()
        cluster.shutdown()


def searched(root: Path, cluster: Any, nodes: list[Any], photos: int, count: int) -> bool:
    world = make_world(root, photos=photos, sketches=200, shards=SEGMENTS)
    config = IndexConfig(index_key=KEY, recall_target=0.5)
    build(Job.of(world.gallery, world.queries, config), Store.at(root / "merged"))
    parted = config.model_copy(update={"segment_rows": photos // SEGMENTS})
    build(Job.of(world.gallery, world.queries, parted), Store.at(root / "parted"))
    queries = clustered(count, 5, shift=0.5)
    merged = Searcher.open(root / "merged")
    good = ask(root, cluster, nodes, queries, merged)
    cluster.add_node(num_cpus=2, object_store_memory=200 << 20)
    good &= without_replicas(root, cluster, nodes, queries[:BATCH], merged)
    return good & taken_over(root, queries[:BATCH])


def ask(root: Path, cluster: Any, nodes: list[Any], queries: np.ndarray, merged: Searcher) -> bool:
    """All queries, two replicas, a node killed after a third."""
    searcher = ShardedSearcher.open(root / "parted", replicas=2, patience=PATIENCE)
    wrong, longest, began = 0, 0.0, time.perf_counter()
    for number, at in enumerate(range(0, len(queries), BATCH)):
        if number == len(queries) // BATCH // 3:
            cluster.remove_node(nodes.pop(), allow_graceful=False)
        started = time.perf_counter()
        found = searcher.search(queries[at : at + BATCH], 10)
        longest = max(longest, time.perf_counter() - started)
        wrong += found.missing > 0 or not same(found, merged.search(queries[at : at + BATCH], 10))
    rate = len(queries) / (time.perf_counter() - began)
    print(f"two replicas, a node killed: {wrong} of {number + 1} batches differ; longest {longest:.1f} s, {rate:.0f}/s")
    return wrong == 0


def without_replicas(root: Path, cluster: Any, nodes: list[Any], queries: np.ndarray, merged: Searcher) -> bool:
    """One replica: a share is missing, and comes back."""
    searcher = ShardedSearcher.open(root / "parted", replicas=1, patience=PATIENCE)
    good = same(searcher.search(queries, 10), merged.search(queries, 10))
    lost = held_on(searcher, nodes[-1].node_id)
    cluster.remove_node(nodes.pop(), allow_graceful=False)
    started = time.perf_counter()
    found = searcher.search(queries, 10)
    waited = time.perf_counter() - started
    while searcher.search(queries, 10).missing and time.perf_counter() - started < AGAIN:
        time.sleep(1)
    back = same(searcher.search(queries, 10), merged.search(queries, 10))
    again = time.perf_counter() - started
    share = lost / SEGMENTS
    for host in searcher._serving.hosts:
        ray.kill(host, no_restart=True)
    nothing = searcher.search(queries, 10)
    back &= nothing.missing == 1 and bool((nothing.ids == -1).all())
    print(f"one replica: missing {found.missing:.4f} of {share:.4f} after {waited:.1f} s, whole after {again:.0f} s")
    print(f"all hosts killed: missing {nothing.missing:.4f}")
    return good and back and waited < PATIENCE + 10 and found.missing == share


def held_on(searcher: ShardedSearcher, node: str) -> int:
    """Segments whose hosts all run on the node with this id."""
    serving = searcher._serving
    return sum(all(serving.nodes[h] == node for h in hosts) for hosts in serving.replicas)


def taken_over(root: Path, queries: np.ndarray) -> bool:
    """A new version without what was found first."""
    searcher = ShardedSearcher.open(root / "parted", replicas=1, patience=PATIENCE)
    gone = np.unique(searcher.search(queries[:20], 10).ids[:, 0])  # few: a change may not shake the golden queries
    edit.delete(Store.at(root / "parted"), gone.tolist())
    good = searcher.refresh() and not searcher.refresh()
    found = searcher.search(queries, 10)
    good &= not np.isin(found.ids, gone).any() and same(found, Searcher.open(root / "parted").search(queries, 10))
    labels = ("class-1", "class-3")
    few = searcher.search(queries, 10, 1, 1, labels=labels)
    good &= same(few, Searcher.open(root / "parted").search(queries, 10, 1, 1, labels=labels))
    print(f"{len(gone)} items deleted, version taken over: {'equal' if good else 'NOT EQUAL'}")
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=100_000)
    parser.add_argument("--photos", type=int, default=30_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return 0 if run(Path(folder), arguments.photos, arguments.queries) else 1


if __name__ == "__main__":
    sys.exit(main())
