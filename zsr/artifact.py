"""Artifacts: content-addressed directories that are either whole and verified, or do not exist.

    ROOT/staging/PLAN/{files,scratch,receipts}/    work in progress, keyed by the digest of the plan
    ROOT/objects/DIGEST/{files..., manifest.json}  immutable; DIGEST is the SHA-256 of manifest.json
    ROOT/versions/N                                a small file that names a digest, created by put-if-absent

A writer stages pieces (each fsynced, renamed and given a receipt with its SHA-256), seals them under a manifest that is
written last, renames the directory into `objects/`, and publishes a version with `os.link`, which fails if the version
exists. A killed writer finds its finished pieces by their receipts. A reader checks size and hash before any parser
sees a byte. Equal work gives equal digests: a manifest holds no path, address, time or host.

Roots are directories on a local or shared POSIX file system. This is the only file that creates a version.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import unicodedata
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from zsr import fault
from zsr.errors import AlreadyPublished, ConfigError, DamagedArtifact, DiskFull, StorageError

SCHEMA_VERSION: Final = 1
MANIFEST: Final = "manifest.json"
MANIFEST_CAP: Final = 64 << 20  # bytes; a billion rows in shards of 100,000 make a manifest of about 2 MiB
CHUNK: Final = 8 << 20

Json = Mapping[str, Any]


def canonical(value: object) -> bytes:
    """`value` as JSON with sorted keys and no spaces: equal values give equal bytes.

    Raises:
        ConfigError: the value holds a NaN, an infinity or something that JSON cannot say.
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
    """The relative path that `name` spells, if it stays inside whatever root it is joined to.

    Raises:
        DamagedArtifact: absolute, a drive, `..`, a backslash, a control character, a look-alike of `.` or `/`, or a
            part longer than 240 bytes.
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
    """One file of an artifact: relative path, size in bytes, hexadecimal SHA-256, and facts its writer recorded."""

    path: str
    bytes: int
    sha256: str
    facts: Json = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {"path": self.path, "bytes": self.bytes, "sha256": self.sha256, "facts": dict(self.facts)}


@dataclass(frozen=True)
class Plan:
    """What is about to be made: its kind, the configuration that shapes it, and the digests of its inputs.

    `guard` holds what tells one input from another without shaping the content, such as modification times of raw
    files: it separates staging areas, but does not enter the manifest.
    """

    kind: str
    config: Json
    parents: Mapping[str, str] = field(default_factory=dict)
    guard: Json = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        parts = {"kind": self.kind, "config": self.config, "parents": dict(self.parents), "guard": self.guard}
        return sha256(canonical(parts))


@dataclass(frozen=True)
class Artifact:
    """A sealed artifact, opened: its manifest was read under a size cap and its digest checked.

    `plan` is the digest of the plan that made it, known to its writer and to its version file only.
    """

    root: Path
    digest: str
    manifest: Json
    plan: str = ""

    @property
    def directory(self) -> Path:
        return self.root / "objects" / self.digest

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
        """The entry of `name`.

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
        with _open_regular(self.directory / safe_name(name)) as handle:
            size = os.fstat(handle.fileno()).st_size
            _check_size(self.directory / name, size, entry)
            data: bytes = handle.read()
        _check_hash(self.directory / name, sha256(data), entry)
        return data

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """`name` as an Arrow table, parsed from the very bytes that were verified.

        Raises:
            DamagedArtifact: wrong size or hash, not parquet, or a schema with an extension type (which may run code).
        """
        data = self.read(name)
        try:
            parquet = pq.ParquetFile(pa.BufferReader(data))
            refuse_extension_types(parquet.schema_arrow, f"{self.directory / name}")
            return parquet.read(columns=columns)
        except DamagedArtifact:
            raise
        except Exception as error:  # a registered extension type parses its metadata here, and may raise anything
            raise DamagedArtifact(f"{self.directory / name}: not readable as parquet: {error}") from error

    def local(self, name: str) -> Path:
        """Path of `name` for a parser that wants a path (faiss mmap); hashed once a process and unchanged inode."""
        entry = self.entry(name)
        path = self.directory / safe_name(name)
        with _open_regular(path) as handle:
            info = os.fstat(handle.fileno())
            inode = (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, entry.sha256)
            if inode not in _verified:
                _check_size(path, info.st_size, entry)
                _check_hash(path, _hash_handle(handle), entry)
                _verified.add(inode)
        return path

    def complete(self) -> bool:
        """Whether every file is there in its size: a cheap look, which does not replace `verify`."""
        try:
            return all((self.directory / safe_name(e.path)).lstat().st_size == e.bytes for e in self.files)
        except OSError:
            return False

    def verify(self) -> None:
        """Hash every file. Raises DamagedArtifact for the first that is not as the manifest says."""
        for entry in self.files:
            self.local(entry.path)


