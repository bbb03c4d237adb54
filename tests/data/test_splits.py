"""Seen and unseen classes never meet."""

import json
from pathlib import Path

import pytest

from zsr.data.published import published as published_data
from zsr.data.splits import Split, choose, load, published
from zsr.errors import ConfigError, Leakage

LABELS = tuple("abcdefghij")


def test_the_published_splits_have_their_published_sizes() -> None:
    sizes = {name: len(load(name).unseen) for name in published()}
    assert sizes == {
        "sketchy-21": 21,
        "sketchy-25": 25,
        "sketchy-25-sempcyc": 25,
        "tuberlin-30": 30,
        "tuberlin-30-sempcyc": 30,
        "quickdraw-30": 30,
    }


def test_roles_are_disjoint_and_complete() -> None:
    split = choose("random:3:0", LABELS, 2, seed=5)
    roles = [split.unseen, split.validation, split.training]
    assert [len(role) for role in roles] == [3, 2, 5]
    assert sorted(name for role in roles for name in role) == list(LABELS)


def test_a_draw_depends_on_its_seed_alone() -> None:
    assert choose("random:3:0", LABELS, 2, 0) == choose("random:3:0", reversed(LABELS), 2, 0)
    assert choose("random:3:1", LABELS, 2, 0) != choose("random:3:0", LABELS, 2, 0)


def test_a_class_in_two_roles_is_a_leak() -> None:
    with pytest.raises(Leakage, match=r"\['b'\] are in both unseen and training"):
        Split(unseen=("a", "b"), training=("b", "c"))


def test_a_file_that_trains_on_an_unseen_class_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"unseen": ["a"], "training": ["a", "b", "c"]}))
    with pytest.raises(Leakage):
        choose(str(path), LABELS, 2, 0)


def test_seen_classes_of_a_file_bound_what_is_trained(tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"unseen": ["a"], "seen": ["b", "c", "d", "e"]}))
    split = choose(str(path), LABELS, 2, 0)
    assert set(split.training) | set(split.validation) == set("bcde")


def test_validation_is_cut_from_a_pinned_training_list(tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"unseen": ["a"], "training": ["b", "c", "d", "e"]}))
    split = choose(str(path), LABELS, 2, 0)
    assert len(split.validation) == len(split.training) == 2
    assert set(split.validation) | set(split.training) == set("bcde")


@pytest.mark.parametrize(
    ("content", "message"),
    [({"unseen": ["zebra"]}, "zebra"), ({"test": ["a"]}, "unseen"), ({"unseen": ["a"], "train": ["b"]}, "train")],
)
def test_a_bad_file_is_explained(tmp_path: Path, content: dict[str, list[str]], message: str) -> None:
    path = tmp_path / "split.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        choose(str(path), LABELS, 2, 0)


@pytest.mark.parametrize("name", ["nowhere", "random:x:0", "random:3", "random:30:0"])
def test_a_bad_name_is_explained(name: str) -> None:
    with pytest.raises(ConfigError):
        choose(name, LABELS, 2, 0)


def test_half_of_ten_classes_leave_all_others_to_train_on_without_validation() -> None:
    split = choose("random:5:0", LABELS, 0, 0)
    assert split.validation == ()
    assert sorted(split.unseen + split.training) == list(LABELS)


@pytest.mark.parametrize(
    ("name", "held_out", "message"),
    [
        ("random:7:0", 2, "leaves 1 classes .* may hold out at most 1"),
        ("random:5:0", 8, "leaves 0 classes .* may hold out at most 3"),
    ],
)
def test_too_few_classes_to_train_on(name: str, held_out: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose(name, LABELS, held_out, 0)


def test_a_split_finds_its_classes_under_the_spelling_of_the_data() -> None:
    labels = [*(name.replace("_", "") for name in load("sketchy-21").unseen), "a", "b", "c"]
    split = choose("sketchy-21", labels, 1, 0)
    assert set(split.unseen) | set(split.validation) | set(split.training) == set(labels)
    hot_dog = Split(("hot_dog",)).resolve(["hotdog", "a", "b"], 0, 0)
    assert hot_dog.unseen == ("hotdog",)


def test_an_unseen_class_under_a_second_spelling_is_a_leak() -> None:
    with pytest.raises(Leakage, match="two ways"):
        Split(("hot_dog",)).resolve(["hot_dog", "hotdog", "a", "b"], 0, 0)


@pytest.mark.parametrize(
    ("name", "data"), [("sketchy", "sketchy-extended"), ("tuberlin", "tuberlin-extended"), ("quickdraw", "quickdraw")]
)
def test_published_splits_name_classes_of_their_data_set(name: str, data: str) -> None:
    for split in published():
        if split.startswith(name):
            assert set(load(split).unseen) <= set(published_data(data).classes)


@pytest.mark.parametrize(
    "content",
    [
        "null",
        "5",
        '"a"',
        "[]",
        '[{"unseen": ["a"]}]',
        '{"unseen": [1, 2]}',
        '{"unseen": "a"}',
        '{"unseen": null}',
        '{"unseen": ["a"], "validation": null}',
        '{"unseen": [{"name": "a"}]}',
        '{"unseen": ["a"], "source": 3}',
        '{"unseen": ["a"], "test": []}',
        '{"validation": ["a"]}',
        "[" * 50_000,
        "{",
        "",
    ],
)
def test_a_file_of_another_shape_is_refused_with_what_it_is_to_hold(tmp_path: Path, content: str) -> None:
    (tmp_path / "split.json").write_text(content)
    with pytest.raises(ConfigError, match=r'expected \{"unseen": \["NAME", ...\]\}') as error:
        load(str(tmp_path / "split.json"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_file_in_utf8_is_read_with_or_without_its_mark(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "split.json").write_text('{"unseen": ["K\u00e4tzchen"]}', encoding=encoding)
    assert load(str(tmp_path / "split.json")).unseen == ("k\u00e4tzchen",)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_file_in_another_encoding_is_refused(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "split.json").write_text('{"unseen": ["K\u00e4tzchen"]}', encoding=encoding)
    with pytest.raises(ConfigError, match=r"split.json: line .* is not UTF-8"):
        load(str(tmp_path / "split.json"))
