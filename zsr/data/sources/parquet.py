"""The user's own parquet files, columns mapped by name; with pictures, with features, or with both.

    ROOT/modality=sketch/*.parquet      one folder a modality, any number of files in it
    ROOT/modality=photo/*.parquet

Columns: key (string), label (string), pair (string), image (binary, or a structure with the field bytes), text
(string), feature (list of floats); only key is required, each can be called otherwise through `Columns`. Labels are
brought to their canonical spelling. One row group is in memory at a time while listing, and a few while loading. A
row without a key is a bad row called FILE:ROWGROUP:ROW.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from zsr.artifact import refuse_extension_types
from zsr.data.decode import BadImage
from zsr.data.rows import Modality, canonical_label, require_modality
from zsr.data.sources import Item
from zsr.data.sources.pages import check_pages
from zsr.data.sources.tree import Tree
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
    """`root` holds a folder modality=NAME for each modality; an item's `where` is FILE:ROWGROUP:ROW."""

    root: str | Path
    columns: Columns = field(default_factory=Columns)

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"name": "parquet", "attribution": "", "columns": self.columns.model_dump()}

    def items(self) -> Iterator[Item]:
        """Every row of every file.

        Raises:
            ConfigError: no modality folder, no file, no key column, or a column of another type than it must have.
            DamagedArtifact: a file that is not parquet, is cut short, or claims pages beyond all measure.
        """
        folders = [name for name in self._tree.folders() if name.startswith("modality=")]
        if not folders:
            raise ConfigError(f"{self._tree}: no modality=NAME folder; expected modality=sketch/*.parquet and so on")
        for folder in folders:
            modality = require_modality(folder.partition("=")[2])
            files = [entry for entry in self._tree.entries(folder) if entry.name.endswith(".parquet")]
            if not files:
                raise ConfigError(f"{self._tree}/{folder}: no *.parquet file")
            for entry in files:
                yield from self._rows(modality, f"{folder}/{entry.name}", entry.guard)

    def load(self, item: Item) -> bytes:
        """The picture of the row, b"" if it has none."""
        item.refuse()
        cell = self._cell(item, self.columns.image)
        value = cell.get("bytes") if isinstance(cell, dict) else cell
        return value or b""

    def feature(self, item: Item) -> np.ndarray | None:
        """The feature (D,) float32 of the row, or None if it has none."""
        value = self._cell(item, self.columns.feature)
        return None if value is None else np.asarray(value, dtype=np.float32)

    @cached_property
    def _tree(self) -> Tree:
        return Tree.at(self.root)

    def _rows(self, modality: Modality, name: str, guard: str) -> Iterator[Item]:
        with self._tree.open(name) as handle:
            parquet = _open(handle, f"{self._tree}/{name}")
            names = self._light(parquet.schema_arrow, f"{self._tree}/{name}")
            for group in range(parquet.metadata.num_row_groups):
                table = _read(parquet, group, list(names), f"{self._tree}/{name}").rename_columns(list(names.values()))
                for row, values in enumerate(table.to_pylist()):
                    yield _item(modality, values, f"{name}:{group}:{row}", guard)

    def _cell(self, item: Item, column: str) -> Any:
        name, group, row = item.where.rsplit(":", 2)
        table = _heavy(self._tree, name, int(group), (self.columns.image, self.columns.feature))
        if column not in table.column_names:
            return None
        cell = table.column(column)[int(row)]
        return (
            cell.values.to_numpy(zero_copy_only=False)
            if cell.is_valid and pa.types.is_list(cell.type)
            else cell.as_py()
        )

    def _light(self, schema: pa.Schema, file: str) -> dict[str, str]:
        """The columns that listing needs, by the user's names, with ours. All columns must have their types."""
        names = {getattr(self.columns, ours): ours for ours in ("key", "label", "pair", "text")}
        there = [theirs for theirs in names if theirs in schema.names]
        if self.columns.key not in there:
            raise ConfigError(f"{file}: no column {self.columns.key!r} among {schema.names}; see --columns.key")
        for theirs in there:
            kind = schema.field(theirs).type
            # a column of nothing but nulls has the type null
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
                raise ConfigError(f"{file}: column {theirs!r} is {kind}, expected string; cast it first")
        if self.columns.image in schema.names and not _holds_bytes(schema.field(self.columns.image).type):
            kind = schema.field(self.columns.image).type
            raise ConfigError(f"{file}: column {self.columns.image!r} is {kind}, expected binary; see --columns.image")
        return {theirs: names[theirs] for theirs in there}


def _item(modality: Modality, values: Mapping[str, Any], where: str, guard: str) -> Item:
    key, label = values["key"], values.get("label")
    problem = "" if key else "missing_value: no key; every row needs one that is its own"
    return Item(
        modality,
        key or where,
        None if label is None else canonical_label(label),
        pair=values.get("pair"),
        where=where,
        text=values.get("text"),
        guard=guard,
        problem=problem,
    )


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_null(kind))


def _open(handle: BinaryIO, name: str, group: int | None = None) -> pq.ParquetFile:
    """The file, after a look at its schema and at what the pages of `group`, or of all groups, claim.

    Raises:
        DamagedArtifact: it is none to be read.
    """
    try:
        parquet = pq.ParquetFile(handle)
        refuse_extension_types(parquet.schema_arrow, name)
        check_pages(handle, parquet.metadata, range(parquet.num_row_groups) if group is None else [group], name)
        return parquet
    except (DamagedArtifact, BadImage):
        raise
    except Exception as error:  # a registered extension type parses its metadata here, and may raise anything
        raise DamagedArtifact(f"{name}: not readable as parquet ({error}); restore it or leave it out") from error


def _read(parquet: pq.ParquetFile, group: int, columns: list[str], name: str) -> pa.Table:
    try:
        return parquet.read_row_group(group, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise DamagedArtifact(f"{name}: not readable as parquet ({error}); restore it or leave it out") from error


@lru_cache(maxsize=4)  # rows come in the order of the files, but two columns are asked for in turn
def _heavy(tree: Tree, name: str, group: int, columns: tuple[str, ...]) -> pa.Table:
    with tree.open(name) as handle:
        parquet = _open(handle, f"{tree}/{name}", group)
        there = [column for column in columns if column in parquet.schema_arrow.names]
        return _read(parquet, group, there, f"{tree}/{name}")
