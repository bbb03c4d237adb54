"""Flags, YAML, exit codes and the JSON line that ends every job."""

import json
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict

from jobs._job import JobConfig, Results, causes, main
from tests.pipeline import job
from zsr.errors import ConfigError, DamagedArtifact, ZsrError


class Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    lr: float = 1e-3
    fast: bool = True


class Config(JobConfig):
    """Flags of the test.

    Attributes:
        output: a path.
        labels: names.
        options: nested.
    """

    output: Path
    labels: tuple[str, ...] = ()
    options: Options = Options()


def show(config: Config) -> Results:
    return {"config": config.model_dump(mode="json")}


def last_line(capsys: pytest.CaptureFixture[str]) -> Results:
    results: Results = json.loads(capsys.readouterr().out.splitlines()[-1])
    return results


def test_a_submitted_job_does_not_write_where_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "working_dir_files" / "_ray_pkg_1"
    here.mkdir(parents=True)
    (here / "in package").mkdir()
    monkeypatch.chdir(here)
    refused = job("prepare", "--source", "folders", "--input", "in package", "--output", "runs/data")
    assert refused["exit_code"] == 2
    assert "a submitted job runs in a folder that is removed with it; give an absolute path" in refused["error"]
    passed = job("prepare", "--source", "folders", "--input", "in package", "--output", tmp_path / "data")
    assert "removed with it" not in passed["error"]


def test_the_command_line_wins_over_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("output: here\nlabels: [a, b]\noptions: {lr: 0.5, fast: false}\n")
    assert main(Config, show, show, ["--config", str(file), "--labels", "c"]) == 0
    config = last_line(capsys)["config"]
    assert config == {
        "plan": False,
        "output": str(Path.cwd() / "here"),
        "labels": ["c"],
        "options": {"lr": 0.5, "fast": False},
    }


def test_an_unknown_key_of_the_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("output: here\noptions: {speed: 1}\n")
    assert main(Config, show, show, ["--config", str(file)]) == 2
    line = last_line(capsys)
    assert line["exit_code"] == 2
    assert "options.speed" in line["error"]


@pytest.mark.parametrize("argv", [["--speed", "1"], [], ["--output", "x", "--options.lr", "fast"]])
def test_a_command_line_that_is_not_understood_exits_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(Config, show, show, argv) == 2
    assert last_line(capsys)["exit_code"] == 2


def test_plan_does_not_work(capsys: pytest.CaptureFixture[str]) -> None:
    def never(config: Config) -> Results:
        raise AssertionError("worked")

    assert main(Config, show, never, ["--output", "x", "--plan"]) == 0
    assert last_line(capsys)["config"]["plan"] is True


@pytest.mark.parametrize("kind", [ConfigError, DamagedArtifact, ZsrError])
def test_an_error_of_the_tree_becomes_its_exit_code(kind: type[ZsrError], capsys: pytest.CaptureFixture[str]) -> None:
    def fail(config: Config) -> Results:
        raise kind("what happened")

    assert main(Config, fail, fail, ["--output", "x"]) == kind.exit_code
    assert last_line(capsys) == {"error": "what happened", "exit_code": kind.exit_code}


def test_an_error_wrapped_by_others_is_found() -> None:
    inner = DamagedArtifact("inner")
    middle = RuntimeError("middle")
    middle.__cause__ = inner
    outer = RuntimeError("outer")
    outer.worker_failures = {0: middle}  # type: ignore[attr-defined]
    assert inner in list(causes(outer))


def test_an_unexpected_error_exits_1(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(config: Config) -> Results:
        raise KeyError("x")

    assert main(Config, fail, fail, ["--output", "x"]) == 1
    assert "KeyError" in last_line(capsys)["error"]
