"""Offline search by ranges of lists: the bytes of whole indexes, also after a fault, and each list read once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.index.helpers import World, clustered, embeddings, run_job
from zsr.artifact import Artifact, Store
from zsr.commands.search import Search
from zsr.errors import ConfigError, DamagedArtifact
from zsr.index import faiss_backend
from zsr.index.building.build import Job, build
from zsr.index.building.plan import IndexConfig
from zsr.index.maintaining import edit
from zsr.index.searching.batch import answered, plan, search_all
from zsr.index.searching.list_major import Assigner, Merged, Scanner, Work, bounds_of, probes_name
from zsr.index.searching.results import SearchParams, answer_block, answers_table
from zsr.index.searching.searcher import Searcher
from zsr.index.storage.embeddings import Vectors

pytestmark = pytest.mark.usefixtures("ray_cluster")

ASKED = SearchParams(
    10, nprobe=6, refine_factor=1
)  # as many candidates as answers: all ties for the last place are seen


def _world(root: Path, metric: str) -> World:
    """Every second photo is there twice, so that codes tie; the queries have two parts each."""
    photos = np.repeat(clustered(600, 1), 1 + np.arange(600) % 2, axis=0)
    sketches = clustered(120, 2, shift=0.5)
    gallery = embeddings(root / "gallery", photos, "photo", shards=3, metric=metric)
    queries = embeddings(root / "queries", sketches, "sketch", shards=3, metric=metric, parts=2)
    return World(root, gallery, queries, photos, sketches)


def _index(world: World, key: str, segment_rows: int = 900) -> Store:
    store, config = Store.at(world.root / "index"), {"index_key": key, "segment_rows": segment_rows}
    build(Job.of(world.gallery, world.queries, IndexConfig.model_validate({**config, "recall_target": 0.1})), store)
    return store


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return _world(Path(tmp_path_factory.mktemp("ranged")), "ip")


@pytest.fixture(scope="module")
def index(world: World, ray_cluster: None) -> Artifact:
    """Of three segments, a tenth of it deleted."""
    store = _index(world, "IVF32,PQ8x6,RFlat", 300)
    ids = Searcher.open(store.root).ids
    edit.delete(store, np.random.default_rng(0).choice(ids, len(ids) // 10, replace=False).tolist())
    return store.latest()


@pytest.fixture(scope="module")
def whole(world: World, index: Artifact) -> str:
    """Digest of the answers by actors that map the whole index."""
    return search_all(index, world.queries, ASKED, Store.at(world.root / "whole"))[0].digest


def _work(world: World, index: Artifact, output: Store, ranges: int = 4) -> Work:
    staging = output.staging(plan(index, world.queries, ASKED))
    return Work(index, Vectors.of(world.queries), ASKED, staging, ranges)


def _scan(work: Work) -> Scanner:
    """Assign and scan in this process."""
    assigner, scanner = Assigner(work), Scanner(work, [0, 1, 2])
    for shard in range(3):
        assigner({"shard": shard})
    for number in range(work.ranges):
        scanner({"range": number})
    return scanner


def test_ranges_give_the_bytes_of_whole_indexes(world: World, index: Artifact, whole: str, tmp_path: Path) -> None:
    made, told = search_all(index, world.queries, ASKED, Store.at(tmp_path), list_ranges=4, workers=2)
    assert made.digest == whole
    assert (told["list_ranges"], told["shards"]) == (4, 3)
    assert told["queries_per_second"] > 0
    assert list((tmp_path / "staging").iterdir()) == []


@pytest.mark.parametrize(
    ("key", "metric"),
    [
        ("OPQ8_16,IVF16,PQ8x6", "ip"),
        ("PCAR16,IVF16,SQ8", "l2"),
        ("IVF16,RaBitQ1,Refine(SQ8)", "ip"),
        ("IVF8,Flat", "l2"),
    ],
)
def test_so_they_do_with_other_codes(tmp_path: Path, key: str, metric: str) -> None:
    world = _world(tmp_path, metric)
    work = _work(world, _index(world, key).latest(), Store.at(tmp_path / "out"), 3)
    with faiss_backend.threads(1):  # as a worker has it: more would search in smaller batches, which round otherwise
        searcher = _scan(work).searcher
        for shard in range(3):
            block = work.source.read(shard)
            one, two = (answer_block(by, block, ASKED) for by in (searcher, Merged(work, searcher, shard)))
            assert answers_table(one).equals(answers_table(two))


@pytest.mark.faults
@pytest.mark.parametrize("point", ["search.assign", "search.scan", "search.shard"])
def test_a_run_goes_on_after_a_fault_in_any_stage(
    world: World, index: Artifact, whole: str, tmp_path: Path, point: str
) -> None:
    inputs = ("--index-dir", index.directory, "--queries", world.queries.directory, "--output", tmp_path / "out")
    words = (*inputs, "--k", 10, "--nprobe", 6, "--refine-factor", 1, "--list-ranges", 4, "--num-workers", 1)
    stopped = run_job("search", *words, fault=f"{point}=enospc@2@{tmp_path / 'once'}")
    assert stopped.code != 0
    assert "injected" in stopped.errors
    staging = _work(world, index, Store.at(tmp_path / "out")).staging
    finished = {"search.assign": 1, "search.scan": 3 + 1, "search.shard": 3 + 4 * 3}  # before the second passing
    assert len(staging.pieces(scratch=True)) >= finished[point]
    ended = run_job("search", *words)
    assert ended.code == 0, ended.errors
    assert ended.results["digest"] == whole
    assert not staging.directory.exists()


def test_a_range_reads_its_own_lists_alone(
    world: World, index: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[set[int]] = []
    original = faiss_backend.probe_assigned

    def spy(index: Any, probes: faiss_backend.Probes, *words: Any) -> Any:
        asked.append(set(np.unique(probes.lists).tolist()) - {-1})
        return original(index, probes, *words)

    monkeypatch.setattr(faiss_backend, "probe_assigned", spy)
    work = _work(world, index, Store.at(tmp_path))
    scanner = _scan(work)
    bounds, segments = scanner.bounds, len(scanner.searcher.segments)
    read = [set().union(*asked[at : at + 3 * segments]) for at in range(0, len(asked), 3 * segments)]
    assert len(read) == 4
    for number, lists in enumerate(read):
        assert lists <= set(range(bounds[number], bounds[number + 1]))
    every = np.unique(np.concatenate([work.probes(shard).lists.ravel() for shard in range(3)]))
    assert set().union(*read) == set(every.tolist())


def test_only_queries_that_look_into_a_range_are_written(world: World, index: Artifact, tmp_path: Path) -> None:
    work = _work(world, index, Store.at(tmp_path))
    scanner = _scan(work)
    owner = np.full(len(scanner.searcher.ids), -1)
    for start, segment in zip(scanner.searcher.starts[:-1], scanner.searcher.segments, strict=True):
        for number in range(32):
            owner[faiss_backend.list_ids(segment.stored, number) + start] = number
    for number in range(4):
        found = work.read(work.found_name(number, 1))
        lists = owner[found.column("ordinal").to_numpy()]
        assert ((lists >= scanner.bounds[number]) & (lists < scanner.bounds[number + 1])).all()
        looked = work.probes(1).lists[found.column("query").to_numpy()]
        assert (looked == lists[:, None]).any(axis=1).all()
        assert not np.isin(found.column("ordinal").to_numpy(), scanner.searcher.dead).any()


def test_queries_whose_last_candidate_ties_are_searched_again(
    world: World, index: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = _work(world, index, Store.at(tmp_path))
    searcher = _scan(work).searcher
    again: list[int] = []
    original = searcher.coded_in

    def spy(probes: faiss_backend.Probes, depth: int) -> tuple[np.ndarray, np.ndarray]:
        again.append(len(probes.lists))
        return original(probes, depth)

    monkeypatch.setattr(searcher, "coded_in", spy)
    answered(Merged(work, searcher, 0), work, {"shard": 0, "name": "out.parquet"})
    assert len(again) == 1
    assert 0 < again[0] < 40


def test_a_rotten_piece_is_refused_once_and_then_made_again(world: World, index: Artifact, tmp_path: Path) -> None:
    work = _work(world, index, Store.at(tmp_path))
    merged, name = Merged(work, _scan(work).searcher, 1), work.found_name(2, 1)
    path = work.staging.path(name, scratch=True)
    sound = path.read_bytes()
    path.write_bytes(sound[:10] + bytes([sound[10] ^ 4]) + sound[11:])
    with pytest.raises(DamagedArtifact, match="run the job again"):
        answered(merged, work, {"shard": 1, "name": "out.parquet"})
    assert work.lacks(name)
    _scan(work)
    assert path.read_bytes() == sound


def test_in_an_object_store_scratch_goes_with_the_staging(
    world: World, index: Artifact, whole: str, bucket: str
) -> None:
    output = Store.at(f"{bucket}/out")
    work = _work(world, index, output)
    searcher = _scan(work).searcher
    for shard, entry in enumerate(work.source.shards):
        answered(Merged(work, searcher, shard), work, {"shard": shard, "name": entry.path})
    assert work.staging.finished(probes_name(0), scratch=True)
    made, _ = search_all(index, world.queries, ASKED, output, list_ranges=4)
    assert made.digest == whole
    assert output.bucket is not None
    assert not output.bucket.sizes("staging")


def test_ranges_hold_about_as_many_vectors_each() -> None:
    assert bounds_of(np.array([5, 5, 5, 5]), 2).tolist() == [0, 1, 4]
    assert bounds_of(np.array([1, 1, 8, 1, 1]), 3).tolist() == [0, 2, 2, 5]
    assert bounds_of(np.array([3, 3]), 1).tolist() == [0, 2]


def test_what_ranges_cannot_answer_is_refused(world: World, index: Artifact, tmp_path: Path) -> None:
    def refused(match: str, **words: Any) -> None:
        asked = SearchParams(5, labels=words.pop("labels", ()))
        with pytest.raises(ConfigError, match=match):
            search_all(index, world.queries, asked, Store.at(tmp_path), list_ranges=2, **words)

    refused("leave --list-ranges out", labels=("class-1",))
    refused("give one of them", replicas=1)
    words = {"index_dir": index.directory, "queries": world.queries.directory, "list_ranges": 2}
    with pytest.raises(ConfigError, match="is a ROOT"):
        Search(output=tmp_path / "found.json", **words).check()


@pytest.mark.parametrize("key", ["IVF8,PQ8x4fs,RFlat", "IVF8,RaBitQ4"])
def test_codes_whose_lists_interact_are_refused(key: str) -> None:
    assert faiss_backend.lists_interact(key)
    assert not faiss_backend.lists_interact("PCAR16,IVF8,RaBitQ1")
