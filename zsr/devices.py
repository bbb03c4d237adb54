"""Choose the device of a stage's workers, by flags and by what the cluster has or its autoscaler can start.

Nodes that can be started count like nodes that are up, see `zsr.autoscaler`: a cluster whose GPU nodes are all down has
GPUs, since only work that requests a GPU starts one of them.
"""

import logging
import math
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict

from zsr import executor
from zsr.autoscaler import NodeType, autoscaler_config, startable
from zsr.errors import ConfigError, Infeasible
from zsr.process import local_cpus

logger = logging.getLogger("zsr")

FAKE: Final = "ZSR_FAKE_GPU"  # set in simulations of an autoscaler: Ray's GPUs do not exist


def gpu_count(count: float) -> float:
    """`count` if Ray can give that many GPUs to a worker; otherwise raises ValueError."""
    if count <= 0 or (count > 1 and count != int(count)):
        raise ValueError(f"{count:g} GPUs per worker; it must be a whole number, or a fraction of 1 such as 0.5")
    return count


class DeviceSettings(BaseModel):
    """Flags of every command that runs a model on workers.

    Attributes:
        device: cuda requests GPUs, which the autoscaler starts if none is up; cpu requests none; auto is cuda if the
            cluster has GPUs or its autoscaler can start some, otherwise cpu.
        gpus_per_worker: GPUs per worker; with a fraction, such as 0.5, workers share a GPU.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: Literal["auto", "cpu", "cuda"] = "auto"
    gpus_per_worker: Annotated[float, AfterValidator(gpu_count)] = 1.0

    @property
    def devices(self) -> "DeviceSettings":
        """The device flags only, of a configuration that inherits them."""
        return DeviceSettings(device=self.device, gpus_per_worker=self.gpus_per_worker)


AUTO: Final = DeviceSettings()


@dataclass(frozen=True)
class Capacity:
    """Resources of a cluster, including nodes that its autoscaler can start.

    Attributes:
        nodes: resources of each live node.
        types: the node types that the autoscaler can start; empty without an autoscaler.
        most_nodes: max nodes of all types together.
        unknown: why the autoscaler's configuration could not be read; empty if it could.
        cores: CPUs of this machine if it is the whole cluster; Ray may count more than there are.
    """

    nodes: tuple[Mapping[str, float], ...]
    types: tuple[NodeType, ...] = ()
    most_nodes: int = 0
    unknown: str = ""
    cores: int | None = None

    def up(self, name: str) -> float:
        """Total of a resource over the live nodes."""
        return sum(node.get(name, 0) for node in self.nodes)

    def fit(self, workers: Callable[[Mapping[str, float]], int]) -> int:
        """Max concurrent workers on the nodes that are up or can be started.

        Args:
            workers: function from a node's resources to the number of workers that fit there.
        """
        left, startable = self.most_nodes, 0
        for kind in sorted(self.types, key=lambda kind: -workers(kind.resources)):
            count = min(kind.most, left) if workers(kind.resources) else 0
            startable, left = startable + count * workers(kind.resources), left - count
        # max, not sum: live nodes are of these types, or there are no types
        return max(startable, sum(map(workers, self.nodes)))

    def cpus(self) -> int:
        """Number of CPUs of the nodes that are up or can be started."""
        return self.fit(lambda node: int(node.get("CPU", 0)))

    def cpu_workers(self) -> int:
        """Max workers with one CPU each, on nodes without GPUs if there are any."""
        plain = self.fit(lambda node: 0 if node.get("GPU") else int(node.get("CPU", 0)))
        # one CPU is reserved for the driver and for data loading
        return max(1, (plain or self.cpus()) - 1)

    def gpus(self) -> str:
        """The GPUs that are up and that can be started, in words."""
        up = f"{self.up('GPU'):g} GPU{'s are' if self.up('GPU') != 1 else ' is'} up"
        kinds = [kind.name for kind in self.types if kind.resources.get("GPU") and kind.most]
        if kinds:
            most = self.fit(lambda node: int(node.get("GPU", 0)))
            return f"{up}, node type{'s' if len(kinds) > 1 else ''} {' and '.join(kinds)} can start {most}"
        if self.unknown:
            return f"{up}, and what the autoscaler can start is unknown: {self.unknown}"
        if self.types:
            return f"{up}, and no node type has GPUs"
        return up if self.up("GPU") else "the cluster has no GPU"


def gpu_workers(node: Mapping[str, float], gpus: float, cpus: float) -> int:
    """Number of workers that fit on a node, each with `gpus` GPUs (a whole number, or a fraction of 1) and `cpus`."""
    there = int(node.get("GPU", 0))
    count = there * math.floor(1 / gpus + 1e-6) if gpus < 1 else there // int(gpus)
    return min(count, int(node.get("CPU", 0) / cpus)) if cpus else count


@dataclass(frozen=True)
class Devices:
    """Device of the workers of a stage.

    Attributes:
        gpus: GPUs that each worker requests; 0 on CPUs.
        most: max concurrent workers on the nodes that are up or can be started, at least 1.
        why: reason of the choice, for messages.
        cores: CPUs of this machine if it is the whole cluster and workers run on CPUs.
    """

    gpus: float
    most: int
    why: str
    cores: int | None = None

    @property
    def name(self) -> Literal["cpu", "cuda"]:
        """The device in torch's terms."""
        return "cuda" if self.gpus else "cpu"

    def say(self, workers: int) -> None:
        """Log the chosen device for `workers` workers."""
        each = f", {self.gpus:g} GPU{'s' if self.gpus > 1 else ''} per worker" if self.gpus else ""
        count = f"{workers} worker{'s' if workers != 1 else ''}"
        limit = f" (up to {self.most} fit)" if workers != self.most and self.cores is None else ""
        logger.warning("device: %s%s, %s%s: %s", self.name, each, count, limit, self.why)


