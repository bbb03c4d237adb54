"""Pictures decoded by tasks ahead of the model are those that the model's own process decodes, in the same order."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import toy
from tests.pipeline import job, ok
from zsr.artifact import open_artifact
from zsr.data.decode import Pictures, Resize
from zsr.embedding.backbone import Extractor
from zsr.embedding.prefetch import Decoders
from zsr.embedding.settings import BackboneSettings
from zsr.embedding.shards import Clocks
from zsr.models import backbones

pytestmark = pytest.mark.usefixtures("ray_cluster")

PICTURES = Pictures(Resize(24), invert_sketches=True)


def encoded(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 30, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def blocks() -> Iterator[list[bytes | None]]:
    """Eleven blocks of three pictures; one picture is broken and one is missing."""
    for number in range(11):
        yield [
            encoded(3 * number),
            b"no image" if number == 4 else encoded(3 * number + 1),
            None if number == 7 else encoded(number),
        ]


@pytest.mark.parametrize("running", [1, 3])
def test_tasks_decode_what_the_process_itself_decodes(running: int) -> None:
    own = list(Decoders(PICTURES, 0).blocks("sketch", blocks()))
    ahead = list(Decoders(PICTURES, running, running).blocks("sketch", blocks()))
    assert len(own) == len(ahead) == 11
    for one, other in zip(own, ahead, strict=True):
        assert (one.rows, one.bad) == (other.rows, other.bad)
        assert np.array_equal(one.pixels, other.pixels)
    assert own[4].rows == [0, 2]
    assert [(row, kind) for row, kind, _ in own[4].bad + own[7].bad] == [(1, "wrong_type"), (2, "empty")]


def test_no_more_blocks_are_read_than_tasks_may_hold() -> None:
    read = 0

    def counted() -> Iterator[list[bytes | None]]:
        nonlocal read
        for block in blocks():
            read += 1
            yield block

    made = Decoders(PICTURES, 2, 2).blocks("photo", counted())
    next(made)
    assert read == 4


@pytest.mark.parametrize(
    ("decode", "model", "most", "running"), [(4, 1, 8, 4), (4.2, 1, 8, 5), (4, 1, 3, 3), (1, 9, 8, 1), (1, 9, 0, 0)]
)
def test_the_probe_chooses_as_many_as_keep_the_model_busy(decode: float, model: float, most: int, running: int) -> None:
    decoders = Decoders(PICTURES, most)
    decoders.note(64, 0.0, 60.0)  # a GPU that wakes up
    assert decoders.running is None
    share = 64 / (decode + model)
    while decoders.running is None:
        decoders.note(64, decode * share, model * share)
    assert decoders.running == running
    told = decoders.as_json()
    assert told["decode"] / told["model"] == pytest.approx(decode / model, rel=1e-4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    raw = toy.write_pictures(root / "raw", toy.CLASSES[:2], each=40)
    ok("prepare", "--source", "folders", "--input", raw, "--output", root / "data")
    return root / "data"


def test_features_have_the_same_bits_whoever_decodes(data: Path) -> None:
    weights, made = backbones.weights_path("lite0", None), open_artifact(data, "data")
    shared = (made, BackboneSettings(size=32), weights, backbones.digest(weights), "", 3)
    in_turn, ahead = Extractor(*shared), Extractor(*shared)
    ahead.decoders = Decoders(in_turn.featurizer.pictures, 2, running=2)
    name = made.shards("photo")[0].path
    found = []
    for extractor in (in_turn, ahead):
        parts = [part for _, part in extractor.made(name, Clocks())]
        found.append(([i for p in parts for i in p.ids], np.concatenate([f for p in parts for f in p.features])))
    assert found[0][0] == found[1][0]
    assert np.array_equal(found[0][1], found[1][1])


def test_a_gpu_that_shall_decode_has_to_be_there(data: Path, tmp_path: Path) -> None:
    for flags in ((), ("--dry-run", "--measure")):
        told = job("features", "--data", data, "--output", tmp_path / "none", "--size", 32, "--jpegs", "gpu", *flags)
        assert told["exit_code"] == 2
        assert "the cluster has no GPU; use --jpegs cpu" in told["error"]
    assert not (tmp_path / "none").exists()


def test_a_job_takes_tasks_to_decode_and_refuses_more_than_there_is_room_for(data: Path, tmp_path: Path) -> None:
    flags = ("--data", data, "--size", 32, "--num-workers", 1)
    plain = ok("features", *flags, "--output", tmp_path / "plain")
    assert ok("features", *flags, "--output", tmp_path / "ahead", "--decoders", 2)["digest"] == plain["digest"]
    refused = job("features", *flags, "--output", tmp_path / "refused", "--decoders", 99)
    assert refused["exit_code"] == 2
    assert "use --decoders" in refused["error"]


def test_the_plan_predicts_what_it_costs_and_writes_nothing(data: Path, tmp_path: Path) -> None:
    words = ("--data", data, "--output", tmp_path, "--size", 32, "--num-workers", 2, "--cpu-price", 0.04, "--dry-run")
    assert "cost" not in ok("features", *words)
    told = ok("features", *words, "--measure")
    cost = told["cost"]
    a_row = cost["seconds_a_row"]
    assert set(a_row) == {"modality=photo", "modality=sketch"}
    busy = sum(seconds * told["rows"][side.partition("=")[2]] for side, seconds in a_row.items())
    assert cost["cost"] == pytest.approx(0.04 * busy / 3600, abs=1e-4)
    assert cost["hours"] == pytest.approx(busy / 2 / 3600, abs=1e-4)
    assert cost["limit"] in ("read", "decode", "model")
    assert set(cost["rows_a_second_by_batch_size"]) == {"4", "16", "32", "64"}
    assert all(rate > 0 for rate in cost["rows_a_second_by_batch_size"].values())
    assert list(tmp_path.iterdir()) == []


def test_the_plan_tries_no_other_batch_size_than_that_asked_for(data: Path, tmp_path: Path) -> None:
    told = ok(
        "features", "--data", data, "--output", tmp_path, "--size", 32, "--batch-size", 2, "--dry-run", "--measure"
    )
    assert "rows_a_second_by_batch_size" not in told["cost"]
