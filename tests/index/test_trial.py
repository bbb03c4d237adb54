"""Measuring candidates on a gallery: what is measured, that it repeats, and that it is kept."""

import logging
import math
from pathlib import Path

import pytest

from tests.index.helpers import World, make_world
from zsr.artifact import Store
from zsr.index.building import benchmark, plan
from zsr.index.building.build import Job
from zsr.index.building.plan import IndexConfig
from zsr.index.storage.embeddings import Vectors

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> World:
    """6,000 photos, which a test takes for too many to be searched exactly."""
    return make_world(Path(tmp_path_factory.mktemp("crowd")), photos=6000, sketches=100)


@pytest.fixture(autouse=True)
def _nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "EXACT_ROWS", 0)
    monkeypatch.setattr(plan, "WHOLE_BYTES", 0)


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate is measured, whatever that costs."""
    monkeypatch.setattr(benchmark, "TRIAL_FRACTION", math.inf)
    monkeypatch.setattr(benchmark, "_could_win", lambda *words: True)


def _measure(crowd: World, **options: object) -> dict[str, plan.Evidence]:
    config = IndexConfig.model_validate(options)
    found = benchmark.measure(Vectors.of(crowd.gallery), Vectors.of(crowd.queries), config)
    return {evidence.index_key: evidence for evidence in found}


@pytest.mark.usefixtures("unhurried")
def test_longer_codes_and_refine_codes_find_more_and_a_repetition_finds_the_same(crowd: World) -> None:
    seen = _measure(crowd, max_index_memory_usage="1MB")
    lists = plan.lists_key(6000, 6000)
    assert seen[f"{lists},RaBitQ1"].recall < seen[f"{lists},RaBitQ4"].recall < seen[f"{lists},RaBitQ8"].recall
    assert seen[f"{lists},RaBitQ1,Refine(SQ8)"].recall > seen[f"{lists},RaBitQ1"].recall
    assert seen[f"{lists},PQ16,RFlat"].recall > 0.95
    assert all(evidence.bytes <= 1_000_000 for evidence in seen.values())
    again = _measure(crowd, max_index_memory_usage="1MB")
    assert {e.index_key: e.lasting() for e in again.values()} == {e.index_key: e.lasting() for e in seen.values()}


@pytest.mark.usefixtures("unhurried")
def test_a_trial_on_a_part_of_the_gallery_follows_its_line_to_the_full_size(
    crowd: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _measure(crowd, max_index_memory_usage="300KB")
    monkeypatch.setattr(benchmark, "POPULATION", 3000)
    part = _measure(crowd, max_index_memory_usage="300KB")
    off = [part[key].recall - evidence.recall for key, evidence in whole.items()]
    assert abs(sum(off) / len(off)) < 0.05


def test_the_evidence_is_kept_beside_the_versions_and_measured_once(
    crowd: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, store = IndexConfig(max_index_memory_usage="250KB"), Store.at(tmp_path)
    first = Job.of(crowd.gallery, crowd.queries, config, store).chosen
    monkeypatch.setattr(benchmark, "measure", lambda *arguments: pytest.fail("measured again"))
    assert Job.of(crowd.gallery, crowd.queries, config, store).chosen == first
    assert first.evidence[0].index_key == first.index_key
    assert first.index_bytes <= 250_000


def test_planning_ends_when_it_used_its_fraction_of_the_build_and_says_what_it_measured(
    crowd: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(benchmark, "TRIAL_FRACTION", 1e-9)
    with caplog.at_level(logging.WARNING, "zsr"):
        seen = _measure(crowd)
    code, *others = seen
    assert {key for key in others} == set(plan.refined(code)[1:])
    lines = [record.getMessage() for record in caplog.records if "plan:" in record.getMessage()]
    assert f"{code}: recall@10 {seen[code].recall:.3f}" in lines[1]
    assert lines[2].startswith("index: plan: stop after")


def test_a_small_gallery_over_its_budget_is_measured_for_shorter_codes(
    crowd: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "EXACT_ROWS", 50_000)
    chosen = Job.of(
        crowd.gallery, crowd.queries, IndexConfig(max_index_memory_usage="200KB"), Store.at(tmp_path)
    ).chosen
    assert chosen.index_bytes <= 200_000
    assert chosen.evidence


def test_a_code_that_takes_more_bytes_than_one_that_reached_the_target_is_not_measured(
    crowd: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "TRIAL_FRACTION", math.inf)
    seen = list(_measure(crowd, recall_target=0.5))
    lists = plan.lists_key(6000, 6000)
    assert f"{lists},SQ8" not in seen
    assert any(key.endswith("RaBitQ1") for key in seen)
