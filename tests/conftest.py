"""One Ray cluster for the whole run: starting one takes seconds, and jobs attach to it as they do to a real one."""

import os
from collections.abc import Iterator

import pytest


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
