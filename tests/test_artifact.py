"""Artifacts are whole and verified, or they do not exist."""

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.faults.counts import count
from zsr import faults
from zsr.artifact import (
    SCHEMA_VERSION,
    Artifact,
    Plan,
    Store,
    canonical,
    open_artifact,
    refuse_extension_types,
    safe_name,
    sha256,
)
from zsr.errors import AlreadyPublished, ConfigError, DamagedArtifact, DiskFull, StorageError

PLAN = Plan("data", {"rows": 3})


def make(root: str | Path, plan: Plan = PLAN, content: bytes = b"hello") -> Artifact:
    store = Store.at(root)
    staging = store.staging(plan)
    staging.write("modality=photo/part-00000.parquet", content)
    artifact = staging.seal(facts={"rows": 3})
    store.publish(artifact)
    return artifact


def test_equal_work_gives_equal_digests(tmp_path: Path) -> None:
    assert make(tmp_path / "a").digest == make(tmp_path / "b").digest


def test_a_published_artifact_opens_by_root_and_by_object(tmp_path: Path) -> None:
    made = make(tmp_path)
    assert open_artifact(tmp_path, "data").digest == made.digest
    assert open_artifact(made.directory, "data").read("modality=photo/part-00000.parquet") == b"hello"


def test_another_kind_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(ConfigError, match="holds 'data', expected 'index'"):
        open_artifact(tmp_path, "index")


def test_an_equal_plan_finds_what_was_made(tmp_path: Path) -> None:
    made = make(tmp_path)
    found = Store.at(tmp_path).made(PLAN)
    assert found is not None
    assert found.digest == made.digest
    assert Store.at(tmp_path).made(Plan("data", {"rows": 4})) is None


def test_a_plan_asked_for_again_is_what_readers_open_next(tmp_path: Path) -> None:
    first = make(tmp_path)
    make(tmp_path, Plan("data", {"rows": 9}))
    assert Store.at(tmp_path).made(PLAN) is not None
    assert open_artifact(tmp_path, "data").digest == first.digest


def test_a_damaged_object_is_made_again(tmp_path: Path) -> None:
    made = make(tmp_path)
    path = made.directory / "modality=photo/part-00000.parquet"
    path.write_bytes(b"half")
    assert Store.at(tmp_path).made(PLAN) is None
    again = make(tmp_path)
    assert again.digest == made.digest
    assert again.read("modality=photo/part-00000.parquet") == b"hello"


def test_nothing_is_sealed_without_a_piece_that_has_a_receipt(tmp_path: Path) -> None:
    staging = Store.at(tmp_path).staging(PLAN)
    staging.write("a", b"whole")
    staging.path("a").write_bytes(b"cut")
    with pytest.raises(StorageError, match="not finished"):
        staging.seal(facts={})


def test_a_guard_tells_plans_apart_without_shaping_the_content(tmp_path: Path) -> None:
    old = make(tmp_path, Plan("data", {"rows": 3}, guard={"mtime": 1}))
    assert Store.at(tmp_path).made(Plan("data", {"rows": 3}, guard={"mtime": 2})) is None
    new = make(tmp_path, Plan("data", {"rows": 3}, guard={"mtime": 2}))
    assert new.digest == old.digest


def test_staging_is_gone_after_publishing(tmp_path: Path) -> None:
    make(tmp_path)
    assert list((tmp_path / "staging").iterdir()) == []


def test_finished_pieces_survive_a_kill(tmp_path: Path) -> None:
    staging = Store.at(tmp_path).staging(PLAN)
    entry = staging.write("a", b"x", facts={"rows": 1})
    assert Store.at(tmp_path).staging(PLAN).finished("a") == entry


def test_a_piece_without_a_receipt_is_not_finished(tmp_path: Path) -> None:
    staging = Store.at(tmp_path).staging(PLAN)
    staging.path("a").parent.mkdir(parents=True)
    staging.path("a").write_bytes(b"x")
    assert staging.finished("a") is None


def test_scratch_never_enters_the_artifact(tmp_path: Path) -> None:
    store = Store.at(tmp_path)
    staging = store.staging(PLAN)
    staging.write("kept", b"1")
    staging.write("state", b"2", scratch=True)
    assert [entry.path for entry in staging.seal(facts={}).files] == ["kept"]


