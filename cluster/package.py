"""What a submission uploads: the source tree without what a job does not need, as one small zip file.

Every node of a cluster fetches it before it can do anything, and Ray keeps it in the head's memory. So it is bounded,
and data that lies in the tree is refused by name, in place of being uploaded or silently left out.
"""

import fnmatch
import io
import os
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from zsr.errors import ConfigError

LIMIT: Final = 2 << 20  # bytes of the zip file
READ: Final = 32 << 20  # bytes of the files in it: beyond this nothing is compressed to find out
# by name, at any depth; "*" as in a shell
EXCLUDES: Final = (
    ".*",
    "__pycache__",
    "*.egg-info",
    "node_modules",
)
TOP_EXCLUDES: Final = ("benchmarks", "build", "dist", "docs", "runs", "tests")  # at the top alone


@dataclass(frozen=True)
class Package:
    """A zip file of source, and the bytes of what is in it by entry at the top of the tree."""

    data: bytes
    contents: Mapping[str, int]


def files(root: Path) -> Iterator[Path]:
    """Paths of what a package of `root` holds, in sorted order and relative to it."""
    for folder, folders, names in os.walk(root):
        here = Path(folder).relative_to(root)
        folders[:] = sorted(name for name in folders if not _excluded(here / name))
        yield from (here / name for name in sorted(names) if not _excluded(here / name))


def _excluded(path: Path) -> bool:
    if len(path.parts) == 1 and path.name in TOP_EXCLUDES:
        return True
    return any(fnmatch.fnmatch(path.name, pattern) for pattern in EXCLUDES)


def package(root: Path, more: Mapping[str, bytes]) -> Package:
    """The zip file of `root`, with the files `more` beside its own. Equal trees give equal bytes.

    Raises:
        ConfigError: larger than `LIMIT`; the largest entries are named with their sizes.
    """
    found = list(files(root))
    contents: Counter[str] = Counter()
    for path in found:
        contents[path.parts[0]] += (root / path).lstat().st_size
    if sum(contents.values()) > READ:
        raise ConfigError(_too_large(root, contents, sum(contents.values()), "before compression"))
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in found:
            _add(archive, path.as_posix(), (root / path).read_bytes())
        for name, data in sorted(more.items()):
            _add(archive, name, data)
    data = memory.getvalue()
    if len(data) > LIMIT:
        raise ConfigError(_too_large(root, contents, len(data), "compressed"))
    return Package(data, dict(contents))


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    entry = zipfile.ZipInfo(name)  # dated 1980: a checkout's times are no content
    entry.external_attr = 0o644 << 16
    entry.compress_type = zipfile.ZIP_DEFLATED
    archive.writestr(entry, data)


def _too_large(root: Path, contents: Mapping[str, int], size: int, what: str) -> str:
    largest = sorted(contents.items(), key=lambda item: -item[1])[:3]
    named = ", ".join(f"{root / name} ({bytes_ / 2**20:.1f} MiB)" for name, bytes_ in largest)
    return (
        f"the package would have {size / 2**20:.1f} MiB {what}, and {LIMIT >> 20} MiB are allowed; its largest entries "
        f"are {named}. Move data out of the tree, to storage that all nodes share"
    )
