"""A built index: what it finds, that equal work gives equal bytes, and what is refused."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.index.helpers import KEY, World, clustered, embeddings, exact_neighbours, make_world
from zsr import cluster
from zsr.artifact import Store, open_artifact
from zsr.commands import index as index_command
from zsr.commands import search as search_command
from zsr.data.rows import row_id
from zsr.errors import ConfigError, DamagedArtifact, QualityGateFailed
from zsr.index import faiss_backend
from zsr.index.building.build import Job, build
from zsr.index.building.plan import IndexConfig
from zsr.index.building.publish import history, rollback, verify
from zsr.index.searching.searcher import Searcher
from zsr.index.storage.segment import INDEX, Segment

NOBODY = np.empty(0, np.int64)
pytestmark = pytest.mark.usefixtures("ray_cluster")


def _build(world: World, place: Path, **options: object) -> Searcher:
    build(
        Job.of(world.gallery, world.queries, IndexConfig.model_validate({"index_key": KEY, **options})), Store.at(place)
    )
    return Searcher.open(place)


def _recall(searcher: Searcher, world: World) -> float:
    """recall@10 at the published operating point, by the definition."""
    expected = exact_neighbours(world.sketches, world.photos, 10, searcher.space.metric)
    found = searcher.search(world.sketches, 10).keys
    return float(np.mean([len({f"photo-{r}" for r in a} & set(b)) / 10 for a, b in zip(expected, found, strict=True)]))


def test_recall_on_the_sketches_is_what_the_manifest_says(world: World, tmp_path: Path) -> None:
    searcher = _build(world, tmp_path, recall_target=0.95)
    point = searcher.facts["operating_point"]
    assert point["recall_sketch"] >= 0.95
    assert _recall(searcher, world) == pytest.approx(point["recall_sketch"], abs=1e-6)
    assert any(p["recall_sketch"] < 0.95 for p in searcher.facts["curve"])


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_a_small_gallery_is_searched_exactly(tmp_path: Path, metric: str) -> None:
    world = make_world(tmp_path, photos=250, sketches=40, shards=2, metric=metric)
    searcher = _build(world, tmp_path / "index", index_key=None, recall_target=1.0)
    named = ("index_key", "exact", "nlist", "evidence", "tuned_on")
    assert [searcher.facts[name] for name in named] == ["Flat", True, 1, [], "sketch"]
    assert _recall(searcher, world) == 1
    typed = _build(world, tmp_path / "typed", index_key="Flat", recall_target=1.0)
    assert open_artifact(tmp_path / "typed", "index").digest == open_artifact(tmp_path / "index", "index").digest
    assert np.array_equal(typed.search(world.sketches, 10).ids, searcher.search(world.sketches, 10).ids)


def test_without_queries_an_index_is_tuned_on_rows_of_the_gallery(world: World, tmp_path: Path) -> None:
    built = build(Job.of(world.gallery, None, IndexConfig()), Store.at(tmp_path))
    assert built.artifact.facts["tuned_on"] == "gallery rows"
    assert _recall(Searcher.open(tmp_path), world) == 1


@pytest.mark.parametrize(
    "key",
    [
        "Flat",
        "SQ8",
        "PQ16,RFlat",
        "PQ16x4fs,Refine(SQ8)",
        "OPQ8_16,IVF16,PQ8x4,RFlat",
        "IVF32_HNSW16,SQ8",
        "PCAR16,IVF8,Flat,Refine(SQ8)",
        "IVF8,RaBitQ4,Refine(SQfp16)",
        "IVF8,PQ16x4fs,RFlat",
        "PCAR16,IVF8,PQ8x4fs,Refine(SQ8)",
    ],
)
def test_other_keys_build_and_answer(tmp_path: Path, key: str) -> None:
    world = make_world(tmp_path, photos=600, sketches=30, metric="l2", shards=2)
    searcher = _build(world, tmp_path / "index", index_key=key)
    assert _recall(searcher, world) >= 0.9 - 1e-9
    nearest = searcher.search(world.sketches[:1], 1)
    row = int(nearest.keys[0, 0].removeprefix("photo-"))
    assert nearest.scores[0, 0] == pytest.approx(-np.linalg.norm(world.photos[row] - world.sketches[0]), abs=0.02)


def test_shards_merge_into_what_one_process_builds(world: World, tmp_path: Path) -> None:
    searcher = _build(world, tmp_path)
    job = Job.of(world.gallery, world.queries, IndexConfig(index_key=KEY))
    sample = job.gallery.sample(job.chosen.train_size, 0)
    single = faiss_backend.train(job.chosen.index_key, "ip", sample, seed=0, count=4)
    single.add_with_ids(world.photos, np.arange(len(world.photos)))
    merged = searcher.segments[0].index
    assert np.array_equal(
        faiss_backend.probe(single, world.sketches, 50, 8), faiss_backend.probe(merged, world.sketches, 50, 8)
    )


def test_equal_work_gives_equal_bytes_however_many_tasks_run(world: World, tmp_path: Path) -> None:
    one = _build(world, tmp_path / "one", num_workers=1)
    four = _build(world, tmp_path / "four", num_workers=4)
    assert open_artifact(tmp_path / "one", "index").digest == open_artifact(tmp_path / "four", "index").digest
    assert one.segments[0].files[INDEX].read_bytes() == four.segments[0].files[INDEX].read_bytes()


def test_the_same_build_again_is_the_same_version(world: World, tmp_path: Path) -> None:
    job, store = Job.of(world.gallery, world.queries, IndexConfig(index_key=KEY)), Store.at(tmp_path)
    first = build(job, store)
    assert build(job, store) == first
    other = build(Job.of(world.gallery, world.queries, IndexConfig(index_key=KEY, seed=1)), store)
    assert (first.version, other.version, store.versions()) == (1, 2, (1, 2))
    again = build(job, store)  # asked for again, it becomes what readers open
    assert (again.version, again.artifact.digest) == (3, first.artifact.digest)
    assert rollback(store, 2).version == 4
    assert history(store)[4] == history(store)[2] == other.artifact.digest
    with pytest.raises(ConfigError, match="has no version 9"):
        rollback(store, 9)


def test_queries_of_another_checkpoint_are_refused(world: World, tmp_path: Path) -> None:
    strangers = embeddings(tmp_path, world.sketches, "sketch", checkpoint="e" * 64)
    with pytest.raises(ConfigError, match="same checkpoint"):
        Job.of(world.gallery, strangers, IndexConfig())


def test_an_unmet_target_publishes_nothing_now_or_later(world: World, tmp_path: Path) -> None:
    noise = np.random.default_rng(3).standard_normal((50, 32)).astype(np.float32)
    queries = embeddings(tmp_path / "q", noise, "sketch", shards=1)
    job = Job.of(world.gallery, queries, IndexConfig(index_key="IVF64,PQ1x4", recall_target=1.0))
    for _ in range(2):
        with pytest.raises(QualityGateFailed, match=r"IVF64,PQ1x4 reaches recall@10 0\.\d+ on the sketches"):
            build(job, Store.at(tmp_path / "index"))
        assert Store.at(tmp_path / "index").versions() == ()


def test_two_rows_of_one_id_and_part_are_refused(tmp_path: Path) -> None:
    photos = clustered(300, 1)
    keys = [f"photo-{max(row, 1)}" for row in range(300)]
    gallery = embeddings(tmp_path / "g", photos, "photo", keys=keys)
    queries = embeddings(tmp_path / "q", clustered(20, 2), "sketch", shards=1)
    with pytest.raises(ConfigError, match="'photo-1'"):
        build(Job.of(gallery, queries, IndexConfig()), Store.at(tmp_path / "index"))


def test_parts_of_a_photo_merge_into_one_hit(tmp_path: Path) -> None:
    photos, sketches = clustered(400, 1), clustered(30, 2, shift=0.5)
    gallery = embeddings(tmp_path / "g", photos, "photo", parts=2)
    queries = embeddings(tmp_path / "q", sketches, "sketch", shards=1)
    build(Job.of(gallery, queries, IndexConfig(index_key="IVF8,PQ8x4,RFlat")), Store.at(tmp_path / "index"))
    searcher = Searcher.open(tmp_path / "index")
    hits = searcher.search(sketches, 10, nprobe=64, refine_factor=20)
    assert searcher.parts == 2
    best = (sketches @ photos.T).reshape(30, 200, 2).max(axis=2)
    expected = np.argsort(-best, axis=1, kind="stable")[:, :10]
    assert hits.ids.tolist() == [[row_id("photo", f"photo-{item}") for item in row] for row in expected]


def test_a_value_that_is_not_finite_is_refused_with_its_row(tmp_path: Path) -> None:
    photos = clustered(300, 1)
    photos[7, 3] = np.nan
    gallery = embeddings(tmp_path / "g", photos, "photo", shards=1)
    queries = embeddings(tmp_path / "q", clustered(20, 2), "sketch", shards=1)
    job = Job.of(gallery, queries, IndexConfig())
    with pytest.raises(ConfigError, match=r"'photo-7' \(row 7\) holds a value that is not finite"):
        job.gallery.read(0)


def test_half_precision_vectors_are_kept_as_they_are(tmp_path: Path) -> None:
    photos = clustered(300, 1).astype(np.float16)
    gallery = embeddings(tmp_path / "g", photos, "photo")
    queries = embeddings(tmp_path / "q", clustered(20, 2).astype(np.float16), "sketch", shards=1)
    build(Job.of(gallery, queries, IndexConfig(index_key="IVF4,SQ8,RFlat")), Store.at(tmp_path / "index"))
    searcher = Searcher.open(tmp_path / "index")
    assert np.array_equal(searcher.vectors(np.array([0, 299, 75])), photos[[0, 299, 75]].astype(np.float32))


def test_segments_find_what_one_file_of_lists_finds(world: World, tmp_path: Path) -> None:
    one, four = _build(world, tmp_path / "one"), _build(world, tmp_path / "four", segment_rows=800)
    assert (len(one.segments), len(four.segments)) == (1, 4)
    found = [s.search(world.sketches, 10, nprobe=64, refine_factor=300) for s in (one, four)]
    assert np.array_equal(found[0].ids, found[1].ids)
    assert np.array_equal(found[0].scores, found[1].scores)


def test_an_index_that_lost_recall_does_not_verify(world: World, tmp_path: Path) -> None:
    searcher = _build(world, tmp_path)
    verify(searcher)
    claimed = {**searcher.facts["operating_point"], "recall_sketch": 0.5}
    with pytest.raises(QualityGateFailed, match="when the index was tuned"):
        verify(Searcher(searcher.segments, {**searcher.facts, "operating_point": claimed}, NOBODY, searcher.files))


def test_files_that_do_not_fit_one_another_are_refused(world: World, tmp_path: Path) -> None:
    (segment,) = _build(world, tmp_path / "index").segments
    short = tmp_path / "short.raw"
    short.write_bytes(segment.files["refine/part-00000.raw"].read_bytes()[: -4 * segment.space.dim])
    with pytest.raises(DamagedArtifact, match="'vectors': 2999"):
        Segment({**segment.files, "refine/part-00000.raw": short}, segment.spec, segment.space, KEY)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Run a job in this process, on its Ray cluster, and return its last line."""
    monkeypatch.setattr(cluster, "disconnect", lambda: None)

    def _run(job: Callable[[Sequence[str]], int], *words: object) -> dict[str, Any]:
        code = job([str(word) for word in words])
        results: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert results["exit_code"] == code
        return results

    return _run


