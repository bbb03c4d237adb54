"""Artifacts in an object store, over HTTP against a local S3 server."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.test_artifact import PLAN, make
from zsr.artifact import Artifact, Plan, Store, canonical, open_artifact
from zsr.artifact import bucket as buckets
from zsr.errors import AlreadyPublished, DamagedArtifact, StorageError
from zsr.storage import filesystem

SHARD = "modality=photo/part-00000.parquet"


def test_equal_work_gives_the_digest_that_it_gives_on_a_disk(bucket: str, tmp_path: Path) -> None:
    assert make(bucket).digest == make(tmp_path / "disk").digest


def test_what_was_published_opens_by_root_and_by_object(bucket: str) -> None:
    made = make(f"{bucket}/data")
    assert open_artifact(f"{bucket}/data", "data").read(SHARD) == b"hello"
    assert open_artifact(Path(f"{bucket}/data/"), "data").digest == made.digest
    assert open_artifact(f"{bucket}/data/objects/{made.digest}", "data").digest == made.digest
    assert Store.at(f"{bucket}/data").digest_of(1) == made.digest


def test_a_bucket_copied_to_a_disk_is_a_root(bucket: str, tmp_path: Path) -> None:
    made = make(bucket)
    store, path = filesystem(bucket)
    store.get(path, str(tmp_path / "copy"), recursive=True)
    assert open_artifact(tmp_path / "copy", "data").read(SHARD) == b"hello"
    assert open_artifact(tmp_path / "copy", "data").digest == made.digest


def test_staging_is_gone_after_publishing(bucket: str) -> None:
    made = make(bucket)
    store, path = filesystem(bucket)
    assert sorted(name[len(path) + 1 :] for name in store.find(path)) == [
        f"objects/{made.digest}/manifest.json",
        f"objects/{made.digest}/{SHARD}",
        "versions/.conditional-put",
        "versions/1",
    ]


def test_finished_pieces_survive_a_kill_and_scratch_stays_out(bucket: str) -> None:
    staging = Store.at(bucket).staging(PLAN)
    entry = staging.write("a", b"x", facts={"rows": 1})
    staging.write("state", b"y", scratch=True)
    again = Store.at(bucket).staging(PLAN)
    assert again.finished("a") == entry
    assert again.read("state", scratch=True) == b"y"
    assert again.path("a").read_bytes() == b"x"
    assert again.pieces() == ("a",)
    again.drop("state", scratch=True)
    assert again.pieces(scratch=True) == ()
    assert [e.path for e in again.seal(facts={}).files] == ["a"]


@pytest.mark.parametrize("content", [b"hellO", b"hell"])
def test_damage_is_refused_before_any_parser_and_names_the_object(bucket: str, content: bytes) -> None:
    made = make(bucket)
    store, path = filesystem(bucket)
    store.pipe_file(f"{path}/objects/{made.digest}/{SHARD}", content)
    with pytest.raises(DamagedArtifact, match=f"{bucket}/objects/.* but the manifest says"):
        open_artifact(bucket, "data").read(SHARD)


def test_a_damaged_copy_in_the_cache_is_fetched_again(bucket: str) -> None:
    made = make(bucket)
    assert made.read(SHARD) == b"hello"
    (made.directory / SHARD).write_bytes(b"hellO")
    assert made.read(SHARD) == b"hello"


def test_an_empty_file_is_a_file(bucket: str) -> None:
    staging = Store.at(bucket).staging(PLAN)
    staging.write("empty", b"")
    assert (staging.read("empty"), staging.path("empty").read_bytes()) == (b"", b"")
    assert staging.seal(facts={}).read("empty") == b""


def test_the_cache_is_bounded(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZSR_CACHE_BYTES", "250")
    monkeypatch.setattr(buckets, "IN_USE", 0)
    made = [make(bucket, Plan("data", {"n": n}), bytes([n]) * 100) for n in range(4)]
    for artifact in made:
        assert len(artifact.read(SHARD)) == 100
    kept = [path for path in made[0].root.parent.rglob("part-*") if "objects" in path.parts]
    assert sum(path.stat().st_size for path in kept) <= 250
    assert made[0].read(SHARD) == bytes(100)


def test_exactly_one_of_two_racing_publishers_wins_each_version(bucket: str) -> None:
    for race in range(8):
        store = Store.at(f"{bucket}/{race}")
        sealed = [_sealed(store, Plan("data", {"who": who})) for who in range(2)]
        gate = threading.Barrier(2)
        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(_race, store, artifact, gate) for artifact in sealed]
        assert sorted(future.result() for future in futures) == ["lost", "won"]
        assert store.versions() == (1,)
        assert store.digest_of(1) in {artifact.digest for artifact in sealed}


def _race(store: Store, artifact: Artifact, gate: threading.Barrier) -> str:
    """Publish as version 1, which both have found free."""
    gate.wait()
    try:
        store._link(artifact, 1)
    except AlreadyPublished:
        return "lost"
    return "won"


def _sealed(store: Store, plan: Plan) -> Artifact:
    staging = store.staging(plan)
    staging.write("x", canonical(plan.config))
    return staging.seal(facts={})


def test_a_store_that_ignores_the_condition_is_refused(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, path = filesystem(bucket)
    put = store.pipe_file
    # an S3 server of before the condition: it takes the request, and overwrites
    monkeypatch.setattr(store, "pipe_file", lambda to, data, **ignored: put(to, data))
    with pytest.raises(StorageError, match="no conditional put"):
        Store.at(bucket).made(PLAN)
    assert not store.exists(f"{path}/versions/1")


def test_a_store_that_does_not_answer_is_a_storage_error(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        open_artifact(f"{bucket}nowhere/data", "data")


@pytest.mark.parametrize("point", ["artifact.seal", "artifact.link"])
def test_a_kill_at_any_point_of_publishing_is_mended_by_a_rerun(bucket: str, tmp_path: Path, point: str) -> None:
    script = (
        "import sys\n"
        "from tests.test_artifact import make, PLAN; from zsr.artifact import Store\n"
        "made = Store.at(sys.argv[1]).made(PLAN) or make(sys.argv[1]); print(made.digest)"
    )
    command = [sys.executable, "-c", script, bucket]
    environment = {**os.environ, "ZSR_FAULT": f"{point}=kill"}
    killed = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert killed.returncode == -9
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert again.stdout.strip() == make(tmp_path / "unbroken").digest
    assert Store.at(bucket).versions() == (1,)
    store, path = filesystem(bucket)
    assert not store.exists(f"{path}/staging")
