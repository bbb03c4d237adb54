"""What an actor frees it gets back without asking the system for pages; what its making raises reaches the driver."""

import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from zsr.artifact import Plan, Store
from zsr.embedding.shards import compute
from zsr.errors import ConfigError
from zsr.process import keep_freed_memory

MEGABYTES = (51, 25, 154, 38, 10, 58, 58, 10, 58, 14, 5)  # activations of a batch of pictures, layer after layer
TIMES = 10


class Allocator:
    """An actor that fills and frees large blocks, two at a time, as the layers of a network do."""

    def __init__(self, **shared: Any) -> None:
        keep_freed_memory()

    def __call__(self, piece: dict[str, Any]) -> dict[str, Any]:
        self.fill(TIMES)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        self.fill(TIMES)
        return {"rows": 0, "faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before}

    @staticmethod
    def fill(times: int) -> None:
        last = torch.ones(1)
        for size in times * MEGABYTES:
            last = torch.ones(size << 18)
        del last


@pytest.mark.usefixtures("ray_cluster")
def test_an_actor_keeps_what_it_freed(tmp_path: Path) -> None:
    store = Store.at(tmp_path)
    staging = store.staging(Plan("features", {}, {}))
    tally = compute("allocate", Allocator, {"shard": "fingerprint"}, store, staging, {}, 1)
    assert tally.results[0]["faults"] < TIMES * (sum(MEGABYTES) << 20) / resource.getpagesize() / 10


class Refusing:
    """An actor that cannot be made."""

    def __init__(self, **shared: Any) -> None:
        raise ConfigError("install the extra")

    def __call__(self, piece: dict[str, Any]) -> dict[str, Any]:
        return {"rows": 0}


@pytest.mark.usefixtures("ray_cluster")
def test_an_error_of_ours_in_making_an_actor_keeps_its_kind(tmp_path: Path) -> None:
    store = Store.at(tmp_path)
    staging = store.staging(Plan("features", {}, {}))
    with pytest.raises(ConfigError, match="install the extra"):
        compute("refuse", Refusing, {"shard": "fingerprint"}, store, staging, {}, 1)
