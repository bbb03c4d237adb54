"""TU-Berlin Extended as its archives unpack."""

from collections import Counter
from pathlib import Path

import pytest

from tests.data.sources.helpers import files, rows
from zsr.data.sources import differences
from zsr.data.sources.tuberlin import TUBerlin
from zsr.errors import ConfigError


@pytest.mark.parametrize(("sketches", "photos"), [("png", "ImageResized"), ("sketches", "images")])
def test_both_folders_get_one_spelling(tmp_path: Path, sketches: str, photos: str) -> None:
    files(tmp_path, f"{sketches}/hot air balloon/1.png", f"{photos}/hot_air_balloon/a.jpg", f"{photos}/T-Shirt/b.jpg")
    found = {(modality, item.label) for (modality, _), item in rows(TUBerlin(tmp_path)).items()}
    assert found == {("sketch", "hot_air_balloon"), ("photo", "hot_air_balloon"), ("photo", "t_shirt")}


def test_a_missing_archive_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder of photo images; expected one of"):
        list(TUBerlin(files(tmp_path, "png/ant/1.png")).items())


def test_it_says_where_a_download_differs(tmp_path: Path) -> None:
    files(tmp_path, "png/ant/1.png", "png/unicorn/2.png", "ImageResized/ant/a.jpg")
    source = TUBerlin(tmp_path)
    counts = {m: Counter(i.label or "" for i in source.items() if i.modality == m) for m in ("photo", "sketch")}
    assert differences(source, counts) == [
        "tuberlin-extended: 249 of 250 classes are missing: airplane, alarm_clock, angel, apple, arm and 244 more",
        "tuberlin-extended: 1 classes are not among the published ones: unicorn",
        "tuberlin-extended: 1 photo rows, published are 204489",
        "tuberlin-extended: 2 sketch rows, published are 20000",
        "tuberlin-extended: sketch rows of 1 classes differ: ant 1 for 80",
    ]