def test_the_jobs_build_inspect_verify_roll_back_and_search(
    world: World, tmp_path: Path, run: Callable[..., dict[str, Any]]
) -> None:
    place, index = tmp_path / "index", index_command.run
    inputs = ("--embeddings", world.root / "gallery", "--queries", world.root / "queries", "--index-dir", place)
    planned = run(index, "build", *inputs, "--dry-run")
    assert (planned["index_key"], planned["shards"], place.exists()) == ("Flat", 4, False)
    built = run(index, "build", *inputs)
    assert (built["exit_code"], built["version"], built["ntotal"]) == (0, 1, 3000)
    assert run(index, "verify", "--index-dir", place)["digest"] == built["digest"]
    assert run(index, "build", *inputs, "--seed", 5)["version"] == 2
    assert run(index, "rollback", "--index-dir", place, "--version", 1)["digest"] == built["digest"]
    versions = run(index, "inspect", "--index-dir", place)["versions"]
    assert (versions["3"], set(versions)) == (built["digest"], {"1", "2", "3"})
    output = tmp_path / "near.json"
    queries = world.root / "queries"
    found = run(search_command.run, "--index-dir", place, "--queries", queries, "--k", 3, "--output", output)
    assert (found["exit_code"], found["queries"], output.exists()) == (0, 120, True)