_verified: set[tuple[int, int, int, int, str]] = set()


def refuse_extension_types(schema: pa.Schema, where: str) -> None:
    """Raise DamagedArtifact if a column has an Arrow extension type: some deserialise by running code."""
    for column in schema:
        metadata = column.metadata or {}
        if isinstance(column.type, pa.BaseExtensionType) or any(b"extension" in key for key in metadata):
            raise DamagedArtifact(
                f"{where}: column {column.name!r} has the extension type {column.type}; plain Arrow types only are read"
            )


def _check_size(path: Path, found: int, entry: FileEntry) -> None:
    if found != entry.bytes:
        raise DamagedArtifact(
            f"{path}: {found} bytes (sha256 not computed) but the manifest says {entry.bytes} (sha256 "
            f"{entry.sha256[:12]}); restore the file, or remove this object and run the job that made it again"
        )


def _check_hash(path: Path, found: str, entry: FileEntry) -> None:
    if found != entry.sha256:
        raise DamagedArtifact(
            f"{path}: sha256 {found[:12]} but the manifest says {entry.sha256[:12]}; restore the file, or remove this "
            "object and run the job that made it again"
        )


@contextmanager
def _open_regular(path: Path) -> Iterator[Any]:
    """Open without following a link; refuse what is not a plain file with one name."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.ENOTDIR):
            raise DamagedArtifact(f"{path}: missing, or a link or device ({error.strerror}); restore it") from error
        raise StorageError(f"{path}: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as handle:
        info = os.fstat(handle.fileno())
        if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1:
            raise DamagedArtifact(f"{path}: not a plain file with a single name; artifacts hold nothing else")
        yield handle


def _hash_handle(handle: Any) -> str:
    handle.seek(0)
    digest = hashlib.sha256()
    while chunk := handle.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(path: Path, size: int | None = None) -> Iterator[None]:
    """Turn an OSError of a write into StorageError or DiskFull, naming the path and the bytes wanted."""
    try:
        yield
    except OSError as error:
        what = f"{path}" + ("" if size is None else f" ({size} bytes)")
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFull(f"{what}: no space left; free some and run the same command again") from error
        raise StorageError(f"{what}: {error}") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write, fsync and rename into place: a reader sees the whole file or none."""
    temporary = path.with_name(f".{path.name[:200]}.{uuid.uuid4().hex}")
    with disk_errors(path, len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _fsync_directory(path.parent)


@dataclass(frozen=True)
class Staging:
    """The unfinished artifact of one plan. Many processes may write pieces at once; equal plans write equal bytes."""

    root: Path
    plan: Plan

    @property
    def directory(self) -> Path:
        return self.root / "staging" / self.plan.digest

    def path(self, name: str, *, scratch: bool = False) -> Path:
        """Where the finished piece `name` lies."""
        return self.directory / ("scratch" if scratch else "files") / safe_name(name)

    def _receipt(self, name: str, scratch: bool) -> Path:
        return self.directory / "receipts" / ("scratch" if scratch else "files") / f"{safe_name(name)}.json"

    def finished(self, name: str, *, scratch: bool = False) -> FileEntry | None:
        """The receipt of piece `name`, or None if it is not there or not of the size that its receipt says."""
        try:
            entry = FileEntry(**json.loads(self._receipt(name, scratch).read_bytes()))
            size = self.path(name, scratch=scratch).stat().st_size
        except (OSError, ValueError, TypeError):
            return None
        return entry if size == entry.bytes else None

    @contextmanager
    def piece(self, name: str, *, scratch: bool = False, facts: dict[str, Any] | None = None) -> Iterator[Path]:
        """A temporary path to write piece `name` to; on leaving it is fsynced, renamed and given its receipt.

        `facts` is read on leaving, so the writer may fill it while it writes. Scratch pieces never enter the artifact.

        Raises:
            DiskFull, StorageError: nothing of the piece is left behind.
        """
        final = self.path(name, scratch=scratch)
        temporary = final.with_name(f".{final.name[:200]}.{uuid.uuid4().hex}")
        with disk_errors(final):
            final.parent.mkdir(parents=True, exist_ok=True)
            try:
                fault.here("artifact.write")
                yield temporary
                with open(temporary, "rb+") as handle:
                    os.fsync(handle.fileno())
                    entry = FileEntry(name, os.fstat(handle.fileno()).st_size, _hash_handle(handle), facts or {})
                os.replace(temporary, final)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            _fsync_directory(final.parent)
            fault.here("artifact.receipt")
        write_atomically(self._receipt(name, scratch), canonical(entry.as_json()))

    def write(self, name: str, data: bytes, *, scratch: bool = False, facts: dict[str, Any] | None = None) -> FileEntry:
        """Stage `data` as piece `name`."""
        with self.piece(name, scratch=scratch, facts=facts) as path:
            path.write_bytes(data)
        return self._staged(name, scratch)

    def write_table(
        self, name: str, table: pa.Table, *, scratch: bool = False, facts: dict[str, Any] | None = None
    ) -> FileEntry:
        """Stage `table` as parquet: zstd, page checksums, byte-identical for an equal table."""
        refuse_extension_types(table.schema, name)
        with self.piece(name, scratch=scratch, facts=facts) as path:
            pq.write_table(table, path, compression="zstd", write_page_checksum=True, row_group_size=16384)
        return self._staged(name, scratch)

    def _staged(self, name: str, scratch: bool) -> FileEntry:
        entry = self.finished(name, scratch=scratch)
        if entry is None:
            raise StorageError(f"{self.path(name, scratch=scratch)} vanished after it was written; is staging shared?")
        return entry

    def read(self, name: str, *, scratch: bool = False) -> bytes:
        """The bytes of a finished piece, checked against its receipt."""
        entry = self.finished(name, scratch=scratch)
        path = self.path(name, scratch=scratch)
        if entry is None:
            raise DamagedArtifact(f"{path}: not finished; run the job again")
        data = path.read_bytes()
        _check_hash(path, sha256(data), entry)
        return data

    def drop(self, name: str, *, scratch: bool = False) -> None:
        """Forget a piece: its receipt first, so that a kill in between leaves no receipt without a file."""
        self._receipt(name, scratch).unlink(missing_ok=True)
        self.path(name, scratch=scratch).unlink(missing_ok=True)

    def pieces(self, *, scratch: bool = False) -> tuple[str, ...]:
        """Names of the finished pieces, sorted."""
        return tuple(name for name in self._received(scratch) if self.finished(name, scratch=scratch))

    def _received(self, scratch: bool) -> tuple[str, ...]:
        """Names of the pieces that have a receipt, sorted."""
        base = self.directory / "receipts" / ("scratch" if scratch else "files")
        names = (str(path.relative_to(base))[: -len(".json")] for path in base.rglob("*.json") if path.name[0] != ".")
        return tuple(sorted(names))

    def all_finished(self, names: Iterable[str]) -> list[FileEntry]:
        """The receipts of pieces that must all be there.

        Raises:
            StorageError: one is missing or not of the size that its receipt says, as a stale view of a shared file
                system may show it. Nothing may be sealed without it.
        """
        entries = [(name, self.finished(name)) for name in names]
        if missing := [name for name, entry in entries if entry is None]:
            raise StorageError(f"{self.directory}: {missing[:5]} are not finished; run the same command again")
        return [entry for _, entry in entries if entry is not None]

    def seal(self, *, facts: Json, rows: Mapping[str, int] | None = None) -> Artifact:
        """Put every finished, non-scratch piece under a manifest and move it to `objects/`. Not yet published.

        Args:
            facts: what readers need to know (dimensions, counts, metric). JSON values only.
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
        digest = sha256(data)
        target = self.root / "objects" / digest
        fault.here("artifact.manifest")
        write_atomically(self.directory / "sealed.json", canonical({"digest": digest}))
        if target.exists() and not _sound(Artifact(self.root, digest, manifest)):
            os.rename(target, self.directory / f"damaged-{uuid.uuid4().hex}")  # goes with the staging area
        if not target.exists():
            write_atomically(self.directory / "files" / MANIFEST, data)
            self._drop_unfinished(manifest)
            fault.here("artifact.seal")
            with disk_errors(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                os.rename(self.directory / "files", target)
                _fsync_directory(target.parent)
        return Artifact(self.root, digest, json.loads(data), self.plan.digest)

    def _drop_unfinished(self, manifest: Mapping[str, Any]) -> None:
        """Remove what a killed writer left beside the listed files: an object holds what its manifest lists."""
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


@dataclass(frozen=True)
class Store:
    """A ROOT directory that holds the versions of one artifact."""

    root: Path

    @classmethod
    def at(cls, path: str | Path) -> "Store":
        """The store at `path`.

        Raises:
            StorageError: `path` is a URL: only POSIX directories offer the atomic link that publishing needs here.
        """
        text = str(path)
        if re.match(r"^[a-z][a-z0-9+.-]*://", text) and not text.startswith("file://"):
            raise StorageError(
                f"{text}: artifacts are kept in local or shared POSIX directories in this version; mount the bucket or "
                "copy the artifact"
            )
        return cls(Path(text.removeprefix("file://")).absolute())

    def staging(self, plan: Plan) -> Staging:
        """Where `plan` is worked on; finished pieces of a killed run are found there."""
        return Staging(self.root, plan)

    def made(self, plan: Plan, check: Callable[[Artifact], None] | None = None) -> Artifact | None:
        """The artifact that this very plan already made, published now if a kill came after sealing.

        Args:
            check: called before such a late publication, where sealing alone does not make an artifact fit to publish;
                what it raises is passed on, and nothing is published.
        """
        for number in reversed(self.versions()):
            artifact = self._at_version(number)
            if artifact is not None and artifact.plan == plan.digest and artifact.complete():
                if number != self.versions()[-1]:
                    self.publish(artifact)  # who asks for this plan again wants the next job to read it
                return artifact
        try:
            sealed = json.loads((self.staging(plan).directory / "sealed.json").read_bytes())
            artifact = self._open_object(str(sealed["digest"]), plan.digest)
        except (OSError, ValueError, DamagedArtifact):
            return None
        if check is not None:
            check(artifact)
        self.publish(artifact)
        return artifact

    def discard(self, plan: Plan) -> None:
        """Forget what a killed run of `plan` had finished. Published versions stay."""
        shutil.rmtree(self.staging(plan).directory, ignore_errors=True)

    def versions(self) -> tuple[int, ...]:
        """Published version numbers, ascending."""
        try:
            return tuple(sorted(int(name) for name in os.listdir(self.root / "versions") if name.isdigit()))
        except FileNotFoundError:
            return ()

    def publish(self, artifact: Artifact) -> int:
        """Make a freshly sealed `artifact` the next version and clear its staging.

        Publishing what the current version holds already, from the same plan, is a no-op.

        Raises:
            AlreadyPublished: another publisher created the same version number first.
        """
        numbers = self.versions()
        current = self._at_version(numbers[-1]) if numbers else None
        if current and (current.digest, current.plan) == (artifact.digest, artifact.plan):
            self._clear(artifact)
            return numbers[-1]
        number = self._link(artifact, (numbers[-1] if numbers else 0) + 1)
        self._clear(artifact)
        return number

    def _link(self, artifact: Artifact, number: int) -> int:
        folder = self.root / "versions"
        temporary = folder / f".{uuid.uuid4().hex}"
        write_atomically(temporary, canonical({"digest": artifact.digest, "plan": artifact.plan}))
        fault.here("artifact.link")
        try:
            with disk_errors(folder / str(number)):
                try:
                    os.link(temporary, folder / str(number))
                except FileExistsError:
                    raise AlreadyPublished(
                        f"{folder / str(number)} was created by another publisher; run again to publish after it"
                    ) from None
                _fsync_directory(folder)
        finally:
            temporary.unlink(missing_ok=True)
        return number

    def _clear(self, artifact: Artifact) -> None:
        if artifact.plan:
            shutil.rmtree(self.root / "staging" / artifact.plan, ignore_errors=True)

    def latest(self) -> Artifact:
        """The highest version whose manifest verifies.

        Raises:
            StorageError: nothing is published here.
            DamagedArtifact: versions exist, and none verifies.
        """
        numbers = self.versions()
        if not numbers:
            raise StorageError(f"{self.root}: no published version; has the job that writes it finished?")
        for number in reversed(numbers):
            artifact = self._at_version(number)
            if artifact is not None:
                return artifact
        raise DamagedArtifact(f"{self.root}: none of the versions {numbers} verifies; restore objects/ from a copy")

    def _at_version(self, number: int) -> Artifact | None:
        try:
            pointer = json.loads((self.root / "versions" / str(number)).read_bytes()[:4096])
            return self._open_object(str(pointer["digest"]), str(pointer["plan"]))
        except (OSError, ValueError, KeyError, TypeError, DamagedArtifact):
            return None

    def _open_object(self, digest: str, plan: str = "") -> Artifact:
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise DamagedArtifact(f"{self.root}: {digest!r} is not a digest")
        path = self.root / "objects" / digest / MANIFEST
        with _open_regular(path) as handle:
            data = handle.read(MANIFEST_CAP + 1)
        if len(data) > MANIFEST_CAP:
            raise DamagedArtifact(f"{path}: larger than {MANIFEST_CAP} bytes; a manifest never is")
        if sha256(data) != digest:
            raise DamagedArtifact(
                f"{path}: sha256 {sha256(data)[:12]} but it is filed under {digest[:12]}; restore it from a copy"
            )
        try:
            manifest = json.loads(data)
            if manifest["schema"] != SCHEMA_VERSION:
                raise DamagedArtifact(f"{path}: schema {manifest['schema']}, this version reads {SCHEMA_VERSION}")
            for entry in manifest["files"]:
                safe_name(entry["path"])
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedArtifact(f"{path}: not a manifest: {error!r}") from error
        return Artifact(self.root, digest, manifest, plan)


def open_artifact(path: str | Path, kind: str) -> Artifact:
    """Open an artifact by its ROOT (the highest version that verifies) or by one of its object directories.

    Args:
        path: ROOT or ROOT/objects/DIGEST.
        kind: what it must be: data, features, semantics, checkpoint, embeddings or index.

    Raises:
        StorageError: no such directory, or nothing published in it.
        DamagedArtifact: the manifest does not verify.
        ConfigError: it is an artifact of another kind.
    """
    place = Store.at(path).root
    if not place.is_dir():
        raise StorageError(f"{place}: no such artifact; expected the --output of an earlier job (kind {kind!r})")
    if (place / MANIFEST).exists() and place.parent.name == "objects":
        artifact = Store(place.parent.parent)._open_object(place.name)
    else:
        artifact = Store(place).latest()
    if artifact.kind != kind:
        raise ConfigError(f"{place} holds {artifact.kind!r} but {kind!r} was expected; check the flag that names it")
    return artifact
