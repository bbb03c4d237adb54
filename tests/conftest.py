"""One Ray cluster for the whole run: starting one takes seconds, and jobs attach to it as they do to a real one."""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

# fixtures that start a cluster or a server
RAY = {"ray_cluster", "local", "bucket"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs on a Ray cluster: `make test` runs that in one process, and everything else in another.

    What requires a cluster of several nodes is for `make faults-tests`.
    """
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if "local" in fixtures:
            item.add_marker(pytest.mark.faults)
        if fixtures & RAY:
            item.add_marker(pytest.mark.ray)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A head with four logical CPUs; RAY_ADDRESS makes `cluster.connect` attach to it."""
    from ray.cluster_utils import Cluster

    from zsr import cluster

    head = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "object_store_memory": 400 << 20})
    os.environ["RAY_ADDRESS"] = head.address
    cluster.connect()
    yield
    cluster.disconnect()
    del os.environ["RAY_ADDRESS"]
    head.shutdown()  # type: ignore[no-untyped-call]


@pytest.fixture(scope="session")
def _s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Endpoint of a local S3 server, in a process of its own: its threads would share this one's interpreter lock."""
    script = (
        "import sys, time, logging; logging.getLogger('werkzeug').setLevel(logging.ERROR)\n"
        "from moto.server import ThreadedMotoServer\n"
        "server = ThreadedMotoServer('127.0.0.1', port=0, verbose=False); server.start()\n"
        "print(server.get_host_and_port()[1], flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        server.terminate()


@pytest.fixture
def bucket(_s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket as s3://NAME, with credentials and a cache of its own, in the environment of this test."""
    from zsr.storage import filesystem

    profile = tmp_path / "aws"
    profile.write_text("[default]\naws_access_key_id = test\naws_secret_access_key = test\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profile))
    monkeypatch.setenv("AWS_ENDPOINT_URL", _s3_server)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("ZSR_CACHE", str(tmp_path / "cache"))
    url = f"s3://zsr-{uuid.uuid4().hex}"
    store, path = filesystem(url)
    store.mkdir(path)
    return url
