"""A ROOT and its versions: the only file that creates one, and does so by put-if-absent."""

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

POINTER_CAP = 4096  # bytes of a version's file


@dataclass(frozen=True)
class Store:
    """A ROOT, directory or prefix of an object store, that holds the versions of one artifact.

    Attributes:
        root: the directory, or what this machine mirrors of the store at `url`.
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
        """The ROOT as a path or URL below which files that are no artifacts are written."""
        return Path(self.url) if self.url else self.root

    @property
    def bucket(self) -> Bucket | None:
        """The object store; None for a directory."""
        return Bucket(self.url, self.root) if self.url else None

    def staging(self, plan: Plan) -> Staging:
        """Where `plan` is worked on; finished pieces of a killed run are found there."""
        staging = Staging(self.root, plan, self.url)
        WATCH.staging = staging.where
        return staging

    def made(
        self, plan: Plan, check: Callable[[Artifact], None] | None = None, after: int | None = None
    ) -> Artifact | None:
        """The artifact that this very plan already made, published now if a kill came after sealing.

        If there is none, this process is the one that may make it, until it publishes or discards it: another run of
        the same plan waits here until then, and finds it made.

        Args:
            check: called before such a late publication, where sealing alone does not make an artifact fit to publish;
                what it raises is passed on, and nothing is published.
            after: see `publish`.

        Raises:
            StorageError: an object store without conditional put, which is found out before anything is made.
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
        """Raise ConfigError where the newest version is of another kind: a mistyped path must not bury an artifact."""
        numbers = self.versions()
        current = self._at_version(numbers[-1]) if numbers else None
        if current is not None and current.kind != kind:
            raise ConfigError(f"{self} holds {current.kind!r}, and {kind!r} would go there; give another output")

    def _published_by(self, plan: Plan, after: int | None) -> Artifact | None:
        for number in reversed(self.versions()):
            artifact = self._at_version(number)
            if artifact is not None and artifact.plan == plan.digest and artifact.complete():
                if number != self.versions()[-1]:
                    self.publish(artifact, after)  # who asks for this plan again wants the next job to read it
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
        """Forget what a killed run of `plan` had finished, to work on it from scratch. Published versions stay."""
        self._remove(f"staging/{plan.digest}")

    def abandon(self, plan: Plan) -> None:
        """Forget what was finished of `plan`, which nobody will go on with."""
        self._clear(plan.digest)

    def remove_staging(self) -> None:
        """Remove everything unfinished.

        Raises:
            AlreadyPublished: another process is at work on some of it.
        """
        folder = self.root / "staging"
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            plan = path.name.removesuffix(lock.SUFFIX)
            if not lock.try_acquire(self._lock(plan)):
                raise AlreadyPublished(f"{path}: another run is at work here; run this again when it has ended")
            self._clear(plan)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Let no other process of this file system be in here: for a publication, and for a removal of what is old."""
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
        """The digest that version `number` names.

        Raises:
            DamagedArtifact: there is no such version, or its file is not what was written.
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
        """Make a freshly sealed `artifact` the next version and clear its staging.

        Publishing what the current version holds already, from the same plan, is a no-op.

        Args:
            after: the newest version when the work began, for an artifact that was made from it: it is published as
                the next one, or not at all, so that no change in between is lost.

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
                f"{self}: version {newest} was published while a change of version {after} was made; run it again, "
                f"so that it is made from version {newest}"
            )
        if current and artifact.plan and current.plan == artifact.plan:
            raise AlreadyPublished(
                f"{self}: another run of the same command has published version {newest} meanwhile; run it again to "
                "find it finished"
            )
        number = self._link(artifact, newest + 1)
        self._clear(artifact.plan)
        return number

    def _link(self, artifact: Artifact, number: int) -> int:
        """Create version `number`, in one step that fails if it is there."""
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
                    f"{folder}: this file system has no hard links, so two publishers could take one version; use "
                    "another one, or an object store with conditional put"
                ) from error
            raise
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _clear(self, plan: str) -> None:
        """Remove the staging area of the plan with this digest, and let other runs of it go on."""
        if plan:
            self._remove(f"staging/{plan}")
            lock.release(self._lock(plan))

    def latest(self) -> Artifact:
        """The highest version whose manifest verifies; a warning says why a higher one does not.

        Raises:
            StorageError: nothing is published here, or a file is not readable for another reason than damage.
            DamagedArtifact: versions exist, and none verifies.
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
                logger.warning("%s: version %d is read, since %s", self, number, "; ".join(reasons[:3]))
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
        """Digests of the object and of the plan that version `number` names."""
        try:
            with disk_errors(self.root / "versions" / str(number)):
                pointer = json.loads(self._read(f"versions/{number}"))
            return str(pointer["digest"]), str(pointer["plan"])
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedArtifact(f"{self}/versions/{number}: does not name an object: {error!r}") from error
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError):  # removed since it was listed, or a dangling link
                raise DamagedArtifact(f"{self}/versions/{number}: missing") from error
            raise

    def open(self, digest: str, plan: str = "") -> Artifact:
        """The object `digest`, published or not; `plan` is the digest of the plan that made it, where it is known.

        Raises:
            DamagedArtifact: missing, or its manifest does not verify.
            ConfigError: written by a newer zsr.
        """
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise DamagedArtifact(f"{self}: {digest!r} is not a digest")
        path = f"{self}/objects/{digest}/{MANIFEST}"
        data = self._manifest(f"objects/{digest}/{MANIFEST}")
        if len(data) > MANIFEST_CAP:
            raise DamagedArtifact(f"{path}: larger than {MANIFEST_CAP} bytes; a manifest never is")
        if sha256(data) != digest:
            raise DamagedArtifact(
                f"{path}: sha256 {sha256(data)[:12]} but it is filed under {digest[:12]}; restore it from a copy"
            )
        try:
            manifest = json.loads(data)
            if manifest["schema"] != SCHEMA_VERSION:
                raise ConfigError(
                    f"{path}: written in schema {manifest['schema']} by a newer zsr, and this one reads schema "
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
        kind: what it must be: data, features, semantics, checkpoint, embeddings or index.

    Raises:
        StorageError: no such directory, or nothing published in it.
        DamagedArtifact: the manifest does not verify.
        ConfigError: it is an artifact of another kind.
    """
    store, digest = _located(Store.at(path))
    artifact = store.open(digest) if digest else store.latest()
    if artifact.kind != kind:
        raise ConfigError(f"{path} holds {artifact.kind!r} but {kind!r} was expected; check the flag that names it")
    return artifact


def _located(place: Store) -> tuple[Store, str]:
    """The ROOT that `place` is, or is in, and the digest if `place` is one of its objects."""
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
