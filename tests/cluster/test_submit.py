"""What is uploaded, and that a submitted job ends like the direct run: the same digest, the same exit code."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.local import LocalCluster
from cluster.package import LIMIT, package
from cluster.submit import ROOT, Config, Log, Submission, ended
from tests import toy
from tests.pipeline import features_only, ok
from zsr.artifact import open_artifact
from zsr.commands.base import Results
from zsr.errors import ConfigError, NonFiniteLoss, ZsrError


def test_the_package_of_this_tree_is_small_and_holds_the_source_alone() -> None:
    made = package(ROOT, {})
    assert len(made.data) < LIMIT == 2 << 20
    assert {"zsr", "jobs", "cluster"} <= set(made.contents)
    assert not {"tests", "docs", "benchmarks", ".git"} & set(made.contents)


def test_equal_trees_give_equal_packages(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "zsr").mkdir(parents=True)
        (tmp_path / name / "zsr" / "x.py").write_text("x = 1\n")
    os.utime(tmp_path / "b" / "zsr" / "x.py", (0, 0))
    assert package(tmp_path / "a", {}).data == package(tmp_path / "b", {}).data


@pytest.mark.parametrize(("size", "when"), [(3 << 20, "compressed"), (33 << 20, "before compression")])
def test_a_data_folder_left_in_the_tree_is_refused_with_its_size_and_name(tmp_path: Path, size: int, when: str) -> None:
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs")
    (tmp_path / "sketchy" / "modality=photo").mkdir(parents=True)
    (tmp_path / "sketchy" / "modality=photo" / "part-00000.parquet").write_bytes(os.urandom(size))
    with pytest.raises(ConfigError) as refused:
        package(tmp_path, {})
    assert f"{tmp_path / 'sketchy'} ({size >> 20}.0 MiB)" in str(refused.value)
    assert when in str(refused.value)


def test_the_configuration_file_travels_along(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("output: /shared/run\n")
    work = Submission.of(Config(job="pipeline"), ["--config", str(file), "--seeds", "0 1"])
    assert work.entrypoint.startswith("python -m jobs.pipeline --config submitted/")
    assert work.entrypoint.endswith("--seeds '0 1'")
    file.write_text("output: /shared/other\n")
    assert Submission.of(Config(job="pipeline"), ["--config", str(file), "--seeds", "0 1"]).name != work.name
    with pytest.raises(ConfigError, match="no job 'pipelin'"):
        Submission.of(Config(job="pipelin"), [])
    with pytest.raises(ConfigError, match="No such file"):
        Submission.of(Config(job="pipeline"), ["--config", str(tmp_path / "none.yaml")])


@pytest.mark.parametrize("spelled", [["--config", "FILE"], ["--config=FILE"]])
def test_a_command_of_jobs_index_keeps_its_place_before_the_file(tmp_path: Path, spelled: list[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("index_dir: /shared/index\n")
    flags = [word.replace("FILE", str(file)) for word in spelled]
    work = Submission.of(Config(job="index"), ["build", *flags, "--threads", "2"])
    assert work.entrypoint.startswith("python -m jobs.index build --config submitted/")
    assert work.entrypoint.endswith(".yaml --threads 2")


def test_the_exit_code_is_that_of_the_jobs_last_line() -> None:
    log = Log()
    log.add('{"exit_code": 0}\nworking\n{"loss": 1}\n{"error": "term x at step 3", "exit_code": 6, "steps": 3}\nbye\n')
    results = log.results()
    assert results is not None
    with pytest.raises(NonFiniteLoss, match="term x at step 3"):
        ended("train-1", results)
    assert ended("train-1", {"exit_code": 0, "steps": 3}) == {"steps": 3, "submission_id": "train-1"}
    with pytest.raises(ZsrError):
        ended("train-1", {"exit_code": 1, "error": "unexpected"})


def test_a_log_that_is_read_again_from_its_beginning_is_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    log = Log()
    log.add("one\ntwo\n")
    log.seen = 0
    for part in ("one\n", "two\nthr", "ee\n"):
        log.add(part)
    assert capsys.readouterr().err == "one\ntwo\nthree\n"


def submit(cluster: LocalCluster, *words: object) -> tuple[int, Results, str]:
    """`python -m cluster.submit WORDS`: exit code, JSON line, and what else was printed."""
    command = [sys.executable, "-m", "cluster.submit", *map(str, words)]
    done = subprocess.run(
        command, cwd=ROOT, env=cluster.environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.stdout.strip(), done.stderr[-3000:]
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return done.returncode, results, done.stderr


@pytest.mark.usefixtures("ray_cluster")
def test_a_submitted_job_ends_with_the_digest_of_the_direct_run(tmp_path: Path, local: LocalCluster) -> None:
    inputs = features_only(tmp_path, toy.write_features(tmp_path / "raw"))
    flags = [*inputs, "--split", "random:3:0", "--validation-classes", 2, "--epochs", 2]
    flags += ["--steps-per-epoch", 5, "--batch-size", 16, "--num-workers", 2]
    direct = ok("train", *flags, "--output", tmp_path / "direct")
    command = ("train", "--metadata", "team=search", "--", *flags, "--output", tmp_path / "submitted")
    code, results, log = submit(local, *command)
    assert code == 0, log[-3000:]
    assert results["digest"] == direct["digest"]
    assert open_artifact(tmp_path / "submitted", "checkpoint").digest == direct["digest"]
    assert "train-" in results["submission_id"]


def test_a_failing_job_fails_here_with_its_own_exit_code_and_again_as_a_second_attempt(
    tmp_path: Path, local: LocalCluster
) -> None:
    flags = ("prepare", "--no-wait", "--", "--source", "sketchy", "--input", tmp_path / "none", "--output", tmp_path)
    code, first, _ = submit(local, *flags)
    assert (code, first["started"]) == (0, True)
    code, results, log = submit(local, "prepare", *flags[2:])
    assert code == results["exit_code"] == 2
    assert str(tmp_path / "none") in results["error"]
    assert results["submission_id"] in (first["submission_id"], first["submission_id"].removesuffix("1") + "2"), log


def test_a_wrong_token_is_told(tmp_path: Path, local: LocalCluster) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("0" * 64)
    wrong.chmod(0o600)
    stranger = LocalCluster(local.process, local.environment | {"RAY_AUTH_TOKEN_PATH": str(wrong)})
    code, results, _ = submit(stranger, "doctor")
    assert code == 1
    assert "RAY_AUTH_TOKEN_PATH" in results["error"]
