"""Paths stay home (B11): hostile names are refused by one function, and nothing is opened outside of the root."""

import encodings.utf_8_sig  # noqa: F401  # a codec is opened when it is first used
import os
import random
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.counts import count
from zsr.artifact import Plan, Store, canonical, open_artifact, safe_name, sha256
from zsr.data.decode import BadImage
from zsr.data.sources.pairs import Pairs
from zsr.errors import DamagedArtifact

NAMES = (
    *("..", "../x", "a/../../x", "a/..", "./x", ".", "", "a//b", "a/", "/etc/passwd", "//host/share", "/", "a/./b"),
    *("C:/x", "c:x", "Z:\\x", "a\\b", "..\\x", "\\\\host\\share", "a\0b", "\0", "a\nb", "a\x7f", "\x1b[2J"),
    *("\u2024\u2024/x", "\uff0e\uff0e/x", "a\uff0fb", "\u2025/x", "a/\ufe52\ufe52/b", "\uff0fetc\uff0fpasswd"),
    *("x" * 300, "a/" + "y" * 241, "\u00e9" * 121, "a/b/" + "z" * 300 + "/c", "..\0", "a/..\0/b"),
)
# plain names that an artifact never has, but a user's table or tar may: tar -C DIR . and Windows write them
READABLE = frozenset(("./x", "a//b", "a/./b", "a\\b", "a/" + "y" * 241, "\u00e9" * 121))
PLACES = ("dangling symlink", "directory", "fifo", "device")
GENERATED = count(0, 2_000)
opened: list[str] | None = None


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if opened is not None and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        opened.append(os.path.realpath(os.fsdecode(arguments[0])))


sys.addaudithook(_watch)


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[list[str]]:
    """What this test opened that does not lie in tmp_path/root."""
    global opened
    opened = []
    found: list[str] = []
    yield found
    found += [path for path in opened if not path.startswith(f"{os.path.realpath(tmp_path)}/root")]
    opened = None
    assert found == []


def hostile(seed: int) -> str:
    """A name of harmless parts and one that is not."""
    rng = random.Random(seed)
    parts = [rng.choice(("a", "b.parquet", "modality=photo", "\u00fc")) for _ in range(rng.randrange(4))]
    parts.insert(
        rng.randrange(len(parts) + 1), rng.choice(("..", ".", "", "a\0", "\uff0e\uff0e", "\\", "q" * 300, "\r"))
    )
    return rng.choice(("", "/", "C:", "../")) + "/".join(parts)


def test_forty_are_tried() -> None:
    assert len(set(NAMES)) + len(PLACES) == 40


@pytest.mark.parametrize("name", [*NAMES, *map(hostile, range(GENERATED))], ids=lambda name: ascii(name)[:40])
def test_a_hostile_name_is_refused_wherever_names_come_in(tmp_path: Path, outside: list[str], name: str) -> None:
    with pytest.raises(DamagedArtifact, match="leaves its artifact or is malformed"):
        safe_name(name)
    root = tmp_path / "root"
    with pytest.raises(DamagedArtifact):
        open_artifact(listing_of(root, name), "data").read(name)
    (root / "table.jsonl").write_bytes(canonical({"image": name, "text": "t"}) + b"\n")
    items = list(Pairs(root).items())
    if readable(name):
        assert all("root/" not in item.where and ".." not in item.where for item in items)
    elif name:  # no image is no name
        with pytest.raises(BadImage) as error:
            Pairs(root).load(items[0])
        assert error.value.kind == "bad_path"


def readable(name: str) -> bool:
    """Whether a reader of tables takes `name`: it is in READABLE, or of the kind by its making."""
    worse = {"..", "a\0", "\uff0e\uff0e", "q" * 300, "\r"} & set(name.split("/"))
    made = name not in NAMES and not worse and not name.startswith(("/", "C:", "\\")) and name[-1:] not in ("/", "\\")
    return name in READABLE or made


def listing_of(root: Path, name: str) -> Path:
    """An object whose manifest, filed under its right digest, lists `name`."""
    entry = {"path": name, "bytes": 1, "sha256": sha256(b"x"), "facts": {}}
    manifest = {"schema": 1, "kind": "data", "config": {}, "parents": {}, "facts": {}, "rows": {}, "files": [entry]}
    place = root / "objects" / sha256(canonical(manifest))
    place.mkdir(parents=True)
    (place / "manifest.json").write_bytes(canonical(manifest))
    return place


@pytest.mark.parametrize("what", PLACES)
def test_what_is_no_regular_file_is_not_read(tmp_path: Path, outside: list[str], what: str) -> None:
    staging = Store.at(tmp_path / "root").staging(Plan("data", {}))
    staging.write("x", b"content")
    path = staging.seal(facts={}).directory / "x"
    path.unlink()
    if what == "dangling symlink":
        path.symlink_to(tmp_path / "root" / "nothing")
    elif what == "directory":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    else:
        device(path)
    with pytest.raises(DamagedArtifact, match=r"dangling link|not a regular file"):
        open_artifact(path.parent, "data").read("x")


def device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # the zeros that never end
    except PermissionError:
        pytest.skip("making a device takes root")
