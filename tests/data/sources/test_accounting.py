"""Rows in are rows used and rows quarantined: every file that looks like an image is a row, in every source."""

import io
import json
import logging
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.sources.helpers import SHARED, files, jpeg, refused, rows
from zsr.data.listing import listing
from zsr.data.prepare import warn_unread
from zsr.data.sources import Item, Source
from zsr.data.sources.folders import Folders
from zsr.data.sources.pairs import Pairs
from zsr.data.sources.parquet import Columns, Parquet
from zsr.data.sources.quickdraw import QuickDraw
from zsr.data.sources.registry import Options, open_source
from zsr.data.sources.restrict import restricted
from zsr.data.sources.sketchy import Sketchy, SketchyOptions
from zsr.data.sources.tree import Tree, plain_name
from zsr.data.sources.tuberlin import TUBerlin
from zsr.data.sources.webdataset import WebDataset
from zsr.data.sources.wikipedia import Wikipedia
from zsr.errors import ConfigError, StorageError

IMAGES = (
    "photo/cat/1.jpg",
    "photo/cat/deep/er/2.JPG",  # in folders below its class
    "photo/cat/no ending",
    "photo/cat/IMG 12.05.2021",  # what looks like an ending is none
    "photo/cat/\u5199\u771f \u00e9.jpeg",
    "photo/cat/e\u0301.png",  # NFD, as macOS writes it
    "photo/cat/x.heic",
    "photo/loose.jpg",
    "sketch/cat/1-1.png",
    "sketch/loose.png",
    "elsewhere/deep/3.jpg",
    "4.webp",
)


def messy(root: Path) -> Path:
    """IMAGES, and what is none of them."""
    files(root, *IMAGES)
    for name in (".DS_Store", "photo/cat/.DS_Store", "photo/cat/Thumbs.db", "photo/cat/._1.jpg", "photo/cat/clip.mp4"):
        (root / name).write_bytes(b"Mac OS X")
    (root / "photo" / "cat" / "notes").write_text("no image")
    return root


def keys(source: Source) -> set[str]:
    return {item.key for item in source.items() if item.modality != "text"}


def good(source: Source) -> set[str]:
    return {item.key for item in source.items() if not item.problem}


@pytest.mark.parametrize("make", [Folders, Sketchy, TUBerlin, QuickDraw])
def test_every_image_below_the_input_is_a_row(tmp_path: Path, make: Callable[[Path], Source]) -> None:
    assert keys(make(messy(tmp_path))) == set(IMAGES)


def test_images_in_folders_below_a_class_belong_to_it(tmp_path: Path) -> None:
    files(tmp_path, "photo/Palm Tree/2021/may/1.jpg", "sketch/palm-tree/a/1-1.png")
    for source in (Folders(tmp_path), Sketchy(tmp_path), TUBerlin(tmp_path), QuickDraw(tmp_path)):
        assert {item.label for item in source.items()} == {"palm_tree"}
        assert all(source.load(item) == jpeg() for item in source.items())


def test_loose_images_are_a_gallery_without_classes(tmp_path: Path) -> None:
    found = rows(Folders(files(tmp_path, "photo/1.jpg", "photo/cat/2.jpg")))
    assert {item.key: (item.label, item.problem) for item in found.values()} == {
        "photo/1.jpg": (None, ""),
        "photo/cat/2.jpg": ("cat", ""),
    }


def test_loose_images_of_a_published_set_are_bad_rows_with_a_reason(tmp_path: Path) -> None:
    files(tmp_path, "photo/cat/1.jpg", "sketch/cat/1-1.png", "photo/2.jpg", "3.jpg")
    for source in (Sketchy(tmp_path), TUBerlin(tmp_path), QuickDraw(tmp_path)):
        found = rows(source)
        assert good(source) == {"photo/cat/1.jpg", "sketch/cat/1-1.png"}
        assert {refused(source, found["photo", key]) for key in ("photo/2.jpg", "3.jpg")} == {"misplaced"}


def test_a_bare_folder_of_images_is_told_where_they_go(tmp_path: Path) -> None:
    files(tmp_path, "1.jpg", "2021/2.jpg")
    with pytest.raises(ConfigError, match=r"'2021'.* and 1 images; expected .*photo/NAME.jpg for a gallery"):
        list(Folders(tmp_path).items())


