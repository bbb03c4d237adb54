"""The floors of what is safe to run, and what the code must never do."""

import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[1]
FLOORS = {
    "ray": "2.56",
    "torch": "2.11",
    "pyarrow": "14.0.1",
    "pillow": "12.3",
    "faiss-cpu": "1.15",
    "deepspeed": "0.15.1",
}


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return dict(line.lower().split("==") for line in lines if "==" in line)


@pytest.mark.parametrize(("name", "floor"), FLOORS.items())
def test_locked_and_installed_versions_are_above_the_floor(name: str, floor: str) -> None:
    assert Version(locked()[name]) >= Version(floor)
    try:
        installed = metadata.version(name)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed; a GPU machine has faiss-gpu")
    assert Version(installed) >= Version(floor)


@pytest.mark.parametrize(
    "pattern",
    [
        r"\bpickle\.loads?\(",
        r"allow_pickle=True",
        r"weights_only=False",
        r"yaml\.load\(",
        r"\.extractall\(",
        r"\beval\(\"",
        r"RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA",
    ],
)
def test_the_code_never_runs_what_it_reads(pattern: str) -> None:
    files = [path for folder in ("zsr", "jobs", "cluster", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert files
    found = [str(path) for path in files if re.search(pattern, path.read_text())]
    assert not found


def test_every_torch_load_reads_weights_only() -> None:
    calls = [
        call for path in (ROOT / "zsr").rglob("*.py") for call in re.findall(r"torch\.load\([^\n]*", path.read_text())
    ]
    assert calls
    assert all("weights_only=True" in call for call in calls)


def test_importing_the_package_is_light() -> None:
    import subprocess
    import sys

    script = "import sys, zsr; print(sorted({'torch', 'ray', 'pyarrow', 'deepspeed'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_resolve() -> None:
    import zsr

    assert all(getattr(zsr, name) is not None for name in zsr.__all__)
    with pytest.raises(AttributeError, match="public names"):
        _ = zsr.nonsense
