"""Real drawings, photos and texts through the job, to shards and to their contact sheet."""

import gzip
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.sources.helpers import SHARED
from tests.pipeline import ok
from zsr.artifact import open_artifact
from zsr.data.inspect import TITLE

pytestmark = [
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.skipif(not SHARED.is_dir(), reason="the real data sets are not beside this checkout"),
]


def prepared(source: str, raw: Path, root: Path, bad: int = 0) -> tuple[dict[str, list[dict[str, Any]]], np.ndarray]:
    """Rows by modality, and the contact sheet as pixels (H, W, 3)."""
    done = ok("prepare", "--source", source, "--input", raw, "--output", root / "data", "--rows-per-shard", 400)
    assert (done["rows"]["in"] - done["rows"]["used"], done["rows"]["quarantined"]) == (bad, bad)
    data = open_artifact(root / "data", "data")
    rows: dict[str, list[dict[str, Any]]] = {}
    for entry in data.shards():
        rows.setdefault(entry.path.split("/")[0].partition("=")[2], []).extend(data.read_table(entry.path).to_pylist())
    ok("prepare", "--inspect", root / "data", "--sheet", root / "sheet.png")
    return rows, np.asarray(Image.open(root / "sheet.png").convert("RGB"))


def test_drawings_become_shards_and_a_sheet_of_black_on_white(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    with gzip.open(SHARED / "quickdraw25" / "strokes.ndjson.gz") as whole:
        lines = [line for number, line in enumerate(whole) if number % 40 == 0]
    (tmp_path / "raw" / "some.ndjson").write_bytes(b"".join(lines))
    rows, sheet = prepared("quickdraw", tmp_path / "raw", tmp_path)
    assert len(rows["sketch"]) == len(lines)
    for row in rows["sketch"]:
        ink = np.asarray(Image.open(io.BytesIO(row["image"]))) < 128
        assert 0.0005 < ink.mean() < 0.4
        assert not (ink[:8] | ink[-8:]).any()  # the padding
        assert not (ink[:, :8] | ink[:, -8:]).any()
    assert (sheet[TITLE:].max(axis=2) - sheet[TITLE:].min(axis=2) < 5).all()  # below the headings, greys alone
    assert 0.01 < (sheet < 128).mean() < 0.2


def test_sketches_keep_their_photos(tmp_path: Path) -> None:
    for modality in ("sketch", "photo"):
        (tmp_path / "raw" / modality).mkdir(parents=True)
        for name in ("hot-air_balloon", "tiger"):
            (tmp_path / "raw" / modality / name).symlink_to((SHARED / "sketchy25" / modality / name).absolute())
    rows, sheet = prepared("sketchy", tmp_path / "raw", tmp_path)
    differences = open_artifact(tmp_path / "data", "data").facts["differences"]
    assert differences[0].startswith("sketchy: 123 of 125 classes are missing: airplane, ")
    photos = {row["key"]: row for row in rows["photo"]}
    assert len(photos) == len(rows["sketch"]) == 50
    assert {row["label"] for row in rows["sketch"]} == {"hot_air_balloon", "tiger"}
    for row in rows["sketch"]:
        assert photos[row["pair"]]["label"] == row["label"]
        assert Path(row["key"]).stem.rpartition("-")[0] == Path(row["pair"]).stem
    assert (np.ptp(sheet[TITLE:], axis=2) > 40).mean() > 0.05  # photos have colours


def test_shop_photos_and_descriptions_share_their_classes(tmp_path: Path) -> None:
    rows, _ = prepared("pairs", SHARED / "grocery", tmp_path, bad=35)  # icons, which no line names
    assert (len(rows["photo"]), len(rows["text"])) == (1050, 35)
    assert {row["label"] for row in rows["photo"]} == {row["label"] for row in rows["text"]}
    assert all(len(row["text"]) > 20 for row in rows["text"])