@pytest.mark.parametrize("make", [Folders, Sketchy, TUBerlin, QuickDraw])
def test_the_case_of_folders_does_not_count(tmp_path: Path, make: Callable[[Path], Source]) -> None:
    files(tmp_path, "Photo/cat/1.jpg", "SKETCH/cat/1-1.png")
    assert {(item.modality, item.key, item.problem) for item in make(tmp_path).items()} == {
        ("photo", "Photo/cat/1.jpg", ""),
        ("sketch", "SKETCH/cat/1-1.png", ""),
    }


def test_two_spellings_of_a_modality_are_both_read(tmp_path: Path) -> None:
    files(tmp_path, "Photo/cat/1.jpg", "photo/cat/2.jpg")
    assert good(Folders(tmp_path)) == {"Photo/cat/1.jpg", "photo/cat/2.jpg"}


def test_a_class_that_is_spelt_in_two_ways_keeps_its_pairs(tmp_path: Path) -> None:
    files(tmp_path, "photo/Palm Tree/1.jpg", "sketch/palm_tree/1-1.png")
    assert rows(Sketchy(tmp_path))["sketch", "sketch/palm_tree/1-1.png"].pair == "photo/Palm Tree/1.jpg"


def test_what_is_no_image_is_counted_on_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = listing(Folders(messy(tmp_path)), seed=0)
    assert found.unread == {".DS_Store": 2, "._*": 1, ".db": 1, ".mp4": 1, "no ending": 1}
    assert listing(restricted(Folders(tmp_path), ""), seed=0).unread == found.unread
    with caplog.at_level(logging.WARNING, "zsr"):
        warn_unread(found.unread)
    assert [record.getMessage() for record in caplog.records] == [
        "not read: 6 files (.DS_Store 2, ._* 1, .db 1, .mp4 1, no ending 1)"
    ]


def test_links_are_followed_and_loops_and_links_to_nowhere_are_bad_rows(tmp_path: Path) -> None:
    outside = files(tmp_path / "outside", "a.jpg", "more/b.jpg")
    root = files(tmp_path / "root", "photo/cat/1.jpg")
    cat = root / "photo" / "cat"
    (cat / "file.jpg").symlink_to(outside / "a.jpg")
    (cat / "folder").symlink_to(outside / "more")
    (cat / "gone.jpg").symlink_to("nowhere")
    (cat / "gone folder").symlink_to("nowhere")
    (cat / "self.jpg").symlink_to("self.jpg")
    (cat / "up").symlink_to(root)
    (cat / "further up").symlink_to(tmp_path)
    source = Folders(root)
    found = rows(source)
    assert good(source) == {"photo/cat/1.jpg", "photo/cat/file.jpg", "photo/cat/folder/b.jpg"}
    bad = {item.key.removeprefix("photo/cat/"): item for item in found.values() if item.problem}
    assert set(bad) == {"gone.jpg", "gone folder", "self.jpg", "up", "further up"}
    assert {refused(source, item) for item in bad.values()} == {"bad_link"}
    assert bad["up"].problem == "bad_link: The link leads to a folder that holds it; remove it."


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_cannot_be_listed_is_a_bad_row(tmp_path: Path) -> None:
    files(tmp_path, "photo/cat/1.jpg", "photo/cat/locked/2.jpg")
    (tmp_path / "photo" / "cat" / "locked").chmod(0)
    assert refused(Folders(tmp_path), rows(Folders(tmp_path))["photo", "photo/cat/locked"]) == "unreadable"
    (tmp_path / "photo" / "cat" / "locked").chmod(0o700)


def test_an_input_that_cannot_be_listed_ends_with_a_storage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(place: Path) -> None:
        raise PermissionError(13, "Permission denied", str(place))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(StorageError, match="cannot be listed: Permission denied"):
        open_source("folders", tmp_path, Options())


