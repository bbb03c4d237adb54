"""Ids, keys and labels of an opened index: mapped from disk, read by ordinal, and not held in memory."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from zsr.artifact import mapped
from zsr.errors import DamagedArtifact, StorageError
from zsr.index.storage import id_map as module
from zsr.index.storage.id_map import IdMap

COUNTS = (700, 1, 350)
READ = """
import sys
from pathlib import Path
import numpy as np
from zsr.index.storage.id_map import IdMap

def own():  # bytes that are not pages of a file
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

held = []
for path in map(Path, sys.argv[1:]):  # the first one makes the process load what it needs
    before = own()
    held.append(IdMap.read([path]))
    held[-1].take(np.arange(0, len(held[-1]), 1000))
print(own() - before)
"""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Id maps of COUNTS rows, which are read in more batches than there are files."""
    monkeypatch.setattr(module, "ROWS", 100)
    found, first = [], 0
    for number, count in enumerate(COUNTS):
        rows = range(first, first + count)
        table = pa.table(
            {
                "id": pa.array([row // 2 * 7 for row in rows], pa.int64()),
                "part": pa.array([row % 2 for row in rows], pa.int16()),
                "key": pa.array([f"künstlich-{row // 2}" for row in rows], pa.string()),
                "label": pa.array([None if row % 3 else f"class {row % 5}" for row in rows], pa.string()),
            }
        )
        found.append(tmp_path / f"{number}.parquet")
        pq.write_table(table, found[-1])
        first += count
    return found


def test_rows_are_taken_by_ordinal_in_any_order(files: list[Path]) -> None:
    whole = pa.concat_tables([pq.read_table(path) for path in files]).combine_chunks()
    read, joined = IdMap.read(files), IdMap.joined([IdMap.read(files[:1]), IdMap.read(files[1:])])
    wanted = np.random.default_rng(0).integers(0, sum(COUNTS), 2000)
    for names in (read, joined):
        assert len(names) == sum(COUNTS)
        assert len(names.batches) > len(files)
        assert np.array_equal(names.ids, whole.column("id").to_numpy())
        assert names.take(wanted) == whole.take(pa.array(wanted))
        assert names.take(wanted[:0]) == whole.slice(0, 0)
        assert pa.chunked_array(names.column("label")) == whole.column("label")


def test_nothing_is_left_below_tmpdir(files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    names = IdMap.read(files)
    assert list(place.iterdir()) == []
    assert names.take(np.array([5])).column("key").to_pylist() == ["künstlich-2"]
    place.rmdir()
    with pytest.raises(StorageError, match="temporary"):
        IdMap.read(files)


def test_what_is_no_id_map_is_refused(files: list[Path]) -> None:
    pq.write_table(pq.read_table(files[1]).drop_columns(["key"]), files[1])
    with pytest.raises(DamagedArtifact, match="columns"):
        IdMap.read(files)
    data = bytearray(files[2].read_bytes())
    data[len(data) // 3] ^= 255
    files[2].write_bytes(data[: len(data) // 2])
    with pytest.raises(DamagedArtifact, match="parquet"):
        IdMap.read(files[2:])


def test_a_mapped_file_holds_no_descriptor(tmp_path: Path) -> None:
    before, held = len(os.listdir("/proc/self/fd")), []
    for number in range(50):
        path = tmp_path / str(number)
        path.write_bytes(number.to_bytes(8, "little"))
        held.append(mapped(path, np.dtype("<i8")))
    assert [int(array[0]) for array in held] == list(range(50))
    assert len(os.listdir("/proc/self/fd")) == before


def test_names_are_not_held_in_memory(tmp_path: Path) -> None:
    rows, paths = (100_000, 2_000_000), []
    for count in rows:
        numbers = np.arange(count)
        keys = pa.array(numbers).cast(pa.string())
        paths.append(tmp_path / f"{count}.parquet")
        parts = pa.array(np.zeros(count, np.int16))
        pq.write_table(
            pa.table({"id": numbers, "part": parts, "key": keys, "label": keys}), paths[-1], row_group_size=16384
        )
    ended = subprocess.run(
        [sys.executable, "-c", READ, *map(str, paths)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    # in memory they would take 32 bytes a row: 64 MB
    assert int(ended.stdout) < 8e6
