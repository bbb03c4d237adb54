"""User data in parquet files with images, features or both; columns are mapped by name.

    ROOT/modality=sketch/*.parquet      one folder per modality, any number of files in it or in folders below it
    ROOT/modality=photo/*.parquet

Columns: key (string), label (string), pair (string), image (binary, or a struct with the field bytes), text (string),
feature (list of numbers); only key and one of image, text and feature are required. `Columns` maps other names; other
columns are ignored. Labels are brought to their canonical spelling. Listing holds one row group in memory, loading a
few. A row without a key is a bad row with the key FILE:ROWGROUP:ROW.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, BinaryIO, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from zsr.data.decode import BadImage
from zsr.data.rows import Modality, canonical_label, require_modality
from zsr.data.sources import Item
from zsr.data.sources.pages import check_pages
from zsr.data.sources.tree import Entry, Tree, TreeSource, elsewhere, misplaced
from zsr.errors import ConfigError, DamagedArtifact

CONTENT: Final = ("image", "text", "feature")  # a file must have at least one of these columns


class Columns(BaseModel):
    """Names of the user's columns."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str = "key"
    label: str = "label"
    pair: str = "pair"
    image: str = "image"
    text: str = "text"
    feature: str = "feature"


@dataclass(frozen=True)
class Parquet(TreeSource):
    """Source over a `root` with one folder modality=NAME per modality; an item's `where` is FILE:ROWGROUP:ROW."""

    columns: Columns = field(default_factory=Columns)

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"name": "parquet", "attribution": "", "columns": self.columns.model_dump()}

    def items(self) -> Iterator[Item]:
        """Yield every row of every file.

        Raises:
            ConfigError: no modality folder, no file, no key column, or a column of the wrong type.
            DamagedArtifact: a file that is not parquet, is truncated, or claims pages of more than 1 GiB.
        """
        tree = self.tree
        folders = [name for name in tree.folders() if name.lower().startswith("modality=")]
        if not folders:
            raise ConfigError(f"{tree}: no modality=NAME folder; expected modality=sketch/*.parquet and so on")
        for folder in folders:
            modality, empty = require_modality(folder.partition("=")[2].lower()), True
            for path, entry in tree.files(_is_parquet, folder):
                if _is_parquet(path):
                    empty = False
                    yield from self._rows(modality, path, entry)
                else:
                    yield misplaced(path, entry, "The image lies among parquet files, and in none of them.")
            if empty:
                raise ConfigError(f"{tree}/{folder}: no *.parquet file")
        yield from elsewhere(tree, folders, "the parquet files")

    def load(self, item: Item) -> bytes:
        """The encoded image of the row, b"" if it has none.

        Raises:
            BadImage: the row holds a path instead of the bytes of its image.
        """
        item.refuse()
        cell = self._cell(item, self.columns.image)
        if not isinstance(cell, dict):
            return cell or b""
        if cell["bytes"] is None and cell.get("path"):
            raise BadImage(
                "missing_value",
                f"The row names its image by the path {cell['path']!r:.200} and does not hold it; write the bytes into "
                "the file (with Hugging Face datasets: embed_table_storage), or take the source pairs.",
            )
        return cell["bytes"] or b""

    def feature(self, item: Item) -> np.ndarray | None:
        """The feature (D,) float32 of the row, or None if it has none.

        Raises:
            BadImage: one of its numbers is null, NaN, infinite, or too large for float32.
        """
        value = self._cell(item, self.columns.feature)
        if value is None:
            return None
        with np.errstate(over="ignore"):
            vector = np.asarray(value, dtype=np.float64).astype(np.float32)
        if not len(vector) or not np.isfinite(vector).all():
            at = int(np.argmin(np.isfinite(vector))) if len(vector) else 0
            found = f"Number {at} of the feature is {value[at]}" if len(vector) else "The feature holds no number"
            raise BadImage("not_finite", f"{found}; expected finite numbers that fit float32.")
        return vector

    def _rows(self, modality: Modality, name: str, entry: Entry) -> Iterator[Item]:
        with self.tree.open(name) as handle:
            parquet = _open(handle, f"{self.tree}/{name}")
            names = self._light(parquet.schema_arrow, f"{self.tree}/{name}")
            for group in range(parquet.metadata.num_row_groups):
                table = _read(parquet, group, list(names), f"{self.tree}/{name}").rename_columns(list(names.values()))
                for row, values in enumerate(table.to_pylist()):
                    yield _item(modality, values, f"{name}:{group}:{row}", entry.guard)

    def _cell(self, item: Item, column: str) -> Any:
        """A cell as a Python value; a list of numbers as a float64 array with nulls as NaN."""
        name, group, row = item.where.rsplit(":", 2)
        table = _heavy(self.tree, name, int(group), (self.columns.image, self.columns.feature))
        if column not in table.column_names:
            return None
        cell = table.column(column)[int(row)]
        return cell.values.to_numpy(zero_copy_only=False) if cell.is_valid and _is_list(cell.type) else cell.as_py()

    def _light(self, schema: pa.Schema, file: str) -> dict[str, str]:
        """The columns needed for listing, {user's name: our name}. Raises ConfigError for a column of a wrong type."""
        names = {getattr(self.columns, ours): ours for ours in ("key", "label", "pair", "text")}
        there = [theirs for theirs in names if theirs in schema.names]
        if self.columns.key not in there:
            raise ConfigError(f"{file}: no column {self.columns.key!r} among {schema.names}; see --columns.key")
        for theirs in there:
            kind = _plain_type(schema.field(theirs), file)
            # a column with only nulls has the type null
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
                raise ConfigError(f"{file}: column {theirs!r} is {kind}, expected string; cast it first")
        for theirs, fits, expected in (
            (self.columns.image, _holds_bytes, "binary, or a struct with the binary field bytes"),
            (self.columns.feature, _holds_numbers, "a list of numbers"),
        ):
            if theirs in schema.names and not fits(kind := _plain_type(schema.field(theirs), file)):
                raise ConfigError(
                    f"{file}: column {theirs!r} is {kind}, expected {expected}; convert it, or name another column "
                    "with --columns.image and --columns.feature"
                )
        if not {getattr(self.columns, ours) for ours in CONTENT} & set(schema.names):
            wanted = [getattr(self.columns, ours) for ours in CONTENT]
            raise ConfigError(
                f"{file}: none of the columns {wanted} is among {schema.names}; give the name of yours, such as "
                f"--columns.image {_likely_image(schema)}"
            )
        return {theirs: names[theirs] for theirs in there}


