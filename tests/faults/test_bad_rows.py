"""Bad rows never stop a run nor vanish (B9): 5% of 12 kinds, counted exactly, the same in every run."""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.faults import bombs
from tests.faults.counts import count
from tests.pipeline import job
from zsr.artifact import open_artifact
from zsr.data.decode import Limits, decode
from zsr.data.rows import row_id

pytestmark = pytest.mark.usefixtures("ray_cluster")

ROWS = count(2_000, 200_000)
CLASSES = ("ant", "bee", "cat", "dog")
A_TAR = 500
Members = list[tuple[str, bytes]]


def picture(kind: str = "JPEG", mode: str = "RGB") -> bytes:
    encoded = io.BytesIO()
    Image.effect_noise((24, 24), 60).convert(mode).save(encoded, kind)
    return encoded.getvalue()


def animation() -> bytes:
    encoded = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (0, 255)]
    frames[0].save(encoded, "WEBP", save_all=True, append_images=frames[1:])
    return encoded.getvalue()


PHOTO = picture()
BOMB = bombs.png(30_000, 30_000)
LABEL = b"ant"
BAD: dict[str, tuple[str, Callable[[str], Members]]] = {
    "0 bytes": ("empty", lambda n: [(f"{n}.jpg", b""), (f"{n}.cls", LABEL)]),
    "truncated JPEG": ("truncated", lambda n: [(f"{n}.jpg", PHOTO[: len(PHOTO) // 2]), (f"{n}.cls", LABEL)]),
    "wrong magic": ("wrong_type", lambda n: [(f"{n}.jpg", b"no image"), (f"{n}.cls", LABEL)]),
    "SVG": ("unsupported", lambda n: [(f"{n}.webp", b"<svg></svg>"), (f"{n}.cls", LABEL)]),
    "900 megapixels": ("oversized", lambda n: [(f"{n}.png", BOMB), (f"{n}.cls", LABEL)]),
    "NaN text": ("wrong_type", lambda n: [(f"{n}.json", b'{"label": "ant", "text": NaN}')]),
    "NUL": ("bad_text", lambda n: [(f"{n}.txt", b"a\0b"), (f"{n}.cls", LABEL)]),
    "1 MB text": ("bad_text", lambda n: [(f"{n}.txt", b"x" * 1_000_000), (f"{n}.cls", LABEL)]),
    "unknown class": ("unknown_class", lambda n: [(f"{n}.jpg", PHOTO), (f"{n}.cls", b"unicorn")]),
    "duplicate id": ("duplicate_key", lambda n: [("0.jpg", PHOTO), ("0.cls", LABEL)]),
    "missing value": ("missing_value", lambda n: [(f"{n}.cls", LABEL)]),
    "wrong type": ("wrong_type", lambda n: [(f"{n}.jpg", PHOTO), (f"{n}.json", b'{"label": ["ant"]}')]),
}


def sample(number: int) -> Members:
    """One row: every twentieth is bad, of each kind in turn; some good rows are of kinds that others refuse."""
    if number % 20 == 19:
        return list(BAD.values())[number // 20 % len(BAD)][1](str(number))
    photo = {1: picture(mode="CMYK"), 2: animation(), 3: picture("GIF", "L")}.get(number, PHOTO)
    return [(f"{number}.jpg", photo), (f"{number}.cls", CLASSES[number % 4].encode())]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tars of ROWS rows, and the list of classes."""
    root = tmp_path_factory.mktemp("raw")
    for first in range(0, ROWS, A_TAR):
        with tarfile.open(root / f"{first:06d}.tar", "w") as tar:
            # so that there is something to repeat in every tar
            members = [("0.jpg", PHOTO), ("0.cls", LABEL)] if first else []
            for number in range(first, first + A_TAR):
                members += sample(number) if number > first or not first else []
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return root


def prepare(raw: Path, output: Path, allowed: str) -> dict[str, Any]:
    flags = ("--input", raw, "--classes", raw / "classes.txt", "--output", output, "--rows-per-shard", 300)
    return job("prepare", "--source", "webdataset", *flags, "--max-bad-rows", allowed)


def quarantine(files: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(files.glob("_quarantine/**/*.jsonl")):
        yield from map(json.loads, path.read_text().splitlines())


def expected() -> Counter[str]:
    kinds = [kind for kind, _ in BAD.values()]
    return Counter(kinds[number // 20 % len(kinds)] for number in range(19, ROWS, 20))


def test_rows_in_are_rows_used_and_rows_quarantined_in_every_run(raw: Path, tmp_path: Path) -> None:
    first, second = (prepare(raw, tmp_path / name, "10%") for name in "ab")
    assert {**first, "artifact": None} == {**second, "artifact": None}
    assert first["exit_code"] == 0
    assert first["rows"] == {"in": ROWS, "used": ROWS - ROWS // 20, "quarantined": ROWS // 20}
    assert first["quarantine"] == dict(sorted(expected().items()))
    data = open_artifact(tmp_path / "a", "data")
    lines = list(quarantine(data.directory))
    assert Counter(line["kind"] for line in lines) == expected()
    for line in lines:
        modality = line["shard"].removeprefix("modality=").partition("/")[0]
        assert line["id"] == row_id(modality, line["key"])
    used = [row for entry in data.shards() for row in data.read_table(entry.path).to_pylist()]
    assert len({row["id"] for row in used}) == len(used) == ROWS - ROWS // 20
    # of two rows with one key the first is used, so that both have its id
    for line in lines:
        assert (line["id"] in {row["id"] for row in used}) == (line["kind"] == "duplicate_key")
    for number in (1, 2, 3):
        image = next(row["image"] for row in used if row["key"] == f"000000/{number}.jpg")
        assert decode(image, 8, Limits()).shape == (8, 8, 3)


def test_too_many_of_them_end_the_run_with_their_counts(raw: Path, tmp_path: Path) -> None:
    results = prepare(raw, tmp_path, "1%")
    assert results["exit_code"] == 3
    assert f"{ROWS // 20} of {ROWS} rows are bad {dict(sorted(expected().items()))}" in results["error"]
    assert not (tmp_path / "versions").exists()
