"""The wheel holds all that the code reads, installs `zsr` and nothing else, and works outside of a checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests import toy

ROOT = Path(__file__).parents[1]
PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs of an environment in which this tree's wheel is installed.

    The packages that it requires are those of this environment, except for zsr itself: what an editable installation
    adds by a .pth file is not read from a folder that a .pth file names.
    """
    root = tmp_path_factory.mktemp("wheel")
    source, environment = root / "source", root / "environment"
    shutil.copytree(ROOT / "zsr", source / "zsr", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("jobs", "cluster", "tests"):  # not to be found by the build
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    built = ("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(root), str(source))
    subprocess.run([sys.executable, *PIP, *built], check=True, timeout=120)
    shutil.rmtree(source)
    (made,) = root.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True, timeout=120)
    python = environment / "bin" / "python"
    subprocess.run([python, *PIP, "install", "--no-deps", str(made)], check=True, timeout=120)
    (packages := _packages(environment)).joinpath("outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    assert packages.is_dir()
    return environment / "bin"


def _packages(environment: Path) -> Path:
    (found,) = environment.glob("lib/python*/site-packages")
    return found


def test_zsr_is_all_that_is_installed(wheel: Path) -> None:
    packages = _packages(wheel.parent)
    others = ("pip", "setuptools", "outer.pth", "pkg_resources", "_distutils_hack", "distutils-precedence.pth")
    names = {path.name for path in packages.iterdir() if not path.name.startswith(others)}
    assert {name.partition("-")[0] for name in names} == {"zsr"}
    assert (wheel / "zsr").exists()
    assert (packages / "zsr" / "py.typed").exists()


def test_every_data_file_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    files = [path.relative_to(ROOT) for path in (ROOT / "zsr").rglob("*") if path.is_file()]
    data = {path for path in files if path.suffix not in (".py", ".pyc")}
    assert Path("zsr/training/deepspeed.yaml") in data
    packages = _packages(wheel.parent)
    assert {path for path in data if not (packages / path).exists()} == set()
    for path in data:
        assert (packages / path).read_bytes() == (ROOT / path).read_bytes()


def test_no_code_reads_files_beside_the_package() -> None:
    """`parents[1]` of a file of zsr/ is the checkout, which an installed wheel does not have."""
    reading = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in (ROOT / "zsr").rglob("*.py")
        for line in path.read_text().splitlines()
        if "__file__" in line and ".parents[" in line
    ]
    # the folder of the package itself, for the import path of workers
    assert reading == ["zsr/cluster.py: root = str(Path(__file__).resolve().parents[1])"]


@pytest.mark.usefixtures("ray_cluster")
def test_all_stages_run_outside_of_the_checkout(wheel: Path, tmp_path: Path) -> None:
    raw = toy.write_features(tmp_path / "raw")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "ZSR_DEEPSPEED")}
    short = "--model contrastive --epochs 1 --steps-per-epoch 2 --batch-size 8 --num-workers 1"
    inputs = "--data data --features features"
    last: dict[str, object] = {}
    for words in (
        f"prepare --source parquet --input {raw} --output data --features-output features",
        "semantics --data data --output semantics",
        f"train {inputs} --semantics semantics --split random:3:0 --validation-classes 2 {short} --output checkpoint",
        f"embed {inputs} --checkpoint checkpoint --modality photo --output photo",
        f"embed {inputs} --checkpoint checkpoint --modality sketch --output sketch",
        "index build --embeddings photo --queries sketch --index-dir index",
        "search --index-dir index --queries sketch --output found.json",
        f"evaluate {inputs} --semantics semantics --checkpoint checkpoint --output report",
    ):
        command = [str(wheel / "zsr"), *words.split()]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, f"zsr {words}: {done.stdout[-2000:]}{done.stderr[-3000:]}"
        last = json.loads(done.stdout.splitlines()[-1])
    assert last["exit_code"] == 0
    assert len(json.loads((tmp_path / "found.json").read_text())) > 10
    assert "</html>" in (tmp_path / "report" / "report.html").read_text()
    where = "import zsr, json; print(zsr.__file__, zsr.open_artifact('index', 'index').digest)"
    command = [str(wheel / "python"), "-c", where]
    said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.startswith(str(wheel.parent))
