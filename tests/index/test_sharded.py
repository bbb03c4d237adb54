"""Offline search as an artifact, killed and run again; and search over nodes of which one is lost."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.index.helpers import KEY, World, embeddings, run_job
from zsr.artifact import Store, open_artifact
from zsr.index.building.build import Job, build
from zsr.index.building.plan import IndexConfig
from zsr.index.searching.results import SearchParams, answer, answers_table
from zsr.index.searching.searcher import Searcher
from zsr.index.searching.sharded import at_once, blocks_of


@pytest.fixture(scope="module")
def index(world: World, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    place = Path(tmp_path_factory.mktemp("parted"))
    build(Job.of(world.gallery, world.queries, IndexConfig(index_key=KEY, segment_rows=800)), Store.at(place))
    return place


@pytest.mark.faults
@pytest.mark.parametrize("flags", [(), ("--replicas", 2)], ids=["mapped whole", "on the nodes"])
def test_answers_as_an_artifact_are_those_of_one_process_after_a_kill(
    index: Path, world: World, tmp_path: Path, flags: tuple[object, ...]
) -> None:
    queries = embeddings(tmp_path / "queries", np.repeat(world.sketches, 3, axis=0), "sketch", shards=3, parts=2)
    words = ("--index-dir", index, "--queries", queries.directory, "--output", tmp_path / "out", "--k", 5, *flags)
    words = (*words, "--cpu-price", 2)
    killed = run_job("search", *words, fault=f"search.shard=kill@2@{tmp_path / 'once'}")
    ended = killed if killed.code == 0 else run_job("search", *words)  # Ray itself starts a lost actor again
    assert ended.code == 0, ended.errors
    found = open_artifact(tmp_path / "out", "neighbours")
    rows = [pq.read_table(found.local(entry.path)) for entry in found.files]
    wanted = answers_table(answer(Searcher.open(index), queries, SearchParams(5)))
    assert [row for table in rows for row in table.to_pylist()] == wanted.to_pylist()
    assert ended.results["digest"] == found.digest
    if not flags:
        assert ended.results["cost_a_million"] == pytest.approx(2 * ended.results["cpu_hours_a_million"], abs=0.01)
        cost = run_job("search", *words, "--num-workers", 2, "--dry-run", "--measure").results["cost"]
        every = 3 * len(world.sketches) * cost["seconds_a_row"] / 3600
        assert cost["seconds_a_row"] > 0
        assert (cost["workers"], cost["hours"]) == (2, pytest.approx(every / 2, abs=1e-6))
    assert run_job("search", *words).results["reused"] is True


@pytest.mark.faults
def test_answers_without_names_are_never_published(index: Path, world: World, tmp_path: Path) -> None:
    queries = embeddings(tmp_path / "queries", world.sketches, "sketch", shards=3)
    words = ("--index-dir", index, "--queries", queries.directory, "--output", tmp_path / "out", "--replicas", 1)
    lost = run_job("search", *words, fault=f"search.names=kill@2@{tmp_path / 'once'}")  # the only host, in between
    assert lost.code != 0
    assert "no shard actor is left" in lost.errors
    ended = run_job("search", *words)
    assert ended.code == 0, ended.errors
    found = open_artifact(tmp_path / "out", "neighbours")
    rows = [row for entry in found.files for row in pq.read_table(found.local(entry.path)).to_pylist()]
    assert rows == answers_table(answer(Searcher.open(index), queries, SearchParams(10))).to_pylist()


def test_hosts_are_asked_about_some_queries_at_once() -> None:
    assert at_once(40, 2) == 1024
    assert at_once(1000, 1000) * 1000 * 1000 * 24 <= 256 << 20  # what a thousand hosts send
    assert blocks_of(2500, 1024) == [(0, 1024), (1024, 2500)]
    assert blocks_of(3, 1024) == [(0, 3)]
    assert blocks_of(0, 1024) == [(0, 0)]


@pytest.mark.faults
def test_a_lost_node_changes_no_answer() -> None:
    command = [sys.executable, "-m", "tests.faults.sharded", "--queries", "10000", "--photos", "6000"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