def test_every_message_reads_as_a_sentence(tmp_path: Path) -> None:
    messy(tmp_path)
    (tmp_path / "photo" / "cat" / "gone.jpg").symlink_to("nowhere")
    (tmp_path / "text" / "cat").mkdir(parents=True)
    (tmp_path / "text" / "cat" / "t.TXT").write_bytes("K\u00e4tzchen".encode("latin-1"))
    files(tmp_path, "text/cat/5.jpg")
    problems = [item.problem.partition(": ")[2] for item in Folders(tmp_path).items() if item.problem]
    assert len(problems) == 5
    assert all(problem[0].isupper() and problem.endswith(".") for problem in problems)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_texts_in_any_folder_and_case_are_read(tmp_path: Path, encoding: str) -> None:
    for name in ("text/cat/a.TXT", "text/cat/deep/b.txt", "text/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("K\u00e4tzchen", encoding=encoding)
    assert {(item.key, item.label, item.text) for item in Folders(tmp_path).items()} == {
        ("text/cat/a.TXT", "cat", "K\u00e4tzchen"),
        ("text/cat/deep/b.txt", "cat", "K\u00e4tzchen"),
        ("text/c.txt", None, "K\u00e4tzchen"),
    }


def test_what_the_options_of_sketchy_leave_out_is_counted(tmp_path: Path) -> None:
    files(
        tmp_path,
        "256x256/photo/tx_000000000000/bat/n1_1.jpg",
        "256x256/photo/tx_000100000000/bat/n1_1.jpg",
        "256x256/sketch/tx_000000000000/bat/n1_1-1.png",
        "256x256/sketch/tx_000100000000/bat/n1_1-1.png",
        "EXTEND_image_sketchy/bat/n1_1.jpg",
    )
    found = listing(Sketchy(tmp_path, SketchyOptions(photos="extended")), seed=0)
    assert (found.count, sum(found.unread.values())) == (2, 3)
    found = listing(Sketchy(tmp_path, SketchyOptions(photos="original")), seed=0)
    assert found.unread == {
        "256x256/photo/tx_000100000000/ (--sketchy.rendering tx_000000000000)": 1,
        "256x256/sketch/tx_000100000000/ (--sketchy.rendering tx_000000000000)": 1,
        "EXTEND_image_sketchy/ (--sketchy.photos original)": 1,
    }
    assert not [item for item in found.items() if item.problem]


def test_a_second_copy_of_tuberlin_is_counted(tmp_path: Path) -> None:
    files(tmp_path, "png/ant/1.png", "png_ready/ant/1.png", "ImageResized/ant/a.jpg")
    found = listing(TUBerlin(tmp_path), seed=0)
    assert (found.count, found.unread) == (2, {"png_ready/ (another copy: png/ is read)": 1})


def test_endings_of_tables_and_archives_are_read_in_any_case(tmp_path: Path) -> None:
    files(tmp_path / "pairs", "1.jpg", "2.jpg", "3.jpg", "4.jpg")
    (tmp_path / "pairs" / "A.CSV").write_text("image,text\n1.jpg,one\n")
    (tmp_path / "pairs" / "b.TSV").write_text("image\ttext\n2.jpg\ttwo, and more\n")
    (tmp_path / "pairs" / "c.JSONL").write_text('\ufeff{"image": "3.jpg", "text": "three"}\n')
    (tmp_path / "pairs" / "d.ndjson").write_text('{"image": "4.jpg", "text": "four"}\n')
    assert {item.text for item in Pairs(tmp_path / "pairs").items()} == {None, "one", "two, and more", "three", "four"}
    line = json.dumps({"word": "ant", "key_id": "1", "drawing": [[[0, 1], [0, 1]]]})
    (tmp_path / "quick").mkdir()
    (tmp_path / "quick" / "ANT.NDJSON").write_text(line)
    assert good(QuickDraw(tmp_path / "quick")) == {"ant/1"}
    place = tmp_path / "parquet" / "modality=Photo" / "part" / "A.PARQUET"
    place.parent.mkdir(parents=True)
    pq.write_table(pa.table({"key": ["a"], "image": [jpeg()]}), place)
    assert good(Parquet(tmp_path / "parquet")) == {"a"}
    tar(tmp_path / "tars" / "deep" / "0.TAR", ("1.JPG", jpeg()))
    assert good(WebDataset(tmp_path / "tars")) == {"deep/0/1.jpg"}


def test_images_beside_tables_and_archives_are_bad_rows(tmp_path: Path) -> None:
    tar(tmp_path / "tars" / "0.tar", ("1.jpg", jpeg()))
    (tmp_path / "parquet" / "modality=photo").mkdir(parents=True)
    pq.write_table(pa.table({"key": ["a"], "image": [jpeg()]}), tmp_path / "parquet" / "modality=photo" / "a.parquet")
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "a.csv").write_text("image,text\n1.jpg,one\n")
    files(tmp_path, "tars/2.jpg", "parquet/2.jpg", "parquet/modality=photo/3.jpg", "pairs/1.jpg", "pairs/shop/2.jpg")
    for source, bad in (
        (WebDataset(tmp_path / "tars"), {"2.jpg"}),
        (Parquet(tmp_path / "parquet"), {"2.jpg", "modality=photo/3.jpg"}),
        (Pairs(tmp_path / "pairs"), {"shop/2.jpg"}),
    ):
        assert {item.key for item in source.items() if item.problem.startswith("misplaced: ")} == bad


