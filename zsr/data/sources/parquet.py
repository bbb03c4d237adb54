"""The user's own parquet files, columns mapped by name; with pictures, with features, or with both.

    ROOT/modality=sketch/*.parquet      one folder a modality, any number of files in it
    ROOT/modality=photo/*.parquet

Columns: key (string), label (string), pair (string), image (binary), text (string), feature (list of floats); only key
is required, each can be called otherwise through `Columns`. Labels are brought to their canonical spelling.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from zsr.artifact import refuse_extension_types
from zsr.data.rows import canonical_label, require_modality
from zsr.data.sources import Item, file_guard
from zsr.errors import ConfigError, DamagedArtifact


class Columns(BaseModel):
    """What the user's columns are called."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str = "key"
    label: str = "label"
    pair: str = "pair"
    image: str = "image"
    text: str = "text"
    feature: str = "feature"


@dataclass(frozen=True)
class Parquet:
    """`root` holds a folder modality=NAME for each modality; an item's `where` is FILE:ROW."""

    root: Path
    columns: Columns = field(default_factory=Columns)

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"name": "parquet", "attribution": "", "columns": self.columns.model_dump()}

    def items(self) -> Iterator[Item]:
        """Every row of every file.

        Raises:
            ConfigError: no modality folder, no file, or no key column.
            DamagedArtifact: a file that is not parquet or is cut short.
        """
        folders = sorted(self.root.glob("modality=*"))
        if not folders:
            raise ConfigError(f"{self.root}: no modality=NAME folder; expected modality=sketch/*.parquet and so on")
        for folder in folders:
            modality = require_modality(folder.name.partition("=")[2])
            files = sorted(folder.glob("*.parquet"))
            if not files:
                raise ConfigError(f"{folder}: no *.parquet file")
            for file in files:
                guard, name = file_guard(file), str(file.relative_to(self.root))
                table = self._light(file)
                for row, values in enumerate(table.to_pylist()):
                    label = values.get("label")
                    yield Item(
                        modality=modality,
                        key=values["key"],
                        label=None if label is None else canonical_label(label),
                        pair=values.get("pair"),
                        where=f"{name}:{row}",
                        text=values.get("text"),
                        guard=guard,
                    )

    def load(self, item: Item) -> bytes:
        """The picture of the row, b"" if it has none."""
        value = self._cell(item, self.columns.image)
        return value or b""

    def feature(self, item: Item) -> np.ndarray | None:
        """The feature (D,) float32 of the row, or None if it has none."""
        value = self._cell(item, self.columns.feature)
        return None if value is None else np.asarray(value, dtype=np.float32)

    def _cell(self, item: Item, column: str) -> Any:
        name, _, row = item.where.rpartition(":")
        table = _heavy(str(self.root / name), (self.columns.image, self.columns.feature))
        if column not in table.column_names:
            return None
        cell = table.column(column)[int(row)]
        return (
            cell.values.to_numpy(zero_copy_only=False)
            if cell.is_valid and pa.types.is_list(cell.type)
            else cell.as_py()
        )

    def _light(self, file: Path) -> pa.Table:
        """The columns that listing needs, under our names."""
        names = {getattr(self.columns, ours): ours for ours in ("key", "label", "pair", "text")}
        parquet = _open(str(file))
        there = [theirs for theirs in names if theirs in parquet.schema_arrow.names]
        if self.columns.key not in there:
            raise ConfigError(
                f"{file}: no column {self.columns.key!r} among {parquet.schema_arrow.names}; see --columns.key"
            )
        for theirs in there:
            kind = parquet.schema_arrow.field(theirs).type
            # a column of nothing but nulls has the type null
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
                raise ConfigError(f"{file}: column {theirs!r} is {kind}, expected string; cast it first")
        return parquet.read(columns=there).rename_columns([names[theirs] for theirs in there])


def _open(file: str) -> pq.ParquetFile:
    try:
        parquet = pq.ParquetFile(file)
        refuse_extension_types(parquet.schema_arrow, file)
        return parquet
    except DamagedArtifact:
        raise
    except Exception as error:  # a registered extension type parses its metadata here, and may raise anything
        raise DamagedArtifact(f"{file}: not readable as parquet ({error}); restore it or leave it out") from error


@lru_cache(maxsize=4)  # rows come in hashed order, so neighbours lie in different files
def _heavy(file: str, columns: tuple[str, ...]) -> pa.Table:
    parquet = _open(file)
    try:
        table = parquet.read(columns=[name for name in columns if name in parquet.schema_arrow.names])
    except (pa.ArrowException, OSError) as error:
        raise DamagedArtifact(f"{file}: not readable as parquet ({error}); restore it or leave it out") from error
    return table
