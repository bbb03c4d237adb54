"""Listing, slices and quarantine of zsr prepare."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.data.sources.helpers import files
from tests.pipeline import job, ok
from zsr.artifact import Plan, Store, open_artifact
from zsr.data import decode, writing
from zsr.data import listing as spilled
from zsr.data.listing import listing
from zsr.data.prepare import Prepare, plan, stage_listing
from zsr.data.rows import order_key, row_id
from zsr.data.sources import Item
from zsr.data.sources.folders import Folders
from zsr.errors import ConfigError


@dataclass(frozen=True)
class Listed:
    """A source of these items; its pictures are what the items' `where` spells."""

    listed: tuple[Item, ...]

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"name": "listed"}

    def items(self) -> Iterator[Item]:
        yield from self.listed

    def load(self, item: Item) -> bytes:
        return b"" if not item.where else _png(int(item.where))

    def feature(self, item: Item) -> None:
        return None


def _png(side: int) -> bytes:
    """Noise, which does not compress: about 3 * side * side bytes."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _texts(count: int) -> tuple[Item, ...]:
    return tuple(Item("text", f"t{i:04d}", f"c{i % 3}", text=f"text {i}", guard=str(i)) for i in range(count))


def test_slices_hold_every_row_once_in_the_order_of_the_seeded_hash() -> None:
    listed = listing(Listed(_texts(1000)), seed=3)
    slices = list(listed.slices(300))
    assert [(name, len(table)) for name, table in slices] == [
        ("modality=text/part-00000.parquet", 300),
        ("modality=text/part-00001.parquet", 300),
        ("modality=text/part-00002.parquet", 300),
        ("modality=text/part-00003.parquet", 100),
    ]
    keys = [key for _, table in slices for key in table.column("key").to_pylist()]
    ids = np.array([row_id("text", key) for key in keys])
    assert sorted(keys) == [f"t{i:04d}" for i in range(1000)]
    assert (np.diff(order_key(ids, 3).astype(object)) > 0).all()
    assert list(listed.sizes(300).items()) == [(name, len(table)) for name, table in slices]


def test_a_listing_depends_neither_on_runs_nor_on_the_order_of_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    items = (*_texts(200), *_texts(7))
    whole = listing(Listed(items), seed=0)
    monkeypatch.setattr(spilled, "RUN_ROWS", 9)
    parts = listing(Listed(items[::-1]), seed=0)
    assert (whole.digest, whole.guards, whole.labels) == (parts.digest, parts.guards, parts.labels)
    assert list(whole.items()) == list(parts.items())
    assert parts.rows == {"text": 200}
    assert parts.refused.kinds == {"duplicate_key": 7}


def test_long_texts_end_a_run_before_its_rows_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spilled, "RUN_BYTES", 10)
    runs = list(spilled._runs(_texts(4), spilled.Refused()))
    assert [len(run) for run in runs] == [2, 2]


@pytest.mark.parametrize("key", ["", "a\0b", "a\udc80"])
def test_a_bad_key_is_refused_and_counted(key: str) -> None:
    listed = listing(Listed((*_texts(2), Item("text", key, None, text="x"))), seed=0)
    assert listed.count == 3
    assert listed.rows == {"text": 2}
    assert [bad.kind for bad in listed.refused] == ["bad_key"]


def test_two_keys_with_one_id_are_a_collision_and_the_first_stays() -> None:
    table = pa.table({"order": pa.array([1, 1, 2], pa.uint64()), "key": ["a", "b", "c"]})
    refused = spilled.Refused()
    assert spilled._unique(table, "photo", refused).column("key").to_pylist() == ["a", "c"]
    assert [(bad.key, bad.kind) for bad in refused] == [("b", "id_collision")]


@pytest.mark.parametrize("changed", [{"text": "other"}, {"label": "c9"}, {"problem": "bad_text: x"}])
def test_what_shapes_a_row_shapes_the_plan(changed: dict[str, str]) -> None:
    items = list(_texts(3))
    before = plan(Listed(tuple(items)), listing(Listed(tuple(items)), 0), Prepare())
    fields = {"label": "c1", "text": "text 1", "problem": "", **changed}
    items[1] = Item("text", "t0001", guard="1", **fields)
    after = plan(Listed(tuple(items)), listing(Listed(tuple(items)), 0), Prepare())
    assert before.config != after.config


def test_a_slice_with_many_bytes_makes_several_files_of_small_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "ROW_GROUP", 30_000)
    monkeypatch.setattr(writing, "SPOOL", 1000)
    source = Listed(tuple(Item("photo", f"p{i:02d}", "c", where=str(60 + i)) for i in range(20)))  # 11 to 19 kB each
    rows = listing(source, 0)
    staging = Store.at(tmp_path).staging(Plan("data", {}))
    (name,) = stage_listing(staging, rows, 100)
    writing.write_slice({"name": name}, source, staging, bytes_per_shard=100_000)
    files = writing.files_of(staging, name)
    assert files[:2] == ["modality=photo/part-00000.parquet", "modality=photo/part-00000_001.parquet"]
    assert {writing.slice_of(file) for file in files} == {name}
    tables = [pq.ParquetFile(staging.path(file)) for file in files]
    assert all(table.metadata.row_group(g).num_rows <= 2 for table in tables for g in range(table.num_row_groups))
    read = pa.concat_tables([table.read() for table in tables]).to_pylist()
    assert [row["key"] for row in read] == [item.key for item in rows.items()]
    assert all(
        row["image"] == source.load(Item("photo", row["key"], None, where=str(60 + int(row["key"][1:]))))
        for row in read
    )
    assert sum(staging.finished(file).facts["rows"] for file in files) == 20  # type: ignore[union-attr]


def test_a_slice_without_one_of_its_files_is_not_finished(tmp_path: Path) -> None:
    source = Listed(_texts(4))
    staging = Store.at(tmp_path).staging(Plan("data", {}))
    (name,) = stage_listing(staging, listing(source, 0), 100)
    assert writing.files_of(staging, name) == []
    writing.write_slice({"name": name}, source, staging, bytes_per_shard=1)
    files = writing.files_of(staging, name)
    assert len(files) == 1
    staging.drop(files[0])
    assert writing.files_of(staging, name) == []


@pytest.mark.parametrize("settings", [{"rows_per_shard": 0}, {"bytes_per_shard": 0}, {"max_bad_rows": "some"}])
def test_bounds_that_are_none_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"must be at least 1|expected"):
        Prepare(**settings)


def pictures(root: Path, count: int = 30, bad: int = 2) -> Path:
    """Photos and sketches of three classes, and files that are no pictures, class by class."""
    for modality in ("photo", "sketch"):
        for i in range(count):
            file = root / modality / f"class_{i % 3}" / f"{i:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(_png(8 + i))
    for i in range(bad):
        (root / "photo" / "class_0" / f"bad_{i}.jpg").write_bytes(b"no picture")
    return root


def test_rows_in_are_rows_used_and_quarantined_whatever_is_done_at_once(tmp_path: Path, ray_cluster: None) -> None:
    raw = pictures(tmp_path / "raw")
    flags = ("--source", "folders", "--input", raw, "--rows-per-shard", 8, "--max-bad-rows", 2)
    found = ok("prepare", *flags, "--output", tmp_path / "data")
    assert found["rows"] == {"in": 62, "used": 60, "quarantined": 2}
    assert found["quarantine"] == {"wrong_type": 2}
    data = open_artifact(tmp_path / "data", "data")
    lines = [json.loads(line) for e in data.files if e.path.startswith("_q") for line in data.read(e.path).splitlines()]
    assert sorted(line["key"] for line in lines) == ["photo/class_0/bad_0.jpg", "photo/class_0/bad_1.jpg"]
    # one task at a time, in another order
    source, settings = Folders(raw), Prepare(8, "2")
    rows = listing(source, 0)
    staging = Store.at(tmp_path / "alone").staging(plan(source, rows, settings))
    for name in reversed(stage_listing(staging, rows, 8)):
        writing.write_slice({"name": name}, source, staging, settings.bytes_per_shard)
    again = ok("prepare", *flags, "--output", tmp_path / "alone")
    assert again["digest"] == found["digest"]


@pytest.mark.parametrize(
    ("rows", "allowed"),
    [(1, 0), (2, 1), (12, 6), (20, 10), (53, 10), (100, 10), (101, 10), (1_000, 100), (10_009, 1_000)],
)
def test_the_limit_is_a_tenth_or_ten_rows_but_at_most_half_of_them(rows: int, allowed: int) -> None:
    assert Prepare().allowed(rows) == allowed


@pytest.mark.parametrize(
    ("limit", "allowed"), [("0", 0), ("7", 7), ("0%", 0), ("1%", 0), ("2.5%", 2), ("100%", 99), (" 5% ", 4)]
)
def test_a_limit_that_is_given_is_taken_as_it_is(limit: str, allowed: int) -> None:
    assert Prepare(max_bad_rows=limit).allowed(99) == allowed


@pytest.mark.parametrize("limit", ["-1", "-5%", "nan%", "inf%", "1e2%", "ten", "%", ""])
def test_a_limit_that_is_none_is_refused(limit: str) -> None:
    with pytest.raises(ConfigError, match="expected auto, a count such as 20, or a percentage such as 1%"):
        Prepare(max_bad_rows=limit)


def test_a_phones_folder_passes_with_a_warning_and_a_row_of_each_kind(
    tmp_path: Path, ray_cluster: None, caplog: pytest.LogCaptureFixture
) -> None:
    raw = pictures(tmp_path / "raw", count=26, bad=1)
    (raw / "photo" / "class_0" / "scan.psd").write_bytes(b"8BPS")
    (raw / "photo" / "class_0" / "clip.mp4").write_bytes(b"film")
    with caplog.at_level("WARNING", "zsr"):
        found = ok("prepare", "--source", "folders", "--input", raw, "--output", tmp_path / "data")
    assert found["rows"] == {"in": 54, "used": 52, "quarantined": 2}
    assert found["not_read"] == {".mp4": 1}
    said = [record.getMessage() for record in caplog.records if record.name == "zsr"]
    assert "not read: 1 files (.mp4 1)" in said
    (line,) = [each for each in said if each.startswith("2 of 54 rows are bad {'unsupported': 1, 'wrong_type': 1}")]
    assert "photo/class_0/bad_0.jpg: not an image" in line
    assert "photo/class_0/scan.psd: a Photoshop document: export it as PNG" in line


def test_no_good_row_at_all_stops_whatever_is_allowed(tmp_path: Path, ray_cluster: None) -> None:
    raw = files(tmp_path / "raw", "photo/cat/1.jpg")
    (raw / "photo" / "cat" / "1.jpg").write_bytes(b"no image")
    flags = ("--source", "folders", "--input", raw, "--output", tmp_path / "data", "--max-bad-rows", "100%")
    assert job("prepare", *flags)["exit_code"] == 3


def test_features_that_are_not_finite_are_quarantined_and_the_others_imported(
    tmp_path: Path, ray_cluster: None
) -> None:
    (tmp_path / "raw" / "modality=photo").mkdir(parents=True)
    values = [[float(n), 1.0] for n in range(30)]
    values[3][1], values[7][0], values[9][0] = float("nan"), float("inf"), 1e39
    table = pa.table({"key": [f"k{n}" for n in range(30)], "feature": values})
    pq.write_table(table, tmp_path / "raw" / "modality=photo" / "a.parquet")
    flags = ("--source", "parquet", "--input", tmp_path / "raw", "--output", tmp_path / "data")
    found = ok("prepare", *flags, "--features-output", tmp_path / "features")
    assert (found["quarantine"], found["features"]["rows"]) == ({"not_finite": 3}, {"photo": 27})
    features = open_artifact(tmp_path / "features", "features")
    matrix = np.array([row for e in features.shards() for row in features.read_table(e.path)["feature"].to_pylist()])
    assert matrix.shape == (27, 2)
    assert np.isfinite(matrix).all()
    data = open_artifact(tmp_path / "data", "data")
    lines = [json.loads(line) for e in data.files if e.path.startswith("_q") for line in data.read(e.path).splitlines()]
    assert {line["key"] for line in lines} == {"k3", "k7", "k9"}


def test_a_feature_of_another_width_is_named(tmp_path: Path, ray_cluster: None) -> None:
    (tmp_path / "raw" / "modality=photo").mkdir(parents=True)
    table = pa.table({"key": ["a", "b", "c"], "feature": [[1.0, 2.0], [1.0, 2.0, 3.0], [1.0, 2.0]]})
    pq.write_table(table, tmp_path / "raw" / "modality=photo" / "a.parquet")
    flags = ("--source", "parquet", "--input", tmp_path / "raw", "--output", tmp_path / "data")
    found = job("prepare", *flags, "--features-output", tmp_path / "features")
    assert found["exit_code"] == 2
    assert "3 ('b')" in found["error"]


def test_too_many_bad_rows_stop_with_their_kinds(tmp_path: Path, ray_cluster: None) -> None:
    raw = pictures(tmp_path / "raw")
    found = job("prepare", "--source", "folders", "--input", raw, "--output", tmp_path / "data", "--max-bad-rows", 1)
    assert found["exit_code"] == 3
    assert "2 of 62 rows are bad {'wrong_type': 2}; --max-bad-rows 1 allows 1. For example: " in found["error"]
    assert "photo/class_0/bad_" in found["error"]


def test_prepare_from_a_bucket_to_a_bucket_equals_the_one_on_a_disk(
    tmp_path: Path, ray_cluster: None, bucket: str
) -> None:
    from zsr import cluster
    from zsr.storage import filesystem

    raw = pictures(tmp_path / "raw", count=6, bad=1)
    store, path = filesystem(bucket)
    store.put(f"{raw}/", f"{path}/raw/", recursive=True)
    flags = ("--source", "folders", "--rows-per-shard", 4, "--max-bad-rows", 1)
    cluster.disconnect()  # tasks get the environment of the connection: the endpoint of this test
    there = ok("prepare", *flags, "--input", f"{bucket}/raw", "--output", f"{bucket}/data")
    here = ok("prepare", *flags, "--input", raw, "--output", tmp_path / "data")
    assert there["digest"] == here["digest"]
    assert there["rows"] == {"in": 13, "used": 12, "quarantined": 1}
    data = open_artifact(f"{bucket}/data", "data")
    assert sum(len(data.read_table(entry.path)) for entry in data.shards()) == 12
    assert not store.exists(f"{path}/data/staging")


def test_a_driver_killed_while_it_stages_the_listing_leaves_no_trace_in_the_result(
    tmp_path: Path, ray_cluster: None
) -> None:
    raw = pictures(tmp_path / "raw", bad=0)
    flags = ["--source", "folders", "--input", str(raw), "--rows-per-shard", "8"]
    command = [sys.executable, "-m", "zsr", "prepare", *flags, "--output", str(tmp_path / "killed")]
    (tmp_path / "temporary").mkdir()
    environment = {**os.environ, "ZSR_FAULT": "prepare.listing=kill@3", "TMPDIR": str(tmp_path / "temporary")}
    killed = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert killed.returncode == -9
    assert not list((tmp_path / "temporary").iterdir())
    again = ok("prepare", *flags, "--output", tmp_path / "killed")
    assert again["digest"] == ok("prepare", *flags, "--output", tmp_path / "unbroken")["digest"]
    assert not any((tmp_path / "killed" / "staging").iterdir())


def test_a_drawing_that_shows_nothing_on_white_is_quarantined(tmp_path: Path) -> None:
    for modality in ("photo", "sketch"):
        (tmp_path / "raw" / modality / "a").mkdir(parents=True)
        for name, color in (("white", (255, 255, 255, 255)), ("black", (0, 0, 0, 255))):
            image = Image.new("RGBA", (16, 16))
            image.paste(color, (4, 4, 12, 12))
            image.save(tmp_path / "raw" / modality / "a" / f"{name}.png")
    source, settings = Folders(tmp_path / "raw"), Prepare(8, "2")
    rows = listing(source, 0)
    staging = Store.at(tmp_path / "data").staging(plan(source, rows, settings))
    for name in stage_listing(staging, rows, 8):
        writing.write_slice({"name": name}, source, staging, settings.bytes_per_shard)
    lines = [line for name in staging.pieces() if name.startswith("_q") for line in staging.read(name).splitlines()]
    found = [json.loads(line) for line in lines]
    assert [(row["key"], row["kind"]) for row in found] == [("sketch/a/white.png", "blank")]
    assert "transparent" in found[0]["message"]


def test_where_heic_is_read_later_on_prepare_looks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, settings = Folders(pictures(tmp_path / "raw")), Prepare()
    rows = listing(source, 0)
    with_it = plan(source, rows, settings)
    monkeypatch.setattr(decode, "_heif", lambda: False)
    without = plan(source, rows, settings)
    assert with_it.config == without.config  # rows that are read either way make the same DATA
    assert with_it.digest != without.digest