def choose(settings: DeviceSettings = AUTO, cpus: float = 1) -> Devices:
    """Choose the device of workers in this cluster. Connects to it if necessary.

    Args:
        cpus: CPUs that a worker with a GPU requests too.

    Raises:
        Infeasible: GPUs are requested, but neither a node nor a node type has enough of them for a worker.
    """
    return chosen(settings, capacity(), cpus)


def chosen(settings: DeviceSettings, have: Capacity, cpus: float = 1) -> Devices:
    """`choose` for a cluster with the capacity `have`."""
    each = settings.gpus_per_worker
    most = have.fit(lambda node: gpu_workers(node, each, cpus))
    # more than one GPU per worker is not the default, so GPUs were requested
    if not most and not have.unknown and (settings.device == "cuda" or (settings.device == "auto" and each > 1)):
        flag = "--device cuda" if settings.device == "cuda" else f"--gpus-per-worker {each:g}"
        raise Infeasible(
            f"{flag} requires {each:g} GPU{'s' if each > 1 else ''} per worker on one node, but {have.gpus()}; "
            "add nodes or a node type with GPUs, or use --device cpu"
        )
    if settings.device == "cuda" or (settings.device == "auto" and most):
        return Devices(each, max(1, most), have.gpus())
    return Devices(
        0, have.cpu_workers(), "--device cpu is given" if settings.device == "cpu" else have.gpus(), have.cores
    )


def own_device() -> Literal["cpu", "cuda"]:
    """The device that Ray assigned to the calling task or actor.

    Raises:
        ConfigError: a GPU was assigned, but torch cannot use it.
    """
    if executor.in_this_process() or FAKE in os.environ:
        return "cpu"
    import ray
    import torch

    if not ray.get_runtime_context().get_accelerator_ids().get("GPU"):
        return "cpu"
    if not torch.cuda.is_available():
        raise ConfigError(
            f"node {socket.gethostname()} offers a GPU, but torch {torch.__version__} finds no CUDA device there; "
            "install a driver and the CUDA build of torch on it (see zsr doctor), or use --device cpu"
        )
    return "cuda"


def here(settings: DeviceSettings) -> Devices:
    """The device of this process: assigned by Ray to a task or actor, otherwise that of this machine.

    Raises:
        Infeasible: a GPU is requested, but torch cannot use any.
        ConfigError: see `own_device`.
    """
    import ray
    import torch

    if ray.is_initialized() and ray.get_runtime_context().get_task_id() is not None:
        return Devices(1.0 if own_device() == "cuda" else 0.0, 1, "as Ray gave it to this process")
    if settings.device == "cpu" or not torch.cuda.is_available():
        if settings.device == "cuda":
            raise Infeasible("--device cuda: torch finds no CUDA device on this machine; use --device cpu")
        return Devices(0.0, 1, "in this process")
    return Devices(1.0, 1, "in this process")


# ---- capacity --------------------------------------------------------------------------------------------------------


def capacity() -> Capacity:
    """The capacity of this cluster. Connects to it, unless it would be this machine only, without a GPU."""
    if executor.is_this_machine() and not _has_gpu():
        cores = os.cpu_count() or 1
        return Capacity(({"CPU": float(local_cpus())},), cores=cores)
    import ray

    from zsr import cluster

    cluster.connect()
    live = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    nodes = tuple(dict(node["Resources"]) for node in live)
    try:
        types, most = startable({} if cluster.started_here() else autoscaler_config())
    except ConfigError as error:
        return Capacity(nodes, unknown=str(error))
    if len(nodes) > 1 or types:
        return Capacity(nodes, types, most)
    return Capacity(nodes, cores=max(1, min(os.cpu_count() or 1, int(sum(node.get("CPU", 0) for node in nodes)))))


def _has_gpu() -> bool:
    """Whether this machine seems to have a GPU; after its start, Ray has the exact number."""
    import torch

    return FAKE in os.environ or Path("/dev/nvidia0").exists() or torch.cuda.is_available()
