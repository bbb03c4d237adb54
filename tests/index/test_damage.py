"""Damage and craft: no parser sees bytes that are not those of the manifest, and none is hurt by those that are."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.index.helpers import KEY, World
from zsr.artifact import Store
from zsr.errors import DamagedArtifact
from zsr.index import faiss_backend
from zsr.index.building.build import Job, build
from zsr.index.building.plan import IndexConfig
from zsr.index.searching import searcher as search
from zsr.index.searching.searcher import Searcher

pytestmark = pytest.mark.usefixtures("ray_cluster")
DAMAGES = 500
CRAFTED = 300


@pytest.fixture(scope="module")
def index(world: World, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    place = Path(tmp_path_factory.mktemp("damaged"))
    build(Job.of(world.gallery, world.queries, IndexConfig(index_key=KEY)), Store.at(place))
    return place


def _harm(data: bytes, rng: np.random.Generator) -> bytes:
    """One bit, a truncation, a page of zeros, or bytes at the end."""
    at = int(rng.integers(len(data)))
    changed = bytearray(data)
    kind = int(rng.integers(4))
    if kind == 0:
        changed[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del changed[at:]
    elif kind == 2:
        changed[at : at + 4096] = bytes(len(changed[at : at + 4096]))
    return bytes(changed) + (b"more" if kind == 3 else b"")


def test_no_damage_reaches_a_parser(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(index, tmp_path / "copy")
    (place,) = (tmp_path / "copy" / "objects").iterdir()
    files = sorted(path for path in place.rglob("*") if path.is_file())
    seen: list[Path] = []
    monkeypatch.setattr(search, "Segment", lambda files, *more: seen.append(files))
    rng, tried = np.random.default_rng(0), 0
    while tried < DAMAGES:
        path = files[int(rng.integers(len(files)))]
        data = path.read_bytes()
        harmed = _harm(data, rng)
        if harmed == data:
            continue
        tried += 1
        path.write_bytes(harmed)
        with pytest.raises(DamagedArtifact):
            Searcher.open(tmp_path / "copy")
        path.write_bytes(data)
    assert seen == []


def test_two_files_that_changed_places_are_refused(index: Path, tmp_path: Path) -> None:
    shutil.copytree(index, tmp_path / "copy")
    one, two = sorted((tmp_path / "copy" / "objects").glob("*/segment-00000/refine/*.raw"))[:2]
    held = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(held)
    with pytest.raises(DamagedArtifact, match="sha256"):
        Searcher.open(tmp_path / "copy")


def test_crafted_indexes_of_a_valid_digest_are_refused_or_harmless(index: Path, tmp_path: Path) -> None:
    """Sizes of 2 GiB and more in the header, under a limit of 2 GiB of memory."""
    (good,) = index.glob("objects/*/segment-00000/index.faiss")
    program = """
import resource, sys
from pathlib import Path
import numpy as np
from zsr.errors import DamagedArtifact
from zsr.index import faiss_backend
resource.setrlimit(resource.RLIMIT_DATA, (2 << 30, 2 << 30))
good, place = Path(sys.argv[1]), Path(sys.argv[2])
data, rng, refused = good.read_bytes(), np.random.default_rng(0), 0
for _ in range(int(sys.argv[3])):
    at = int(rng.integers(4, 96))
    huge = int(rng.choice([2**31, 2**33, 2**40, 2**62, 2**63 - 1]))
    place.write_bytes(data[:at] + huge.to_bytes(8, "little") + data[at + 8 :])
    try:
        faiss_backend.open_split(place, good.with_name("index.ivfdata"))
    except DamagedArtifact:
        refused += 1
print(refused)
"""
    words = [sys.executable, "-c", program, str(good), str(tmp_path / "crafted.faiss"), str(CRAFTED)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > CRAFTED // 2
    opened: Any = faiss_backend.open_split(good, good.with_name("index.ivfdata"))
    assert opened.ntotal == 3000
