"""No node starts without a token that is secret."""

import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.local import serve
from cluster.start import command, require_token
from zsr.errors import ConfigError

ROOT = Path(__file__).parents[2]


def written(path: Path, text: str, mode: int) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_token_file_of_mode_0600_is_taken(tmp_path: Path) -> None:
    path = written(tmp_path / "token", secrets.token_hex(32), 0o600)
    assert require_token({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}) == path


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o666])
def test_a_token_file_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    path = written(tmp_path / "token", secrets.token_hex(32), mode)
    with pytest.raises(ConfigError, match=r"chmod 600"):
        require_token({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)})


def test_a_missing_short_or_linked_token_file_is_refused(tmp_path: Path) -> None:
    good = written(tmp_path / "token", secrets.token_hex(32), 0o600)
    short = written(tmp_path / "short", "secret", 0o600)
    link = tmp_path / "link"
    link.symlink_to(good)
    for path, why in ((tmp_path / "none", "No such file"), (short, "shorter than 32"), (link, "plain file")):
        with pytest.raises(ConfigError, match=why):
            require_token({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)})


@pytest.mark.parametrize("more", [{}, {"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x"}])
def test_authentication_must_be_on_and_the_token_not_inherited(tmp_path: Path, more: dict[str, str]) -> None:
    path = written(tmp_path / "token", secrets.token_hex(32), 0o600)
    with pytest.raises(ConfigError, match="RAY_AUTH_"):
        require_token({"RAY_AUTH_TOKEN_PATH": str(path), **more})


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_the_head_command_refuses_with_exit_2(tmp_path: Path, mode: int) -> None:
    path = written(tmp_path / "token", secrets.token_hex(32 if mode != 0o600 else 4), mode)
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
    start = [sys.executable, "-m", "cluster.start", "head"]
    done = subprocess.run(start, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert str(path) in done.stderr


def test_the_local_cluster_refuses_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(written(tmp_path / "token", secrets.token_hex(32), 0o644)))
    assert serve(["--nodes", "1"]) == 2
    assert "chmod 600" in capsys.readouterr().out


def test_the_head_keeps_its_dashboard_on_loopback() -> None:
    words = command(["head", "--num-cpus", "0"])
    assert "--dashboard-host=127.0.0.1" in words
    assert words[-2:] == ["--num-cpus", "0"]
    with pytest.raises(ConfigError, match="worker HEAD:PORT"):
        command(["worker", "--num-cpus"])
