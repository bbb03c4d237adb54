"""Shards kept from the last version, killed runs, and what a run says it cost."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests import toy
from tests.pipeline import every_version, ok, read_all
from zsr.artifact import open_artifact

pytestmark = pytest.mark.usefixtures("ray_cluster")

TINY = ("--rows-per-shard", 4)


def prepared(raw: Path, output: Path) -> Path:
    ok("prepare", "--source", "folders", "--input", raw, "--output", output, *TINY)
    return output


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ROOT/raw and ROOT/data: 24 pictures in 6 shards."""
    root = tmp_path_factory.mktemp("before")
    raw = toy.write_pictures(root / "raw", toy.CLASSES[:3], each=4)
    prepared(raw, root / "data")
    return root


@pytest.fixture(scope="module")
def after(before: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with one photo drawn anew."""
    root = tmp_path_factory.mktemp("after")
    raw = Path(shutil.copytree(before / "raw", root / "raw"))
    Image.new("RGB", (48, 48), "navy").save(raw / "photo" / toy.CLASSES[0] / "0.png")
    return prepared(raw, root / "data").parent


def features(data: Path, output: Path, *flags: object) -> dict[str, Any]:
    return ok("features", "--data", data, "--output", output, "--size", 32, "--num-workers", 1, *flags)


def test_only_changed_shards_are_computed_and_nobody_can_tell(before: Path, after: Path, tmp_path: Path) -> None:
    first = features(before / "data", tmp_path / "kept", "--cpu-price", 0.04)
    again = features(after / "data", tmp_path / "kept")
    fresh = features(after / "data", tmp_path / "fresh")
    assert first["cost"]["shards"] == {"computed": 6, "reused": 0, "finished_before": 0}
    assert again["cost"]["shards"] == {"computed": 1, "reused": 5, "finished_before": 0}
    assert again["digest"] == fresh["digest"] != first["digest"]
    assert [read_all(artifact) for artifact in every_version(tmp_path / "kept")] == [24, 24]
    assert features(after / "data", tmp_path / "kept")["cost"] == {
        "shards": {"computed": 0, "reused": 0, "finished_before": 6}
    }


def test_another_size_keeps_nothing(before: Path, tmp_path: Path) -> None:
    features(before / "data", tmp_path)
    other = ok("features", "--data", before / "data", "--output", tmp_path, "--size", 40, "--num-workers", 1)
    assert other["cost"]["shards"] == {"computed": 6, "reused": 0, "finished_before": 0}


def test_a_damaged_shard_is_not_taken_over_but_computed(before: Path, after: Path, tmp_path: Path) -> None:
    features(before / "data", tmp_path / "kept")
    made = open_artifact(tmp_path / "kept", "features")
    for entry in made.shards("photo"):
        path = made.directory / entry.path
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    again = features(after / "data", tmp_path / "kept")
    assert again["cost"]["shards"] == {"computed": 3, "reused": 3, "finished_before": 0}
    assert again["digest"] == features(after / "data", tmp_path / "fresh")["digest"]


def test_the_cost_adds_up(before: Path, tmp_path: Path) -> None:
    cost = features(before / "data", tmp_path, "--cpu-price", 0.04)["cost"]
    assert cost["rows_computed"] == 24
    assert sum(cost["shares"].values()) == pytest.approx(1, abs=0.01)
    assert cost["limit"] in cost["shares"]
    hours = cost["cpu_hours_a_million"]
    assert hours == pytest.approx(1e6 / cost["rows_a_second_an_actor"] / 3600, rel=0.02)
    assert cost["cost_a_million"] == pytest.approx(0.04 * hours, rel=0.02)
