"""DATA without images: what needs some says so in one sentence, before anything is started."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.sources.helpers import jpeg
from tests.pipeline import job, ok
from zsr.artifact import open_artifact
from zsr.data.decode import Pictures, Resize
from zsr.data.pictures import has_images
from zsr.data.shards import stream

pytestmark = pytest.mark.usefixtures("ray_cluster")


def prepared(root: Path, images: int) -> Path:
    """DATA of 12 sketches and photos of 4 classes, of which so many photos and sketches have an image."""
    for modality in ("sketch", "photo"):
        (root / "raw" / f"modality={modality}").mkdir(parents=True)
        columns = {
            "key": [str(n) for n in range(12)],
            "label": ["ant", "bee", "cat", "dog"] * 3,
            "feature": [[float(n), 1.0] for n in range(12)],
            "image": pa.array([jpeg()] * images + [None] * (12 - images), pa.binary()),
        }
        pq.write_table(pa.table(columns), root / "raw" / f"modality={modality}" / "a.parquet")
    flags = ("--input", root / "raw", "--rows-per-shard", 4, "--output", root / "data")
    ok("prepare", "--source", "parquet", *flags, "--features-output", root / "features")
    return root / "data"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("none"), 0)


def test_a_tower_is_refused(data: Path, tmp_path: Path) -> None:
    flags = ("--data", data, "--split", "random:1:0", "--validation-classes", 0, "--output", tmp_path / "out")
    for more in ((), ("--dry-run",)):
        found = job("train", *flags, "--tower", "tiny", "--random-weights", "--model", "classifier", *more)
        assert found["exit_code"] == 2
        assert "have none of sketch and photo; train on --features, or prepare data with images" in found["error"]
    assert not (tmp_path / "out" / "staging").exists()


def test_features_are_refused(data: Path, tmp_path: Path) -> None:
    found = job("features", "--data", data, "--output", tmp_path / "out", "--size", 32)
    assert found["exit_code"] == 2
    assert "has no images to compute features of" in found["error"]


def test_a_shard_without_images_is_an_empty_part_of_a_stream(tmp_path: Path) -> None:
    data = open_artifact(prepared(tmp_path, 1), "data")
    assert has_images(data, "photo")
    blocks = list(stream(data, Pictures(Resize(8)), "photo", None, keys=True))
    assert [key for block in blocks for key in block.keys] == ["0"]
    assert np.concatenate([block.features for block in blocks]).shape == (1, 8, 8, 3)
