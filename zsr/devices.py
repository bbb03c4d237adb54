"""What the workers of a stage run on, by flags and by what the cluster has or its autoscaler can start.

A cluster whose GPU nodes are all down is a cluster with GPUs: nothing starts one of its nodes but work that requests a
GPU. Ray tells what is up. What may be started stands in the autoscaler's configuration alone: Ray 2.60 has an address
for it in its key-value store, which the open-source autoscaler never writes. So it is read where the autoscaler reads
it: the file that the head's monitor process was started with, or on Kubernetes the RayCluster resource.
"""

import logging
import math
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import ray
import torch
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict

from zsr import cluster
from zsr.errors import ConfigError, Infeasible

logger = logging.getLogger("zsr")

ANSWER: Final = 60.0  # seconds that the head may take to read its autoscaler's configuration
FAKE: Final = "ZSR_FAKE_GPU"  # set by simulations of an autoscaler: GPUs that Ray counts and that do not exist


def gpu_count(count: float) -> float:
    """`count` if Ray can give so many GPUs to each worker: a whole number, or a fraction of one."""
    if count <= 0 or (count > 1 and count != int(count)):
        raise ValueError(f"{count:g} GPUs per worker; it must be a whole number, or a fraction of 1 such as 0.5")
    return count


class DeviceSettings(BaseModel):
    """Flags of every job that runs a model on workers.

    Attributes:
        device: cuda requests GPUs, which the autoscaler starts if none is up; cpu requests none; auto is cuda where the
            cluster has GPUs or its autoscaler can start some, and else cpu.
        gpus_per_worker: GPUs that each worker holds; with a fraction, such as 0.5, workers share one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: Literal["auto", "cpu", "cuda"] = "auto"
    gpus_per_worker: Annotated[float, AfterValidator(gpu_count)] = 1.0

    @property
    def devices(self) -> "DeviceSettings":
        """These of a job's flags alone."""
        return DeviceSettings(device=self.device, gpus_per_worker=self.gpus_per_worker)


AUTO: Final = DeviceSettings()


@dataclass(frozen=True)
class NodeType:
    """A kind of node that the autoscaler can start.

    Attributes:
        resources: what one node offers, by Ray's names.
        most: nodes of this kind at once.
    """

    name: str
    resources: Mapping[str, float]
    most: int


@dataclass(frozen=True)
class Capacity:
    """What a cluster has and what it can have.

    Attributes:
        nodes: what each live node offers.
        types: the node types that the autoscaler can start; none without an autoscaler.
        most_nodes: of all types together.
        unknown: why the autoscaler's configuration could not be read, if it could not.
        cores: CPUs of this machine, where it is the whole cluster. Ray may count more of them than there are.
    """

    nodes: tuple[Mapping[str, float], ...]
    types: tuple[NodeType, ...] = ()
    most_nodes: int = 0
    unknown: str = ""
    cores: int | None = None

    def up(self, name: str) -> float:
        """How much of a resource the live nodes offer together."""
        return sum(node.get(name, 0) for node in self.nodes)

    def fit(self, workers: Callable[[Mapping[str, float]], int]) -> int:
        """Workers at once on the nodes that are up or can start.

        Args:
            workers: what a node offers -> workers that fit there.
        """
        left, startable = self.most_nodes, 0
        for kind in sorted(self.types, key=lambda kind: -workers(kind.resources)):
            count = min(kind.most, left) if workers(kind.resources) else 0
            startable, left = startable + count * workers(kind.resources), left - count
        # nodes that are up are of these types, or there are no types
        return max(startable, sum(map(workers, self.nodes)))

    def cpu_workers(self) -> int:
        """Workers of a CPU each, on nodes without GPUs where there are any."""
        plain = self.fit(lambda node: 0 if node.get("GPU") else int(node.get("CPU", 0)))
        # one is left for the driver, and for tasks that read
        return max(1, (plain or self.fit(lambda node: int(node.get("CPU", 0)))) - 1)

    def gpus(self) -> str:
        """The GPUs that are up and that can start, in words."""
        up = f"{self.up('GPU'):g} GPU{'s are' if self.up('GPU') != 1 else ' is'} up"
        kinds = [kind.name for kind in self.types if kind.resources.get("GPU") and kind.most]
        if kinds:
            most = self.fit(lambda node: int(node.get("GPU", 0)))
            return f"{up}, node type{'s' if len(kinds) > 1 else ''} {' and '.join(kinds)} can start {most}"
        if self.unknown:
            return f"{up}, and what the autoscaler can start is not known: {self.unknown}"
        if self.types:
            return f"{up}, and no node type has any"
        return up if self.up("GPU") else "the cluster has no GPU"


def gpu_workers(node: Mapping[str, float], gpus: float, cpus: float) -> int:
    """Workers that fit on a node, each with `gpus` GPUs (a fraction of one GPU, or whole ones) and `cpus` CPUs."""
    there = int(node.get("GPU", 0))
    count = there * math.floor(1 / gpus + 1e-6) if gpus < 1 else there // int(gpus)
    return min(count, int(node.get("CPU", 0) / cpus)) if cpus else count


@dataclass(frozen=True)
class Devices:
    """What the workers of a stage run on.

    Attributes:
        gpus: that each worker requests; 0 on CPUs.
        most: workers at once, on the nodes that are up or can start. At least 1.
        why: in words.
        cores: CPUs of this machine, where it is the whole cluster and workers run on CPUs.
    """

    gpus: float
    most: int
    why: str
    cores: int | None = None

    @property
    def name(self) -> Literal["cpu", "cuda"]:
        """As torch calls it."""
        return "cuda" if self.gpus else "cpu"

    def say(self, workers: int) -> None:
        """One line on what was chosen, for `workers` workers."""
        each = f", {self.gpus:g} GPU{'s' if self.gpus > 1 else ''} per worker" if self.gpus else ""
        count = f"{workers} worker{'s' if workers != 1 else ''}"
        limit = f" (up to {self.most} fit)" if workers != self.most and self.cores is None else ""
        logger.warning("device: %s%s, %s%s: %s", self.name, each, count, limit, self.why)