@pytest.mark.skipif(not (SHARED / "wikipedia").is_dir(), reason="the Wikipedia set is not here")
def test_images_of_the_wikipedia_set_are_counted_and_others_are_bad_rows(tmp_path: Path) -> None:
    for file in (SHARED / "wikipedia").iterdir():
        shutil.copy(file, tmp_path)
    named = next(item for item in Wikipedia(tmp_path).items() if item.modality == "photo").key.partition("/")[2]
    files(tmp_path, f"images/art/{named}.jpg", "images/art/other.jpg")
    found = listing(Wikipedia(tmp_path), seed=0)
    assert found.unread["images of rows (their features are read instead)"] == 1
    assert [item.key for item in found.items() if item.problem] == ["images/art/other.jpg"]


def test_the_embedded_set_takes_no_input(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reads no --input"):
        open_source("emoji", files(tmp_path, "1.jpg"), Options())


def tar(path: Path, *members: tuple[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path.parent


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("./0001.jpg", "0001.jpg"),
        ("photo\\cat\\1.jpg", "photo/cat/1.jpg"),
        ("photo//cat/./1.jpg", "photo/cat/1.jpg"),
        ("e\u0301.jpg", "e\u0301.jpg"),
        ("\uff21\uff11 \u00bd.jpg", "\uff21\uff11 \u00bd.jpg"),
        ("\ufb01sh.jpg", "\ufb01sh.jpg"),
        ("\u00e9" * 125 + ".jpg", "\u00e9" * 125 + ".jpg"),
    ],
)
def test_names_that_are_only_read_from_are_taken_by_tars_and_tables(tmp_path: Path, name: str, plain: str) -> None:
    assert plain_name(name) == plain
    tar(tmp_path / "tars" / "0.tar", (name, jpeg()))
    source: Source = WebDataset(tmp_path / "tars")
    assert good(source) == {f"0/{plain}"}
    files(tmp_path / "pairs", plain)
    (tmp_path / "pairs" / "t.jsonl").write_text(json.dumps({"image": name, "text": "t"}))
    source = Pairs(tmp_path / "pairs")
    found = rows(source)
    assert source.load(found["photo", plain]) == jpeg()
    assert found["text", "t.jsonl:1"].pair == plain


@pytest.mark.parametrize(
    "name", ["../1.jpg", "a/../../1.jpg", "/1.jpg", "C:/1.jpg", "..\\1.jpg", "a\0.jpg", "\u2025/1.jpg"]
)
def test_names_that_lead_out_are_refused_still(tmp_path: Path, name: str) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"image": name, "text": "t"}))
    source = Pairs(tmp_path)
    assert refused(source, rows(source)["text", "t.jsonl:1"]) == "bad_path"


def test_a_table_may_spell_a_file_in_another_unicode_form_or_case(tmp_path: Path) -> None:
    files(tmp_path, "Bilder/e\u0301.JPG")
    (tmp_path / "t.jsonl").write_text(json.dumps({"image": "bilder/\u00e9.jpg", "text": "t"}))
    source = Pairs(tmp_path)
    assert source.load(rows(source)["photo", "Bilder/e\u0301.JPG"]) == jpeg()


def test_members_of_a_base_name_are_found_wherever_they_lie(tmp_path: Path) -> None:
    photos = [(f"{n}.jpg", jpeg((n, 0, 0))) for n in range(3)]
    classes = [(f"{n}.cls", b"cat") for n in range(3)]
    texts = [(f"{n}.txt", f"text {n}".encode()) for n in range(3)]
    source = WebDataset(tar(tmp_path / "0.tar", *photos, *classes, *texts))
    found = rows(source)
    assert {(*at, item.label, item.pair, item.text, item.problem) for at, item in found.items()} == {
        *(("photo", f"0/{n}.jpg", "cat", None, None, "") for n in range(3)),
        *(("text", f"0/{n}.txt", "cat", f"0/{n}.jpg", f"text {n}", "") for n in range(3)),
    }


