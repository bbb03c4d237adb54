"""Exact search (Flat) through all parts of an index: segments, changes, filters, offline and sharded search."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.index.helpers import World, clustered, embeddings, exact_neighbours, make_world
from zsr.artifact import Store, open_artifact
from zsr.errors import ConfigError
from zsr.index.building.build import Job, build
from zsr.index.building.plan import IndexConfig
from zsr.index.building.publish import rollback, verify
from zsr.index.maintaining import edit, purge
from zsr.index.searching.batch import search_all
from zsr.index.searching.results import SearchParams
from zsr.index.searching.searcher import Searcher
from zsr.index.searching.sharded import ShardedSearcher

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> World:
    """500 photos in 4 shards, 12 sketches."""
    return make_world(Path(tmp_path_factory.mktemp("small")), photos=500, sketches=12)


@pytest.fixture(scope="module")
def built(small: World, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    """Their index, in 4 segments."""
    place = Path(tmp_path_factory.mktemp("exact"))
    build(Job.of(small.gallery, small.queries, IndexConfig(segment_rows=130, recall_target=1.0)), Store.at(place))
    return place


@pytest.fixture
def store(built: Path, tmp_path: Path) -> Store:
    """A copy of the built index, to be changed."""
    shutil.copytree(built, tmp_path / "index")
    return Store.at(tmp_path / "index")


def _keys(photos: np.ndarray, names: list[str], sketches: np.ndarray, k: int = 10) -> list[list[str]]:
    return [[names[row] for row in rows] for rows in exact_neighbours(sketches, photos, k)]


def _found(store: Store, world: World) -> list[list[str]]:
    searcher = Searcher.open(store.root)
    verify(searcher)
    assert searcher.facts["index_key"] == "Flat"
    assert searcher.facts["operating_point"]["recall_sketch"] == 1.0
    return list(searcher.search(world.sketches, 10).keys.tolist())


def test_segments_deletes_additions_rebuilds_and_rollbacks_stay_exact(
    store: Store, small: World, tmp_path: Path
) -> None:
    names = [f"photo-{row}" for row in range(500)]
    assert len(Searcher.open(store.root).segments) == 4
    assert _found(store, small) == _keys(small.photos, names, small.sketches)
    # all that the golden queries have among their 40 nearest, so that none of these neighbors is known any more
    near = np.unique(exact_neighbours(small.sketches, small.photos, 40))
    edit.delete(store, Searcher.open(store.root).ids[near].tolist())
    left = np.setdiff1d(np.arange(500), near)
    kept = [names[row] for row in left]
    assert _found(store, small) == _keys(small.photos[left], kept, small.sketches)
    more = clustered(80, 11)
    added = edit.add(store, embeddings(tmp_path / "m", more, "photo", keys=[f"new-{i}" for i in range(80)], shards=2))
    assert "drift" not in added.told
    every, every_name = np.concatenate([small.photos[left], more]), kept + [f"new-{i}" for i in range(80)]
    assert _found(store, small) == _keys(every, every_name, small.sketches)
    edit.compact(store)
    assert len(Searcher.open(store.root).segments) == 1
    assert _found(store, small) == _keys(every, every_name, small.sketches)
    rollback(store, 1)
    assert _found(store, small) == _keys(small.photos, names, small.sketches)
    changed = small.photos.copy()
    changed[130:200] = clustered(70, 12)
    edit.rebuild(store, embeddings(tmp_path / "c", changed, "photo"))
    assert _found(store, small) == _keys(changed, names, small.sketches)
    purge.purge(store)
    assert len(store.versions()) == 1
    assert _found(store, small) == _keys(changed, names, small.sketches)


def test_offline_by_ranges_and_over_nodes_give_one_answer(built: Path, small: World, tmp_path: Path) -> None:
    index = open_artifact(built, "index")
    asked = SearchParams(7, labels=("Class 3", "CLASS-1"))
    whole, _ = search_all(index, small.queries, asked, Store.at(tmp_path / "a"))
    nodes, _ = search_all(index, small.queries, asked, Store.at(tmp_path / "b"), replicas=1)
    assert whole.digest == nodes.digest
    ranges = [
        search_all(index, small.queries, SearchParams(7), Store.at(tmp_path / name), list_ranges=count)[0].digest
        for name, count in (("c", 0), ("d", 4))
    ]
    assert ranges[0] == ranges[1]
    rows = pq.read_table(whole.local(whole.files[0].path)).to_pylist()
    wanted = np.flatnonzero([row % 5 != 0 and row % 7 in (1, 3) for row in range(500)])
    expected = _keys(small.photos[wanted], [f"photo-{row}" for row in wanted], small.sketches, 7)
    assert [row["key"] for row in rows] == [key for keys in expected for key in keys]


@pytest.mark.parametrize("opened", [Searcher.open, lambda place: ShardedSearcher.open(place, replicas=1)])
def test_labels_are_found_under_any_spelling_and_unknown_ones_refused(
    built: Path, small: World, opened: Callable[[Path], Any]
) -> None:
    searcher = opened(built)
    plain = searcher.search(small.sketches, 5, labels=["class-3"])
    for spelling in ("class-3", "Class 3", "CLASS_3", ["Class3", "class 3"]):
        assert searcher.search(small.sketches, 5, labels=spelling).ids.tolist() == plain.ids.tolist()
    with pytest.raises(ConfigError, match=r"class 'klass-3' is not among the 7 known ones; did you mean .*'class-3'"):
        searcher.search(small.sketches, 5, labels=["class-1", "klass-3"])


def test_a_class_whose_items_are_all_deleted_is_unknown(store: Store, small: World, tmp_path: Path) -> None:
    searcher = Searcher.open(store.root)
    labels = np.array([row % 5 != 0 and row % 7 == 3 for row in range(500)])
    edit.delete(store, searcher.ids[labels].tolist())
    with pytest.raises(ConfigError, match="not among the 6"):
        Searcher.open(store.root).search(small.sketches, 5, labels="class-3")
    with pytest.raises(ConfigError, match="not among the 6"):
        search_all(store.latest(), small.queries, SearchParams(5, labels=("class-3",)), Store.at(tmp_path / "out"))


def test_a_list_of_deletions_can_be_sent_again(store: Store) -> None:
    ids = Searcher.open(store.root).ids
    first = edit.delete(store, ids[:3].tolist())
    assert first.told["already_deleted"] == 0
    again = edit.delete(store, ids[:3].tolist())
    assert (again.told["deleted"], again.told["already_deleted"]) == (0, 3)
    assert again.published.version == first.published.version
    more = edit.delete(store, ids[1:5].tolist())
    assert (more.told["deleted"], more.told["already_deleted"]) == (2, 2)
    with pytest.raises(ConfigError, match="an index holds at least one"):
        edit.delete(store, ids.tolist())


@pytest.mark.parametrize("photos", [1, 3])
def test_the_smallest_galleries_and_one_query_are_served(tmp_path: Path, photos: int) -> None:
    vectors = clustered(photos, 1, dim=17)
    gallery = embeddings(tmp_path / "g", vectors, "photo", shards=1)
    queries = embeddings(tmp_path / "q", clustered(1, 2, dim=17), "sketch", shards=1)
    build(Job.of(gallery, queries, IndexConfig()), Store.at(tmp_path / "i"))
    hits = Searcher.open(tmp_path / "i").search(clustered(1, 2, dim=17), 5)
    assert sorted(key for key in hits.keys[0] if key) == [f"photo-{row}" for row in range(photos)]


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("vectors", [np.zeros((60, 4)), np.ones((60, 1)), np.ones((60, 4)) * 1e14])
def test_equal_vectors_are_all_as_near(tmp_path: Path, metric: str, vectors: np.ndarray) -> None:
    gallery = embeddings(tmp_path / "g", vectors.astype(np.float32), "photo", metric=metric)
    queries = embeddings(tmp_path / "q", vectors[:5].astype(np.float32), "sketch", shards=1, metric=metric)
    for key in ("Flat", "IVF2,Flat", "SQ8"):
        built = build(Job.of(gallery, queries, IndexConfig(index_key=key)), Store.at(tmp_path / key.replace(",", "")))
        assert built.artifact.facts["operating_point"]["recall_sketch"] == 1.0


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize(
    ("value", "found"), [(np.nan, "not finite"), (-np.inf, "not finite"), (1e20, "is 1e\\+20 long")]
)
def test_vectors_without_distances_are_refused_by_key_in_gallery_queries_and_additions(
    tmp_path: Path, built: Path, small: World, metric: str, value: float, found: str
) -> None:
    photos, sketches = clustered(200, 1), clustered(20, 2)
    bad, worse = photos.copy(), sketches.copy()
    bad[120, 5] = worse[7, 0] = value
    good = [embeddings(tmp_path / n, v, m, metric=metric) for n, v, m in (("g", photos, "photo"), ("q", sketches, "s"))]
    wrong = [embeddings(tmp_path / n, v, m, metric=metric) for n, v, m in (("b", bad, "photo"), ("w", worse, "s"))]
    for gallery, queries, key in ((wrong[0], good[1], "photo-120"), (good[0], wrong[1], "s-7")):
        with pytest.raises(ConfigError, match=f"'{key}' .*{found}"):
            build(Job.of(gallery, queries, IndexConfig()), Store.at(tmp_path / "i"))
    if metric == "ip":
        with pytest.raises(ConfigError, match=f"'photo-120' .*{found}"):
            edit.add(Store.at(built), wrong[0])
        with pytest.raises(ConfigError, match=f"queries: the vector of row 7 .*{found}"):
            Searcher.open(built).search(worse, 3)
    assert Store.at(tmp_path / "i").versions() == ()
