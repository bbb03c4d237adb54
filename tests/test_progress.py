"""What a person sees of a stage: rows done of all rows, the rate, the time left, and nothing that looks fatal."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from zsr import noise, process, progress
from zsr.telemetry import Items


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Takes the place of the clock."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


def test_rows_rate_and_time_left(clock: Clock) -> None:
    stage = progress.Stage("features", 10_000, "rows")
    assert stage.sentence() == "0 of 10,000 rows, 0.0 s so far"
    clock.now = 20.0
    stage.advance(4_000)
    stage.look()
    assert stage.sentence() == "4,000 of 10,000 rows, 200 rows/s, 30 s left"
    clock.now = 50.0
    stage.advance(6_000)
    assert stage.summary() == "10,000 rows in 50 s, 200 rows/s"


def test_the_rate_is_that_of_the_last_minute(clock: Clock) -> None:
    stage = progress.Stage("features", 1000, "rows")
    for second in range(40, 200, 10):  # nothing is done in the first two minutes
        clock.now = second
        stage.done = max(0, second - 120)
        stage.look()
    assert stage.rate == pytest.approx(1.0)


def test_what_was_found_is_no_part_of_the_rate(clock: Clock) -> None:
    stage = progress.Stage("train", 160, "steps", done=120)
    clock.now = 10.0
    stage.done = 140
    stage.look()
    assert stage.sentence() == "140 of 160 steps, 2 steps/s, 10 s left"
    assert stage.summary() == "20 steps in 10 s, 2 steps/s"


def test_without_a_terminal_a_line_each_30_seconds_and_one_at_the_end(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.stage("features", 100) as stage:
        for second in range(0, 70, 5):
            clock.now = second
            progress.advance(1)
            stage.look()
    out, said = capsys.readouterr()
    assert out == ""
    lines = said.splitlines()
    assert [line.split(",")[0] for line in lines] == ["features: 7 of 100 rows", "features: 13 of 100 rows",
                                                      "features: 14 rows in 1 min 5 s"]  # fmt: skip


def test_a_terminal_has_a_bar_and_stdout_stays_clean(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress.stage("features", 100) as stage:
        progress.advance(40)
        stage.look()
        time.sleep(0.3)  # rich draws ten times a second
    assert "40 of 100 rows" in terminal.getvalue()
    assert "features: 40 rows in" in terminal.getvalue().splitlines()[-1]
    assert capsys.readouterr().out == ""


def test_a_failed_stage_claims_no_rows(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="broken"), progress.stage("features", 100):
        raise ValueError("broken")
    assert capsys.readouterr().err == ""
    progress.advance(1)  # and counts for nobody


def test_what_need_not_be_done_again_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    progress.found_finished("features", 0, 10)
    progress.found_finished("features", 8, 10)
    progress.found_finished("embed", 1, 10, reused=6)
    progress.up_to_date("features", "runs/features", (1, 2, 3))
    assert capsys.readouterr().err.splitlines() == [
        "features: 8 of 10 shards found finished, 2 to compute",
        "embed: 1 of 10 shards found finished, 6 of 10 shards reused from the last version, 3 to compute",
        "features: nothing to do: version 3 of runs/features is up to date",
    ]


def _slow(piece: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Counts 50 rows, and finishes when it is told to; the first try dies in between."""
    for number in range(5):
        progress.advance(10)
        time.sleep(0.6)  # what is counted is told once per second, so after the third and the fifth time
        if number == 3 and not (folder / "died").exists():
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    while not (folder / "go").exists():
        time.sleep(0.05)
    return {"rows": 50, "was": sorted(piece)}


@pytest.mark.usefixtures("ray_cluster")
def test_progress_advances_within_a_shard_and_outlives_a_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from zsr.executor import map_pieces

    seen: list[int] = []
    counts = Items.done

    def done(items: Items) -> int:
        seen.append(counts(items))
        if seen[-1] == 50:
            (tmp_path / "go").touch()  # the second try has counted, too, and is not finished
        return seen[-1]

    monkeypatch.setattr(Items, "done", done)
    monkeypatch.setattr(progress, "LOOK", 0.1)
    found = map_pieces("slow", _slow, [{"name": "a"}], rows=[50], fn_kwargs={"folder": tmp_path})
    assert found == [{"rows": 50, "was": ["name"]}]
    assert {0, 30, 50} <= set(seen)
    assert "slow: 50 rows in" in capsys.readouterr().err


ACTORS = """
import ray
from zsr import cluster, executor

class Doubled:
    def __call__(self, piece):
        return {"twice": 2 * piece["one"]}

def doubled():
    cluster.set_data_context()
    actors = ray.data.ActorPoolStrategy(size=1)
    return executor.map_pieces("double", Doubled, [{"one": 1}], compute=actors, num_cpus=0.5)

cluster.connect()
assert doubled() == ray.get(ray.remote(num_cpus=0)(doubled).remote()) == [{"twice": 2}]
ray.get(ray.remote(num_cpus=0)(lambda: print("a worker's own words")).remote())
import time; time.sleep(2)  # lines of workers come late
"""


def test_nothing_is_printed_that_looks_fatal_and_is_not() -> None:
    """By actors that may restart, in the driver and in a task whose lines the driver prints, nor at the end."""
    alone = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    ran = subprocess.run(
        [sys.executable, "-c", ACTORS], env=alone, capture_output=True, text=True, timeout=240, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert "a worker's own words" in ran.stdout + ran.stderr
    assert [line for line in ran.stderr.splitlines() if not re.match(r"(\S*\(\w+ pid=\d+\)\S* )?double: ", line)] == []


def test_only_that_line_of_a_worker_is_kept_out() -> None:
    printed: list[dict[str, Any]] = []
    printer = noise.without_line(printed.append)
    line = f"[2026-11-28 E 1 1] core_worker.cc:2465: Actor with class name: 'A' and ID: '1' {noise.LINE} If"
    printer({"lines": ["before", line, "after"], "pid": 7})
    printer({"lines": [line], "pid": 7})
    gone = f"[2026-11-28 E 1 1] (gcs_server) gcs_actor_scheduler.cc:538: {noise.GONE} ef45, return status: Invalid"
    printer({"lines": [gone], "pid": "gcs_server"})
    assert printed == [{"lines": ["before", "after"], "pid": 7}]


def test_of_failed_threads_only_that_of_ray_s_cleaner_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    failed: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: failed.append(args.thread.name))
    process.setup()
    process.setup()  # and not twice
    for name in (process.CLEANER, "another"):
        thread = threading.Thread(target=lambda: 1 // 0, name=name)
        thread.start()
        thread.join()
    assert failed == ["another"]
