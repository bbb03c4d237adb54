"""Check the uncompressed sizes in the page headers of a parquet file before anything is decompressed.

A parquet reader trusts page headers: a page of a few kilobytes may decompress to 2 GiB, whatever the footer says.
The headers use Thrift's compact encoding (apache/parquet-format, PageHeader): field 2 is the uncompressed size,
field 3 the compressed size.
"""

from collections.abc import Iterable
from typing import BinaryIO, Final

import pyarrow.parquet as pq

from zsr.errors import DamagedArtifact

PAGE: Final = 1 << 30  # max bytes of an uncompressed page; writers aim at 1 MiB, but exceed it for images
HEADER: Final = 1 << 16  # max bytes of a page header, which may hold the min and max value
SHORT: Final = {1: 0, 2: 0, 3: 1, 7: 8}  # Thrift types of a fixed size: true, false, byte, double


def check_pages(file: BinaryIO, metadata: pq.FileMetaData, groups: Iterable[int], name: str) -> None:
    """Check the page headers of every column in these row groups.

    Raises:
        DamagedArtifact: a page claims more than PAGE bytes, or a header cannot be read; nothing was decompressed.
    """
    for group in groups:
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            where = f"{name}: row group {group}, column {column.path_in_schema!r}"
            starts = (column.dictionary_page_offset, column.data_page_offset)
            at = min(start for start in starts if start is not None)
            end = at + column.total_compressed_size
            while at < end:
                at = _page(file, at, where)


def _page(file: BinaryIO, at: int, where: str) -> int:
    """Check the header of the page at offset `at`, and return the offset of the next page."""
    file.seek(at)
    try:
        header = _Compact(file.read(HEADER))
        fields = header.struct()
        unpacked, packed = int(fields[2]), int(fields[3])
    except (IndexError, KeyError, ValueError, RecursionError) as error:
        raise DamagedArtifact(f"{where}: no page header at byte {at} ({error!r}); restore the file") from error
    if not 0 <= unpacked <= PAGE or packed < 0:
        raise DamagedArtifact(
            f"{where}: the page at byte {at} claims {unpacked} bytes unpacked from {packed}, at most {PAGE} are read; "
            "write the file with smaller pages, or remove it"
        )
    return at + header.at + packed


class _Compact:
    """Parser of the part of Thrift's compact protocol that page headers use: keeps integers and skips the rest."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def struct(self) -> dict[int, int]:
        """The integer fields of the struct at the current position, by field number."""
        fields: dict[int, int] = {}
        number = 0
        while head := self._byte():
            delta, kind = head >> 4, head & 15
            number = number + delta if delta else self._signed()
            if kind in (4, 5, 6):
                fields[number] = self._signed()
            else:
                self._skip(kind)
        return fields

    def _skip(self, kind: int) -> None:
        if kind in SHORT:
            self.at += SHORT[kind]
        elif kind == 8:  # text or bytes
            length = self._varint()
            self.at += length
        elif kind == 12:
            self.struct()
        else:
            raise ValueError(f"a field of type {kind}")
        if self.at > len(self.data):
            raise IndexError("the header ends early")

    def _byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def _signed(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
