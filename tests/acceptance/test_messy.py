"""A folder of images as people have them goes through everything, to the answer to a drawn query."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.acceptance import messy
from tests.pipeline import ok, read_all
from zsr.artifact import open_artifact
from zsr.data.decode import Limits, decode

pytestmark = pytest.mark.usefixtures("ray_cluster")

BAD = {
    "photo/ball/dangling.jpg": "link leads nowhere",
    "photo/ball/downloads/half.jpg": "46% of its rows are missing",
    "photo/ball/downloads/not found.jpg": "web page instead of an image",
    "photo/ball/downloads/zero.jpg": "0 bytes",
    "photo/Tower Räder/logo.svg": "SVG drawing",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    """raw/, and data/ that `zsr prepare` made of it."""
    root = tmp_path_factory.mktemp("messy")
    messy.write(root / "raw")
    results = ok("prepare", "--source", "folders", "--input", root / "raw", "--output", root / "data")
    (root / "results.json").write_text(json.dumps(results))
    return root


def prepared(root: Path) -> tuple[dict[str, Any], dict[str, bytes | None]]:
    """What prepare said, and the image of each row by key."""
    data = open_artifact(root / "data", "data")
    assert read_all(data) == data.manifest["rows"]["used"]
    tables = [data.read_table(entry.path, columns=["key", "image"]) for entry in data.shards()]
    images = {key: image for t in tables for key, image in zip(*t.to_pydict().values(), strict=True)}
    return json.loads((root / "results.json").read_text()), images


def test_every_image_is_used_or_has_a_reason(root: Path) -> None:
    results, images = prepared(root)
    raw = root / "raw"
    # a link to a folder is followed, one to a file is a file
    found = {p for p in raw.rglob("*") if not p.is_dir() and messy.looks_like_an_image(p)}
    found |= {raw / "photo" / "album" / p.name for p in (raw / "photo" / "album").iterdir()}
    keys = {str(path.relative_to(raw)) for path in found}
    assert results["rows"] == {"in": len(keys), "used": len(images), "quarantined": len(BAD)}
    assert set(images) | set(BAD) == keys
    assert results["not_read"] == {".DS_Store": 1, "._*": 1, ".db": 1, ".mp4": 1, ".txt": 1}


def test_the_reasons_are_told(root: Path) -> None:
    data = open_artifact(root / "data", "data")
    lines = [line for e in data.files if e.path.startswith("_quarantine/") for line in data.read(e.path).splitlines()]
    reasons = {row["key"]: row["message"] for row in map(json.loads, lines)}
    assert set(reasons) == set(BAD)
    for key, words in BAD.items():
        assert words in reasons[key]
        assert len(reasons[key].split()) > 4


def test_pixels_are_what_a_viewer_shows(root: Path) -> None:
    _, images = prepared(root)

    def pixels(key: str) -> np.ndarray:
        image = images[key]
        assert image is not None
        return decode(image, messy.SIZE, Limits()).astype(int)

    def scene(kind: str, seed: int) -> np.ndarray:
        return np.asarray(messy.scene(kind, seed)).astype(int)

    tower = "photo/Tower Räder"
    for key, expected, near in (
        ("photo/ball/phone/turned.jpg", scene("ball", 11), 8),
        ("photo/ball/phone/IMG_0001.HEIC", scene("ball", 12), 12),
        ("photo/ball/phone/moving.webp", scene("ball", 13), 12),
        (f"{tower}/print.jpg", scene("tower", 21), 25),
        (f"{tower}/web.jpg", scene("tower", 21), 8),
        (f"{tower}/scan.tif", scene("tower", 21), 0),
        (f"{tower}/no ending", scene("tower", 21), 0),
        (f"{tower}/deep.png", np.asarray(messy.scene("tower", 21).convert("L").convert("RGB")).astype(int), 1),
    ):
        assert np.abs(pixels(key) - expected).mean() <= near, key


def test_a_drawing_finds_photos_of_its_class(root: Path) -> None:
    data, features = ("--data", root / "data"), ("--features", root / "features")
    checkpoint, index = ("--checkpoint", root / "checkpoint"), ("--index-dir", root / "index")
    ok("features", *data, "--output", features[1], "--size", 64, "--num-workers", 1)
    ok("train", *data, *features, "--model", "raw", "--split", "random:1:0", "--validation-classes", 0,
       "--num-workers", 1, "--output", checkpoint[1])  # fmt: skip
    for modality in ("photo", "sketch"):
        ok(
            "embed",
            *data,
            *features,
            *checkpoint,
            "--modality",
            modality,
            "--output",
            root / modality,
            "--num-workers",
            1,
        )
    ok("index", "build", "--embeddings", root / "photo", "--queries", root / "sketch", *index)
    drawn, found = root / "my drawing.png", root / "found.json"
    messy.save(drawn, messy.drawing("tower", 40))
    flags = ("--sketch", drawn, *checkpoint, *data, "--picture", root / "found.png", "--k", 5)
    ok("search", *index, "--output", found, *flags)
    hits = json.loads(found.read_text())
    assert [row["rank"] for row in hits] == [1, 2, 3, 4, 5]
    assert sum(row["label"] == "tower_räder" for row in hits) >= 3
    with Image.open(root / "found.png") as sheet:
        assert np.asarray(sheet.convert("L")).std() > 20
