"""What is imported when: help and an opened index need neither torch nor Ray, which take seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

import zsr
from zsr.cli import COMMANDS

ROOT = Path(__file__).parents[1]


def loaded(code: str) -> set[str]:
    """Which of the packages that take long a fresh process imports for `code`."""
    tell = "; import sys; print(*({'torch', 'ray', 'deepspeed', 'transformers'} & sys.modules.keys()))"
    command = [sys.executable, "-c", code + tell]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_importing_zsr_imports_nothing_heavy() -> None:
    assert loaded("import zsr; zsr.Searcher; zsr.open_artifact; zsr.ZsrError") == set()


@pytest.mark.parametrize("command", [*COMMANDS, "index build"])
def test_help_imports_nothing_heavy(command: str) -> None:
    words = [*command.split(), "--help"]
    code = f"import contextlib\nfrom zsr.cli import main\nwith contextlib.suppress(SystemExit): main({words})\npass"
    assert loaded(code) == set()


def test_the_public_names_are_those_that_are_listed() -> None:
    assert set(dir(zsr)) == set(zsr.__all__)
    for name in zsr.__all__:
        assert getattr(zsr, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Seacher'"):
        zsr.Seacher  # noqa: B018
