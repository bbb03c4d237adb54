"""Folders of classes, an allowed list of classes, and files that are no files."""

import os
import pickle
from pathlib import Path

import pytest

from tests.data.sources.helpers import files, refused, rows
from zsr.data.sources.folders import Folders
from zsr.data.sources.registry import Options, open_source
from zsr.data.sources.restrict import restricted
from zsr.data.sources.sketchy import Sketchy
from zsr.errors import ConfigError


def test_every_modality_is_found(tmp_path: Path) -> None:
    files(tmp_path, "sketch/Palm Tree/1.png", "photo/palm-tree/1.JPG")
    (tmp_path / "text" / "palm_tree").mkdir(parents=True)
    (tmp_path / "text" / "palm_tree" / "a.txt").write_text("a tall plant")
    source = Folders(tmp_path)
    found = rows(source)
    assert {(modality, item.label) for (modality, _), item in found.items()} == {
        (modality, "palm_tree") for modality in ("sketch", "photo", "text")
    }
    assert found["text", "text/palm_tree/a.txt"].text == "a tall plant"
    assert source.load(found["photo", "photo/palm-tree/1.JPG"])[:2] == b"\xff\xd8"


@pytest.mark.parametrize(("content", "kind"), [(b"\xff\xfe", "bad_text"), (b"x" * ((1 << 20) + 1), "oversized")])
def test_a_text_file_that_is_no_text_is_a_bad_row(tmp_path: Path, content: bytes, kind: str) -> None:
    (tmp_path / "text" / "a").mkdir(parents=True)
    (tmp_path / "text" / "a" / "t.txt").write_bytes(content)
    assert refused(Folders(tmp_path), rows(Folders(tmp_path))["text", "text/a/t.txt"]) == kind


def test_a_named_pipe_is_a_bad_row_and_does_not_hang(tmp_path: Path) -> None:
    files(tmp_path, "photo/a/1.jpg")
    os.mkfifo(tmp_path / "photo" / "a" / "2.jpg")
    assert refused(Folders(tmp_path), rows(Folders(tmp_path))["photo", "photo/a/2.jpg"]) == "wrong_type"


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    files(tmp_path, "photo/a/1.jpg")
    os.truncate(tmp_path / "photo" / "a" / "1.jpg", 1 << 40)
    assert refused(Folders(tmp_path), rows(Folders(tmp_path))["photo", "photo/a/1.jpg"]) == "oversized"


def test_a_link_to_nowhere_is_a_bad_row(tmp_path: Path) -> None:
    files(tmp_path, "photo/a/1.jpg")
    (tmp_path / "photo" / "a" / "2.jpg").symlink_to("gone")
    assert refused(Folders(tmp_path), rows(Folders(tmp_path))["photo", "photo/a/2.jpg"]) == "bad_link"


@pytest.mark.parametrize("there", ["pictures/a/1.jpg", "1.jpg"])
def test_another_layout_is_explained(tmp_path: Path, there: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        list(Folders(files(tmp_path, there)).items())


def test_items_come_one_at_a_time(tmp_path: Path) -> None:
    source = Folders(files(tmp_path, "photo/a/1.jpg", "photo/b/1.jpg"))
    items = source.items()
    assert next(items).label == "a"
    (tmp_path / "photo" / "b" / "1.jpg").rename(tmp_path / "photo" / "b" / "2.jpg")
    assert next(items).key == "photo/b/2.jpg"  # a folder is not looked at before its turn


def test_other_classes_than_those_of_a_list_are_bad_rows(tmp_path: Path) -> None:
    files(tmp_path, "photo/Hot-Air Balloon/1.jpg", "photo/ant/1.jpg")
    (tmp_path / "names.txt").write_text("hot air balloon\nbee\n")
    source = restricted(Folders(tmp_path), str(tmp_path / "names.txt"))
    found = rows(source)
    assert refused(source, found["photo", "photo/ant/1.jpg"]) == "unknown_class"
    assert found["photo", "photo/Hot-Air Balloon/1.jpg"].label == "hot_air_balloon"
    assert source.facts["allowed_classes"] == ["bee", "hot_air_balloon"]


def test_the_published_list_is_allowed_by_name(tmp_path: Path) -> None:
    files(tmp_path, "photo/unicorn/1.jpg", "sketch/unicorn/1-1.png", "photo/ant/1.jpg")
    source = restricted(Sketchy(tmp_path), "published")
    assert refused(source, rows(source)["photo", "photo/unicorn/1.jpg"]) == "unknown_class"
    with pytest.raises(ConfigError, match="no list is known for the source folders"):
        restricted(Folders(tmp_path), "published")


@pytest.mark.parametrize("content", ["", "ant\nAnt\n"])
def test_a_list_of_classes_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "names.txt").write_text(content)
    with pytest.raises(ConfigError, match="expected each once"):
        restricted(Folders(tmp_path), str(tmp_path / "names.txt"))


def test_a_source_goes_to_workers_and_an_empty_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="requires --input"):
        open_source("folders", tmp_path, Options())
    files(tmp_path, "photo/a/1.jpg")
    source = open_source("folders", tmp_path, Options())
    item = next(iter(source.items()))
    assert pickle.loads(pickle.dumps(source)).load(item) == source.load(item)


def test_the_same_rows_are_found_in_an_object_store(tmp_path: Path) -> None:
    import fsspec

    files(tmp_path, "photo/a/1.jpg", "photo/b/2.jpg", "sketch/a/1-1.png")
    fsspec.filesystem("memory").put(str(tmp_path), "/bucket", recursive=True)
    there, here = Sketchy("memory://bucket"), Sketchy(tmp_path)
    assert {at: item.pair for at, item in rows(there).items()} == {at: item.pair for at, item in rows(here).items()}
    for at, item in rows(there).items():
        assert pickle.loads(pickle.dumps(there)).load(item) == here.load(rows(here)[at])
