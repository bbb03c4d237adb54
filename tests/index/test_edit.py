"""Deleting, adding, rebuilding, compacting and purging: what is found, what is written again, and what is gone."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.index.helpers import KEY, World, clustered, embeddings
from zsr.artifact import Store, open_artifact
from zsr.commands.index import Delete
from zsr.errors import AlreadyPublished, ConfigError, DamagedArtifact
from zsr.index.building import drift
from zsr.index.building import publish as publishing
from zsr.index.building.build import Job, build
from zsr.index.building.plan import IndexConfig
from zsr.index.building.publish import history, rollback
from zsr.index.ground_truth import K
from zsr.index.maintaining import edit, purge
from zsr.index.searching.searcher import Searcher

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def built(world: World, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    place = Path(tmp_path_factory.mktemp("edited"))
    build(Job.of(world.gallery, world.queries, IndexConfig(index_key=KEY)), Store.at(place))
    return place


@pytest.fixture
def store(built: Path, tmp_path: Path) -> Store:
    """A copy of the built index, to be changed."""
    shutil.copytree(built, tmp_path / "index")
    return Store.at(tmp_path / "index")


def _found(store: Store, world: World) -> np.ndarray:
    """Ids that the sketches find, exactly."""
    return Searcher.open(store.root).search(world.sketches, K, nprobe=64, refine_factor=300).ids


def test_nothing_deleted_is_found_and_compacting_changes_no_answer(store: Store, world: World) -> None:
    ids = Searcher.open(store.root).ids
    gone = np.random.default_rng(0).choice(ids, len(ids) // 10, replace=False)
    changed = edit.delete(store, gone.tolist())
    assert changed.published.artifact.facts["ntotal"] == len(ids) - len(gone)
    after = _found(store, world)
    assert not np.isin(after, gone).any()
    assert (after >= 0).all()
    point = Searcher.open(store.root).search(world.sketches, K)
    assert edit.compact(store).told["dropped"] == len(gone)
    assert np.array_equal(_found(store, world), after)
    compacted = Searcher.open(store.root)
    assert len(compacted.ids) == len(ids) - len(gone)
    again = compacted.search(world.sketches, K)
    assert np.array_equal(again.ids, point.ids)
    assert np.array_equal(again.scores, point.scores)


def test_keys_to_delete_may_come_from_a_file(store: Store, tmp_path: Path) -> None:
    listed = tmp_path / "keys.txt"
    listed.write_bytes("\ufeffphoto-3\r\nphoto-5\r\n\r\n".encode())  # as spreadsheets write it
    chosen = Delete(index_dir=store.root, keys_from=listed)
    searcher = Searcher.open(store.root)
    found = searcher.names.take(np.array([3, 5])).column("id").to_pylist()
    assert sorted(chosen.ids()) == sorted(found)
    listed.write_bytes(b"photo-3\nph\xf6to-5\n")
    with pytest.raises(ConfigError, match="line 2 is not UTF-8"):
        chosen.ids()


def test_an_id_that_is_not_there_cannot_be_deleted(store: Store) -> None:
    with pytest.raises(ConfigError, match="1 of the ids to delete are not in the index"):
        edit.delete(store, [7])


def test_added_items_are_found_beside_the_old_ones(store: Store, world: World, tmp_path: Path) -> None:
    more = clustered(300, 11)
    keys = [f"new-{row}" for row in range(300)]
    added = edit.add(store, embeddings(tmp_path / "more", more, "photo", keys=keys, shards=2))
    assert (added.told["added"], added.published.artifact.facts["ntotal"]) == (300, 3300)
    every = np.concatenate([world.photos, more])
    named = np.array([f"photo-{row}" for row in range(3000)] + keys)
    expected = named[np.argsort(-(world.sketches @ every.T), axis=1, kind="stable")[:, :K]]
    hits = Searcher.open(store.root).search(world.sketches, K, nprobe=64, refine_factor=300)
    assert (hits.keys == expected).mean() > 0.999
    some = embeddings(
        tmp_path / "again", more[:70], "photo", keys=[*keys[:50], *(f"x-{i}" for i in range(20))], shards=2
    )
    with pytest.raises(
        ConfigError, match="50 of 70 vectors are of items that are in the index already, such as 'new-0'"
    ):
        edit.add(store, some)
    edit.delete(store, Searcher.open(store.root).ids[3000:3050].tolist())
    assert edit.add(store, some).told["added"] == 70


def test_a_rebuild_writes_only_what_changed_and_finds_what_a_full_build_finds(
    built: Path, store: Store, world: World, tmp_path: Path
) -> None:
    photos = world.photos.copy()
    photos[750:1500] = clustered(750, 12)
    gallery = embeddings(tmp_path / "changed", photos, "photo")
    rebuilt = edit.rebuild(store, gallery)
    told = rebuilt.told
    assert (told["reused_shards"], told["added_shards"], told["left_out_rows"]) == (3, 1, 750)
    written = sum(entry.bytes for entry in rebuilt.published.artifact.files)
    whole = open_artifact(built, "index")
    assert written < 0.4 * sum(entry.bytes for entry in whole.files)
    full = Store.at(tmp_path / "full")
    build(Job.of(gallery, world.queries, IndexConfig(index_key=KEY)), full)
    assert np.array_equal(_found(store, world), _found(full, world))
    assert edit.rebuild(store, gallery).published.version == rebuilt.published.version


def test_a_gallery_whose_every_shard_changed_is_rebuilt(store: Store, world: World, tmp_path: Path) -> None:
    photos = world.photos.copy()
    photos[::750] = clustered(4, 13)
    gallery = embeddings(tmp_path / "changed", photos, "photo")
    rebuilt = edit.rebuild(store, gallery)
    told = rebuilt.told
    assert (told["reused_shards"], told["added_rows"], told["left_out_rows"], told["agreement"]) == (0, 3000, 3000, 1.0)
    full = Store.at(tmp_path / "full")
    build(Job.of(gallery, world.queries, IndexConfig(index_key=KEY)), full)
    assert np.array_equal(_found(store, world), _found(full, world))


def test_a_purge_leaves_nothing_of_what_was_deleted(store: Store, world: World) -> None:
    before = Searcher.open(store.root)
    gone = before.ids[[3, 800, 2999]]
    vectors = [world.photos[row].tobytes() for row in (3, 800, 2999)]
    edit.delete(store, gone.tolist())
    done = purge.purge(store)
    assert (done.items, len(store.versions()), done.versions) == (3, 1, 2)
    left = [path for path in store.root.rglob("*") if path.is_file()]
    assert not any(vector in path.read_bytes() for path in left for vector in vectors)
    assert not np.isin(_found(store, world), gone).any()


def test_the_scan_of_a_purge_finds_what_was_left(store: Store) -> None:
    searcher = Searcher.open(store.root)
    newest = store.latest()
    first = int(searcher.ids[0])
    with pytest.raises(DamagedArtifact, match="were deleted and are still there"):
        purge.scan(store, newest, searcher, purge.Gone(frozenset([first]), {}))
    codes = {digest: 0 for digest in purge.digests(searcher.segments[0], np.arange(3000) == 0)}
    assert len(codes) == 2
    with pytest.raises(DamagedArtifact, match="codes of deleted items are still there"):
        purge.scan(store, newest, searcher, purge.Gone(frozenset(), codes))
    (store.root / "objects" / "stray.raw").write_bytes(b"vector")
    with pytest.raises(DamagedArtifact, match="left behind after a purge"):
        purge.scan(store, newest, searcher, purge.Gone(frozenset(), {}))


def test_a_drift_report_says_when_to_train_again(store: Store, tmp_path: Path) -> None:
    alike = edit.add(
        store, embeddings(tmp_path / "a", clustered(1500, 21), "photo", keys=[f"a{i}" for i in range(1500)])
    )
    assert alike.told["drift"]["retrain"] is False
    noise = np.random.default_rng(5).standard_normal((1500, 32)).astype(np.float32)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    other = edit.add(store, embeddings(tmp_path / "b", noise, "photo", keys=[f"b{i}" for i in range(1500)]))
    assert other.told["drift"]["retrain"] is True
    assert "quantisation error" in other.told["drift"]["why"][0]


def test_new_vectors_of_one_class_are_no_drift_but_lists_of_the_index_that_fill_unevenly_are() -> None:
    sample = drift.Spread(3000, 0.1, drift.imbalance(np.full(64, 47)))
    one_class = drift.Spread(1500, 0.1, 64.0)
    even, uneven = np.full(64, 470), np.array([15_040, *[240] * 63])
    assert drift.report(sample.as_json(), one_class, even)["retrain"] is False
    told = drift.report(sample.as_json(), one_class, uneven)
    assert told["retrain"] is True
    assert "imbalance" in told["why"][0]


def test_balance_counts_beyond_what_chance_does() -> None:
    even = np.full(64, 100)
    assert drift.imbalance(even) == 1
    assert drift.imbalance(np.array([100, 0, 0, 0])) == 4


def test_filters_admit_only_what_they_name(store: Store, world: World) -> None:
    searcher = Searcher.open(store.root)
    hits = searcher.search(world.sketches, K, labels=["class-3"])
    assert set(hits.labels.ravel()) == {"class-3"}
    rows = [row for row in range(3000) if row % 5 and row % 7 == 3]
    expected = np.argsort(-(world.sketches @ world.photos[rows].T), axis=1, kind="stable")[:, :K]
    exactly = searcher.search(world.sketches, K, nprobe=64, refine_factor=300, labels=["class-3"])
    assert exactly.keys.tolist() == [[f"photo-{rows[r]}" for r in row] for row in expected]
    few = searcher.ids[[5, 77, 1234]].tolist()
    assert {tuple(sorted(row)) for row in searcher.search(world.sketches, 3, ids=few).ids} == {tuple(sorted(few))}
    edit.delete(store, few[:1])
    assert few[0] not in Searcher.open(store.root).search(world.sketches, 3, ids=few).ids


def test_a_filter_widens_the_search_of_those_queries_alone_that_it_leaves_short(store: Store, world: World) -> None:
    searcher, labels = Searcher.open(store.root), ["class-1", "class-3"]
    together = searcher.search(world.sketches, K, 1, labels=labels).ids
    assert (together >= 0).all()
    alone = [searcher.search(one[None], K, 1, labels=labels).ids for one in world.sketches]
    assert np.array_equal(together, np.concatenate(alone))


@pytest.mark.parametrize("other", ["delete", "compact", "add"])
def test_a_change_that_was_published_meanwhile_is_not_lost(
    store: Store, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    ids = Searcher.open(store.root).ids
    more = embeddings(tmp_path / "more", clustered(60, 11), "photo", keys=[f"new-{row}" for row in range(60)], shards=1)
    measured, pending = edit._measured, [True]

    def meanwhile(*arguments: Any) -> Any:
        """Publish a deletion while another change, which has opened the live version already, is being measured."""
        if pending:
            pending.clear()
            edit.delete(store, [int(ids[0])])
        return measured(*arguments)

    monkeypatch.setattr(edit, "_measured", meanwhile)
    if other == "delete":
        edit.delete(store, [int(ids[1])])
    else:
        _ = edit.compact(store) if other == "compact" else edit.add(store, more)
    live = Searcher.open(store.root).live_ids
    assert int(ids[0]) not in live
    assert (int(ids[1]) in live) == (other != "delete")
    assert store.versions() == (1, 2, 3)
    assert not list((store.root / "staging").iterdir())


def test_a_change_that_is_overtaken_again_and_again_ends_with_the_exit_code_of_a_lost_race(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [int(i) for i in Searcher.open(store.root).ids]
    measured, others = edit._measured, iter(ids[1:])
    inner: list[bool] = []

    def meanwhile(*arguments: Any) -> Any:
        if not inner:
            inner.append(True)
            edit.delete(store, [next(others)])
            inner.clear()
        return measured(*arguments)

    monkeypatch.setattr(edit, "_measured", meanwhile)
    with pytest.raises(AlreadyPublished, match="run it again") as lost:
        edit.delete(store, ids[:1])
    assert lost.value.exit_code == 8
    assert ids[0] in Searcher.open(store.root).live_ids


@pytest.mark.parametrize("deleted_before", [False, True])
@pytest.mark.parametrize("moment", ["opened", "compacted", "looked through", "about to remove"])
def test_a_purge_does_not_take_a_change_away_that_comes_in_between(
    store: Store, monkeypatch: pytest.MonkeyPatch, moment: str, deleted_before: bool
) -> None:
    ids = [int(i) for i in Searcher.open(store.root).ids]
    if deleted_before:
        edit.delete(store, ids[:1])
    due = [ids[1]]

    def before(place: Any, name: str) -> None:
        """Publish a deletion right before `name` is called."""
        called = getattr(place, name)

        def with_a_deletion(*arguments: Any) -> Any:
            if due:
                edit.delete(store, [due.pop()])
            return called(*arguments)

        monkeypatch.setattr(place, name, with_a_deletion)

    places = {"opened": (edit, "compact"), "compacted": (purge, "_gone"), "looked through": (purge, "_remove_others")}
    before(*places.get(moment, (Store, "exclusive")))
    try:
        purge.purge(store)
    except AlreadyPublished as error:
        assert "run the purge again" in str(error)  # noqa: PT017 - whether it comes too late depends on the moment
    monkeypatch.undo()
    live = Searcher.open(store.root)
    gone = ids[:2] if deleted_before else ids[1:2]
    if due:  # the moment did not come: an index without deletions is not compacted
        gone = ids[:1] if deleted_before else []
    assert sorted(live.live_ids) == sorted(set(ids) - set(gone))
    purge.purge(store)
    assert sorted(Searcher.open(store.root).live_ids) == sorted(set(ids) - set(gone))
    assert len(list((store.root / "objects").iterdir())) == 1


def test_a_shard_that_left_the_gallery_comes_back_with_its_items(store: Store, world: World, tmp_path: Path) -> None:
    every = Searcher.open(store.root).live_ids
    photos = world.photos.copy()
    photos[0] = -photos[0]  # the first shard is another one now
    other = embeddings(tmp_path / "other", photos, "photo", shards=len(world.gallery.shards()))
    assert edit.rebuild(store, other).told["added_shards"] == 1
    back = edit.rebuild(store, world.gallery)
    assert back.told["added_shards"] == 1
    assert back.told["still_deleted"] == 0
    live = Searcher.open(store.root)
    assert sorted(live.live_ids) == sorted(every)
    assert (live.search(world.photos[:50], 1, nprobe=64, refine_factor=300).keys[:, 0] == [
        f"photo-{row}" for row in range(50)
    ]).all()  # fmt: skip


def test_a_damaged_version_file_does_not_stop_changes(store: Store) -> None:
    ids = [int(i) for i in Searcher.open(store.root).ids]
    edit.delete(store, ids[:1])
    edit.delete(store, ids[1:2])
    (store.root / "versions" / "3").write_bytes(b"{")
    assert edit.delete(store, ids[2:3]).published.version == 4
    live = Searcher.open(store.root).live_ids
    assert (ids[0] in live, ids[1] in live, ids[2] in live) == (False, True, False)
    assert sorted(history(store)) == [1, 2, 4]
    assert rollback(store, 2).version == 5
    purge.purge(store)
    assert sorted(history(store)) == [6]


def test_a_rollback_does_not_undo_a_deletion_that_came_meanwhile(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [int(i) for i in Searcher.open(store.root).ids]
    edit.delete(store, ids[:1])
    checked = publishing.verify

    def meanwhile(searcher: Searcher) -> None:
        monkeypatch.undo()
        edit.delete(store, ids[1:2])
        checked(searcher)

    monkeypatch.setattr(publishing, "verify", meanwhile)
    with pytest.raises(AlreadyPublished):
        rollback(store, 1)
    assert not np.isin(ids[:2], Searcher.open(store.root).live_ids).any()


def test_no_queries_have_no_neighbors(store: Store) -> None:
    searcher = Searcher.open(store.root)
    for shape in ((0, 32), (0, 3, 32)):
        hits = searcher.search(np.zeros(shape, np.float32), 5)
        assert (hits.ids.shape, hits.keys.shape) == ((0, 5), (0, 5))


def test_a_version_whose_base_is_gone_is_damaged(store: Store) -> None:
    base = store.latest()
    edit.delete(store, [int(Searcher.open(store.root).ids[0])])
    shutil.rmtree(base.directory)
    with pytest.raises(DamagedArtifact, match=f"{base.digest}.*missing"):
        Searcher.open(store.root)
