"""The user's parquet files: rows are read row group by row group."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.sources.helpers import jpeg, refused, rows
from zsr.data.sources.parquet import Columns, Parquet
from zsr.errors import ConfigError


def table(root: Path, columns: dict[str, object], modality: str = "photo") -> Path:
    (root / f"modality={modality}").mkdir(parents=True)
    pq.write_table(pa.table(columns), root / f"modality={modality}" / "a.parquet", row_group_size=2)
    return root


def test_rows_of_every_row_group_are_found_and_loaded(tmp_path: Path) -> None:
    images = [jpeg((20 * n, 0, 0)) for n in range(5)]
    table(
        tmp_path,
        {"path": list("abcde"), "label": ["Hot-Dog"] * 5, "image": images, "feature": [[1.0, n] for n in range(5)]},
    )
    source = Parquet(tmp_path, Columns(key="path"))
    found = rows(source)
    assert [source.load(found["photo", key]) for key in "ecabd"] == [images["abcde".index(key)] for key in "ecabd"]
    assert {item.label for item in found.values()} == {"hot_dog"}
    assert np.array_equal(source.feature(found["photo", "d"]), np.array([1, 3], np.float32))  # type: ignore[arg-type]


def test_pictures_may_be_structures_with_bytes(tmp_path: Path) -> None:
    table(tmp_path, {"key": ["a"], "image": [{"bytes": jpeg(), "path": None}]})
    assert Parquet(tmp_path).load(rows(Parquet(tmp_path))["photo", "a"]) == jpeg()


def test_a_row_without_a_key_is_a_bad_row(tmp_path: Path) -> None:
    table(tmp_path, {"key": ["a", None, "c"], "image": [jpeg()] * 3})
    source = Parquet(tmp_path)
    assert refused(source, rows(source)["photo", "modality=photo/a.parquet:0:1"]) == "missing_value"


@pytest.mark.parametrize("columns", [{"key": [1]}, {"key": ["a"], "image": ["text"]}, {"key": ["a"], "text": [0.5]}])
def test_a_column_of_another_type_is_refused(tmp_path: Path, columns: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        list(Parquet(table(tmp_path, columns)).items())
