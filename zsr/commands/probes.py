"""Probes of `zsr doctor`: small measurements, each a Ray task or actor on its node.

A probe returns plain values; `zsr.commands.checks` compares them with the limits.
"""

import os
import platform
import shutil
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from importlib import metadata
from typing import Any, Final

import numpy as np
import ray
import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

Facts = dict[str, Any]
PACKAGES: Final = (
    "zsr",
    "ray",
    "torch",
    "deepspeed",
    "pyarrow",
    "numpy",
    "faiss-cpu",
    "faiss-gpu",
    "pydantic",
    "safetensors",
    "transformers",
    "pillow",
    "simplejpeg",
)
# extras that stages use on every node; `nvjpeg` is for GPU nodes only
EXTRAS: Final = ("demo", "heif", "mlflow", "optuna", "report", "s3", "text", "towers", "wandb")
WAIT: Final = 120.0  # seconds until a node that does not answer counts as unreachable


def on(node: str) -> dict[str, Any]:
    """Options of a task that runs on that node only, and reserves no resources there."""
    return {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


def versions() -> dict[str, str]:
    """Versions of the packages installed in this process's environment; "" for those that are not installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = ""
    return found


def extras() -> list[str]:
    """The extras of zsr whose packages are all installed in this process's environment."""
    missing = set()
    for requirement in map(Requirement, metadata.requires("zsr") or ()):
        try:
            metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            missing |= {
                extra for extra in EXTRAS if requirement.marker and requirement.marker.evaluate({"extra": extra})
            }
    known = metadata.metadata("zsr").get_all("Provides-Extra") or []
    return sorted(set(EXTRAS) & set(known) - missing)


@ray.remote
def describe(folder: str) -> Facts:
    """Versions, extras, GPUs and free disk of this node; `folder` is on the disk of Ray's spilled objects and logs."""
    return {
        "host": socket.gethostname(),
        "versions": versions(),
        "extras": extras(),
        "gpus_torch": torch.cuda.device_count(),
        "free_bytes": shutil.disk_usage(folder).free,
    }


@ray.remote
def wall_clock() -> float:
    """This node's clock, in seconds since the epoch."""
    return time.time()


@ray.remote
def make_object(size: int) -> np.ndarray:
    """`size` random bytes in this node's object store."""
    return np.frombuffer(os.urandom(size), np.uint8)


@ray.remote
def receive(data: np.ndarray) -> int:
    """Size in bytes of an object, which Ray has transferred to this node before the call."""
    return data.nbytes


def clock_skew(node: str, tries: int = 5) -> float:
    """Seconds that a node's clock is ahead of this one's, from the fastest of some round trips (Cristian, 1989)."""
    best = (float("inf"), 0.0)
    for _ in range(tries):
        before = time.time()
        there: float = ray.get(wall_clock.options(**on(node)).remote(), timeout=WAIT)
        after = time.time()
        best = min(best, (after - before, there - (before + after) / 2))
    return best[1]


def object_store_speed(source: str, target: str, size: int) -> float:
    """Bytes per second of the transfer of a `size` byte object from one node's object store to another's."""
    reference = make_object.options(**on(source)).remote(size)
    ray.wait([reference], timeout=WAIT, fetch_local=False)
    empty = make_object.options(**on(source)).remote(1)
    ray.get(receive.options(**on(target)).remote(empty), timeout=WAIT)  # warm-up: starts workers and connection
    began = time.monotonic()
    moved = ray.get(receive.options(**on(target)).remote(reference), timeout=WAIT)
    return float(moved / (time.monotonic() - began))


class Ring:
    """One rank of an all-reduce."""

    def address(self) -> str:
        """A tcp:// address on this node, on which rank 0 listens for the other ranks."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        return f"tcp://{ray.util.get_node_ip_address()}:{port}"  # type: ignore[no-untyped-call]

    def join(self, address: str, rank: int, ranks: int, backend: str) -> None:
        """Initialize the process group. Raises RuntimeError if the ranks do not find each other."""
        dist.init_process_group(
            backend, init_method=address, rank=rank, world_size=ranks, timeout=timedelta(seconds=WAIT)
        )

    def all_reduce(self, size: int, repeats: int) -> float:
        """Bus bandwidth of an all-reduce of `size` bytes in bytes per second: 2 (N - 1) / N times size over seconds."""
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        values = torch.ones(size // 4, device=device)
        dist.all_reduce(values)  # warm-up: link set-up is not measured
        began = time.monotonic()
        for _ in range(repeats):
            dist.all_reduce(values)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = (time.monotonic() - began) / repeats
        ranks = dist.get_world_size()
        return float(2 * (ranks - 1) / ranks * size / seconds)

    def leave(self) -> None:
        """Destroy the process group."""
        dist.destroy_process_group()


def all_reduce_speed(nodes: Sequence[str], gpus: bool, size: int, repeats: int = 3) -> float:
    """Bus bandwidth of the slowest rank, with one rank per node: NCCL with one GPU per rank, gloo without."""
    actor = ray.remote(num_cpus=0, num_gpus=1 if gpus else 0)(Ring)
    ranks: list[Any] = [
        actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n, soft=False)).remote() for n in nodes
    ]
    try:
        address = ray.get(ranks[0].address.remote(), timeout=WAIT)
        backend = "nccl" if gpus else "gloo"
        ray.get([r.join.remote(address, i, len(ranks), backend) for i, r in enumerate(ranks)], timeout=WAIT)
        speeds = ray.get([rank.all_reduce.remote(size, repeats) for rank in ranks], timeout=WAIT)
        ray.get([rank.leave.remote() for rank in ranks], timeout=WAIT)
        return float(min(speeds))
    finally:
        for rank in ranks:
            ray.kill(rank)
