"""Artifacts: content-addressed directories that are either complete and verified, or do not exist.

    ROOT/staging/PLAN/{files,scratch,receipts}/    work in progress, keyed by the digest of the plan
    ROOT/objects/DIGEST/{files..., manifest.json}  immutable; DIGEST is the SHA-256 of manifest.json
    ROOT/versions/N                                a small file that names a digest, created by put-if-absent

A writer stages pieces (each fsynced, renamed and given a receipt with its SHA-256), seals them under a manifest that is
written last, moves them into `objects/`, and publishes a version in one atomic step that fails if the version exists. A
restarted writer finds its finished pieces by their receipts. A reader checks size and hash before parsing. Equal work
gives equal digests: a manifest holds no path, address, time or host.

Roots are directories on a local or shared POSIX file system (a version is an `os.link`), or prefixes of an object store
(a conditional put; see `bucket`). Only `store` creates versions.
"""

from zsr.artifact.disk import disk_errors, mapped, write_atomically
from zsr.artifact.format import (
    CHUNK,
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
from zsr.artifact.staging import Staging
from zsr.artifact.store import Store, open_artifact

__all__ = [
    "CHUNK",
    "MANIFEST",
    "MANIFEST_CAP",
    "SCHEMA_VERSION",
    "Artifact",
    "FileEntry",
    "Json",
    "Plan",
    "Staging",
    "Store",
    "canonical",
    "disk_errors",
    "mapped",
    "open_artifact",
    "refuse_extension_types",
    "safe_name",
    "sha256",
    "write_atomically",
]
