"""Tables of images and texts become rows, and a bad line is a bad row."""

import json
from pathlib import Path

import pytest

from tests.data.sources.helpers import SHARED, files, refused, rows
from zsr.data.listing import listing
from zsr.data.sources.pairs import Pairs
from zsr.errors import ConfigError


def test_a_line_is_a_photo_and_its_text(tmp_path: Path) -> None:
    files(tmp_path, "shop/1.png")
    (tmp_path / "a.jsonl").write_text('{"image": "shop/1.png", "text": "ripe", "label": "Sweet Potato"}\n')
    (tmp_path / "b.csv").write_text("\ufeffimage,text,class\nshop/1.png,two of them,sweet-potato\n,no picture,Kiwi\n")
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
    files(tmp_path, "photo/Red Kiwi/1.jpg")
    (tmp_path / "texts.jsonl").write_text('{"class": "Red Kiwi", "text": "sour"}\n')
    assert rows(Pairs(tmp_path))["photo", "photo/Red Kiwi/1.jpg"].label == "red_kiwi"


def test_a_replaced_picture_has_another_guard(tmp_path: Path) -> None:
    files(tmp_path, "1.png")
    (tmp_path / "t.jsonl").write_text('{"image": "1.png"}\n{"image": "gone.png"}\n')
    before = rows(Pairs(tmp_path))
    (tmp_path / "1.png").write_bytes(b"another")
    after = rows(Pairs(tmp_path))
    assert before["photo", "1.png"].guard != after["photo", "1.png"].guard
    assert after["photo", "gone.png"].guard == ""


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("{", "malformed"),
        ("[1]", "malformed"),
        ('"' + "x" * (17 << 20) + '"', "malformed"),
        ('{"label": "x"}', "missing_value"),
        ('{"image": "../secret.png"}', "bad_path"),
        ('{"image": "/etc/passwd"}', "bad_path"),
        ('{"image": "a\\u0000b"}', "bad_path"),
        ('{"text": NaN, "label": "x"}', "wrong_type"),
        ('{"text": "t", "label": ["x"]}', "wrong_type"),
        ('{"text": "t", "label": true}', "wrong_type"),
        ('{"text": "t", "label": "a\\u0000"}', "bad_label"),
        ('{"text": "\\ud800", "label": "x"}', "bad_text"),
        ('{"image": "1.png", "label": "lemon"}', "conflict"),
    ],
)
def test_a_bad_line_is_a_bad_row_and_the_next_one_is_used(tmp_path: Path, line: str, kind: str) -> None:
    lines = ['{"image": "1.png", "label": "lime"}', line, '{"text": "fine", "label": 7}']
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    found = rows(Pairs(tmp_path))
    assert refused(Pairs(tmp_path), found["text", "t.jsonl:2"]) == kind
    assert found["text", "t.jsonl:3"].label == "7"


@pytest.mark.parametrize("line", ["1.png,t,a,b", '1.png,"t"t,a', "x" * (17 << 20), "1.png"])
def test_a_bad_line_of_a_csv_is_a_bad_row_and_the_next_one_is_used(tmp_path: Path, line: str) -> None:
    (tmp_path / "t.csv").write_text(f"text,label\n{line}\nfine,lime\n")
    found = rows(Pairs(tmp_path))
    if line != "1.png":  # a short line has values and then none
        assert refused(Pairs(tmp_path), found["text", "t.csv:2"]) == "malformed"
    assert found["text", "t.csv:3"].label == "lime"


def test_bytes_that_are_no_utf8_are_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"text,label\n\xff,lime\nfine,lime\n")
    assert refused(Pairs(tmp_path), rows(Pairs(tmp_path))["text", "t.csv:2"]) == "bad_text"


def test_a_folder_without_tables_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no \*.jsonl"):
        list(Pairs(tmp_path).items())


def test_a_csv_without_a_header_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("1.png,ripe,lime\n")
    with pytest.raises(ConfigError, match=r"t.csv: found the columns \['1.png'"):
        list(Pairs(tmp_path).items())


@pytest.mark.skipif(not (SHARED / "grocery").is_dir(), reason="the grocery photos are not beside this checkout")
def test_grocery_photos_and_descriptions() -> None:
    listed = listing(Pairs(SHARED / "grocery"), seed=0)
    assert listed.rows == {"photo": 1085, "text": 35}
    assert len(listed.labels) == 35
    bad = [item for item in listed.items() if item.problem]
    assert len(bad) == 35  # icons, which no line names
    assert all(item.key.startswith("iconic/") and item.problem.startswith("misplaced: ") for item in bad)


def test_json_labels_may_be_numbers(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "nought", "label": 0}) + "\n")
    assert rows(Pairs(tmp_path))["text", "t.jsonl:1"].label == "0"