def test_leftovers_of_a_killed_writer_do_not_enter_the_object(tmp_path: Path) -> None:
    staging = Store.at(tmp_path).staging(PLAN)
    staging.write("kept", b"1")
    (staging.directory / "files" / ".kept.1234").write_bytes(b"half")
    sealed = staging.seal(facts={})
    assert sorted(os.listdir(sealed.directory)) == ["kept", "manifest.json"]


@pytest.mark.parametrize("where", [0, 2, -1])
@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit_is_refused_before_any_parser(tmp_path: Path, where: int, bit: int) -> None:
    made = make(tmp_path)
    path = made.directory / "modality=photo/part-00000.parquet"
    data = bytearray(path.read_bytes())
    data[where] ^= 1 << bit
    path.write_bytes(data)
    with pytest.raises(DamagedArtifact, match=r"sha256 .* but the manifest says"):
        made.read_table("modality=photo/part-00000.parquet")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    made = make(tmp_path)
    (made.directory / "modality=photo/part-00000.parquet").write_bytes(b"hell")
    with pytest.raises(DamagedArtifact, match="4 bytes"):
        made.verify()


def test_a_changed_manifest_is_refused(tmp_path: Path) -> None:
    made = make(tmp_path)
    manifest = made.directory / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"rows":3', b'"rows":4'))
    with pytest.raises(DamagedArtifact, match=r"no version can be read: version 1: .*sha256 .*, expected"):
        open_artifact(tmp_path, "data")


def test_readers_fall_back_to_the_highest_version_that_verifies(tmp_path: Path) -> None:
    first = make(tmp_path)
    second = make(tmp_path, Plan("data", {"rows": 9}))
    (second.directory / "manifest.json").write_bytes(b"{}")
    assert open_artifact(tmp_path, "data").digest == first.digest


@pytest.mark.parametrize("how", ["-al", "-as"])
def test_a_snapshot_of_links_and_what_it_was_made_of_are_read(tmp_path: Path, how: str) -> None:
    made = make(tmp_path / "root")
    subprocess.run(["cp", how, str(tmp_path / "root"), str(tmp_path / "snapshot")], check=True)
    for place in ("root", "snapshot"):
        opened = open_artifact(tmp_path / place, "data")
        assert opened.digest == made.digest
        assert opened.complete()
        opened.verify()
        assert opened.read("modality=photo/part-00000.parquet") == made.read("modality=photo/part-00000.parquet")


def test_a_link_brings_no_other_content_in(tmp_path: Path) -> None:
    made = make(tmp_path / "root")
    path = made.directory / "modality=photo/part-00000.parquet"
    size = path.stat().st_size
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedArtifact, match="dangling link"):
        made.read("modality=photo/part-00000.parquet")
    for content in (b"short", b"x" * size):
        (tmp_path / "elsewhere").write_bytes(content)
        with pytest.raises(DamagedArtifact, match="but the manifest says"):
            made.read("modality=photo/part-00000.parquet")


def test_a_file_that_is_changed_through_another_name_is_hashed_again(tmp_path: Path) -> None:
    made = make(tmp_path / "root")
    path = made.local("modality=photo/part-00000.parquet")
    before, other = path.stat(), tmp_path / "other name"
    os.link(path, other)
    other.write_bytes(b"x" * before.st_size)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))  # as if nothing had been written
    with pytest.raises(DamagedArtifact, match="but the manifest says"):
        made.local("modality=photo/part-00000.parquet")


def test_why_no_version_can_be_read_is_said(tmp_path: Path) -> None:
    first = make(tmp_path)
    (first.directory / "manifest.json").unlink()
    with pytest.raises(DamagedArtifact, match=r"no version can be read: version 1: .*manifest.json: missing"):
        open_artifact(tmp_path, "data")


def test_an_earlier_version_is_read_with_a_warning_that_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = make(tmp_path)
    second = make(tmp_path, Plan("data", {"rows": 9}))
    (second.directory / "manifest.json").write_bytes(b"{}")
    assert open_artifact(tmp_path, "data").digest == first.digest
    assert "version 1 is read instead, since version 2:" in caplog.text


