"""Small files that claim, or unpack to, more than a machine should give them."""

import gzip
import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

KINDS = {
    "900mp.png": "oversized",
    "body.png": "oversized",
    "text.png": "undecodable",
    "profile.png": "undecodable",
    "900mp.jpg": "oversized",
    "progressive.jpg": "oversized",
    "lossy.webp": "oversized",
    "lossless.webp": "oversized",
    "canvas.webp": "oversized",
    "long.jpg": "oversized",
    "strokes.ndjson.gz": "ConfigError",
    "page.parquet": "DamagedArtifact",
}


def write(root: Path, files: dict[str, bytes]) -> list[str]:
    """Write `files` below `root`; their paths. The one called long.jpg becomes a terabyte without a body."""
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        if path.name == "long.jpg":
            with path.open("ab") as handle:
                handle.truncate(1 << 40)
    return [str(root / name) for name in files]


def all_of_them(seed: int) -> dict[str, bytes]:
    """Twelve bombs; sides vary with the seed, from 51 to 900 megapixels."""
    rng = random.Random(seed)
    side = rng.randrange(7_200, 30_001)
    pictures = {
        "900mp.png": png(side, 51_000_000 // side + rng.randrange(1, 1_000)),
        "body.png": png(8_000, 8_000, body=zlib.compress(bytes(8_001 * 8_000))),
        "text.png": png(8, 8, before=[(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100 << 20)))]),
        "profile.png": png(8, 8, before=[(b"iCCP", b"icc\0\0" + zlib.compress(bytes(100 << 20)))]),
        "900mp.jpg": jpeg(rng.randrange(8_000, 65_500), 13_740),
        "progressive.jpg": jpeg(30_000, 30_000, progressive=True),
        "lossy.webp": webp(16_383, 16_383 - rng.randrange(1_000)),
        "lossless.webp": webp(16_383, 16_383 - rng.randrange(1_000), lossless=True),
        "canvas.webp": canvas(30_000, 30_000 - rng.randrange(1_000)),
        "long.jpg": b"\xff\xd8\xff",
    }
    return {
        **{f"photo/a/{name}": data for name, data in pictures.items()},
        "strokes/strokes.ndjson.gz": gzip.compress(bytes(16 << 20)) * 64,
        "table/modality=photo/page.parquet": parquet(),
    }


def png(width: int, height: int, body: bytes = b"", before: list[tuple[bytes, bytes]] | None = None) -> bytes:
    """A PNG whose header says so, with this body, and these chunks before it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    middle = b"".join(chunk(name, data) for name, data in before or [])
    return b"\x89PNG\r\n\x1a\n" + header + middle + chunk(b"IDAT", body or zlib.compress(b"")) + chunk(b"IEND", b"")


def jpeg(width: int, height: int, progressive: bool = False) -> bytes:
    """A small JPEG whose frame header is changed to these sides."""
    encoded = io.BytesIO()
    Image.new("RGB", (16, 16)).save(encoded, "JPEG", progressive=progressive)
    data = bytearray(encoded.getvalue())
    at = data.index(b"\xff\xc2" if progressive else b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def webp(width: int, height: int, lossless: bool = False) -> bytes:
    """A small WebP whose frame header is changed to these sides."""
    encoded = io.BytesIO()
    Image.new("RGB", (16, 16)).save(encoded, "WEBP", lossless=lossless)
    data = bytearray(encoded.getvalue())
    if lossless:
        at = data.index(b"\x2f", 20)
        data[at + 1 : at + 5] = struct.pack("<I", (width - 1) | (height - 1) << 14)
    else:
        at = data.index(b"\x9d\x01\x2a")
        data[at + 3 : at + 7] = struct.pack("<HH", width, height)
    return bytes(data)


def canvas(width: int, height: int) -> bytes:
    """A WebP in the extended format, of a canvas and nothing else."""
    sides = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    return b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + sides


def parquet() -> bytes:
    """A file with one page of some 70 kB that claims 2 GiB, and unpacks to them; the footer says 70 kB.

    The page takes the place of an incompressible one of the same length: its header's third integer is what the page is
    packed to, and a frame that zstd skips fills the rest.
    """
    noise = np.random.default_rng(0).bytes(90_000)
    schema = pa.schema([pa.field("key", pa.string(), nullable=False), pa.field("image", pa.binary(), nullable=False)])
    encoded = io.BytesIO()
    table = pa.table({"key": ["a"], "image": [noise]}, schema=schema)
    options = {"compression": "zstd", "use_dictionary": False, "write_statistics": False, "data_page_version": "1.0"}
    pq.write_table(table, encoded, **options)
    column = pq.ParquetFile(encoded).metadata.row_group(0).column(1)
    data, start, length = encoded.getvalue(), column.data_page_offset, column.total_compressed_size
    bomb = io.BytesIO()
    with pa.CompressedOutputStream(bomb, "zstd") as stream:
        for _ in range(128):
            stream.write(bytes(16 << 20))
        packed = bomb  # closed with the stream
        stream.flush()
        frame = packed.getvalue()
    page = page_header(2**31 - 1, length) + frame
    page += b"\x50\x2a\x4d\x18" + struct.pack("<I", length - len(page) - 8)
    page += bytes(length - len(page))
    assert len(page) == length
    return data[:start] + page + data[start + length :]


def page_header(unpacked: int, room: int) -> bytes:
    """PageHeader of a data page of one value in Thrift's compact encoding, filling `room` with what follows it."""

    def number(value: int) -> bytes:
        value = value << 1
        parts = []
        while value > 127:
            parts.append(value & 127 | 128)
            value >>= 7
        return bytes([*parts, value])

    # field 5 is the structure of a data page: values, encoding, and those of the two kinds of levels
    of_page = b"\x2c\x15\x02\x15\x00\x15\x06\x15\x06\x00\x00"
    packed = room
    while True:
        header = b"\x15\x00\x15" + number(unpacked) + b"\x15" + number(packed) + of_page
        if packed == room - len(header):
            return header
        packed = room - len(header)
