"""A look at DATA says what is in it, and shows it."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from tests.data.sources.helpers import jpeg
from tests.pipeline import job, ok
from zsr.artifact import Plan, Store
from zsr.data.inspect import GAP, THUMB, TITLE
from zsr.data.rows import SCHEMA, row_id

RED, GREEN, BLUE = (250, 0, 0), (0, 250, 0), (0, 0, 250)


def shard(modality: str, *rows: tuple[str, str | None, str | None, bytes | None, str | None]) -> tuple[str, pa.Table]:
    """A shard of rows of key, label, pair, image and text."""
    columns = ("key", "label", "pair", "image", "text")
    table = [{"id": row_id(modality, row[0]), **dict(zip(columns, row, strict=True))} for row in rows]
    return f"modality={modality}/part-00000.parquet", pa.Table.from_pylist(table, schema=SCHEMA)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two sketches of ants, the first of which was drawn from the last photo; a bee, and a text that belongs to it."""
    store = Store.at(tmp_path / "data")
    staging = store.staging(Plan("data", {}))
    shards = (
        shard("sketch", ("s1", "ant", "p3", jpeg(BLUE), None), ("s2", "ant", None, jpeg(BLUE), None)),
        shard(
            "photo",
            *(("p1", "ant", None, jpeg(RED), None), ("p2", "ant", None, jpeg(RED), None)),
            *(("p3", "ant", None, jpeg(GREEN), None), ("p4", "bee", None, jpeg(RED), None)),
        ),
        shard("text", ("t1", "bee", "p4", None, "a small striped thing \x07")),
    )
    for name, table in shards:
        classes = {
            str(label): n for label, n in zip(*np.unique(table["label"].to_pylist(), return_counts=True), strict=True)
        }
        staging.write_table(name, table, facts={"classes": {label: int(n) for label, n in classes.items()}})
    facts = {"quarantine": {"empty": 2}, "differences": ["x: 1 photo rows, published are 2"]}
    store.publish(staging.seal(facts=facts, rows={"in": 9, "used": 7, "quarantined": 2}))
    return tmp_path / "data"


def test_counts_sizes_and_quarantine_are_said(data: Path, tmp_path: Path) -> None:
    said = ok("prepare", "--inspect", data, "--sheet", tmp_path / "sheet.png")
    assert said["rows"] == {"in": 9, "used": 7, "quarantined": 2}
    assert said["quarantine"] == {"empty": 2}
    assert said["differences"] == ["x: 1 photo rows, published are 2"]
    assert said["classes"] == {"sketch": {"ant": 2}, "photo": {"ant": 3, "bee": 1}, "text": {"bee": 1}}
    assert said["sampled"]["photo"]["pixels"] == {"least": 64, "median": 64, "most": 64}
    assert said["sampled"]["photo"]["bytes"]["most"] == max(len(jpeg(colour)) for colour in (RED, GREEN))
    assert said["sampled"]["text"] == {
        "rows": 1,
        "without_pair": 0,
        "characters": {"least": 23, "median": 23, "most": 23},
    }


def test_a_sketch_stands_beside_its_own_photo(data: Path, tmp_path: Path) -> None:
    ok("prepare", "--inspect", data, "--sheet", tmp_path / "sheet.png", "--sheet-rows", 2)
    pixels = np.asarray(Image.open(tmp_path / "sheet.png"))
    middle = pixels[2 * TITLE + THUMB // 2]  # through the first strip, that of the ants
    left = GAP + THUMB // 2
    colours = [middle[left + place].argmax() for place in (0, THUMB, 2 * THUMB + GAP, 3 * THUMB + GAP)]
    assert colours == [2, 2, 1, 0]  # two sketches, the photo of the first, another photo


def test_the_sheet_is_the_same_each_time(data: Path, tmp_path: Path) -> None:
    for name in "ab":
        ok("prepare", "--inspect", data, "--sheet", tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert Image.open(io.BytesIO((tmp_path / "a").read_bytes())).format == "PNG"


@pytest.mark.parametrize("flags", [(), ("--source", "folders"), ("--source", "emoji")])
def test_what_is_missing_on_the_command_line_is_named(flags: tuple[str, ...]) -> None:
    results = job("prepare", *flags)
    assert results["exit_code"] == 2
    assert "missing" in results["error"] or "requires --input" in results["error"]
    assert json.dumps(results)