def test_an_artifact_of_a_newer_zsr_asks_for_an_upgrade_and_is_not_passed_over(tmp_path: Path) -> None:
    make(tmp_path)
    data = canonical({**make(tmp_path, Plan("data", {"rows": 9})).manifest, "schema": SCHEMA_VERSION + 1})
    folder = tmp_path / "objects" / sha256(data)
    folder.mkdir()
    (folder / "manifest.json").write_bytes(data)
    (tmp_path / "versions" / "3").write_bytes(canonical({"digest": sha256(data), "plan": ""}))
    for place in (tmp_path, folder):
        with pytest.raises(ConfigError, match=r"by a newer zsr.*upgrade zsr"):
            open_artifact(place, "data")
    with pytest.raises(ConfigError, match="upgrade zsr"):
        Store.at(tmp_path).publish(_sealed(Store.at(tmp_path), PLAN))


def test_an_artifact_of_another_kind_is_not_published_over(tmp_path: Path) -> None:
    made, store = make(tmp_path), Store.at(tmp_path)
    with pytest.raises(ConfigError, match=r"holds 'data', so 'index' cannot be written there; give another output"):
        store.made(Plan("index", {}))
    with pytest.raises(ConfigError, match="give another output"):
        store.publish(_sealed(store, Plan("index", {})))
    assert open_artifact(tmp_path, "data").digest == made.digest


def test_what_was_made_from_a_version_is_published_right_after_it_or_not_at_all(tmp_path: Path) -> None:
    store = Store.at(tmp_path)
    base = store.publish(_sealed(store, Plan("data", {"who": "base"})))
    changes = [_sealed(store, Plan("data", {"who": who})) for who in "ab"]
    assert store.publish(changes[0], after=base) == base + 1
    with pytest.raises(AlreadyPublished, match="version 2 was published while version 1 was being changed"):
        store.publish(changes[1], after=base)
    assert store.versions() == (1, 2)


def test_a_second_run_of_the_same_plan_waits_and_finds_it_made(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from tests.test_artifact import PLAN; from zsr.artifact import Store\n"
        "print(Store.at(Path(sys.argv[1])).made(PLAN).digest)"
    )
    store = Store.at(tmp_path)
    assert store.made(PLAN) is None
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as second:
        assert second.stderr is not None
        told = second.stderr.readline()
        assert f"another run is working here (process {os.getpid()} on " in told
        made = make(tmp_path)
        output, _ = second.communicate(timeout=60)
    assert output.strip() == made.digest
    assert not any((tmp_path / "staging").iterdir())
    assert store.versions() == (1,)


def test_a_run_goes_on_where_one_that_was_killed_held_the_lock(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path\n"
        "from tests.test_artifact import PLAN; from zsr.artifact import Store\n"
        "store = Store.at(Path(sys.argv[1])); store.made(PLAN); store.staging(PLAN).write('x', b'kept')\n"
        "os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert killed.returncode == -9
    store = Store.at(tmp_path)
    assert store.made(PLAN) is None
    assert store.staging(PLAN).read("x") == b"kept"


def test_a_manifest_that_no_reader_would_open_is_not_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zsr.artifact.staging.MANIFEST_CAP", 500)
    with pytest.raises(ConfigError, match="at most 500 are read; use fewer and larger shards"):
        _sealed(Store.at(tmp_path), Plan("data", {"about": "x" * 500}))


def test_a_fifo_is_refused_and_does_not_hang(tmp_path: Path) -> None:
    made = make(tmp_path)
    path = made.directory / "modality=photo/part-00000.parquet"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DamagedArtifact):
        made.read("modality=photo/part-00000.parquet")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc/passwd",
        "../x",
        "a/../../x",
        "C:\\x",
        "C:x",
        "a\\b",
        "a\0b",
        "a\nb",
        "./a",
        "a//b",
        "a/",
        "\uff0e\uff0e/x",
        "x" * 300,
    ],
)
def test_names_that_leave_the_root_are_refused(name: str) -> None:
    with pytest.raises(DamagedArtifact):
        safe_name(name)


@pytest.mark.parametrize("name", ["a", "modality=photo/part-00000.parquet", "_quarantine/x.jsonl", "größe"])
def test_plain_names_pass(name: str) -> None:
    assert str(safe_name(name)) == name


