"""The unfinished artifact of a plan: pieces with receipts, sealed under a manifest that is written last."""

import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from zsr import faults
from zsr.artifact.bucket import Bucket
from zsr.artifact.disk import check_hash, disk_errors, fsync_directory, hash_handle, write_atomically
from zsr.artifact.format import (
    MANIFEST,
    MANIFEST_CAP,
    SCHEMA_VERSION,
    FileEntry,
    Json,
    Plan,
    canonical,
    refuse_extension_types,
    safe_name,
    sha256,
)
from zsr.artifact.opened import Artifact
from zsr.errors import ConfigError, DamagedArtifact, StorageError

RECEIPT_CAP: Final = 16 << 20  # max bytes; the metadata may hold counts of many classes


@dataclass(frozen=True)
class Staging:
    """The unfinished artifact of one plan. Many processes may write pieces in parallel; equal plans write equal bytes.

    For an object store, at `url`, pieces are written below `root` on this machine and uploaded when complete.
    """

    root: Path
    plan: Plan
    url: str = ""

    @property
    def bucket(self) -> Bucket | None:
        """Its object store; None for a folder."""
        return Bucket(self.url, self.root) if self.url else None

    @property
    def directory(self) -> Path:
        return self.root / self._folder

    @property
    def where(self) -> str:
        """Its path or URL, for messages."""
        return f"{self.url or self.root}/{self._folder}"

    @property
    def _folder(self) -> str:
        return f"staging/{self.plan.digest}"

    def _name(self, name: str, scratch: bool) -> str:
        return f"{self._folder}/{'scratch' if scratch else 'files'}/{safe_name(name)}"

    def _receipt(self, name: str, scratch: bool) -> str:
        return f"{self._folder}/receipts/{'scratch' if scratch else 'files'}/{safe_name(name)}.json"

    def path(self, name: str, *, scratch: bool = False) -> Path:
        """Path of the piece `name` on this machine; a finished one is downloaded from the object store."""
        if self.bucket is not None and (entry := self.finished(name, scratch=scratch)):
            return self.bucket.fetch(self._name(name, scratch), entry)
        return self.root / self._name(name, scratch)

    def finished(self, name: str, *, scratch: bool = False) -> FileEntry | None:
        """The receipt of piece `name`, or None if the piece is missing or its size differs from the receipt."""
        try:
            if self.bucket is not None:  # an upload is complete before its receipt is written
                return FileEntry(**json.loads(self.bucket.read(self._receipt(name, scratch), RECEIPT_CAP)))
            entry = FileEntry(**json.loads((self.root / self._receipt(name, scratch)).read_bytes()))
            size = (self.root / self._name(name, scratch)).stat().st_size
        except (OSError, ValueError, TypeError):
            return None
        return entry if size == entry.bytes else None

    @contextmanager
    def piece(self, name: str, *, scratch: bool = False, facts: dict[str, Any] | None = None) -> Iterator[Path]:
        """A temporary path to write piece `name` to; on exit it is fsynced, renamed and given its receipt.

        `facts` is read on exit, so the writer may fill it while it writes. Scratch pieces never enter the artifact.

        Raises:
            DiskFull, StorageError: the piece is removed.
        """
        final = self.root / self._name(name, scratch)
        temporary = final.with_name(f".{final.name[:200]}.{uuid.uuid4().hex}")
        with disk_errors(final):
            final.parent.mkdir(parents=True, exist_ok=True)
            try:
                faults.here("artifact.write")
                yield temporary
                with open(temporary, "rb+") as handle:
                    os.fsync(handle.fileno())
                    entry = FileEntry(name, os.fstat(handle.fileno()).st_size, hash_handle(handle), facts or {})
                self._keep(temporary, final, self._name(name, scratch))
            finally:
                temporary.unlink(missing_ok=True)
            faults.here("artifact.receipt")
        self._note(self._receipt(name, scratch), canonical(entry.as_json()))

    def _keep(self, temporary: Path, final: Path, name: str) -> None:
        if self.bucket is not None:
            final.unlink(missing_ok=True)  # an earlier download, perhaps of another run's piece
            self.bucket.upload(temporary, name)
            return
        os.replace(temporary, final)
        fsync_directory(final.parent)

    def _note(self, name: str, data: bytes) -> None:
        if self.bucket is not None:
            self.bucket.write(name, data)
        else:
            write_atomically(self.root / name, data)

    def write(self, name: str, data: bytes, *, scratch: bool = False, facts: dict[str, Any] | None = None) -> FileEntry:
        """Stage `data` as piece `name`."""
        with self.piece(name, scratch=scratch, facts=facts) as path:
            path.write_bytes(data)
        return self._staged(name, scratch)

    def write_table(
        self, name: str, table: pa.Table, *, scratch: bool = False, facts: dict[str, Any] | None = None
    ) -> FileEntry:
        """Stage `table` as parquet (zstd, page checksums), byte-identical for equal tables."""
        refuse_extension_types(table.schema, name)
        with self.piece(name, scratch=scratch, facts=facts) as path:
            pq.write_table(table, path, compression="zstd", write_page_checksum=True, row_group_size=16384)
        return self._staged(name, scratch)

    def _staged(self, name: str, scratch: bool) -> FileEntry:
        entry = self.finished(name, scratch=scratch)
        if entry is None:
            raise StorageError(f"{self.where}: {name} vanished after it was written; is staging shared?")
        return entry

    def read(self, name: str, *, scratch: bool = False) -> bytes:
        """The bytes of a finished piece, checked against its receipt."""
        entry = self.finished(name, scratch=scratch)
        place = self.root / self._name(name, scratch)
        if entry is None:
            raise DamagedArtifact(f"{self.where}: {name} is not finished; run the job again")
        if self.bucket is not None:
            data = self.bucket.read(self._name(name, scratch), entry.bytes + 1)
        else:
            data = place.read_bytes()
        check_hash(place, sha256(data), entry)
        return data

    def drop(self, name: str, *, scratch: bool = False) -> None:
        """Remove a piece: its receipt first, so that a kill in between leaves no receipt without a file."""
        for what in (self._receipt(name, scratch), self._name(name, scratch)):
            if self.bucket is not None:
                self.bucket.remove(what)
            else:
                (self.root / what).unlink(missing_ok=True)

    def pieces(self, *, scratch: bool = False) -> tuple[str, ...]:
        """Names of the finished pieces, sorted."""
        return tuple(name for name in self._received(scratch) if self.finished(name, scratch=scratch))

    def _received(self, scratch: bool) -> tuple[str, ...]:
        """Names of the pieces that have a receipt, sorted."""
        folder = f"{self._folder}/receipts/{'scratch' if scratch else 'files'}"
        if self.bucket is not None:
            found = [name for name in self.bucket.sizes(folder) if name.endswith(".json")]
        else:
            base = self.root / folder
            found = [str(path.relative_to(base)) for path in base.rglob("*.json") if path.name[0] != "."]
        return tuple(sorted(name[: -len(".json")] for name in found))

    def all_finished(self, names: Iterable[str]) -> list[FileEntry]:
        """The receipts of pieces that must all be finished.

        Raises:
            StorageError: one is missing or differs in size from its receipt, for example in a stale view of a shared
                file system. Nothing may be sealed without it.
        """
        entries = [(name, self.finished(name)) for name in names]
        if missing := [name for name, entry in entries if entry is None]:
            raise StorageError(f"{self.where}: {missing[:5]} are not finished; run the same command again")
        return [entry for _, entry in entries if entry is not None]

    def seal(self, *, facts: Json, rows: Mapping[str, int] | None = None) -> Artifact:
        """Put every finished, non-scratch piece under a manifest and move it to `objects/`. Not yet published.

        Args:
            facts: metadata for readers (dimensions, counts, metric). JSON values only.
            rows: counts such as in, used, quarantined.
        """
        entries = self.all_finished(self._received(scratch=False))
        manifest = {
            "schema": SCHEMA_VERSION,
            "kind": self.plan.kind,
            "config": self.plan.config,
            "parents": dict(self.plan.parents),
            "facts": facts,
            "rows": dict(rows or {}),
            "files": [entry.as_json() for entry in entries],
        }
        data = canonical(manifest)
        if len(data) > MANIFEST_CAP:  # readers would reject it
            raise ConfigError(
                f"{self.where}: {len(entries)} files need a manifest of {len(data)} bytes, at most {MANIFEST_CAP} are "
                "read; use fewer and larger shards (--rows-per-shard)"
            )
        digest = sha256(data)
        faults.here("artifact.manifest")
        self._note(f"{self._folder}/sealed.json", canonical({"digest": digest}))
        if self.bucket is not None:
            self._copy_to_objects(self.bucket, entries, digest, data)
        else:
            self._move_to_objects(Artifact(self.root, digest, manifest), data)
        return Artifact(self.root, digest, json.loads(data), self.plan.digest, self.url)

    def _move_to_objects(self, sealed: Artifact, data: bytes) -> None:
        target = sealed.directory
        if target.exists() and not _sound(sealed):
            os.rename(target, self.directory / f"damaged-{uuid.uuid4().hex}")  # removed with the staging area
        if target.exists():
            return
        write_atomically(self.directory / "files" / MANIFEST, data)
        self._drop_unfinished(sealed.manifest)
        faults.here("artifact.seal")
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(self.directory / "files", target)
            fsync_directory(target.parent)

    def _copy_to_objects(self, bucket: Bucket, entries: list[FileEntry], digest: str, data: bytes) -> None:
        """Copy every file, overwriting existing ones, which may be damaged; the manifest last."""
        faults.here("artifact.seal")
        target = f"objects/{digest}"
        if entries:
            bucket.copy((self._name(entry.path, False), f"{target}/{entry.path}") for entry in entries)
        bucket.write(f"{target}/{MANIFEST}", data)

    def _drop_unfinished(self, manifest: Mapping[str, Any]) -> None:
        """Remove unlisted files of killed writers: an object holds only the files of its manifest."""
        listed = {entry["path"] for entry in manifest["files"]} | {MANIFEST}
        base = self.directory / "files"
        for path in [p for p in base.rglob("*") if p.is_file() and str(p.relative_to(base)) not in listed]:
            path.unlink()


def _sound(artifact: Artifact) -> bool:
    try:
        artifact.verify()
    except DamagedArtifact:
        return False
    return True
