"""The Sketchy database in each of its layouts."""

from collections import Counter
from pathlib import Path

import pytest

from tests.data.sources.helpers import SHARED, files, labels, refused, rows
from zsr.data.sources import differences
from zsr.data.sources.sketchy import Sketchy, SketchyOptions
from zsr.errors import ConfigError


def extended(root: Path) -> Path:
    """Both archives: two original photos, one of which the extension lacks, and one photo that it adds."""
    return files(
        root,
        "256x256/photo/tx_000000000000/hot-air_balloon/n1_1.jpg",
        "256x256/photo/tx_000000000000/hot-air_balloon/n1_2.jpg",
        "256x256/sketch/tx_000000000000/hot-air_balloon/n1_1-1.png",
        "256x256/sketch/tx_000000000000/hot-air_balloon/n1_2-4.png",
        "256x256/sketch/tx_000100000000/hot-air_balloon/n1_1-1.png",
        "EXTEND_image_sketchy/hot-air_balloon/n1_1.jpg",
        "EXTEND_image_sketchy/hot-air_balloon/ext_9.jpg",
    )


def pairs(root: Path, photos: str) -> dict[str, str | None]:
    source = Sketchy(root, SketchyOptions(photos=photos))
    return {Path(key).name: item.pair for (modality, key), item in rows(source).items() if modality == "sketch"}


def test_flat_folders_pair_a_sketch_with_its_photo(tmp_path: Path) -> None:
    files(tmp_path, "photo/car (sedan)/x.jpg", "sketch/car (sedan)/x-12.png", "sketch/car (sedan)/alone-1.png")
    found = rows(Sketchy(tmp_path))
    assert found["sketch", "sketch/car (sedan)/x-12.png"].pair == "photo/car (sedan)/x.jpg"
    assert found["sketch", "sketch/car (sedan)/alone-1.png"].pair is None
    assert labels(found.values()) == {"car_(sedan)"}


@pytest.mark.parametrize(
    ("photos", "count"), [("auto", 2), ("extended", 2), ("original", 2), ("union", 3), ("doubled", 4)]
)
def test_photos_of_the_extension_stand_once_unless_they_are_to_stand_twice(
    tmp_path: Path, photos: str, count: int
) -> None:
    source = Sketchy(extended(tmp_path), SketchyOptions(photos=photos))
    assert Counter(item.modality for item in source.items()) == {"photo": count, "sketch": 2}


def test_sketches_are_paired_with_the_photos_that_are_taken(tmp_path: Path) -> None:
    base, more = "256x256/photo/tx_000000000000/hot-air_balloon", "EXTEND_image_sketchy/hot-air_balloon"
    root = extended(tmp_path)
    assert pairs(root, "original") == {"n1_1-1.png": f"{base}/n1_1.jpg", "n1_2-4.png": f"{base}/n1_2.jpg"}
    assert pairs(root, "auto") == {"n1_1-1.png": f"{more}/n1_1.jpg", "n1_2-4.png": None}
    assert pairs(root, "union") == {"n1_1-1.png": f"{more}/n1_1.jpg", "n1_2-4.png": f"{base}/n1_2.jpg"}


def test_a_rendering_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has the renderings \['tx_000000000000', 'tx_000100000000'\]"):
        list(Sketchy(extended(tmp_path), SketchyOptions(rendering="tx_1")).items())


def test_the_extension_is_asked_for_where_it_is_not(tmp_path: Path) -> None:
    files(tmp_path, "photo/bat/x.jpg", "sketch/bat/x-1.png")
    with pytest.raises(ConfigError, match="no EXTEND_image_sketchy"):
        list(Sketchy(tmp_path, SketchyOptions(photos="union")).items())


@pytest.mark.parametrize("path", ["photo/bat/x.jpg", "sketch/bat/x-1.png"])
def test_one_modality_alone_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(ConfigError, match="missing"):
        list(Sketchy(files(tmp_path, path)).items())


def test_pictures_of_other_formats_are_not_overlooked(tmp_path: Path) -> None:
    files(tmp_path, "photo/bat/x.gif", "photo/bat/notes.txt", "photo/bat/.hidden.jpg", "sketch/bat/x-1.png")
    assert {key for _, key in rows(Sketchy(tmp_path))} == {"photo/bat/x.gif", "sketch/bat/x-1.png"}


def test_a_name_that_is_no_text_is_a_bad_row(tmp_path: Path) -> None:
    files(tmp_path, "photo/bat/x.jpg", "sketch/bat/x-1.png")
    (tmp_path / "photo/bat").joinpath(b"\xff.jpg".decode(errors="surrogateescape")).write_bytes(b"")
    source = Sketchy(tmp_path)
    assert refused(source, rows(source)["photo", "photo/bat/\\udcff.jpg"]) == "bad_key"


@pytest.mark.skipif(not (SHARED / "sketchy25").is_dir(), reason="Sketchy is not beside this checkout")
def test_every_sketch_of_sketchy25_has_its_photo() -> None:
    source = Sketchy(SHARED / "sketchy25")
    found = rows(source)
    photos = {key for modality, key in found if modality == "photo"}
    sketches = [item for (modality, _), item in found.items() if modality == "sketch"]
    assert (len(photos), len(sketches)) == (1575, 1575)
    for item in sketches:
        assert item.pair in photos
        assert Path(item.pair).stem == Path(item.key).stem.rpartition("-")[0]
        assert found["photo", item.pair].label == item.label
    counts = {m: Counter(i.label or "" for i in found.values() if i.modality == m) for m in ("photo", "sketch")}
    said = differences(source, counts)
    assert said[0].startswith("sketchy: 62 of 125 classes are missing: airplane, alarm_clock")
    assert "sketchy: 1575 sketch rows, published are 75481" in said