def test_two_different_classes_of_one_base_name_are_a_conflict(tmp_path: Path) -> None:
    source = WebDataset(
        tar(tmp_path / "0.tar", ("1.jpg", jpeg()), ("1.cls", b"cat"), ("2.jpg", b""), ("1.cls", b"dog"))
    )
    assert refused(source, rows(source)["photo", "0/1.jpg"]) == "conflict"


def test_members_that_are_no_part_of_a_row_are_counted(tmp_path: Path) -> None:
    heic = b"\0\0\0\x18ftypheic\0\0\0\0"
    members = (("1.jpg", jpeg()), ("._1.jpg", b"Mac OS X"), ("1.mp4", b"film"), ("2.heic", heic), ("3", jpeg()))
    found = listing(WebDataset(tar(tmp_path / "0.tar", *members)), seed=0)
    assert {item.key for item in found.items()} == {"0/1.jpg", "0/2.heic", "0/3"}
    assert found.unread == {".mp4 in tars": 1, "no ending in tars": 1}


@pytest.mark.parametrize("name", ["metadata.csv", "train/metadata.csv", "train/metadata.jsonl"])
def test_image_folders_of_hugging_face_give_images_and_texts(tmp_path: Path, name: str) -> None:
    folder = Path(name).parent
    files(tmp_path, str(folder / "0001.png"), str(folder / "deep/0002.png"))
    table = [("0001.png", "a cat", "cat"), ("deep/0002.png", "a dog", "dog")]
    lines = [json.dumps({"file_name": n, "text": t, "label": c}) for n, t, c in table]
    if name.endswith(".csv"):
        lines = ["file_name,text,label", *(",".join(row) for row in table)]
    (tmp_path / name).write_text("\n".join(lines))
    source = Pairs(tmp_path)
    found = rows(source)
    photos = {str(folder / n): label for n, _, label in table}
    assert {key: item.label for (modality, key), item in found.items() if modality == "photo"} == photos
    assert {(item.text, item.pair) for (modality, _), item in found.items() if modality == "text"} == {
        (text, str(folder / n)) for n, text, _ in table
    }
    assert all(source.load(found["photo", key]) == jpeg() for key in photos)


@pytest.mark.parametrize("columns", ["image_path,caption", "filename,text", "url,label,text"])
def test_images_in_an_unknown_column_are_refused_by_its_name(tmp_path: Path, columns: str) -> None:
    name = columns.partition(",")[0]
    (tmp_path / "t.csv").write_text(f"{columns}\n{','.join(['a/1.jpg'] * (columns.count(',') + 1))}\n")
    with pytest.raises(ConfigError, match=rf"t.csv:2: the column '{name}' names an image .*'file_name'"):
        list(Pairs(tmp_path).items())


def test_columns_that_are_not_read_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "t.csv").write_text("text,price\nkiwi,3\nlime,4\n")
    list(Pairs(tmp_path).items())
    assert [record.getMessage() for record in caplog.records] == [f"{tmp_path}/t.csv: ignored columns: price"]


def test_a_table_in_utf16_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,label\nkiwi,a\n", encoding="utf-16")
    with pytest.raises(ConfigError, match=r"t.csv: is UTF-16, expected UTF-8"):
        list(Pairs(tmp_path).items())


def parquet(root: Path, table: pa.Table) -> Parquet:
    (root / "modality=photo").mkdir()
    pq.write_table(table, root / "modality=photo" / "a.parquet")
    return Parquet(root)


def test_columns_as_img2dataset_calls_them_are_explained(tmp_path: Path) -> None:
    source = parquet(tmp_path, pa.table({"key": ["a"], "jpg": [jpeg()], "txt": ["t"]}))
    with pytest.raises(ConfigError, match=r"none of the columns \['image', 'text', 'feature'\].*--columns.image jpg"):
        list(source.items())
    source = Parquet(tmp_path, Columns(image="jpg", text="txt"))
    assert source.load(next(source.items())) == jpeg()


