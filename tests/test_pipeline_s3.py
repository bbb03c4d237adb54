"""Every stage with its artifacts in an object store."""

import json
from pathlib import Path

import pytest

from tests import toy
from tests.pipeline import features_only, ok
from zsr import cluster
from zsr.artifact import open_artifact
from zsr.storage import files_below, read_file


@pytest.mark.usefixtures("ray_cluster")
def test_from_features_to_report_in_a_bucket(tmp_path: Path, bucket: str) -> None:
    cluster.disconnect()  # tasks get the environment of the connection: the endpoint of this test
    raw = toy.write_features(tmp_path / "raw", toy.CLASSES[:7])
    root = Path(bucket)  # as the flags of jobs make it
    inputs = features_only(root, raw)
    here = features_only(tmp_path / "disk", raw)
    for flag, there, local in zip(inputs[::2], inputs[1::2], here[1::2], strict=True):
        kind = str(flag).removeprefix("--")
        assert open_artifact(str(there), kind).digest == open_artifact(str(local), kind).digest
    split = ("--split", "random:2:0", "--validation-classes", 2)
    short = ("--epochs", 2, "--steps-per-epoch", 3, "--batch-size", 8, "--track", "tensorboard")
    for model, flags in (("contrastive", short), ("ridge", short[:0])):
        ok("train", *inputs, "--model", model, *split, *flags, "--output", root / "checkpoint", "--num-workers", 1)
    logs = files_below(root / "checkpoint" / "logs")
    metrics = next(path for path in logs if path.name == "metrics.jsonl")
    assert [json.loads(line)["step"] for line in read_file(metrics).splitlines() if b'"epoch"' in line] == [3, 6]
    assert any("tfevents" in path.name for path in logs)
    common = [*inputs[:4], "--checkpoint", root / "checkpoint", "--classes", "unseen"]
    for modality in ("photo", "sketch"):
        ok("embed", *common, "--modality", modality, "--output", root / modality)
    build = ("--embeddings", root / "photo", "--queries", root / "sketch", "--index-dir", root / "index")
    assert ok("index", "build", *build)["operating_point"]["recall_sketch"] >= 0.9
    assert {path.name for path in files_below(root / "index" / "reports")} == {"build.json", "curve.png"}
    ok("evaluate", *inputs, "--checkpoint", root / "checkpoint", "--output", root / "report")
    assert json.loads(read_file(root / "report" / "report.json"))["rows"]
    assert b"</html>" in read_file(root / "report" / "report.html")
    assert not Path("s3:").exists()
