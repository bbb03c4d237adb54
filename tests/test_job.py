"""Flags, YAML, exit codes and the JSON line that ends every job."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, field_validator

from tests.pipeline import job
from zsr import cli, executor
from zsr.commands.base import JobConfig, Results, causes, explain, main
from zsr.errors import ConfigError, DamagedArtifact, ZsrError

ROOT = Path(__file__).parents[1]


class Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    lr: float = 1e-3
    fast: bool = True
    most: int = Field(8, le=8)


class Config(JobConfig):
    """Flags of the test.

    Attributes:
        output: a path.
        labels: names.
        options: nested.
        held_out: with a validator of its own.
        side: a choice.
        note: text, or None.
        title: text.
        sure: three values.
    """

    output: Path
    labels: tuple[str, ...] = ()
    options: Options = Options()
    held_out: int = 0
    side: Literal["left", "right"] = "left"
    note: str | None = None
    title: str = ""
    sure: bool | None = None

    @field_validator("held_out")
    @classmethod
    def _enough(cls, value: int) -> int:
        if value == 1:
            raise ValueError("hold out 0, or at least 2")
        return value


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
    assert "a submitted job runs in a folder that is deleted when the job ends; give an absolute" in refused["error"]
    passed = job("prepare", "--source", "folders", "--input", "in package", "--output", tmp_path / "data")
    assert "deleted when the job ends" not in passed["error"]


def test_the_command_line_wins_over_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("output: here\nlabels: [a, b]\noptions: {lr: 0.5, fast: false}\n")
    assert main(Config, show, show, ["--config", str(file), "--labels", "c"], "zsr work") == 0
    config = last_line(capsys)["config"]
    assert (config["output"], config["labels"]) == (str(Path.cwd() / "here"), ["c"])
    assert config["options"] == {"lr": 0.5, "fast": False, "most": 8}


def test_an_unknown_key_of_the_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("output: here\noptions: {speed: 1}\n")
    assert main(Config, show, show, ["--config", str(file)], "zsr work") == 2
    line = last_line(capsys)
    assert line["exit_code"] == 2
    assert "options.speed" in line["error"]


REFUSED = [
    (["--output", "x", "--speed", "1"], "unknown --speed, 1"),
    (["--output", "x", "--outptu", "y"], "unknown --outptu, y; perhaps you meant: --output PATH"),
    ([], "missing --output PATH"),
    (["--output"], "Missing value for argument '--output'. Expected 1 values"),
    (["--output", "x", "--options.lr", "fast"], "--options.lr: found 'fast'; expected --options.lr FLOAT"),
    (["--output", "x", "--held-out", "1"], "--held-out: found 1; hold out 0, or at least 2"),
    (["--output", "x", "--options.most", "9"], "--options.most: found 9; input should be less than or equal to 8"),
    (["--output", "x", "--side", "up"], "found 'up' for argument '--side'"),
    (["--config"], "--config requires the name of a YAML file"),
    (["--config="], "--config requires the name of a YAML file"),
]


@pytest.mark.parametrize(("argv", "why"), REFUSED)
@pytest.mark.parametrize("columns", ["20", "200"])
def test_a_refused_command_line_is_one_sentence_on_the_terminal_and_in_the_json(
    argv: list[str], why: str, columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert main(Config, show, show, argv, "zsr work") == 2
    printed = capsys.readouterr()
    line = json.loads(printed.out)
    assert line["exit_code"] == 2
    assert line["error"].startswith(why)
    assert printed.err == f"error: {line['error']}\n"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"output: \xe9t\xe9\n", "line 1 is not UTF-8; save the file as UTF-8"),
        (b"output: [\n", "expected YAML"),
        (b"[1, 2]\n", "found list, expected a mapping"),
        (b"output: x\noptions:\n", "options: found nothing, expected a mapping of its flags"),
        (b"output: x\noptions: []\n", "options: found list [], expected a mapping of its flags"),
        (b"output: x\nlabels: [no, cat]\n", "labels: found False, expected a string or number"),
        (b"output: x\nlabels: {a: b}\n", "labels: found {'a': 'b'}, expected a string or number"),
    ],
)
def test_a_file_of_another_shape_or_encoding_is_one_sentence(
    content: bytes, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    assert main(Config, show, show, [f"--config={file}"], "zsr work") == 2
    error = last_line(capsys)["error"]
    assert str(file) in error
    assert why in error
    assert "\n" not in error


def test_null_in_a_file_is_the_default_and_truth_values_are_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("output: x\nnote: null\ntitle:\nsure: true\n")
    assert main(Config, show, show, ["--config", str(file)], "zsr work") == 0
    config = last_line(capsys)["config"]
    assert (config["note"], config["title"], config["sure"]) == (None, "", True)


def test_help_names_the_command_and_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(Config, show, show, ["--help"], "zsr work build")
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: zsr work build ")
    assert "--config FILE.yaml" in said


CALLS = [("zsr", name) for name in ("", *cli.COMMANDS, "index build", "train --model ridge")]
CALLS += [(module, "") for module in ("cluster.local", "cluster.start", "cluster.submit", "jobs.train")]


@pytest.mark.parametrize(("module", "words"), CALLS)
def test_every_help_is_one(module: str, words: str) -> None:
    command = [sys.executable, "-m", module, *words.split(), "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    program = {"zsr": f"zsr {words.partition('--')[0]}", "jobs.train": "zsr train"}.get(module, f"python -m {module}")
    assert program.strip() in done.stdout
    if words not in ("", "index") or module in ("cluster.local", "cluster.submit"):
        assert "--config FILE.yaml" in done.stdout
    assert ("--options.penalties" in done.stdout) == ("ridge" in words)


def test_help_into_a_reader_that_leaves_is_no_error() -> None:
    words = [sys.executable, "-m", "zsr", "train", "--help"]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait(60)) == ("", 0)


def test_the_advice_that_ray_data_adds_to_an_error_of_a_task_is_left_out(ray_cluster: None) -> None:
    def fail(piece: Results) -> Results:
        raise ConfigError("shard 3: found a, expected b")

    with pytest.raises(Exception, match="shard 3") as raised:
        executor.map_pieces("work", fail, [{"number": 3}])
    assert explain(raised.value) == (2, "shard 3: found a, expected b")


def test_plan_does_not_work(capsys: pytest.CaptureFixture[str]) -> None:
    def never(config: Config) -> Results:
        raise AssertionError("worked")

    assert main(Config, show, never, ["--output", "x", "--dry-run"], "zsr work") == 0
    assert last_line(capsys)["config"]["dry_run"] is True


@pytest.mark.parametrize("kind", [ConfigError, DamagedArtifact, ZsrError])
def test_an_error_of_the_tree_becomes_its_exit_code(kind: type[ZsrError], capsys: pytest.CaptureFixture[str]) -> None:
    def fail(config: Config) -> Results:
        raise kind("what happened")

    assert main(Config, fail, fail, ["--output", "x"], "zsr work") == kind.exit_code
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

    assert main(Config, fail, fail, ["--output", "x"], "zsr work") == 1
    assert "KeyError" in last_line(capsys)["error"]