def _is_parquet(path: str) -> bool:
    return path.lower().endswith(".parquet")


def _likely_image(schema: pa.Schema) -> str:
    """Name of a column that may hold images, for an error message."""
    return next((each.name for each in schema if _holds_bytes(each.type) and not pa.types.is_null(each.type)), "NAME")


def _plain_type(column: pa.Field, file: str) -> pa.DataType:
    """The type of a column. Raises ConfigError for an extension type: some execute code when they are read."""
    name = (column.metadata or {}).get(b"ARROW:extension:name", b"").decode(errors="replace")
    if isinstance(column.type, pa.BaseExtensionType):
        name = column.type.extension_name
    if name:
        raise ConfigError(
            f"{file}: column {column.name!r} has the Arrow extension type {name}; write its plain "
            "values, as table.column(NAME).combine_chunks().storage has them (a tensor as a list of numbers)"
        )
    return column.type


def _item(modality: Modality, values: Mapping[str, Any], where: str, guard: str) -> Item:
    key, label = values["key"], values.get("label")
    problem = "" if key else "missing_value: The row has no key; every row requires one of its own."
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


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _holds_numbers(kind: pa.DataType) -> bool:
    if pa.types.is_null(kind):
        return True
    numbers = _is_list(kind) and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))
    return bool(numbers or (_is_list(kind) and pa.types.is_null(kind.value_type)))


def _open(handle: BinaryIO, name: str, group: int | None = None) -> pq.ParquetFile:
    """Open the file after checking its schema and the page headers of `group`, or of all groups.

    Raises:
        DamagedArtifact: it is not readable as parquet.
    """
    try:
        parquet = pq.ParquetFile(handle)
        check_pages(handle, parquet.metadata, range(parquet.num_row_groups) if group is None else [group], name)
        return parquet
    except (DamagedArtifact, BadImage):
        raise
    except Exception as error:  # registered extension types parse their metadata here, and may raise anything
        raise DamagedArtifact(f"{name}: not readable as parquet ({error}); restore it or leave it out") from error


def _read(parquet: pq.ParquetFile, group: int, columns: list[str], name: str) -> pa.Table:
    try:
        return parquet.read_row_group(group, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise DamagedArtifact(f"{name}: not readable as parquet ({error}); restore it or leave it out") from error


@lru_cache(maxsize=4)  # rows are loaded in file order, but images and features are requested in turn
def _heavy(tree: Tree, name: str, group: int, columns: tuple[str, ...]) -> pa.Table:
    with tree.open(name) as handle:
        parquet = _open(handle, f"{tree}/{name}", group)
        there = [column for column in columns if column in parquet.schema_arrow.names]
        return _read(parquet, group, there, f"{tree}/{name}")
