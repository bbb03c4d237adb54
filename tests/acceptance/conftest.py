"""One connection to the shared cluster for the commands of a module: with one each, Ray starts new workers for each."""

from collections.abc import Iterator

import pytest

from zsr import cluster


@pytest.fixture(scope="module", autouse=True)
def one_connection(ray_cluster: None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zsr.cluster.disconnect", lambda: None)
        cluster.connect()
        yield
    cluster.disconnect()
