"""Quick, Draw!: strokes are found in three formats and drawn alike."""

import gzip
import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.sources.helpers import SHARED, files, refused, rows
from zsr.data.decode import BadImage
from zsr.data.drawing import Drawing, checked, draw
from zsr.data.sources.quickdraw import QuickDraw, QuickDrawOptions
from zsr.errors import ConfigError, DamagedArtifact

CROSS = [[[0, 255], [0, 255]], [[0, 255], [255, 0]]]


def line(key: int = 1, drawing: object = CROSS, **more: Any) -> str:
    return json.dumps({"word": "The Eiffel Tower", "key_id": str(key), "drawing": drawing, **more}) + "\n"


def record(key: int = 1, drawing: list[list[list[int]]] = CROSS, recognized: bool = True) -> bytes:
    head = struct.pack("<Q2sbIH", key, b"SE", recognized, 0, len(drawing))
    return head + b"".join(struct.pack("<H", len(x)) + bytes(x) + bytes(y) for x, y in drawing)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_the_three_formats_give_the_same_picture(tmp_path: Path) -> None:
    (tmp_path / "a.ndjson").write_text(line())
    (tmp_path / "b.ndjson.gz").write_bytes(gzip.compress(line(2).encode()))
    (tmp_path / "The Eiffel Tower.bin").write_bytes(record(3))
    source = QuickDraw(tmp_path)
    found = rows(source)
    assert {(key, item.label) for (_, key), item in found.items()} == {
        (f"the_eiffel_tower/{key}", "the_eiffel_tower") for key in (1, 2, 3)
    }
    assert len({source.load(item) for item in found.values()}) == 1


def test_each_row_is_read_at_its_own_place(tmp_path: Path) -> None:
    drawings = [[[[0, width], [0, 9]]] for width in (9, 40, 255)]
    for suffix, text in ((".ndjson", str.encode), (".ndjson.gz", lambda lines: gzip.compress(lines.encode()))):
        content = "".join(line(key, drawing) for key, drawing in enumerate(drawings))
        (tmp_path / f"strokes{suffix}").write_bytes(text(content))
        source = QuickDraw(tmp_path)
        loaded = [source.load(rows(source)["sketch", f"the_eiffel_tower/{key}"]) for key in (2, 0, 1)]
        assert loaded == [draw(checked(drawings[key]), Drawing()) for key in (2, 0, 1)]
        (tmp_path / f"strokes{suffix}").unlink()


def test_size_padding_and_stroke_width_are_what_was_asked_for() -> None:
    square = [[[0, 100, 100, 0, 0], [0, 0, 100, 100, 0]]]
    drawn = pixels(draw(checked(square), Drawing(size=64, stroke_width=4, padding=10)))
    assert drawn.shape == (64, 64)
    assert drawn[:10].min() == drawn[:, -10:].min() == 255
    assert (drawn[32] < 128).nonzero()[0].tolist() == [10, 11, 12, 13, 50, 51, 52, 53]
    wide = pixels(draw(checked([[[0, 100], [0, 0]]]), Drawing(size=64, stroke_width=2, padding=4)))
    assert (wide[:, 32] < 128).nonzero()[0].tolist() == [31, 32]  # in the middle, though it began at the top


def test_lines_are_anti_aliased_and_black() -> None:
    drawn = pixels(draw(checked(CROSS), Drawing(size=64)))
    assert {0, 255} < set(drawn.flat)  # and greys between them
    assert drawn.min() == 0


def test_a_single_point_is_a_dot() -> None:
    drawn = pixels(draw(checked([[[7], [7]]]), Drawing(size=32, stroke_width=6)))
    assert drawn[16, 16] == 0
    assert 20 < (drawn < 128).sum() < 40