def test_one_of_two_racing_publishers_wins(tmp_path: Path) -> None:
    store = Store.at(tmp_path)
    for race in range(count(200, 5_000)):
        plans = [Plan("data", {"race": race, "who": who}) for who in range(2)]
        sealed = [_sealed(store, plan) for plan in plans]
        outcomes: list[object] = []
        gate = threading.Barrier(2)

        def publish(artifact: Artifact, outcomes: list[object] = outcomes, gate: threading.Barrier = gate) -> None:
            gate.wait()
            try:
                outcomes.append(store.publish(artifact))
            except AlreadyPublished as error:
                outcomes.append(error)

        threads = [threading.Thread(target=publish, args=(artifact,)) for artifact in sealed]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        numbers = [outcome for outcome in outcomes if isinstance(outcome, int)]
        assert numbers
        assert len(set(numbers)) == len(numbers)


def _sealed(store: Store, plan: Plan) -> Artifact:
    staging = store.staging(plan)
    staging.write("x", canonical(plan.config))
    return staging.seal(facts={})


def test_a_full_disk_leaves_nothing_readable_and_a_rerun_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZSR_FAULT", "artifact.write=enospc")
    monkeypatch.setattr(faults, "_passed", type(faults._passed)())
    with pytest.raises(DiskFull, match="no space left"):
        make(tmp_path)
    monkeypatch.delenv("ZSR_FAULT")
    with pytest.raises(StorageError):
        open_artifact(tmp_path, "data")
    assert make(tmp_path).digest == make(tmp_path / "other").digest


@pytest.mark.parametrize("point", [p for p in faults.POINTS if p.startswith("artifact.")])
def test_a_kill_at_any_point_of_publishing_is_mended_by_a_rerun(tmp_path: Path, point: str) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from tests.test_artifact import make, PLAN; from zsr.artifact import Store\n"
        "root = Path(sys.argv[1]); made = Store.at(root).made(PLAN) or make(root); print(made.digest)"
    )
    environment = {**os.environ, "ZSR_FAULT": f"{point}=kill"}
    root = str(tmp_path / "killed")
    killed = subprocess.run([sys.executable, "-c", script, root], env=environment, capture_output=True, check=False)
    assert killed.returncode == -9
    again = subprocess.run([sys.executable, "-c", script, root], capture_output=True, text=True, check=True)
    assert again.stdout.strip() == make(tmp_path / "unbroken").digest
    assert len(Store.at(root).versions()) == 1
    assert not any((tmp_path / "killed" / "staging").iterdir())


def test_an_extension_type_in_a_schema_is_refused() -> None:
    field = pa.field("x", pa.int64(), metadata={b"ARROW:extension:name": b"arrow.py_extension_type"})
    with pytest.raises(DamagedArtifact, match="extension type"):
        refuse_extension_types(pa.schema([field]), "here")


@pytest.mark.parametrize("ray_is_loaded", [False, True])
def test_a_crafted_shard_with_a_valid_digest_is_refused(tmp_path: Path, ray_is_loaded: bool) -> None:
    if ray_is_loaded:
        import ray.data  # noqa: F401  # registers the type, whose own parser then sees the metadata
    field = pa.field("x", pa.int64(), metadata={b"ARROW:extension:name": b"ray.data.arrow_tensor"})
    path = tmp_path / "crafted.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array([1])], schema=pa.schema([field])), path)
    made = make(tmp_path / "root", content=path.read_bytes())
    with pytest.raises(DamagedArtifact):
        made.read_table("modality=photo/part-00000.parquet")


def test_a_storage_without_conditional_put_is_refused_before_any_work() -> None:
    with pytest.raises(StorageError, match="no conditional put"):
        Store.at("memory://bucket/data").made(PLAN)


def test_a_file_system_without_links_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted", str(target))  # what vfat and some network mounts answer

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StorageError, match="no hard links"):
        make(tmp_path)


def test_a_manifest_holds_no_path_and_no_time(tmp_path: Path) -> None:
    made = make(tmp_path)
    manifest = json.loads((made.directory / "manifest.json").read_bytes())
    assert sorted(manifest) == ["config", "facts", "files", "kind", "parents", "rows", "schema"]
    assert str(tmp_path) not in json.dumps(manifest)
