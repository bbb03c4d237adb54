"""Stores (ROOTs) and their versions. Versions are created only here, by put-if-absent."""

import errno
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from zsr import faults
from zsr.artifact import lock
from zsr.artifact.bucket import Bucket, cache_directory
from zsr.artifact.disk import disk_errors, fsync_directory, open_regular, write_atomically
from zsr.artifact.format import MANIFEST, MANIFEST_CAP, SCHEMA_VERSION, Plan, canonical, safe_name, sha256
from zsr.artifact.opened import Artifact
from zsr.artifact.staging import Staging
from zsr.errors import AlreadyPublished, ConfigError, DamagedArtifact, StorageError
from zsr.interrupt import WATCH
from zsr.storage import local_path, url_of

logger = logging.getLogger("zsr")

POINTER_CAP = 4096  # max bytes of a version file


@dataclass(frozen=True)
class Store:
    """A ROOT, a directory or prefix of an object store, that holds the versions of one artifact.

    Attributes:
        root: the directory, or this machine's mirror of the store at `url`.
    """

    root: Path
    url: str = ""

    @classmethod
    def at(cls, path: str | Path) -> "Store":
        """The store at `path`, a directory or a URL such as s3://bucket/prefix."""
        url = url_of(path)
        return cls(local_path(path)) if url is None else cls(cache_directory(url), url)

    def __str__(self) -> str:
        return self.url or str(self.root)

    @property
    def place(self) -> Path:
        """The ROOT as a path or URL, for files that are not artifacts."""
        return Path(self.url) if self.url else self.root

    @property
    def bucket(self) -> Bucket | None:
        """The object store; None for a directory."""
        return Bucket(self.url, self.root) if self.url else None

    def staging(self, plan: Plan) -> Staging:
        """The staging area of `plan`, with the finished pieces of a killed run."""
        staging = Staging(self.root, plan, self.url)
        WATCH.staging = staging.where
        return staging

    def made(
        self, plan: Plan, check: Callable[[Artifact], None] | None = None, after: int | None = None
    ) -> Artifact | None:
        """The artifact already written by the same plan; it is published now if a kill came between sealing and that.

        If there is none, this process gets the lock of the plan until it publishes or discards: another run of the same
        plan waits here until then, and finds it finished.

        Args:
            check: called before such a late publication, for artifacts that must pass a check to be published; its
                errors are passed on, and nothing is published.
            after: see `publish`.

        Raises:
            StorageError: an object store without conditional put, detected before any work is done.
            AlreadyPublished: see `publish`.
            ConfigError: a newer zsr has published here, or the artifacts here are of another kind.
        """
        if self.bucket is not None:
            self.bucket.require_conditional_put()
        self._require_kind(plan.kind)
        if artifact := self._published_by(plan, after):
            return artifact
        lock.acquire(self._lock(plan.digest))
        artifact = self._published_by(plan, after) or self._sealed_by(plan, check, after)
        if artifact is not None:
            lock.release(self._lock(plan.digest))
        return artifact

    def _require_kind(self, kind: str) -> None:
        """Raise ConfigError if the newest version is of another kind: a mistyped path must not hide an artifact."""
        numbers = self.versions()
        current = self._at_version(numbers[-1]) if numbers else None
        if current is not None and current.kind != kind:
            raise ConfigError(
                f"{self} holds {current.kind!r}, so {kind!r} cannot be written there; give another output"
            )

    def _published_by(self, plan: Plan, after: int | None) -> Artifact | None:
        for number in reversed(self.versions()):
            artifact = self._at_version(number)
            if artifact is not None and artifact.plan == plan.digest and artifact.complete():
                if number != self.versions()[-1]:
                    self.publish(artifact, after)  # the newest version must be that of the last run
                return artifact
        return None

    def _sealed_by(self, plan: Plan, check: Callable[[Artifact], None] | None, after: int | None) -> Artifact | None:
        try:
            sealed = json.loads(self._read(f"staging/{plan.digest}/sealed.json"))
            artifact = self.open(str(sealed["digest"]), plan.digest)
        except (OSError, ValueError, DamagedArtifact):
            return None
        if check is not None:
            check(artifact)
        self.publish(artifact, after)
        return artifact

    def discard(self, plan: Plan) -> None:
        """Remove the work of a killed run of `plan`, to start from scratch. Published versions stay."""
        self._remove(f"staging/{plan.digest}")

    def abandon(self, plan: Plan) -> None:
        """Remove the staging area of `plan`, which will not be resumed, and release its lock."""
        self._clear(plan.digest)

    def remove_staging(self) -> None:
        """Remove all staging areas.

        Raises:
            AlreadyPublished: another process is working in one of them.
        """
        folder = self.root / "staging"
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            plan = path.name.removesuffix(lock.SUFFIX)
            if not lock.try_acquire(self._lock(plan)):
                raise AlreadyPublished(f"{path}: another run is working here; run this again when it has ended")
            self._clear(plan)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Exclude all other processes on this file system while publishing or removing old versions."""
        path = self.root / ".publishing.lock"
        lock.acquire(path)
        try:
            yield
        finally:
            lock.release(path)

    def _lock(self, plan: str) -> Path:
        return self.root / "staging" / f"{plan}{lock.SUFFIX}"

    def versions(self) -> tuple[int, ...]:
        """Published version numbers, ascending."""
        if self.bucket is not None:
            names = list(self.bucket.sizes("versions"))
        else:
            folder = self.root / "versions"
            names = os.listdir(folder) if folder.is_dir() else []
        return tuple(sorted(int(name) for name in names if name.isdigit()))

    def digest_of(self, number: int) -> str:
        """The digest of version `number`.

        Raises:
            DamagedArtifact: there is no such version, or its file is damaged.
            StorageError: the storage fails.
        """
        return self._pointer(number)[0]

    def _read(self, name: str) -> bytes:
        """A small file of this root. Raises OSError, StorageError."""
        if self.bucket is not None:
            return self.bucket.read(name, POINTER_CAP)
        with open(self.root / name, "rb") as handle:
            return handle.read(POINTER_CAP)

    def _remove(self, folder: str) -> None:
        if self.bucket is not None:
            self.bucket.remove(folder)
        else:
            shutil.rmtree(self.root / folder, ignore_errors=True)

    def publish(self, artifact: Artifact, after: int | None = None) -> int:
        """Publish a sealed `artifact` as the next version and remove its staging area.

        A no-op if the current version has the same content and plan.

        Args:
            after: the newest version when the work began, for an artifact derived from it: it is only published as the
                version after that, so that no change in between is lost.

        Raises:
            AlreadyPublished: another publisher created the version first.
            ConfigError: the newest version is of a newer zsr, or of another kind.
        """
        self._require_kind(artifact.kind)
        numbers = self.versions()
        newest = numbers[-1] if numbers else 0
        current = self._at_version(newest) if numbers else None
        if current and (current.digest, current.plan) == (artifact.digest, artifact.plan):
            self._clear(artifact.plan)
            return newest
        if after not in (None, newest):
            raise AlreadyPublished(
                f"{self}: version {newest} was published while version {after} was being changed; run it again to "
                f"change version {newest}"
            )
        if current and artifact.plan and current.plan == artifact.plan:
            raise AlreadyPublished(
                f"{self}: another run of the same command has published version {newest} in the meantime; run it again "
                "to use its result"
            )
        number = self._link(artifact, newest + 1)
        self._clear(artifact.plan)
        return number

    def _link(self, artifact: Artifact, number: int) -> int:
        """Create version `number` in one atomic step that fails if it exists."""
        content = {"digest": artifact.digest, "plan": artifact.plan}
        if self.bucket is None:
            won = self._link_file(content, number)
        else:
            faults.here("artifact.link")
            won = self.bucket.create(f"versions/{number}", content)
        if not won:
            raise AlreadyPublished(
                f"{self}/versions/{number} was created by another publisher; run again to publish after it"
            )
        return number

    def _link_file(self, content: dict[str, str], number: int) -> bool:
        folder = self.root / "versions"
        temporary = folder / f".{uuid.uuid4().hex}"
        write_atomically(temporary, canonical(content))
        faults.here("artifact.link")
        try:
            with disk_errors(folder / str(number)):
                os.link(temporary, folder / str(number))
                fsync_directory(folder)
        except StorageError as error:
            if isinstance(error.__cause__, FileExistsError):
                return False
            if getattr(error.__cause__, "errno", None) in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise StorageError(
                    f"{folder}: this file system has no hard links, so two publishers could create the same version; "
                    "use another one, or an object store with conditional put"
                ) from error
            raise
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _clear(self, plan: str) -> None:
        """Remove the staging area of the plan with this digest, and release its lock."""
        if plan:
            self._remove(f"staging/{plan}")
            lock.release(self._lock(plan))

    def latest(self) -> Artifact:
        """The highest version whose manifest verifies; a warning gives the reason if a higher one does not.

        Raises:
            StorageError: nothing is published here, or a file is not readable for a reason other than damage.
            DamagedArtifact: versions exist, but none verifies.
            ConfigError: the newest was written by a newer zsr.
        """
        numbers = self.versions()
        if not numbers:
            raise StorageError(f"{self}: no published version; has the job that writes it finished?")
        reasons = []
        for number in reversed(numbers):
            try:
                artifact = self._opened(number)
            except DamagedArtifact as error:
                reasons.append(f"version {number}: {error}")
                continue
            if reasons:
                logger.warning("%s: version %d is read instead, since %s", self, number, "; ".join(reasons[:3]))
            return artifact
        more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        raise DamagedArtifact(f"{self}: no version can be read: {'; '.join(reasons[:3])}{more}")

    def _at_version(self, number: int) -> Artifact | None:
        """The artifact of version `number`; None if it is damaged. Raises StorageError, ConfigError as `latest`."""
        try:
            return self._opened(number)
        except DamagedArtifact:
            return None

    def _opened(self, number: int) -> Artifact:
        return self.open(*self._pointer(number))

    def _pointer(self, number: int) -> tuple[str, str]:
        """Digests of the object and of the plan of version `number`."""
        try:
            with disk_errors(self.root / "versions" / str(number)):
                pointer = json.loads(self._read(f"versions/{number}"))
            return str(pointer["digest"]), str(pointer["plan"])
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedArtifact(f"{self}/versions/{number}: not a version file: {error!r}") from error
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError):  # removed after it was listed, or a dangling link
                raise DamagedArtifact(f"{self}/versions/{number}: missing") from error
            raise

    def open(self, digest: str, plan: str = "") -> Artifact:
        """Open the object `digest`, published or not; `plan` is the digest of the plan that wrote it, if known.

        Raises:
            DamagedArtifact: missing, or its manifest does not verify.
            ConfigError: written by a newer zsr.
        """
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise DamagedArtifact(f"{self}: {digest!r} is not a digest")
        path = f"{self}/objects/{digest}/{MANIFEST}"
        data = self._manifest(f"objects/{digest}/{MANIFEST}")
        if len(data) > MANIFEST_CAP:
            raise DamagedArtifact(f"{path}: larger than {MANIFEST_CAP} bytes, the limit of a manifest")
        if sha256(data) != digest:
            raise DamagedArtifact(f"{path}: sha256 {sha256(data)[:12]}, expected {digest[:12]}; restore it from a copy")
        try:
            manifest = json.loads(data)
            if manifest["schema"] != SCHEMA_VERSION:
                raise ConfigError(
                    f"{path}: written in schema {manifest['schema']} by a newer zsr, but this one reads schema "
                    f"{SCHEMA_VERSION}; upgrade zsr"
                )
            for entry in manifest["files"]:
                safe_name(entry["path"])
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedArtifact(f"{path}: not a manifest: {error!r}") from error
        return Artifact(self.root, digest, manifest, plan, self.url)

    def _manifest(self, name: str) -> bytes:
        if self.bucket is not None:
            try:
                return self.bucket.read(name, MANIFEST_CAP + 1)
            except FileNotFoundError:
                raise DamagedArtifact(f"{self}/{name}: missing; restore it from a copy") from None
        with open_regular(self.root / name) as handle:
            data: bytes = handle.read(MANIFEST_CAP + 1)
        return data


def open_artifact(path: str | Path, kind: str) -> Artifact:
    """Open an artifact by its ROOT (the highest version that verifies) or by one of its object directories.

    Args:
        path: ROOT or ROOT/objects/DIGEST.
        kind: its required kind: data, features, semantics, checkpoint, embeddings or index.

    Raises:
        StorageError: no such directory, or nothing published in it.
        DamagedArtifact: the manifest does not verify.
        ConfigError: it is an artifact of another kind.
    """
    store, digest = _located(Store.at(path))
    artifact = store.open(digest) if digest else store.latest()
    if artifact.kind != kind:
        raise ConfigError(f"{path} holds {artifact.kind!r}, expected {kind!r}; check the flag of this path")
    return artifact


def _located(place: Store) -> tuple[Store, str]:
    """The store of `place`, which is a ROOT or one of its objects, and in the latter case the digest."""
    if place.url:
        root, folder, name = _parted(place.url)
        return (Store.at(root), name) if folder == "objects" and re.fullmatch(r"[0-9a-f]{64}", name) else (place, "")
    if not place.root.is_dir():
        raise StorageError(f"{place}: no such artifact; expected the --output of an earlier job")
    if (place.root / MANIFEST).exists() and place.root.parent.name == "objects":
        return Store(place.root.parent.parent), place.root.name
    return place, ""


def _parted(url: str) -> tuple[str, str, str]:
    rest, _, name = url.rpartition("/")
    root, _, folder = rest.rpartition("/")
    return root, folder, name
