"""How a job finds its Ray: an address that is dead is told in seconds, and a local cluster starts wherever it can."""

import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from zsr import cluster
from zsr.errors import ConfigError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a server that accepts and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.fixture
def web() -> Iterator[int]:
    """The port of a server of another kind."""
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def refusal(address: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What `connect` says to RAY_ADDRESS, within seconds."""
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr(cluster, "ANSWER", 1.0)
    began = time.monotonic()
    with pytest.raises(ConfigError) as refused:
        cluster.connect()
    assert time.monotonic() - began < 10
    message = str(refused.value)
    assert f"RAY_ADDRESS is {address!r}" in message
    assert "unset RAY_ADDRESS" in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("127.0.0.1:9", "nothing answers at 127.0.0.1:9"),
        ("localhost:9", "nothing answers at localhost:9"),
        ("no-such-host.invalid:6379", "nothing answers at no-such-host.invalid:6379"),
        ("ray://127.0.0.1:9", "nothing answers at 127.0.0.1:9"),
        ("http://127.0.0.1:8265", "http:// is not an address of a Ray head"),
        ("somewhere", "Invalid address format"),
        ("127.0.0.1:99999", "nothing answers"),
    ],
)
def test_an_address_where_no_ray_is_is_told(address: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert why in refusal(address, monkeypatch)


def test_a_server_that_is_no_ray_is_told(silent: int, web: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for port in (silent, web):
        assert "is not a Ray head" in refusal(f"127.0.0.1:{port}", monkeypatch)


def test_a_local_cluster_needs_no_token_no_short_folder_and_leaves_nothing(tmp_path: Path) -> None:
    home, folder = tmp_path / "home", tmp_path / ("a-long-name-as-slurm-makes-them-" * 3)
    home.mkdir()
    folder.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"HOME": str(home), "TMPDIR": str(folder), "RAY_AUTH_MODE": "token", "PYTHONPATH": str(ROOT)}
    code = (
        "import ray\nfrom zsr import cluster, executor\n"
        "print(executor.map_pieces('work', lambda piece: piece, [{'a': 1}]))\n"
        "print(ray._private.worker._global_node.get_session_dir_path())\n"
        "cluster.disconnect()\n"
    )
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if not line.startswith("work: 1 shards in ")] == []
    result, session = done.stdout.splitlines()
    assert result == "[{'a': 1}]"
    assert not Path(session).exists()
    assert not list(folder.glob("zsr-*"))
    assert not (home / ".ray").exists()