@pytest.mark.parametrize(
    "drawing",
    [
        [],
        [[[], []]],
        5,
        "strokes",
        [[1, 2]],
        [[[0, 1], [0]]],
        [[["a"], ["b"]]],
        [[[float("nan")], [0]]],
        [[[1e9], [0]]],
        {"x": 1},
        [{"x": [1]}],
        [[[0] * 100_001] * 2],
    ],
)
def test_what_is_no_drawing_is_refused(drawing: object) -> None:
    with pytest.raises(BadImage) as error:
        checked(drawing)
    assert error.value.kind == "bad_drawing"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("{", "malformed"),
        ("[1]", "wrong_type"),
        ('{"word": "ant", "drawing": []}', "missing_value"),
        ('{"word": 7, "key_id": "1", "drawing": []}', "wrong_type"),
        ('{"word": "ant", "key_id": "1", "drawing": "' + "x" * (4 << 20) + '"}', "oversized"),
        ("[" * 100_000, "malformed"),
    ],
)
def test_a_line_that_is_no_drawing_is_a_bad_row_and_the_next_one_is_used(tmp_path: Path, text: str, kind: str) -> None:
    (tmp_path / "s.ndjson").write_text(f"{text}\n{line()}")
    source = QuickDraw(tmp_path)
    found = rows(source)
    assert refused(source, found["sketch", "s.ndjson:1"]) == kind
    assert source.load(found["sketch", "the_eiffel_tower/1"])


def test_the_ndjson_of_a_class_is_read_and_not_its_binary_twin(tmp_path: Path) -> None:
    (tmp_path / "The Eiffel Tower.ndjson").write_text(line(1))
    (tmp_path / "The Eiffel Tower.bin").write_bytes(record(1) + record(2))
    assert [key for _, key in rows(QuickDraw(tmp_path))] == ["the_eiffel_tower/1"]


def test_some_drawings_of_a_class_are_a_fixed_choice(tmp_path: Path) -> None:
    lines = [line(key, recognized=key != 4) for key in range(50)]
    (tmp_path / "s.ndjson").write_text("".join(lines))
    chosen = [key for _, key in rows(QuickDraw(tmp_path, QuickDrawOptions(per_class=10)))]
    (tmp_path / "s.ndjson").write_text("".join(reversed(lines)))
    assert sorted(key for _, key in rows(QuickDraw(tmp_path, QuickDrawOptions(per_class=10)))) == sorted(chosen)
    assert len(chosen) == 10
    assert len(rows(QuickDraw(tmp_path, QuickDrawOptions(recognized=True)))) == 49


@pytest.mark.parametrize("cut", [-1, 25, 20, 3])
def test_a_binary_file_that_ends_early_is_damaged(tmp_path: Path, cut: int) -> None:
    (tmp_path / "ant.bin").write_bytes((record(1) + record(2))[: len(record(1)) + cut])
    with pytest.raises(DamagedArtifact, match="ends within drawing"):
        list(QuickDraw(tmp_path).items())


def test_a_packed_file_that_ends_early_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "s.ndjson.gz").write_bytes(gzip.compress(line().encode())[:-12])
    with pytest.raises(DamagedArtifact, match="download it again"):
        list(QuickDraw(tmp_path).items())


def test_pictures_of_the_extension_are_found_beside_or_without_strokes(tmp_path: Path) -> None:
    files(tmp_path, "QuickDraw_sketches_final/cruise ship/a.png", "QuickDraw_images_final/cruise ship/1|2.jpg")
    found = rows(QuickDraw(tmp_path))
    assert {item.label for item in found.values()} == {"cruise_ship"}
    assert QuickDraw(tmp_path).load(found["photo", "QuickDraw_images_final/cruise ship/1|2.jpg"])[:2] == b"\xff\xd8"


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no \*.ndjson"):
        list(QuickDraw(tmp_path).items())


@pytest.mark.skipif(not (SHARED / "quickdraw25").is_dir(), reason="Quick, Draw! is not beside this checkout")
def test_quickdraw25_is_drawn() -> None:
    source = QuickDraw(SHARED / "quickdraw25")
    found = list(source.items())
    assert (len(found), len({item.label for item in found})) == (4225, 169)
    assert {item.label for item in found} <= set(source.published.classes)
    for item in found[::211]:
        drawn = pixels(source.load(item))
        assert drawn.shape == (256, 256)
        assert 0.001 < (drawn < 128).mean() < 0.3
