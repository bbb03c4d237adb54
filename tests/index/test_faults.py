"""A build killed at any of its points, or out of disk, goes on to the bytes of a build that was never disturbed."""

import signal
from pathlib import Path

import pytest

from tests.index.helpers import KEY, World, run_job
from zsr.artifact import Store
from zsr.errors import DamagedArtifact, DiskFull, StorageError
from zsr.index.building.build import Job, add, added_name, build, merge, sample, train
from zsr.index.building.plan import IndexConfig
from zsr.index.searching.searcher import Searcher
from zsr.index.storage.segment import ids_name, refine_name, segment_name

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def unbroken(world: World, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> str:
    """Digest of an undisturbed build."""
    store = Store.at(tmp_path_factory.mktemp("unbroken"))
    return build(Job.of(world.gallery, world.queries, IndexConfig(index_key=KEY)), store).artifact.digest


def _inputs(world: World, place: Path) -> tuple[object, ...]:
    inputs = ("--embeddings", world.root / "gallery", "--queries", world.root / "queries", "--index-dir", place)
    return (*inputs, "--index-key", KEY)


@pytest.mark.faults
@pytest.mark.parametrize("point", ["index.train", "index.merge", "index.tune"])
def test_a_killed_build_goes_on_to_the_same_bytes(world: World, tmp_path: Path, unbroken: str, point: str) -> None:
    killed = run_job("index", "build", *_inputs(world, tmp_path), fault=f"{point}=kill")
    assert killed.code == -signal.SIGKILL, killed.errors
    with pytest.raises(StorageError, match="no published version"):
        Searcher.open(tmp_path)
    resumed = build(Job.of(world.gallery, world.queries, IndexConfig(index_key=KEY)), Store.at(tmp_path))
    assert resumed.artifact.digest == unbroken
    assert list((tmp_path / "staging").iterdir()) == []


@pytest.mark.faults
def test_a_killed_worker_is_replaced_and_the_build_ends_well(world: World, tmp_path: Path, unbroken: str) -> None:
    ended = run_job("index", "build", *_inputs(world, tmp_path), "--num-workers", 1, fault="index.add=kill@2")
    assert ended.code == 0, ended.errors
    assert ended.results["digest"] == unbroken


@pytest.mark.parametrize("point", ["index.train", "index.merge"])
def test_a_full_disk_is_named_and_the_next_run_goes_on(
    world: World, tmp_path: Path, unbroken: str, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, store = Job.of(world.gallery, world.queries, IndexConfig(index_key=KEY)), Store.at(tmp_path)
    monkeypatch.setenv("ZSR_FAULT", f"{point}=enospc")
    with pytest.raises(DiskFull, match="no space left"):
        build(job, store)
    assert store.versions() == ()
    monkeypatch.delenv("ZSR_FAULT")
    assert build(job, store).artifact.digest == unbroken


@pytest.mark.parametrize(
    ("name", "scratch"),
    [(added_name(1), True), (f"add/{ids_name(2)}", True), (f"{segment_name(0)}/{refine_name(1)}", False)],
)
def test_a_staged_piece_that_rotted_is_refused_once_and_then_made_again(
    world: World, tmp_path: Path, unbroken: str, name: str, scratch: bool
) -> None:
    job, store = Job.of(world.gallery, world.queries, IndexConfig(index_key=KEY)), Store.at(tmp_path)
    staging = store.staging(job.artifact_plan())
    sample(job, staging)
    train(job, staging)
    add(job.gallery, KEY, staging)
    if not scratch:
        merge(staging, segment_name(0), job.segments[0])
    path = staging.path(name, scratch=scratch)
    data = bytearray(path.read_bytes())
    data[10] ^= 4
    path.write_bytes(data)
    with pytest.raises(DamagedArtifact, match="run the job again"):
        build(job, store)
    assert build(job, store).artifact.digest == unbroken
