"""A cluster whose nodes an autoscaler starts, on one machine: Ray's own autoscaler over its provider of fake nodes.

`ray.cluster_utils.AutoscalingCluster` is the same, but begins with `ray stop --force`, which ends every Ray of the
machine, and reads an example file that Ray's wheel lacks.
"""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE

from zsr.process import LOOPBACK

OBJECTS: Final = 100 << 20  # bytes of a node's object store


@dataclass(frozen=True)
class Autoscaling:
    """A running cluster.

    Attributes:
        address: of its GCS.
        environment: of clients.
        folder: of its session.
    """

    address: str
    environment: Mapping[str, str]
    folder: Path

    def started(self) -> Counter[str]:
        """Nodes that the autoscaler has started so far, by type, those that have ended included."""
        log = (self.folder / "ray" / "session_latest" / "logs" / "monitor.log").read_text()
        return Counter(re.findall(r"New instance QUEUED \(.*?type=([^,]+),", log))


def configuration(address: str, types: Mapping[str, Any], idle_minutes: float) -> dict[str, Any]:
    """What the autoscaler reads."""
    lists = ("cluster_synced_files", "initialization_commands", "setup_commands", "head_setup_commands")
    commands = ("worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
    return {
        "cluster_name": "fake",
        "max_workers": 8,
        "provider": {
            # the type `fake_multinode` would read that example file
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "gcs_address": address,
            "head_node_id": FAKE_HEAD_NODE_ID,
        },
        "available_node_types": {
            FAKE_HEAD_NODE_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            **{name: {"node_config": {}, "min_workers": 0, **about} for name, about in types.items()},
        },
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": idle_minutes,
        "auth": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in (*lists, *commands)},
    }


@contextmanager
def autoscaling_cluster(
    types: Mapping[str, Mapping[str, Any]], head_cpus: int = 0, idle_minutes: float = 5
) -> Iterator[Autoscaling]:
    """A head without GPUs, and an autoscaler that can start nodes of `types`; all of it ends with the block."""
    with tempfile.TemporaryDirectory(
        prefix="zsr-auto-", dir="/tmp", ignore_cleanup_errors=True
    ) as name:  # short: sockets
        address = f"127.0.0.1:{free_port()}"
        folder = Path(name)
        config = folder / "autoscaler.json"
        config.write_text(json.dumps(configuration(address, types, idle_minutes)))
        plain = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_TMPDIR")}
        environment = {**plain, **LOOPBACK}
        autoscaler = {
            "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        }
        command = [
            str(Path(sys.executable).parent / "ray"),
            *("start", "--head", "--block", "--disable-usage-stats", "--include-dashboard=false", "--num-gpus=0"),
            *(f"--num-cpus={head_cpus}", f"--port={address.rpartition(':')[2]}", "--node-ip-address=127.0.0.1"),
            *(f"--temp-dir={folder / 'ray'}", f"--autoscaling-config={config}", f"--object-store-memory={OBJECTS}"),
            *("--dashboard-agent-listen-port=0", f"--ray-client-server-port={free_port()}"),
        ]
        log = (folder / "head.log").open("w")
        head = subprocess.Popen(command, env=environment | autoscaler, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_for(address, head, folder / "head.log")
            yield Autoscaling(address, {**environment, "RAY_ADDRESS": address}, folder)
        finally:
            _end(head, name)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(address: str, head: "subprocess.Popen[bytes]", log: Path) -> None:
    host, _, port = address.rpartition(":")
    for _ in range(240):
        if head.poll() is not None:
            break
        with suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
            return
        time.sleep(0.5)
    raise RuntimeError(f"the head did not start: {log.read_text()[-2000:]}")


def _end(head: "subprocess.Popen[bytes]", folder: str) -> None:
    """End the head and the nodes that its autoscaler started, by the folder that their command lines name."""
    head.kill()
    for process in psutil.process_iter(["cmdline"]):
        if any(folder in word for word in process.info["cmdline"] or ()):
            with suppress(psutil.NoSuchProcess):
                process.kill()
    head.wait(20)
