"""Format of artifacts: canonical JSON, digests, safe file names, file entries and plans."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, Final

import pyarrow as pa

from zsr.errors import ConfigError, DamagedArtifact

SCHEMA_VERSION: Final = 1
MANIFEST: Final = "manifest.json"
MANIFEST_CAP: Final = 64 << 20  # bytes; a billion rows in shards of 100,000 make a manifest of about 2 MiB
CHUNK: Final = 8 << 20

Json = Mapping[str, Any]


def canonical(value: object) -> bytes:
    """`value` as JSON with sorted keys and no spaces: equal values give equal bytes.

    Raises:
        ConfigError: the value holds a NaN, an infinity or something that JSON cannot represent.
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"not representable in a manifest: {error}") from error
    return text.encode()


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def safe_name(name: str) -> PurePosixPath:
    """`name` as a relative path that stays inside the root it is joined to.

    Raises:
        DamagedArtifact: absolute, a drive, `..`, a backslash, a control character, a look-alike of `.` or `/`, or a
            component longer than 240 bytes.
    """
    bad = (
        not name
        or name.startswith("/")
        or "\\" in name
        or re.match(r"^[A-Za-z]:", name) is not None
        or any(ord(c) < 32 or ord(c) == 127 for c in name)
        # full-width and one-dot-leader characters that some file systems fold into "." or "/"
        or unicodedata.normalize("NFKC", name) != name
    )
    parts = name.split("/")
    bad = bad or any(part in ("", ".", "..") or len(part.encode()) > 240 for part in parts)
    if bad:
        raise DamagedArtifact(f"file name {name!r} leaves its artifact or is malformed; expected a plain relative path")
    return PurePosixPath(name)


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of an artifact: relative path, size in bytes, hexadecimal SHA-256, and metadata (`facts`)."""

    path: str
    bytes: int
    sha256: str
    facts: Json = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {"path": self.path, "bytes": self.bytes, "sha256": self.sha256, "facts": dict(self.facts)}


@dataclass(frozen=True)
class Plan:
    """Specification of an artifact to write: its kind, its configuration, and the digests of its inputs.

    `guard` distinguishes inputs without determining the content, such as by modification times of raw files: it
    separates staging areas, but does not enter the manifest.
    """

    kind: str
    config: Json
    parents: Mapping[str, str] = field(default_factory=dict)
    guard: Json = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        parts = {"kind": self.kind, "config": self.config, "parents": dict(self.parents), "guard": self.guard}
        return sha256(canonical(parts))


def refuse_extension_types(schema: pa.Schema, where: str) -> None:
    """Raise DamagedArtifact if a column has an Arrow extension type: some execute code when they are deserialized."""
    for column in schema:
        metadata = column.metadata or {}
        if isinstance(column.type, pa.BaseExtensionType) or any(b"extension" in key for key in metadata):
            raise DamagedArtifact(
                f"{where}: column {column.name!r} has the extension type {column.type}; only plain Arrow types are read"
            )
