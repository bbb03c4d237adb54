"""Pictures to features with a backbone from a local directory."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests import toy
from tests.pipeline import job, ok
from zsr.artifact import open_artifact
from zsr.data.decode import Limits, Resize, decode
from zsr.data.features import vectors

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    raw = toy.write_pictures(root / "raw", toy.CLASSES[:2], each=3)
    ok("prepare", "--source", "sketchy", "--input", raw, "--output", root / "data")
    return root / "data"


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random DINOv2 as `save_pretrained` writes it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("dinov2")
    small: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    transformers.Dinov2Model(transformers.Dinov2Config(**small)).save_pretrained(path)
    return path


def by_hand(path: Path, image: bytes, invert: bool) -> np.ndarray:
    pixels = decode(image, Resize(28, "bicubic", 0.875), Limits())
    images = torch.tensor(255 - pixels if invert else pixels)[None].float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    network: Any = transformers.Dinov2Model.from_pretrained(path)
    with torch.no_grad():
        return np.asarray(network(((images - mean) / std).permute(0, 3, 1, 2)).pooler_output[0])


def test_features_of_a_directory_are_those_of_its_network(data: Path, dinov2: Path, tmp_path: Path) -> None:
    flags = ["--data", data, "--output", tmp_path, "--backbone", "dinov2", "--weights", dinov2, "--size", 28]
    made = ok("features", *flags, "--fit", "published", "--invert-sketches", "--num-workers", 1)
    assert made["dims"] == {"photo": 16, "sketch": 16}
    assert made["rows"] == {"photo": 6, "sketch": 6}
    features, pictures = open_artifact(tmp_path, "features"), open_artifact(data, "data")
    for modality in ("photo", "sketch"):
        name = f"modality={modality}/part-00000.parquet"
        rows, found = pictures.read_table(name), features.read_table(name)
        assert rows.column("id") == found.column("id")
        expected = [by_hand(dinov2, image, modality == "sketch") for image in rows.column("image").to_pylist()]
        assert vectors(found.column("feature"), name) == pytest.approx(np.stack(expected), abs=5e-3)


def test_the_plan_names_what_is_wanted_and_the_default_size(data: Path, tmp_path: Path) -> None:
    flags = ["--data", data, "--output", tmp_path]
    assert job("features", *flags, "--backbone", "dinov2", "--dry-run")["exit_code"] == 2  # no weights
    assert job("features", *flags, "--layer", "fc7", "--dry-run")["exit_code"] == 2  # lite0 has none
    plain, told = (ok("features", *flags, *size, "--dry-run")["plan"] for size in ((), ("--size", 224)))
    assert plain == told
    assert ok("features", *flags, "--scaling", "unit", "--dry-run")["plan"] != plain