def test_the_jobs_end_with_the_code_of_what_is_wrong(
    world: World, tmp_path: Path, run: Callable[..., dict[str, Any]]
) -> None:
    place, index = tmp_path / "index", index_command.run
    inputs = ("--embeddings", world.root / "gallery", "--queries", world.root / "queries", "--index-dir", place)
    refused = run(index, "build", *inputs, "--max-index-memory-usage", "1KB")
    assert (refused["exit_code"], "give at least" in refused["error"]) == (2, True)
    assert run(index, "rebuild")["exit_code"] == 2
    noise = np.random.default_rng(3).standard_normal((50, 32)).astype(np.float32)
    embeddings(tmp_path / "noise", noise, "sketch", shards=1)
    hard = ("--queries", tmp_path / "noise", "--index-key", "IVF64,PQ1x4", "--recall-target", 1)
    assert run(index, "build", *inputs[:2], *inputs[4:], *hard)["exit_code"] == 4
    assert run(index, "inspect", "--index-dir", tmp_path / "nowhere")["exit_code"] == 7


def test_the_jobs_delete_by_key_filter_by_class_and_name_what_is_wrong(
    tmp_path: Path, run: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    world = make_world(tmp_path, photos=300, sketches=20)
    place, index, search = tmp_path / "index", index_command.run, search_command.run
    where = ("--index-dir", place)
    gallery, queries = ("--embeddings", world.root / "gallery"), ("--queries", world.root / "queries")
    built = run(index, "build", *gallery, *where)  # without queries
    assert (built["index_key"], built["exact"], built["exit_code"]) == ("Flat", True, 0)
    shown = run(index, "inspect", *where)
    assert (shown["index_key"], shown["exact"], shown["tuned_on"]) == ("Flat", True, "gallery rows")
    listed = tmp_path / "keys.txt"
    listed.write_bytes("\ufeffphoto-1\r\nphoto-2\r\n".encode())
    delete = ("delete", *where, "--keys-from", listed)
    assert run(index, *delete, "--dry-run")["items"] == 2
    assert run(index, *delete)["deleted"] == 2
    assert run(index, *delete, "--keys", "photo-3", "--dry-run")["items"] == 1
    told = run(index, *delete, "--keys", "photo-3")
    assert (told["deleted"], told["already_deleted"]) == (1, 2)
    assert run(index, *delete)["deleted"] == 0
    unknown = run(index, *delete, "--keys", "photo-9999")
    assert (unknown["exit_code"], "'photo-9999'" in unknown["error"]) == (2, True)
    listed.write_bytes("photo-\xe9".encode("latin-1"))
    assert run(index, *delete)["exit_code"] == 2
    again = run(index, "add", *where, *gallery)
    assert (again["exit_code"], "are in the index already" in again["error"]) == (2, True)
    output = tmp_path / "neighbors-v1.0"
    assert run(search, *where, *queries, "--output", output, "--labels", "Class 3")["exit_code"] == 0
    assert {
        row["label"] for entry in open_artifact(output, "neighbours").files for row in _rows(output, entry.path)
    } == {"class-3"}
    for target in (output, tmp_path / "near.json"):
        refused = run(search, *where, *queries, "--output", target, "--labels", "klass-3")
        assert (refused["exit_code"], "'class-3'" in refused["error"]) == (2, True)
    assert run(search, *where, *queries, "--output", tmp_path / "near.csv")["exit_code"] == 2
    bad = world.sketches.copy()
    bad[4, 0] = 1e20
    embeddings(tmp_path / "bad", bad, "sketch", shards=1)
    other = ("build", *gallery, "--index-dir", tmp_path / "other")
    key = run(index, *other, "--index-key", "PCA64,Flat")
    assert (key["exit_code"], len(key["error"].splitlines())) == (2, 1)
    huge = run(index, *other, "--queries", tmp_path / "bad")
    assert (huge["exit_code"], "'sketch-4' (row 4) is 1e+20 long" in huge["error"]) == (2, True)


def _rows(root: Path, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = open_artifact(root, "neighbours").read_table(name).to_pylist()
    return rows
