"""Image-text pairs and the Wikipedia set become rows, and what is bad is named."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zsr.data.prepare import listing
from zsr.data.sources import Item
from zsr.data.sources.pairs import Pairs
from zsr.data.sources.wikipedia import Wikipedia
from zsr.errors import ConfigError, DamagedArtifact

SHARED = Path(__file__).parents[3] / "shared" / "data"


def rows(source: Pairs | Wikipedia) -> dict[tuple[str, str], Item]:
    return {(item.modality, item.key): item for item in source.items()}


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (200, 10, 10)).save(path)


def test_a_line_is_a_photo_and_its_text(tmp_path: Path) -> None:
    picture(tmp_path / "shop" / "1.png")
    (tmp_path / "a.jsonl").write_text('{"image": "shop/1.png", "text": "ripe", "label": "Sweet Potato"}\n')
    (tmp_path / "b.csv").write_text("image,text,class\nshop/1.png,two of them,sweet-potato\n,no picture,Kiwi\n")
    found = rows(Pairs(tmp_path))
    assert {(*at, item.label, item.pair, item.text) for at, item in found.items()} == {
        ("photo", "shop/1.png", "sweet_potato", None, None),
        ("text", "a.jsonl:1", "sweet_potato", "shop/1.png", "ripe"),
        ("text", "b.csv:2", "sweet_potato", "shop/1.png", "two of them"),
        ("text", "b.csv:3", "kiwi", None, "no picture"),
    }
    assert Pairs(tmp_path).load(found["photo", "shop/1.png"]) == (tmp_path / "shop" / "1.png").read_bytes()
    assert Pairs(tmp_path).load(found["text", "a.jsonl:1"]) == b""


def test_folders_of_classes_add_photos(tmp_path: Path) -> None:
    picture(tmp_path / "photo" / "Red Kiwi" / "1.jpg")
    (tmp_path / "texts.jsonl").write_text('{"class": "Red Kiwi", "text": "sour"}\n')
    assert rows(Pairs(tmp_path))["photo", "photo/Red Kiwi/1.jpg"].label == "red_kiwi"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"t.jsonl:2: not JSON"),
        ("[1]", r"t.jsonl:2: found list"),
        ('{"label": "x"}', r"t.jsonl:2: neither image nor text"),
        ('{"image": "../secret.png"}', r"t.jsonl:2: image '../secret.png'; expected a path below"),
        ('{"image": "/etc/passwd"}', r"expected a path below"),
        ('{"image": "1.png", "label": "lemon"}', r"t.jsonl:2: label 'lemon', but 1.png was 'lime' before"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "t.jsonl").write_text('{"image": "1.png", "label": "lime"}\n' + line + "\n")
    with pytest.raises(ConfigError, match=message):
        list(Pairs(tmp_path).items())


def test_a_folder_without_tables_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no \*.jsonl"):
        list(Pairs(tmp_path).items())


@pytest.mark.skipif(not (SHARED / "grocery").is_dir(), reason="the grocery photos are not beside this checkout")
def test_grocery_photos_and_descriptions() -> None:
    listed = listing(Pairs(SHARED / "grocery"), seed=0)
    assert {m: len(items) for m, items in listed.items.items()} == {"photo": 1050, "text": 35}
    assert len(listed.labels) == 35


def wikipedia(folder: Path) -> Path:
    io = pytest.importorskip("scipy.io")
    (folder / "categories.list").write_text("art\nbiology\n")
    (folder / "trainset_txt_img_cat.list").write_text("t1\ti1\t2\nt2\ti2\t1\n")
    (folder / "testset_txt_img_cat.list").write_text("t3\ti3\t1\n")
    matrices = {"I_tr": [[1.0, 2], [3, 4]], "T_tr": [[5.0], [6]], "I_te": [[7.0, 8]], "T_te": [[9.0]]}
    io.savemat(folder / "raw_features.mat", matrices)
    return folder


def test_wikipedia_pairs_have_features_and_no_bytes(tmp_path: Path) -> None:
    source = Wikipedia(wikipedia(tmp_path))
    found = rows(source)
    assert {(*at, item.label, item.pair, tuple(source.feature(item))) for at, item in found.items()} == {
        ("photo", "train/i1", "biology", None, (1.0, 2.0)),
        ("photo", "train/i2", "art", None, (3.0, 4.0)),
        ("photo", "test/i3", "art", None, (7.0, 8.0)),
        ("text", "train/t1", "biology", "train/i1", (5.0,)),
        ("text", "train/t2", "art", "train/i2", (6.0,)),
        ("text", "test/t3", "art", "test/i3", (9.0,)),
    }
    assert {source.load(item) for item in found.values()} == {b""}
    assert {item.text for item in found.values()} == {None}


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("testset_txt_img_cat.list", "t3\ti3\t1\nt4\ti4\t1\n", ConfigError),
        ("testset_txt_img_cat.list", "t3\ti3\t3\n", ConfigError),
        ("raw_features.mat", "once upon a time", DamagedArtifact),
    ],
)
def test_lists_and_features_that_do_not_fit_are_refused(
    tmp_path: Path, name: str, content: str, error: type[Exception]
) -> None:
    (wikipedia(tmp_path) / name).write_text(content)
    with pytest.raises(error, match=name):
        list(Wikipedia(tmp_path).items())


@pytest.mark.skipif(not (SHARED / "wikipedia").is_dir(), reason="the Wikipedia set is not beside this checkout")
def test_the_published_wikipedia_set() -> None:
    source = Wikipedia(SHARED / "wikipedia")
    items = list(source.items())
    tests = [item for item in items if item.key.startswith("test/") and item.modality == "text"]
    assert (len(items), len(tests)) == (2 * 2866, 693)
    assert sum(item.label == "art" for item in tests) == 34
    assert {len(source.feature(item)) for item in tests} == {10}
    assert np.isfinite(source.feature(items[0])).all()


def test_json_labels_may_be_numbers(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "nought", "label": 0}) + "\n")
    assert rows(Pairs(tmp_path))["text", "t.jsonl:1"].label == "0"
