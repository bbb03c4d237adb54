"""What an actor frees it gets back without asking the system for pages."""

import resource
from typing import Any

import pytest
import torch
from ray.data import ActorPoolStrategy

from zsr.cluster import map_pieces
from zsr.worker import ONE_ARENA, keep_freed_memory

MEGABYTES = (51, 25, 154, 38, 10, 58, 58, 10, 58, 14, 5)  # activations of a batch of pictures, layer after layer
TIMES = 10


class Allocator:
    """An actor that fills and frees large blocks, two at a time, as the layers of a network do."""

    def __init__(self) -> None:
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
def test_an_actor_keeps_what_it_freed() -> None:
    options = {"compute": ActorPoolStrategy(size=1), "num_cpus": 1, "runtime_env": ONE_ARENA}
    (found,) = map_pieces("allocate", Allocator, [{"number": 0}], **options)
    assert found["faults"] < TIMES * (sum(MEGABYTES) << 20) / resource.getpagesize() / 10
