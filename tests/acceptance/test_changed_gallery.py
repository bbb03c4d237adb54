"""A gallery that changes is searched again after each change, and every file of every version stays readable.

One row changed, one added, one deleted, a class added, nothing changed: prepare, features, embed and rebuild, with
the same flags each time, as docs/guide.md tells. Every version is read to its last byte after each.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.pipeline import every_version, ok, read_all
from zsr.artifact import Store
from zsr.index.searching.searcher import Searcher

pytestmark = pytest.mark.usefixtures("ray_cluster")

CLASSES = ("circle", "square", "star")
EACH = 4
STAGES = ("data", "features", "photo", "index")


def draw(path: Path, shape: str, at: int, color: str = "seagreen") -> None:
    """An image of a filled shape; `at` moves it."""
    image = Image.new("RGB", (64, 64), "white")
    pen, box = ImageDraw.Draw(image), (6 + at, 6, 46 + at, 46)
    if shape == "circle":
        pen.ellipse(box, fill=color)
    elif shape == "square":
        pen.rectangle(box, fill=color)
    else:
        angles = np.arange(10) * np.pi / 5
        radii = np.where(np.arange(10) % 2, 9, 22)
        points = zip(26 + at + radii * np.cos(angles), 26 + radii * np.sin(angles), strict=True)
        pen.polygon([(float(x), float(y)) for x, y in points], fill=color)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


class Gallery:
    """A folder of photos with everything that is made of it below ROOT."""

    def __init__(self, root: Path, checkpoint: Path) -> None:
        self.root, self.raw, self.checkpoint = root, root / "raw", checkpoint
        for name in CLASSES:
            for number in range(EACH):
                draw(self.raw / "photo" / name / f"{number}.png", name, number)

    def at(self, stage: str) -> Path:
        return self.root / stage

    def update(self) -> None:
        """The commands of docs/guide.md for a gallery that changed."""
        data = ("--data", self.at("data"))
        ok("prepare", "--source", "folders", "--input", self.raw, "--output", self.at("data"), "--rows-per-shard", 3)
        ok("features", *data, "--output", self.at("features"), "--size", 32, "--num-workers", 1)
        ok("embed", *data, "--features", self.at("features"), "--checkpoint", self.checkpoint, "--modality", "photo",
           "--output", self.at("photo"), "--num-workers", 1)  # fmt: skip
        if Store.at(self.at("index")).versions():
            ok("index", "rebuild", "--index-dir", self.at("index"), "--embeddings", self.at("photo"))
        else:
            flags = ("--embeddings", self.at("photo"), "--queries", self.at("photo"), "--index-dir", self.at("index"))
            ok("index", "build", *flags)

    def nearest(self, photo: Path) -> tuple[str, float]:
        """The item that is nearest to a photo, and its score."""
        found = self.root / "found.json"
        ok("search", "--index-dir", self.at("index"), "--photo", photo, "--checkpoint", self.checkpoint, "--output",
           found, "--k", 3)  # fmt: skip
        first = json.loads(found.read_text())[0]
        return first["key"], first["score"]

    def keys(self) -> set[str]:
        searcher = Searcher.open(self.at("index"))
        ids = set(searcher.live_ids.tolist())
        named = (batch.to_pydict() for batch in searcher.names.batches)
        return {key for one in named for key, i in zip(one["key"], one["id"], strict=True) if i in ids}

    def read_everything(self) -> dict[str, list[int]]:
        """Rows of each version of each artifact, every file of which is read."""
        return {stage: [read_all(artifact) for artifact in every_version(self.at(stage))] for stage in STAGES}


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Gallery:
    root = tmp_path_factory.mktemp("gallery")
    made = Gallery(root, root / "checkpoint")
    data = ("--data", root / "trained" / "data")
    for shape in CLASSES:
        for number in range(2):
            draw(root / "drawn" / "sketch" / shape / f"{number}.png", shape, number, "black")
    shutil.copytree(made.raw / "photo", root / "drawn" / "photo")
    ok("prepare", "--source", "folders", "--input", root / "drawn", "--output", data[1])
    features = ("--features", root / "trained" / "features")
    ok("features", *data, "--output", features[1], "--size", 32, "--num-workers", 1)
    ok("train", *data, *features, "--model", "raw", "--split", "random:1:0", "--validation-classes", 0,
       "--num-workers", 1, "--output", made.checkpoint)  # fmt: skip
    made.update()
    return made


def change_one(gallery: Gallery) -> None:
    draw(gallery.raw / "photo" / "circle" / "0.png", "star", 9, "crimson")


def add_one(gallery: Gallery) -> None:
    draw(gallery.raw / "photo" / "square" / "new.png", "square", 11, "gold")


def delete_one(gallery: Gallery) -> None:
    (gallery.raw / "photo" / "star" / "1.png").unlink()


def add_a_class(gallery: Gallery) -> None:
    for number in range(2):
        draw(gallery.raw / "photo" / "cross" / f"{number}.png", "square", 3 * number, "purple")


def change_nothing(gallery: Gallery) -> None:
    """The same files again."""


@pytest.mark.parametrize(
    ("change", "images"),
    [(change_one, 12), (add_one, 13), (delete_one, 12), (add_a_class, 14), (change_nothing, 14)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_changed_gallery_is_found_as_it_is_now(
    gallery: Gallery, change: Callable[[Gallery], None], images: int
) -> None:
    before = gallery.read_everything()
    change(gallery)
    gallery.update()
    after = gallery.read_everything()
    for stage in STAGES:  # all versions of before are there and as large as they were
        assert after[stage][: len(before[stage])] == before[stage]
        assert len(after[stage]) == len(before[stage]) + (change is not change_nothing)
    assert (after["data"][-1], after["features"][-1], after["photo"][-1]) == (images, images, images)
    assert gallery.keys() == {str(path.relative_to(gallery.raw)) for path in (gallery.raw / "photo").rglob("*.png")}
    for path in sorted((gallery.raw / "photo").rglob("*.png"))[::4]:  # a photo finds itself, or one with its pixels
        key, score = gallery.nearest(path)
        assert score == pytest.approx(1, abs=1e-3), (key, path)
