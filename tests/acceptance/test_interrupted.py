"""Every command that works for long is interrupted once, in the middle of its work, and goes on when it is given again.

Each runs as a user starts it, in a process of its own on the shared cluster, and stands still where it writes: there it
gets SIGINT, or SIGTERM as Kubernetes and Slurm send it.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import toy
from tests.pipeline import every_version, features_only, ok, read_all
from tests.test_signals import DEFAULT_SIGNALS

pytestmark = pytest.mark.usefixtures("ray_cluster")

ROOT = Path(__file__).resolve().parents[2]
SPLIT = ("--split", "random:3:0", "--validation-classes", 2, "--num-workers", 1)
SHORT = ("--model", "contrastive", "--epochs", 1, "--steps-per-epoch", 4, "--batch-size", 8)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> dict[str, list[object]]:
    """The flags that each command gets but `--output`: what the commands before it have made."""
    root = tmp_path_factory.mktemp("interrupted")
    raw, images = toy.write_features(root / "features"), toy.write_pictures(root / "images", toy.CLASSES[:3], each=2)
    artifacts = features_only(root, raw)
    checkpoint, common = ("--checkpoint", root / "checkpoint"), artifacts[:4]
    ok("train", *artifacts, "--model", "ridge", *SPLIT, "--output", checkpoint[1])
    for modality in ("photo", "sketch"):
        ok("embed", *common, *checkpoint, "--modality", modality, "--output", root / modality, "--num-workers", 1)
    queries = ("--queries", root / "sketch")
    index = ("--index-dir", root / "index")
    ok("index", "build", "--embeddings", root / "photo", *queries, *index)
    ok("prepare", "--source", "folders", "--input", images, "--output", root / "images-data")
    return {
        "prepare": ["--source", "folders", "--input", images],
        "features": ["--data", root / "images-data", "--size", 32, "--num-workers", 1],
        "semantics": artifacts[:2],
        "train": [*artifacts, *SHORT, *SPLIT],
        "embed": [*common, *checkpoint, "--modality", "sketch", "--num-workers", 1],
        "index build": ["--embeddings", root / "photo", *queries],
        "search": [*index, *queries],
        "evaluate": [*artifacts, *checkpoint],
    }


@pytest.mark.parametrize(
    ("name", "point", "number"),
    [
        ("prepare", "artifact.write", signal.SIGINT),
        ("features", "artifact.write", signal.SIGTERM),
        ("semantics", "artifact.write", signal.SIGINT),
        ("train", "train.step", signal.SIGINT),
        ("embed", "embed.shard", signal.SIGTERM),
        ("index build", "index.add", signal.SIGINT),
        ("search", "search.shard", signal.SIGTERM),
        ("evaluate", "evaluate.row", signal.SIGINT),
    ],
)
def test_a_command_that_was_interrupted_goes_on_when_it_is_given_again(
    inputs: dict[str, list[object]], tmp_path: Path, name: str, point: str, number: int
) -> None:
    output = "--index-dir" if name.startswith("index") else "--output"
    words = [*name.split(), *map(str, inputs[name]), output, str(tmp_path / "made")]
    code, seconds, err, last = interrupted(words, point, tmp_path / "reached", number)
    assert code == 128 + number
    assert seconds < 3
    assert [line for line in err if "interrupted; run the same command again to continue" in line] == err[-1:]
    assert not [line for line in err if "Traceback" in line or "Error" in line]
    assert last["exit_code"] == code
    assert not list((tmp_path / "made").glob("versions/*"))
    ok(*words)
    if name == "evaluate":
        assert json.loads((tmp_path / "made" / "report.json").read_text())["rows"]
    else:
        assert [read_all(artifact) > 0 for artifact in every_version(tmp_path / "made")]
        assert not any((tmp_path / "made" / "staging").iterdir())


def interrupted(
    words: list[str], point: str, reached: Path, number: int
) -> tuple[int, float, list[str], dict[str, int]]:
    """Exit code, seconds from the signal to the end, lines of stderr and the JSON line of a command."""
    environment = {**os.environ, "ZSR_FAULT": f"{point}=wait@1@{reached}", "PYTHONPATH": str(ROOT)}
    command = [*DEFAULT_SIGNALS, sys.executable, "-m", "zsr", words[0], *words[1:]]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 120
        while not reached.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        began = time.monotonic()
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        seconds = time.monotonic() - began
    assert reached.exists(), err
    return process.returncode, seconds, err.splitlines(), json.loads(out.splitlines()[-1])
