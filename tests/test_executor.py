"""Small work runs in this process with the results that Ray's workers give, and leaves nothing behind in it."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import toy
from tests.pipeline import every_version, features_only, ok
from zsr import executor, progress
from zsr.errors import ConfigError, DamagedArtifact
from zsr.executor import map_pieces


def where(piece: dict[str, Any], sizes: list[int]) -> dict[str, Any]:
    sizes.append(piece["number"])
    progress.advance(piece["number"])
    return {"pid": os.getpid(), "sizes": len(sizes), "threads": torch.get_num_threads(), "rows": piece["number"]}


class Counter:
    """Counts the calls of one object."""

    def __init__(self, start: int) -> None:
        self.calls = start

    def __call__(self, piece: dict[str, Any]) -> dict[str, Any]:
        self.calls += 1
        return {"calls": self.calls, "pid": os.getpid()}


def refuse(piece: dict[str, Any]) -> dict[str, Any]:
    raise DamagedArtifact(f"shard {piece['number']}")


PIECES = [{"number": number} for number in (1, 2, 3)]


def test_small_work_runs_here_in_order_and_with_copies_of_its_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(2)
    sizes: list[int] = []
    found = map_pieces("work", where, PIECES, small=True, rows=[1, 2, 3], fn_kwargs={"sizes": sizes})
    assert [one["rows"] for one in found] == [1, 2, 3]
    assert {one["pid"] for one in found} == {os.getpid()}
    assert {one["threads"] for one in found} == {1}
    assert sizes == []  # as a worker's changes of its arguments are not seen here
    assert torch.get_num_threads() == 2
    assert not executor.in_this_process()
    assert "work: 6 rows in" in capsys.readouterr().err


def test_one_object_handles_all_items_as_an_actor_does() -> None:
    found = map_pieces("work", Counter, PIECES, small=True, fn_constructor_kwargs={"start": 10})
    assert [one["calls"] for one in found] == [11, 12, 13]


def test_an_error_comes_through_as_it_was_raised() -> None:
    with pytest.raises(DamagedArtifact, match="shard 1") as raised:
        map_pieces("work", refuse, PIECES, small=True)
    assert type(raised.value) is DamagedArtifact
    assert not executor.in_this_process()


def test_arguments_that_no_worker_could_get_are_refused_here_too() -> None:
    with pytest.raises(TypeError, match="pickle"):
        map_pieces("work", where, PIECES, small=True, fn_kwargs={"sizes": threading.Lock()})


@pytest.mark.usefixtures("ray_cluster")
def test_the_variable_decides_where_work_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(executor.VARIABLE, "ray")
    found = map_pieces("work", Counter, PIECES, small=True, fn_constructor_kwargs={"start": 0}, concurrency=1)
    assert {one["pid"] for one in found}.isdisjoint({os.getpid()})
    monkeypatch.setenv(executor.VARIABLE, "local")
    assert executor.runs_here(small=False)
    assert not executor.runs_here(small=True, gpus=1)
    monkeypatch.setenv(executor.VARIABLE, "threads")
    with pytest.raises(ConfigError, match="auto, local or ray"):
        executor.runs_here(small=True)


@pytest.mark.usefixtures("ray_cluster")
def test_every_stage_makes_the_same_artifacts_here_and_in_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, images = (
        toy.write_features(tmp_path / "features"),
        toy.write_pictures(tmp_path / "images", toy.CLASSES[:3], each=2),
    )
    digests: dict[str, dict[str, str]] = {}
    for choice in ("local", "ray"):
        monkeypatch.setenv(executor.VARIABLE, choice)
        root = tmp_path / choice
        artifacts = features_only(root, raw)
        common, checkpoint = artifacts[:4], ("--checkpoint", root / "checkpoint")
        ok("train", *artifacts, "--model", "ridge", "--split", "random:3:0", "--validation-classes", 2,
           "--num-workers", 1, "--output", checkpoint[1])  # fmt: skip
        for modality in ("photo", "sketch"):
            ok("embed", *common, *checkpoint, "--modality", modality, "--output", root / modality, "--num-workers", 1)
        queries = ("--queries", root / "sketch", "--index-dir", root / "index")
        ok("index", "build", "--embeddings", root / "photo", *queries)
        ok("search", *queries, "--output", root / "found")
        ok("prepare", "--source", "folders", "--input", images, "--output", root / "images-data")
        ok(
            "features",
            "--data",
            root / "images-data",
            "--size",
            32,
            "--num-workers",
            1,
            "--output",
            root / "images-features",
        )
        digests[choice] = {path.name: every_version(path)[-1].digest for path in sorted(root.iterdir())}
    assert digests["local"] == digests["ray"]
    assert len(digests["local"]) == 10
