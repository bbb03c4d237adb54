"""Merging, naming and refusing, on a published index."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.index.helpers import DIM, KEY, World, embeddings, exact_neighbours
from zsr.artifact import Store
from zsr.data.rows import row_id
from zsr.errors import ConfigError, DamagedArtifact
from zsr.index import faiss_backend
from zsr.index.building.build import Job, build
from zsr.index.building.plan import IndexConfig
from zsr.index.searching.results import SearchParams, answer, write_answers
from zsr.index.searching.searcher import Searcher, merge_best

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def index(world: World, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    place = Path(tmp_path_factory.mktemp("index"))
    build(Job.of(world.gallery, world.queries, IndexConfig(index_key=KEY)), Store.at(place))
    return place


def test_the_best_come_first_and_ties_in_row_order() -> None:
    ordinals, scores = merge_best(np.array([[4, 2, -1, 7]]), np.array([[1.0, 1.0, 9.0, 2.0]]), None, 3)
    assert ordinals.tolist() == [[7, 2, 4]]
    assert scores.tolist() == [[2.0, 1.0, 1.0]]


def test_parts_of_one_item_count_once_by_their_best_score() -> None:
    ids = np.array([100, 100, 200, 300])
    ordinals, scores = merge_best(np.array([[0, 1, 2, 3]]), np.array([[0.1, 0.9, 0.5, 0.2]]), ids, 4)
    assert ordinals.tolist() == [[1, 2, 3, -1]]
    assert scores[0, :3].tolist() == pytest.approx([0.9, 0.5, 0.2])
    assert scores[0, 3] == -np.inf


def test_missing_neighbours_are_padded() -> None:
    ordinals, scores = merge_best(np.array([[5]]), np.array([[0.5]]), None, 3)
    assert ordinals.tolist() == [[5, -1, -1]]
    assert scores.tolist() == [[0.5, -np.inf, -np.inf]]


def test_nothing_found_is_padding() -> None:
    ordinals, scores = merge_best(np.full((2, 3), -1), np.full((2, 3), -np.inf), np.empty(0, np.int64), 2)
    assert ordinals.tolist() == [[-1, -1]] * 2
    assert scores.tolist() == [[-np.inf, -np.inf]] * 2


def test_a_full_probe_with_full_reranking_is_exact_search(index: Path, world: World) -> None:
    hits = Searcher.open(index).search(world.sketches, 10, nprobe=64, refine_factor=300)
    expected = exact_neighbours(world.sketches, world.photos, 10)
    assert hits.keys.tolist() == [[f"photo-{row}" for row in rows] for rows in expected]
    assert hits.ids[3, 4] == row_id("photo", hits.keys[3, 4])
    assert hits.labels[3].tolist() == [None if row % 5 == 0 else f"class-{row % 7}" for row in expected[3]]
    assert hits.scores[5] == pytest.approx(np.sort(world.photos @ world.sketches[5])[::-1][:10], abs=1e-6)


def test_more_neighbours_than_photos_are_padded(index: Path, world: World) -> None:
    hits = Searcher.open(index).search(world.sketches[:2], 3500, nprobe=64)
    assert np.all(hits.ids[:, :3000] >= 0)
    assert hits.ids[:, 3000:].tolist() == [[-1] * 500] * 2
    assert hits.keys[0, 3000] is None


def test_a_moved_index_opens(index: Path, world: World, tmp_path: Path) -> None:
    before = Searcher.open(index).search(world.sketches, 5)
    shutil.copytree(index, tmp_path / "elsewhere")
    after = Searcher.open(tmp_path / "elsewhere").search(world.sketches, 5)
    assert np.array_equal(before.ids, after.ids)


def test_queries_of_another_space_are_refused(index: Path, world: World, tmp_path: Path) -> None:
    searcher = Searcher.open(index)
    searcher.check(world.queries)
    other = embeddings(tmp_path / "a", world.sketches, "sketch", checkpoint="d" * 64)
    with pytest.raises(ConfigError, match="checkpoint is 'dddd"):
        answer(searcher, other, SearchParams(5))
    with pytest.raises(ConfigError, match="metric is 'l2'"):
        searcher.check(embeddings(tmp_path / "b", world.sketches, "sketch", metric="l2"))
    with pytest.raises(ConfigError, match="hamming"):
        searcher.check(embeddings(tmp_path / "c", world.sketches, "sketch", metric="hamming"))
    with pytest.raises(ConfigError, match=rf"expected \(B, {DIM}\)"):
        searcher.search(world.sketches[:, :7], 5)
    with pytest.raises(ConfigError, match="at least 1"):
        searcher.search(world.sketches, 0)


def test_parts_of_a_query_merge_by_best_score(index: Path, world: World, tmp_path: Path) -> None:
    searcher = Searcher.open(index)
    queries = embeddings(tmp_path / "parts", world.sketches[:6], "sketch", shards=2, parts=2)
    answers = answer(searcher, queries, SearchParams(8))
    assert answers.keys.tolist() == ["sketch-0", "sketch-1", "sketch-2"]
    single = searcher.search(world.sketches[2:4], 8)
    best: dict[int, float] = {}
    for identity, score in zip(single.ids.ravel(), single.scores.ravel(), strict=True):
        best[int(identity)] = max(best.get(int(identity), -np.inf), float(score))
    expected = sorted(best.values(), reverse=True)[:8]
    assert answers.hits.scores[1].tolist() == pytest.approx(expected)
    assert [best[int(i)] for i in answers.hits.ids[1]] == pytest.approx(expected)


def test_answers_are_written_as_json_or_parquet(index: Path, world: World, tmp_path: Path) -> None:
    answers = answer(Searcher.open(index), world.queries, SearchParams(3))
    write_answers(answers, tmp_path / "a.json")
    write_answers(answers, tmp_path / "a.parquet")
    rows = json.loads((tmp_path / "a.json").read_text())
    assert rows == pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert [row["rank"] for row in rows[:4]] == [1, 2, 3, 1]
    assert rows[3]["query_key"] == "sketch-1"
    assert rows[3]["key"] == answers.hits.keys[1, 0]
    with pytest.raises(ConfigError, match=r"is \.json or \.parquet, found '\.csv'"):
        write_answers(answers, tmp_path / "a.csv")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["index.faiss", "index.ivfdata", "ids/part-00001.parquet", "refine/part-00002.raw"])
def test_a_flipped_bit_is_refused_before_faiss_reads(
    index: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(index, tmp_path / "copy")
    (damaged,) = (tmp_path / "copy" / "objects").glob(f"*/segment-00000/{name}")
    _flip(damaged)
    parsed: list[Any] = []
    monkeypatch.setattr(faiss_backend.faiss, "read_index", lambda *arguments: parsed.append(arguments))
    with pytest.raises(DamagedArtifact, match="sha256"):
        Searcher.open(tmp_path / "copy")
    assert parsed == []


def test_faiss_may_not_allocate_more_than_its_file(tmp_path: Path, index: Path) -> None:
    (good,) = index.glob("objects/*/segment-00000/index.faiss")
    data = bytearray(good.read_bytes())
    at = data.find((64 * DIM * 4).to_bytes(8, "little"))
    at = at if at >= 0 else data.find((64 * DIM).to_bytes(8, "little"))
    data[at : at + 8] = (2**36).to_bytes(8, "little")
    with pytest.raises(DamagedArtifact, match="faiss cannot read it"):
        faiss_backend.from_bytes(bytes(data), "crafted")
    assert faiss_backend.faiss.get_deserialization_vector_byte_limit() > 2**36


def test_a_list_that_reaches_out_of_its_file_is_refused(index: Path, tmp_path: Path) -> None:
    (good,) = index.glob("objects/*/segment-00000/index.faiss")
    lists = good.with_name("index.ivfdata")
    opened = faiss_backend.open_split(good, lists)
    crafted = faiss_backend.list_sizes(opened)
    crafted[[0, 1]] += np.array([2**40, -(2**40)])
    (tmp_path / "crafted.faiss").write_bytes(faiss_backend.with_lists_in(opened, lists.name, crafted))
    with pytest.raises(DamagedArtifact, match="outside of"):
        faiss_backend.open_split(tmp_path / "crafted.faiss", lists)
