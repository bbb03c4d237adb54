"""Artifacts opened for reading: every byte is checked against the manifest before it is parsed."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from zsr.artifact.bucket import Bucket
from zsr.artifact.disk import check_hash, check_size, hash_handle, open_regular
from zsr.artifact.format import FileEntry, Json, refuse_extension_types, safe_name, sha256
from zsr.errors import DamagedArtifact


@dataclass(frozen=True)
class Artifact:
    """A sealed artifact opened for reading; its manifest was read under a size cap and its digest checked.

    `plan` is the digest of the plan that wrote it, known only to its writer and in its version file. For an object
    store, at `url`, `root` is the local mirror into which files are downloaded.
    """

    root: Path
    digest: str
    manifest: Json
    plan: str = ""
    url: str = ""

    @property
    def directory(self) -> Path:
        return self.root / "objects" / self.digest

    @property
    def place(self) -> str:
        """Its ROOT, a path or a URL."""
        return self.url or str(self.root)

    @property
    def bucket(self) -> Bucket | None:
        """Its object store; None for a folder."""
        return Bucket(self.url, self.root) if self.url else None

    @property
    def kind(self) -> str:
        return str(self.manifest["kind"])

    @property
    def config(self) -> Json:
        config: Json = self.manifest["config"]
        return config

    @property
    def facts(self) -> Json:
        facts: Json = self.manifest["facts"]
        return facts

    @property
    def parents(self) -> Mapping[str, str]:
        parents: Mapping[str, str] = self.manifest["parents"]
        return parents

    @cached_property
    def files(self) -> tuple[FileEntry, ...]:
        return tuple(FileEntry(**entry) for entry in self.manifest["files"])

    @cached_property
    def _by_path(self) -> dict[str, FileEntry]:
        return {entry.path: entry for entry in self.files}

    def entry(self, name: str) -> FileEntry:
        """The manifest's entry (size, SHA-256, metadata) for the file at the relative path `name`.

        Raises:
            DamagedArtifact: the manifest lists no such file.
        """
        try:
            return self._by_path[name]
        except KeyError:
            raise DamagedArtifact(
                f"{self.directory}: no file {name!r} in the manifest; it lists {sorted(self._by_path)[:5]} ..."
            ) from None

    def shards(self, modality: str | None = None) -> tuple[FileEntry, ...]:
        """Parquet shards in name order, of one modality or of all."""
        prefix = "modality=" if modality is None else f"modality={modality}/"
        return tuple(e for e in sorted(self.files, key=lambda e: e.path) if e.path.startswith(prefix))

    def read(self, name: str) -> bytes:
        """The bytes of `name`, after its size and hash have been checked."""
        entry = self.entry(name)
        path = self.directory / safe_name(name) if self.bucket is None else self.local(name)
        with open_regular(path) as handle:
            size = os.fstat(handle.fileno()).st_size
            check_size(self.directory / name, size, entry)
            data: bytes = handle.read()
        check_hash(self.directory / name, sha256(data), entry)
        return data

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """`name` as an Arrow table, parsed from the same bytes that were verified.

        Raises:
            DamagedArtifact: wrong size or hash, not parquet, or a schema with an extension type (which may execute
                code).
        """
        data = self.read(name)
        try:
            parquet = pq.ParquetFile(pa.BufferReader(data))
            refuse_extension_types(parquet.schema_arrow, f"{self.directory / name}")
            return parquet.read(columns=columns)
        except DamagedArtifact:
            raise
        except Exception as error:  # registered extension types parse their metadata here, and may raise anything
            raise DamagedArtifact(f"{self.directory / name}: not readable as parquet: {error}") from error

    def local(self, name: str) -> Path:
        """Path of `name` for a parser that requires one (faiss mmap); hashed once per process and unchanged inode."""
        entry = self.entry(name)
        try:
            return self._checked(entry)
        except DamagedArtifact:
            if not self.url:
                raise
            # the local copy may be damaged: download it again
            (self.directory / safe_name(name)).unlink(missing_ok=True)
            return self._checked(entry)

    def _here(self, entry: FileEntry) -> Path:
        """Path of the file on this machine, downloaded if necessary; `safe_name` keeps it inside the root."""
        name = str(safe_name(entry.path))
        if self.bucket is None:
            return self.directory / name
        return self.bucket.fetch(f"objects/{self.digest}/{name}", entry)

    def _checked(self, entry: FileEntry) -> Path:
        path = self._here(entry)
        with open_regular(path) as handle:
            info = os.fstat(handle.fileno())
            # ctime changes with every write through any link to the file, and no program can reset it; in the mirror of
            # a bucket it changes with each use (utime), and those files have no other links
            changed = info.st_ctime_ns if self.bucket is None else info.st_mtime_ns
            inode = (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, changed, entry.sha256)
            if inode not in _verified:
                check_size(path, info.st_size, entry)
                check_hash(path, hash_handle(handle), entry)
                _verified.add(inode)
        return path

    def complete(self) -> bool:
        """Whether every file exists with its size: a cheap check that does not replace `verify`."""
        try:
            if self.bucket is not None:
                sizes = self.bucket.sizes(f"objects/{self.digest}")
                return all(sizes.get(e.path) == e.bytes for e in self.files)
            return all((self.directory / safe_name(e.path)).stat().st_size == e.bytes for e in self.files)
        except OSError:
            return False

    def verify(self) -> None:
        """Hash every file. Raises DamagedArtifact for the first that differs from the manifest."""
        for entry in self.files:
            self.local(entry.path)


_verified: set[tuple[int, int, int, int, int, str]] = set()