def choose(settings: DeviceSettings = AUTO, cpus: float = 1) -> Devices:
    """What workers run on in this cluster. Connects if need be.

    Args:
        cpus: that a worker with a GPU requests beside it.

    Raises:
        Infeasible: --device cuda, and neither a node nor a node type has enough GPUs for a worker.
    """
    return chosen(settings, capacity(), cpus)


def chosen(settings: DeviceSettings, have: Capacity, cpus: float = 1) -> Devices:
    """`choose` for a cluster that is described."""
    each = settings.gpus_per_worker
    most = have.fit(lambda node: gpu_workers(node, each, cpus))
    if settings.device == "cuda" and not most and not have.unknown:
        raise Infeasible(
            f"--device cuda requires {each:g} GPU{'s' if each > 1 else ''} per worker on one node, and {have.gpus()}; "
            "add nodes or a node type with GPUs, or use --device cpu"
        )
    if settings.device == "cuda" or (settings.device == "auto" and most):
        return Devices(each, max(1, most), have.gpus())
    return Devices(
        0, have.cpu_workers(), "--device cpu is given" if settings.device == "cpu" else have.gpus(), have.cores
    )


def own_device() -> Literal["cpu", "cuda"]:
    """The device that Ray gave to the task or actor which calls this.

    Raises:
        ConfigError: a GPU that torch cannot use.
    """
    if not ray.get_runtime_context().get_accelerator_ids().get("GPU") or FAKE in os.environ:
        return "cpu"
    if not torch.cuda.is_available():
        raise ConfigError(
            f"node {socket.gethostname()} offers a GPU, and torch {torch.__version__} finds no CUDA device there; "
            "install a driver and the CUDA build of torch on it, see jobs.doctor, or use --device cpu"
        )
    return "cuda"


# ---- what there is ---------------------------------------------------------------------------------------------------


def capacity() -> Capacity:
    """What this cluster has and can have. Connects if need be."""
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


def startable(config: Mapping[str, Any]) -> tuple[tuple[NodeType, ...], int]:
    """The node types of an autoscaler's configuration but the head's, and the most nodes of all types together."""
    kinds = dict(config.get("available_node_types", {}))
    kinds.pop(config.get("head_node_type"), None)
    most = int(config.get("max_workers", 0))
    types = (NodeType(name, dict(k.get("resources", {})), int(k.get("max_workers", most))) for name, k in kinds.items())
    return tuple(kind for kind in types if kind.most), most


@lru_cache(maxsize=1)
def _read(gcs_address: str) -> Mapping[str, Any]:
    if "KUBERNETES_SERVICE_HOST" in os.environ and "RAY_CLUSTER_NAME" in os.environ:
        return kubernetes_config(os.environ["RAY_CLUSTER_NAME"])
    # a resource of the head alone: no other task takes it
    task = ray.remote(num_cpus=0, resources={"node:__internal_head__": 0.001})(monitor_config)
    try:
        found: Mapping[str, Any] = ray.get(task.remote(gcs_address), timeout=ANSWER)
    except ray.exceptions.RayError as error:
        raise ConfigError(f"the head did not read it: {str(error).strip().splitlines()[-1]}") from error
    return found


def autoscaler_config() -> Mapping[str, Any]:
    """The configuration of this cluster's autoscaler; empty if it has none.

    Raises:
        ConfigError: there is one, and it cannot be read.
    """
    return _read(ray.get_runtime_context().gcs_address)


def monitor_config(gcs_address: str, processes: Path = Path("/proc")) -> Mapping[str, Any]:
    """The file that the monitor process of this cluster was started with, on the head; empty without an autoscaler."""
    for process in processes.glob("[0-9]*/cmdline"):
        try:
            words = process.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has ended, or is another user's
            continue
        given = dict(word.partition("=")[::2] for word in words if word.startswith("--"))
        # by its port: the same address may be written as a name, or as loopback
        same = given.get("--gcs-address", "").rpartition(":")[2] == gcs_address.rpartition(":")[2]
        if same and "--autoscaling-config" in given:
            path = Path(given["--autoscaling-config"]).expanduser()
            try:
                return dict(yaml.safe_load(path.read_text()))
            except (OSError, ValueError, yaml.YAMLError) as error:
                raise ConfigError(f"{path}: {error}") from error
    return {}


SERVICE_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")


def kubernetes_config(name: str, account: Path = SERVICE_ACCOUNT) -> Mapping[str, Any]:
    """What the autoscaler of RayCluster `name` goes by; empty where the cluster has none.

    The pods' service account is allowed to read it, since the operator binds the autoscaler's role to it.

    Raises:
        ConfigError: it cannot be read.
    """
    from ray.autoscaler._private.kuberay import autoscaling_config, node_provider  # in a pod alone

    try:
        namespace = (account / "namespace").read_text().strip()
        found = node_provider.KubernetesHttpApiClient(namespace).get(f"rayclusters/{name}")
    except OSError as error:  # requests' errors are of this kind, too
        raise ConfigError(f"RayCluster {name}: {error}") from error
    if not found["spec"].get("enableInTreeAutoscaling"):
        return {}
    derived: Mapping[str, Any] = autoscaling_config._derive_autoscaling_config_from_ray_cr(found)
    return derived
