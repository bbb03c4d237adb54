"""One local cluster of three nodes for these tests: starting one takes long on a busy machine."""

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.local import LocalCluster, local_cluster


@pytest.fixture(scope="session")
def token(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token file as the head wants it."""
    path = tmp_path_factory.mktemp("token") / "token"
    path.write_text(secrets.token_hex(32))
    path.chmod(0o600)
    return path


@pytest.fixture(scope="session")
def local(token: Path) -> Iterator[LocalCluster]:
    """A head without CPUs, a CPU node and a spot node, which tests leave as they find them."""
    with local_cluster(token, nodes=3, cpus=2) as running:
        yield running
