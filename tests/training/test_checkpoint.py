"""Which epochs' weights are kept, writing behind the steps' back, and numbers of workers."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from zsr.artifact import Plan, Staging
from zsr.errors import StorageError
from zsr.training.checkpoint import Progress, Writer, last_progress, save_progress
from zsr.training.config import TrainSettings

SCORES = {10: 0.3, 20: 0.5, 30: 0.5, 40: 0.1}


def after(scores: dict[int, float] | dict[int, None]) -> Progress:
    progress = Progress()
    for step, score in scores.items():
        progress = progress.after(step, score)
    return progress


@pytest.mark.parametrize(
    ("keep", "kept"), [("best", {20}), ("all", {10, 20, 30, 40}), ("1", {20}), ("2", {20, 30}), ("9", set(SCORES))]
)
def test_the_best_epochs_are_kept(keep: str, kept: set[int]) -> None:
    assert after(SCORES).kept(keep) == kept


def test_without_scores_the_last_epochs_are_kept() -> None:
    assert after(dict.fromkeys(SCORES)).kept("2") == {30, 40}


@pytest.mark.parametrize(("keep", "left"), [("best", []), ("2", [20, 30]), ("all", [10, 20, 30, 40])])
def test_what_lies_in_the_artifact_and_what_a_resumption_finds(keep: str, left: list[int], tmp_path: Path) -> None:
    staging = Staging(tmp_path, Plan("checkpoint", {}))
    progress = Progress()
    for step, score in SCORES.items():
        progress = progress.after(step, score)
        weights = {"w": torch.full((2,), float(step))}
        save_progress(staging, progress, weights, {"g/w/moment": weights["w"] + 1}, keep)
    assert [int(name[6:14]) for name in staging.pieces() if name.startswith("steps/")] == left
    found = last_progress(staging)
    assert found is not None
    assert (found[0], found[1]["w"].tolist()) == (progress, [40.0, 40.0])
    assert found[2]["g/w/moment"].tolist() == [41.0, 41.0]


def test_a_write_does_not_hold_up_the_one_who_asks_and_is_done_on_leaving() -> None:
    go, done = threading.Event(), []
    with Writer() as writer:
        writer.write(lambda: done.append(go.wait(20)))
        assert done == []  # it is still waiting for us
        go.set()
    assert done == [True]


def test_a_failed_write_is_told_at_the_next_one_or_on_leaving() -> None:
    def fail() -> None:
        raise StorageError("no space")

    with pytest.raises(StorageError), Writer() as writer:
        writer.write(fail)
    with pytest.raises(StorageError):
        _write_all(fail, lambda: pytest.fail("written after a failure"))


def _write_all(*saves: Callable[[], None]) -> None:
    with Writer() as writer:
        for save in saves:
            writer.write(save)


def test_numbers_of_workers() -> None:
    assert TrainSettings(num_workers="4").num_workers == 4
    assert TrainSettings(num_workers=3).workers == (3, 3)
    assert TrainSettings(num_workers="0").workers == TrainSettings(num_workers=0).workers == (1, 1)  # this process
    settings = TrainSettings(num_workers="2:8", batch_size=16, accumulate=2)
    assert settings.workers == (2, 8)
    assert [settings.rows(world) for world in (8, 4, 3, 2)] == [32, 64, 85, 128]


@pytest.mark.parametrize("wrong", [-1, "0:2", "3:2", "two", "1:2:3"])
def test_wrong_numbers_of_workers_are_refused(wrong: int | str) -> None:
    with pytest.raises(ValidationError, match="workers"):
        TrainSettings(num_workers=wrong)
