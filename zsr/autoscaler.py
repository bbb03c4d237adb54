"""What an autoscaler can start, read from its configuration.

Ray tells what is up. What may be started stands in the autoscaler's configuration alone: Ray 2.60 has a key for it in
its key-value store, which the open-source autoscaler never writes. So it is read where the autoscaler reads it: from
the file that the head's monitor process was started with, or on Kubernetes from the RayCluster resource.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import yaml

from zsr.errors import ConfigError

ANSWER: Final = 60.0  # seconds that the head may take to read it


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


def startable(config: Mapping[str, Any]) -> tuple[tuple[NodeType, ...], int]:
    """The node types of an autoscaler's configuration but the head's, and the most nodes of all types together."""
    kinds = dict(config.get("available_node_types", {}))
    kinds.pop(config.get("head_node_type"), None)
    most = int(config.get("max_workers", sum(kind.get("max_workers", 0) for kind in kinds.values())))
    types = (NodeType(name, dict(k.get("resources", {})), int(k.get("max_workers", most))) for name, k in kinds.items())
    return tuple(kind for kind in types if kind.most), most


@lru_cache(maxsize=1)
def _read(gcs_address: str) -> Mapping[str, Any]:
    import ray

    if "KUBERNETES_SERVICE_HOST" in os.environ and "RAY_CLUSTER_NAME" in os.environ:
        return kubernetes_config(os.environ["RAY_CLUSTER_NAME"])
    if gcs_address.rpartition(":")[0] == ray.util.get_node_ip_address():  # type: ignore[no-untyped-call]
        return monitor_config(gcs_address)  # this machine is the head
    # a resource of the head alone
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
    import ray

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