def test_images_by_path_are_bad_rows_that_say_so(tmp_path: Path) -> None:
    source = parquet(tmp_path, pa.table({"key": ["a"], "image": [{"bytes": None, "path": "x/1.jpg"}]}))
    assert refused(source, next(source.items())) == "missing_value"


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["[1, 2]"]),
        pa.array([b"12"]),
        pa.array([1.5]),
        pa.array([[[1.0], [2.0]]]),
        pa.array([{"x": 1.0}]),
        pa.array([[True]]),
        pa.array([["1"]]),
    ],
)
def test_features_of_another_type_are_refused_with_it(tmp_path: Path, column: pa.Array) -> None:
    source = parquet(tmp_path, pa.table({"key": ["a"], "feature": column}))
    with pytest.raises(ConfigError, match=r"column 'feature' is .*, expected a list of numbers"):
        list(source.items())


@pytest.mark.parametrize("kind", [pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.int64(), 2)])
def test_features_are_lists_of_any_kind(tmp_path: Path, kind: pa.DataType) -> None:
    source = parquet(tmp_path, pa.table({"key": ["a"], "feature": pa.array([[1, 2]], kind)}))
    feature = source.feature(next(source.items()))
    assert feature is not None
    assert feature.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1.0, float("nan")], pa.float32()),
        ([1.0, float("inf")], pa.float64()),
        ([1.0, None], pa.float32()),
        ([1, None], pa.int64()),
        ([1.0, 1e39], pa.float64()),
        ([], pa.float32()),
    ],
)
def test_features_that_are_not_finite_are_bad_rows(
    tmp_path: Path, values: list[float | None], kind: pa.DataType, recwarn: pytest.WarningsRecorder
) -> None:
    source = parquet(tmp_path, pa.table({"key": ["a"], "feature": pa.array([values], pa.list_(kind))}))
    with pytest.raises(ValueError, match="finite") as error:
        source.feature(next(source.items()))
    assert getattr(error.value, "kind", "") == "not_finite"
    assert not recwarn


def test_a_tensor_column_is_refused_with_its_conversion_and_an_unused_one_is_not_read(tmp_path: Path) -> None:
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ones((1, 4), np.float32))
    source = parquet(tmp_path, pa.table({"key": ["a"], "text": ["t"], "feature": tensors}))
    with pytest.raises(
        ConfigError, match=r"extension type arrow.fixed_shape_tensor; write its plain values.*\.storage"
    ):
        list(source.items())
    assert good(Parquet(tmp_path, Columns(feature="none"))) == {"a"}


def test_only_the_published_sets_have_their_licenses(tmp_path: Path) -> None:
    own = files(tmp_path / "own", "photo/cat/a.jpg", "sketch/cat/a-1.png")
    for source in (Folders(own), Sketchy(own), TUBerlin(own), QuickDraw(own)):
        assert source.facts["attribution"] == ""
    sketchy = files(tmp_path / "s", "photo/cat/n02121620_1.jpg", "sketch/cat/n02121620_1-1.png")
    assert Sketchy(sketchy).facts["attribution"].endswith("research use")
    tuberlin = files(tmp_path / "t", "png/cat/1.png", "ImageResized/cat/a.jpg")
    assert TUBerlin(tuberlin).facts["attribution"].startswith("TU-Berlin")


def test_a_path_of_an_input_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files(tmp_path, "in/photo/cat/1.jpg")
    monkeypatch.chdir(tmp_path)
    source = Folders("in")
    monkeypatch.chdir("/")
    assert keys(source) == {"photo/cat/1.jpg"}
    assert Tree.at(f"file://{tmp_path}/in").folders() == ["photo"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Tree.at("~/in").folders() == ["photo"]


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An environment whose S3 is down; clients are cached by process, and this one must not be met by other tests."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    client = fsspec.get_filesystem_class("s3")
    client.clear_instance_cache()
    yield
    client.clear_instance_cache()


@pytest.mark.parametrize("url", ["s3://bucket/raw", "https://127.0.0.1:9/raw"])
def test_an_input_that_cannot_be_reached_is_a_storage_error(unreachable: None, url: str) -> None:
    with pytest.raises(StorageError, match="check credentials and endpoint"):
        open_source("folders", url, Options())


def test_an_item_with_a_problem_has_nothing_to_load() -> None:
    item = Item("photo", "a", None, problem="misplaced: There.")
    assert refused(Folders("/"), item) == "misplaced"
