"""The main job on small generated data: pictures to report, features to report, and what a kill leaves."""

import json
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import toy
from tests.pipeline import features_only, job, ok
from zsr.artifact import open_artifact
from zsr.checkpoint import open_model
from zsr.models import build
from zsr.models.protocol import Inputs

pytestmark = pytest.mark.usefixtures("ray_cluster")

# of a model with several parameter groups, which take turns; a later --model takes its place
SHORT = (
    *("--model", "sem-pcyc", "--split", "random:3:0", "--validation-classes", 2),
    *("--epochs", 2, "--steps-per-epoch", 5, "--batch-size", 16),
)


@pytest.fixture(scope="module")
def featured(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Artifacts of a feature-only set, as flags."""
    root = tmp_path_factory.mktemp("featured")
    return features_only(root, toy.write_features(root / "raw"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, featured: list[object]) -> Path:
    """ROOT of a checkpoint trained on them by two workers."""
    root = tmp_path_factory.mktemp("trained")
    ok("train", *featured, "--output", root, *SHORT, "--num-workers", 2)
    return root


@pytest.fixture(scope="module")
def pictured(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """DATA of pictures and their SEMANTICS, as flags."""
    root = tmp_path_factory.mktemp("pictured")
    raw = toy.write_pictures(root / "raw")
    prepared = ok("prepare", "--source", "sketchy", "--input", raw, "--output", root / "data", "--rows-per-shard", 30)
    assert prepared["rows"] == {"in": 160, "used": 160, "quarantined": 0}
    ok("semantics", "--data", root / "data", "--output", root / "semantics")
    return ["--data", root / "data", "--semantics", root / "semantics"]


def flags_to_paths(flags: list[object]) -> dict[str, Path]:
    return {str(name).removeprefix("--"): Path(str(path)) for name, path in zip(flags[::2], flags[1::2], strict=True)}


def test_pictures_to_report(tmp_path: Path, pictured: list[object]) -> None:
    features = tmp_path / "features"
    ok("features", *pictured[:2], "--output", features, "--size", 32, "--num-workers", 1)
    inputs = [*pictured[:2], "--features", features, *pictured[2:]]
    trained = ok("train", *inputs, "--output", tmp_path / "checkpoint", *SHORT, "--num-workers", 0)
    assert trained["steps"] == 10
    search_and_report(tmp_path, inputs, tmp_path / "checkpoint")


def test_an_image_tower_is_trained_along_and_again_with_the_validation_classes(
    tmp_path: Path, pictured: list[object]
) -> None:
    flags = ["--tower", "tiny", "--random-weights", "--size", 16, "--model", "doodle2search", "--augment", "--refit"]
    flags += ["--tower-rate", 0.5, "--tower-tune", "norms", "--window", 4]
    refitted = ok("train", *SHORT, *flags, *pictured, "--num-workers", 0, "--output", tmp_path / "tower")
    final, chosen = (
        open_artifact(tmp_path / "tower" / "objects" / d, "checkpoint") for d in _versions(tmp_path / "tower")
    )
    assert (final.digest, final.parents["chosen"]) == (refitted["digest"], chosen.digest)
    assert refitted["steps"] == chosen.facts["best_step"]
    assert refitted["validation_map_all"] == chosen.facts["validation_map_all"]
    assert len(final.config["inputs"]["classes"]) == len(chosen.config["inputs"]["classes"]) + 2
    before = build("doodle2search", {}, Inputs.model_validate(final.config["inputs"])).towers.state_dict()
    after = open_model(final).towers.state_dict()
    assert any(not value.equal(before[name]) for name, value in after.items())
    tower = final.config["inputs"]["tower"]
    assert (tower["rate"], tower["tune"], final.config["settings"]["window"]) == (0.5, "norms", 4)
    embedded = ok(
        "embed", *pictured[:2], "--checkpoint", tmp_path / "tower", "--modality", "sketch", "--output", tmp_path / "e"
    )
    assert embedded["rows"] == 80


def test_a_backbone_tuned_on_a_class_is_refused_where_that_class_is_unseen(tmp_path: Path) -> None:
    raw = toy.write_pictures(tmp_path / "raw", toy.CLASSES[:6], each=4)
    ok("prepare", "--source", "sketchy", "--input", raw, "--output", tmp_path / "data")
    how = [f"--finetune.training.{flag}" for flag in ("epochs=1", "steps-per-epoch=2", "batch-size=4", "num-workers=0")]
    tune = ("--finetune-on-seen", "random:2:0", *how, "--finetune.training.validation-classes=0")
    flags = ("--data", tmp_path / "data", "--size", 32, "--num-workers", 1)
    plain = ok("features", *flags, "--output", tmp_path / "plain")
    tuned = ok("features", *flags, *tune, "--output", tmp_path / "tuned")
    assert tuned["rows"] == plain["rows"]
    names = [next((tmp_path / name / "objects").glob("*/modality=photo/*")) for name in ("plain", "tuned")]
    assert names[0].read_bytes() != names[1].read_bytes()
    train = ("train", *flags[:2], "--features", tmp_path / "tuned", "--model", "raw", "--num-workers", 1)
    more = ("--validation-classes", 0, "--output", tmp_path / "checkpoint")
    refused = job(*train, "--split", "random:2:1", *more)
    assert refused["exit_code"] == 2
    assert "was fine-tuned on" in refused["error"]
    assert ok(*train, "--split", "random:2:0", *more)["model"] == "raw"


def _versions(root: Path) -> list[str]:
    """Digests that were published, newest first."""
    numbers = sorted((int(path.name) for path in (root / "versions").iterdir()), reverse=True)
    return [json.loads((root / "versions" / str(number)).read_text())["digest"] for number in numbers]


def test_features_alone_to_report(tmp_path: Path, featured: list[object], trained: Path) -> None:
    report = search_and_report(tmp_path, featured, trained)
    assert [row["name"] for row in report["rows"]] == ["sem-pcyc", "sem-pcyc", "ridge"]  # widths differ: no raw floor


def search_and_report(root: Path, inputs: list[object], checkpoint: Path) -> dict[str, Any]:
    """Embed, index and evaluate; checks that hold for any data, and report.json."""
    common = [*inputs[:4], "--checkpoint", checkpoint, "--classes", "unseen"]
    for modality in ("photo", "sketch"):
        ok("embed", *common, "--modality", modality, "--output", root / modality)
    built = ok(
        "index", "build", "--embeddings", root / "photo", "--queries", root / "sketch", "--index-dir", root / "index"
    )
    assert built["operating_point"]["recall_sketch"] >= 0.9
    results = ok(
        "evaluate", *inputs, "--checkpoint", checkpoint, "--index-dir", root / "index", "--output", root / "out"
    )
    assert 0 < results["chance"] < 1
    assert results["map_all_unseen_index"] == pytest.approx(results["map_all_unseen"], abs=0.1)
    report: dict[str, Any] = json.loads((root / "out" / "report.json").read_text())
    HTMLParser().feed((root / "out" / "report.html").read_text())
    return report


def test_a_finished_run_is_found_and_another_seed_is_another_run(trained: Path, featured: list[object]) -> None:
    planned = [
        ok("train", *featured, "--output", trained, *SHORT, "--seed", seed, "--dry-run")["plan"] for seed in (0, 1)
    ]
    assert planned[0] != planned[1]
    again = ok("train", *featured, "--output", trained, *SHORT)
    assert again["digest"] == open_checkpoint(trained).digest


def test_unseen_poison_leaves_every_loss_and_weight_as_it_is(tmp_path: Path, trained: Path) -> None:
    unseen = open_checkpoint(trained).config["split"]["unseen"]
    poisoned_flags = features_only(tmp_path, toy.write_features(tmp_path / "raw", poison=tuple(unseen)))
    ok("train", *poisoned_flags, "--output", tmp_path / "poisoned", *SHORT)
    weights = [open_checkpoint(root).read("model.safetensors") for root in (trained, tmp_path / "poisoned")]
    assert weights[0] == weights[1]
    losses = [next((root / "logs").rglob("metrics.jsonl")).read_text() for root in (trained, tmp_path / "poisoned")]
    assert _terms(losses[0]) == _terms(losses[1])


def test_unseen_pictures_that_cannot_be_decoded_leave_every_loss_and_weight_as_it_is(tmp_path: Path) -> None:
    tower = ("--tower", "tiny", "--random-weights", "--size", 16, "--model", "doodle2search", "--augment")

    def train(name: str) -> tuple[bytes, list[dict[str, float]]]:
        root = tmp_path / name
        data = ("--data", root / "data")
        ok("prepare", "--source", "folders", "--input", root / "raw", "--output", data[1], "--max-bad-rows", 30)
        ok("semantics", *data, "--output", root / "semantics")
        ok("train", *SHORT, *tower, *data, "--semantics", root / "semantics", "--output", root / "out",
           "--num-workers", 1)  # fmt: skip
        losses = next((root / "out" / "logs").rglob("metrics.jsonl")).read_text()
        return open_checkpoint(root / "out").read("model.safetensors"), _terms(losses)

    toy.write_pictures(tmp_path / "whole" / "raw")
    wanted = train("whole")
    raw = toy.write_pictures(tmp_path / "poisoned" / "raw")
    cut = 0
    for name in open_checkpoint(tmp_path / "whole" / "out").config["split"]["unseen"]:
        for picture in sorted(raw.glob(f"*/{name}/*.png"))[::2]:
            picture.write_bytes(picture.read_bytes()[:60])  # its header is whole, its pixels are not
            cut += 1
    assert cut == 24
    assert train("poisoned") == wanted


def open_checkpoint(root: Path) -> Any:
    return open_artifact(root, "checkpoint")


def _terms(text: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in text.splitlines()]
    assert all("NaN" not in line for line in text.splitlines())
    kept = ("step", "validation_map_all")
    return [{name: value for name, value in line.items() if name in kept or "/" in name} for line in lines]


@pytest.mark.faults
def test_a_killed_worker_and_driver_go_on_to_the_same_digest(
    tmp_path: Path, featured: list[object], trained: Path
) -> None:
    flags = [str(flag) for flag in (*featured, "--output", tmp_path / "killed", *SHORT)]
    # a cluster of its own, since workers take the fault from the runtime environment of their job; it fires in the
    # second epoch, when the state of the first is staged
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"ZSR_FAULT": "train.step=kill@8"}
    command = [sys.executable, "-m", "zsr", "train", *flags]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        for line in run.stderr or ():
            if "restarting from the last saved state" in line:
                run.kill()  # the driver, too
                break
    assert not list((tmp_path / "killed").rglob("versions/*"))
    assert list((tmp_path / "killed").rglob("state/00000005.safetensors"))
    resumed = ok("train", *flags)
    assert resumed["digest"] == open_checkpoint(trained).digest


def test_ridge_is_refitted_with_the_penalty_that_validation_chose(tmp_path: Path, featured: list[object]) -> None:
    flags = (*featured, *SHORT, "--model", "ridge", "--num-workers", 1)
    ok("train", *flags, "--refit", "--output", tmp_path / "refit")
    final, chosen = (open_checkpoint(tmp_path / "refit" / "objects" / d) for d in _versions(tmp_path / "refit"))
    assert final.config["options"]["penalties"] == chosen.facts["chosen_options"]["penalties"]
    assert sorted(final.config["inputs"]["classes"]) == final.facts["saw"] == chosen.facts["saw"]
    # its validation classes were trained on: they cannot be tested, not even as released
    report = (
        *featured,
        "--as-released",
        "--output",
        tmp_path / "report",
        "--checkpoint",
        tmp_path / "refit" / "objects",
    )
    refused = job("evaluate", *report[:-1], report[-1] / final.digest)
    assert refused["exit_code"] == 2
    assert "after --refit" in refused["error"]
    ok("evaluate", *report[:-1], report[-1] / chosen.digest)


def test_without_validation_classes_the_last_step_is_kept(
    tmp_path: Path, featured: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (*featured, *SHORT, "--num-workers", 0, "--validation-classes", 0, "--keep-checkpoints", "all")
    done = ok("train", *flags, "--output", tmp_path / "all", "--rows-per-class", 6)
    assert (done["best_step"], done["steps"], done["validation_map_all"]) == (10, 10, None)
    report = ("--checkpoint", tmp_path / "all", "--output", tmp_path / "report")
    assert set(ok("evaluate", *featured, *report)["peaks"]) == {"sem-pcyc (peak)"}
    refused = job("train", *flags, "--refit", "--output", tmp_path / "x")
    assert refused["exit_code"] == 2
    assert "--refit requires validation classes" in refused["error"]
    one = job("train", *featured, "--split", "random:3:0", "--validation-classes", 1, "--output", tmp_path / "x")
    assert one["exit_code"] == 2
    assert "every ranking perfect" in capsys.readouterr().err


def test_class_vectors_are_asked_for_where_a_model_learns_from_them(tmp_path: Path, featured: list[object]) -> None:
    flags = (*featured[:4], *SHORT, "--output", tmp_path / "x")
    refused = job("train", *flags, "--model", "sem-pcyc")
    assert "sem-pcyc requires class embeddings; set --semantics" in refused["error"]
    assert ok("train", *flags, "--model", "cvae", "--dry-run")["classes"]["training"] == 5
    refused = job("train", "--data", featured[1], *SHORT, "--output", tmp_path / "x", "--model", "cvae")
    assert "give either --features, or a --tower" in refused["error"]


def test_plan_trains_nothing(tmp_path: Path, featured: list[object]) -> None:
    planned = ok("train", *featured, "--output", tmp_path / "x", *SHORT, "--dry-run")
    assert planned["steps_at_most"] == 10
    assert "parameters" in planned["model"]
    assert not (tmp_path / "x").exists()


def test_an_unseen_class_in_the_training_list_is_refused(tmp_path: Path, featured: list[object]) -> None:
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"unseen": ["apple", "ball"], "training": ["apple", "cat", "dog"]}))
    results = job("train", *featured, "--output", tmp_path / "x", "--split", split)
    assert results["exit_code"] == 2
    assert "'apple'" in results["error"]
    assert not (tmp_path / "x").exists()


def test_a_truncated_shard_is_refused(tmp_path: Path) -> None:
    flags = features_only(tmp_path, toy.write_features(tmp_path / "raw"))
    shard = max(flags_to_paths(flags)["features"].rglob("part-00000.parquet"))
    shard.write_bytes(shard.read_bytes()[:-100])
    results = job("train", *flags, "--output", tmp_path / "x", *SHORT, "--model", "ridge", "--num-workers", "1")
    assert results["exit_code"] == 5
    assert str(shard) in results["error"]
    assert not list((tmp_path / "x").rglob("versions"))


def test_a_missing_column_names_file_and_column(tmp_path: Path) -> None:
    raw = toy.write_features(tmp_path / "raw")
    results = job("prepare", "--source", "parquet", "--input", raw, "--output", tmp_path / "x", "--columns.key", "name")
    assert results["exit_code"] == 2
    assert "no column 'name'" in results["error"]
    assert "rows.parquet" in results["error"]


def test_a_key_that_is_no_string_names_file_and_column(tmp_path: Path) -> None:
    folder = tmp_path / "raw" / "modality=photo"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"key": [1, 2]}), folder / "rows.parquet")
    results = job("prepare", "--source", "parquet", "--input", tmp_path / "raw", "--output", tmp_path / "x")
    assert results["exit_code"] == 2
    assert "column 'key' is int64, expected string" in results["error"]


def test_new_vectors_under_old_keys_are_imported_anew(tmp_path: Path) -> None:
    flags = features_only(tmp_path, toy.write_features(tmp_path / "raw"))
    features = flags_to_paths(flags)["features"]
    old = open_artifact(features, "features").digest
    shutil.rmtree(tmp_path / "raw")
    features_only(tmp_path, toy.write_features(tmp_path / "raw", poison=("apple",)))
    assert open_artifact(features, "features").digest != old


def test_a_label_without_a_vector_is_named(tmp_path: Path) -> None:
    results = job("semantics", "--labels", "apple", "qzxv", "--output", tmp_path / "x")
    assert results["exit_code"] == 2
    assert "qzxv" in results["error"]


def test_an_infeasible_budget_names_the_nearest(tmp_path: Path, featured: list[object]) -> None:
    ok("train", *featured, "--output", tmp_path / "ridge", *SHORT, "--model", "ridge", "--num-workers", "1")
    for modality in ("photo", "sketch"):
        ok(
            "embed",
            *featured[:4],
            "--checkpoint",
            tmp_path / "ridge",
            "--modality",
            modality,
            "--output",
            tmp_path / modality,
        )
    results = job(
        "index", "build", "--embeddings", tmp_path / "photo", "--queries", tmp_path / "sketch",
        "--index-dir", tmp_path / "index", "--max-index-memory-usage", "1KB",
    )  # fmt: skip
    assert results["exit_code"] == 2
    assert not list((tmp_path / "index").rglob("versions/*"))


def test_bad_pictures_are_quarantined_and_counted(tmp_path: Path) -> None:
    raw = toy.write_pictures(tmp_path / "raw", classes=toy.CLASSES[:4])
    for number, data in enumerate([b"", b"no image", b"\x89PNG\r\n\x1a\n broken"]):
        (raw / "photo" / "apple" / f"{number}.png").write_bytes(data)
    strict = job("prepare", "--source", "sketchy", "--input", raw, "--output", tmp_path / "strict",
                 "--max-bad-rows", "1%")  # fmt: skip
    assert strict["exit_code"] == 3
    assert "'empty': 1, 'undecodable': 1, 'wrong_type': 1" in strict["error"]
    assert not (tmp_path / "strict" / "versions").exists()
    loose = ok(
        "prepare", "--source", "sketchy", "--input", raw, "--output", tmp_path / "loose", "--max-bad-rows", "10%"
    )
    assert loose["rows"] == {"in": 64, "used": 61, "quarantined": 3}
    lines = [
        json.loads(line) for path in (tmp_path / "loose").rglob("*.jsonl") for line in path.read_text().splitlines()
    ]
    assert sorted(line["kind"] for line in lines) == ["empty", "undecodable", "wrong_type"]
    assert all(line["shard"] and line["id"] and line["key"] for line in lines)


def test_an_unknown_configuration_key_is_refused(tmp_path: Path, featured: list[object]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: sem-pcyc\noptions: {learning_rate: 1}\n")
    results = job("train", *featured, "--output", tmp_path / "x", *SHORT, "--config", file)
    assert results["exit_code"] == 2
    assert "options.learning_rate" in results["error"]


def test_a_huge_learning_rate_stops_with_the_term_and_the_step(tmp_path: Path, featured: list[object]) -> None:
    flags = (*featured, "--output", tmp_path / "x", *SHORT, "--num-workers", 0, "--options.generator-lr", "1e30")
    results = job("train", *flags)
    assert results["exit_code"] == 6
    assert "step" in results["error"]
    assert not list((tmp_path / "x").rglob("versions/*"))
