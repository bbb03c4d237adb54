"""Node types that an autoscaler can start, read from its configuration.

Ray's API only lists nodes that are up. Node types are only in the autoscaler's configuration: Ray 2.60 has a key for
them in its key-value store, which the open-source autoscaler never writes. So the configuration is read from the same
place as by the autoscaler: from the file given to the head's monitor process, or on Kubernetes from the RayCluster
resource.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import yaml

from zsr.errors import ConfigError

ANSWER: Final = 60.0  # timeout in seconds for the head to read it


@dataclass(frozen=True)
class NodeType:
    """A node type that the autoscaler can start.

    Attributes:
        resources: resources of one node, by Ray's names.
        most: max nodes of this type.
    """

    name: str
    resources: Mapping[str, float]
    most: int


def startable(config: Mapping[str, Any]) -> tuple[tuple[NodeType, ...], int]:
    """The node types of an autoscaler's configuration except the head's, and the max nodes of all types together."""
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
    # a resource that only the head has
    task = ray.remote(num_cpus=0, resources={"node:__internal_head__": 0.001})(monitor_config)
    try:
        found: Mapping[str, Any] = ray.get(task.remote(gcs_address), timeout=ANSWER)
    except ray.exceptions.RayError as error:
        raise ConfigError(f"the head could not read it: {str(error).strip().splitlines()[-1]}") from error
    return found


def autoscaler_config() -> Mapping[str, Any]:
    """The configuration of this cluster's autoscaler; empty if it has none.

    Raises:
        ConfigError: there is one, but it cannot be read.
    """
    import ray

    return _read(ray.get_runtime_context().gcs_address)


def monitor_config(gcs_address: str, processes: Path = Path("/proc")) -> Mapping[str, Any]:
    """The configuration file of this cluster's monitor process, on the head; empty without an autoscaler."""
    for process in processes.glob("[0-9]*/cmdline"):
        try:
            words = process.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # the process has ended, or is another user's
            continue
        given = dict(word.partition("=")[::2] for word in words if word.startswith("--"))
        # compare only ports: the host of the same address may be a name or loopback
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
    """The configuration of the autoscaler of RayCluster `name`; empty if the cluster has none.

    The pods' service account may read it, since the operator binds the autoscaler's role to that account.

    Raises:
        ConfigError: it cannot be read.
    """
    from ray.autoscaler._private.kuberay import autoscaling_config, node_provider  # only needed in a pod

    try:
        namespace = (account / "namespace").read_text().strip()
        found = node_provider.KubernetesHttpApiClient(namespace).get(f"rayclusters/{name}")
    except OSError as error:  # includes the errors of requests
        raise ConfigError(f"RayCluster {name}: {error}") from error
    if not found["spec"].get("enableInTreeAutoscaling"):
        return {}
    derived: Mapping[str, Any] = autoscaling_config._derive_autoscaling_config_from_ray_cr(found)
    return derived
