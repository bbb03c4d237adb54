"""The wheel holds all that the code reads, and trains outside of a checkout."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import toy

ROOT = Path(__file__).parents[1]
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")

TRAIN = """
import json, sys
import zsr
from jobs import prepare, semantics, train

raw, root = sys.argv[1:]
assert zsr.__file__.startswith(root + "/wheel/"), zsr.__file__
jobs = [
    (prepare, ["--source", "parquet", "--input", raw, "--output", "data", "--features-output", "features"]),
    (semantics, ["--data", "data", "--output", "semantics"]),
    (train, ["--data", "data", "--features", "features", "--semantics", "semantics", "--output", "checkpoint",
             "--model", "contrastive", "--split", "random:3:0", "--validation-classes", "2", "--num-workers", "1",
             "--epochs", "1", "--steps-per-epoch", "2", "--batch-size", "8"]),
]
for job, flags in jobs:
    code = job.run(flags)
    assert code == 0, (job.__name__, code)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel of this tree installs, and nothing else of the tree."""
    root = tmp_path_factory.mktemp("wheel")
    source = root / "source"
    source.mkdir()
    for name in ("zsr", "jobs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    built = ("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", root, source)
    subprocess.run([*PIP, *map(str, built)], check=True, timeout=120)
    (made,) = root.glob("*.whl")
    subprocess.run([*PIP, "install", "--no-deps", "--target", str(root / "wheel"), str(made)], check=True, timeout=120)
    shutil.rmtree(source)
    return root / "wheel"


def test_every_data_file_of_the_packages_is_in_the_wheel(wheel: Path) -> None:
    files = [path.relative_to(ROOT) for name in ("zsr", "jobs") for path in (ROOT / name).rglob("*") if path.is_file()]
    data = {path for path in files if path.suffix not in (".py", ".pyc")}
    assert Path("zsr/training/deepspeed.yaml") in data
    assert {path for path in data if not (wheel / path).exists()} == set()
    for path in data:
        assert (wheel / path).read_bytes() == (ROOT / path).read_bytes()


def test_no_code_reads_files_beside_the_packages() -> None:
    """`parents[1]` of a file of zsr/ is the checkout, which an installed wheel does not have."""
    reading = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for name in ("zsr", "jobs")
        for path in (ROOT / name).rglob("*.py")
        for line in path.read_text().splitlines()
        if "__file__" in line and ".parents[" in line
    ]
    # the folder of the packages itself, for the import path of workers
    assert reading == ["zsr/cluster.py: root = str(Path(__file__).resolve().parents[1])"]


@pytest.mark.usefixtures("ray_cluster")
def test_an_installed_wheel_trains_outside_of_the_checkout(wheel: Path, tmp_path: Path) -> None:
    raw = toy.write_features(tmp_path / "raw")
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    environment.pop("ZSR_DEEPSPEED", None)
    command = [sys.executable, "-c", TRAIN, str(raw), str(wheel.parent)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    trained = json.loads(done.stdout.splitlines()[-1])
    assert (trained["exit_code"], trained["steps"]) == (0, 2)
