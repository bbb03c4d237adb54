"""Worked examples and published lists: figures that others gave, met by our code."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.reference import formulas
from zsr.data.sources.sketchy import Sketchy
from zsr.data.splits import load
from zsr.metrics import chance, mean_average_precision
from zsr.models.itq import rotation, transductive

SHARED = Path(__file__).parents[3] / "shared"
PAPERS, SKETCHES = SHARED / "papers" / "splits.json", SHARED / "data" / "sketchy25"
needs_papers = pytest.mark.skipif(not PAPERS.exists(), reason="the published lists lie in ../shared/papers/splits.json")


@pytest.fixture
def papers() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(PAPERS.read_text())
    return content


# -- splits ------------------------------------------------------------------------------------------------------------


@needs_papers
def test_sem_pcyc_s_25_classes_are_drawn_again_from_its_seed(papers: dict[str, Any]) -> None:
    names = np.array(sorted(papers["sketchy_classes125"]))
    draw = np.random.RandomState(0)
    trained = draw.choice(names, int(0.8 * len(names)), replace=False)
    left = np.setdiff1d(names, trained)
    validation = draw.choice(left, 12, replace=False)
    test = np.setdiff1d(left, validation)
    assert (len(trained), len(validation), len(test)) == (100, 12, 13)
    assert sorted(validation) == sorted(papers["sketchy_sempcyc_val12"])
    assert sorted(test) == sorted(papers["sketchy_sempcyc_test13"])
    assert sorted(load("sketchy-25-sempcyc").unseen) == sorted([*validation, *test])


@needs_papers
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("sketchy-21", ["sketchy_yelamarthi_unseen21"]),
        ("sketchy-25", ["sketchy_sake_unseen25"]),
        ("tuberlin-30", ["tuberlin_sake_unseen30"]),
        ("tuberlin-30-sempcyc", ["tuberlin_sempcyc_val15", "tuberlin_sempcyc_test15"]),
        ("quickdraw-30", ["quickdraw_doodle2search_unseen30"]),
    ],
)
def test_the_lists_that_ship_are_the_published_ones(ours: str, theirs: list[str], papers: dict[str, Any]) -> None:
    def spelt(name: str) -> str:
        return "".join(letter for letter in name.lower() if letter.isalnum())

    assert sorted(map(spelt, load(ours).unseen)) == sorted(spelt(name) for part in theirs for name in papers[part])


@needs_papers
@pytest.mark.parametrize(
    ("parts", "seen", "sketches", "photos"),
    [
        (["sketchy_yelamarthi_unseen21"], 104, 12_694, 10_453),
        (["sketchy_sempcyc_val12", "sketchy_sempcyc_test13"], 100, 14_421, 14_626),
    ],
)
def test_unseen_classes_have_the_published_rows(
    parts: list[str], seen: int, sketches: int, photos: int, papers: dict[str, Any]
) -> None:
    unseen = [name for part in parts for name in papers[part]]
    assert len(set(papers["sketchy_classes125"]) - set(unseen)) == seen
    assert set(unseen) < set(papers["sketchy_classes125"])
    assert sum(papers["sketchy_sketch_counts"][name] for name in unseen) == sketches
    assert sum(papers["sketchy_ext_gallery_counts"][name] for name in unseen) == photos


@pytest.mark.skipif(not SKETCHES.exists(), reason="the trial sketches lie in ../shared/data/sketchy25")
def test_every_sketch_of_the_trial_set_finds_the_photo_that_it_was_drawn_from() -> None:
    items = list(Sketchy(SKETCHES).items())
    photos = {item.key: item.label for item in items if item.modality == "photo"}
    sketches = [item for item in items if item.modality == "sketch"]
    assert len(sketches) > 1000
    assert all(item.pair is not None and photos[item.pair] == item.label for item in sketches)


# -- formulas ----------------------------------------------------------------------------------------------------------


def test_chance_with_5_relevant_of_50_is_published_as_1643() -> None:
    assert chance(np.array([5]), 50)["mAP@all"] == pytest.approx(0.1643, abs=5e-5)
    assert chance(np.array([5]), 50)["mAP@all"] == pytest.approx(formulas.chance_ap(5, 50))


def test_transductive_codes_are_those_of_the_released_steps_written_in_numpy() -> None:
    draw = np.random.default_rng(0)
    centre = 2 * draw.standard_normal((6, 24))
    query, gallery = (centre.repeat(20, 0) + draw.standard_normal((120, 24)) for _ in range(2))
    start = rotation(torch.zeros(1, 16, dtype=torch.float64), seed=3, rounds=0).numpy()
    expected = formulas.itq_of_queries(query, gallery + 5.0, 16, start)
    found = transductive(torch.from_numpy(query), torch.from_numpy(gallery + 5.0), 16, seed=3)
    for ours, theirs in zip(found, expected, strict=True):
        assert np.array_equal(np.unpackbits(ours.numpy(), axis=1).astype(bool), theirs)
    label = np.arange(6).repeat(20)
    distance = (expected[0][:, None] != expected[1][None]).sum(2)
    assert (
        mean_average_precision(found[0], found[1], label, label, "hamming") > 2 * chance(np.array([20]), 120)["mAP@all"]
    )
    assert int(distance.max()) <= 16
