"""GPUs that no node offers yet: what stages choose, and that they start GPU nodes from zero.

The nodes are Ray's own fake ones, so ZSR_FAKE_GPU has workers that were given a GPU compute on the CPU.
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.local import ROOT
from tests import toy
from tests.cluster.autoscaling import Autoscaling, autoscaling_cluster
from tests.pipeline import features_only, job, ok
from zsr import autoscaler, devices, executor
from zsr.autoscaler import NodeType, startable
from zsr.devices import Capacity, Devices, DeviceSettings, chosen
from zsr.errors import ConfigError, Infeasible

HEAD = {"CPU": 0.0}
CPU, GPU = {"CPU": 32.0}, {"CPU": 16.0, "GPU": 1.0}
SHIPPED = (NodeType("cpu", CPU, 32), NodeType("gpu", GPU, 8), NodeType("gpu-spot", GPU, 64))
OBJECTS = {"object_store_memory": 100 << 20}
TYPES: dict[str, dict[str, Any]] = {
    "gpu-l4": {"resources": {"CPU": 2, "GPU": 1, **OBJECTS}, "max_workers": 2},
    "cpu": {"resources": {"CPU": 2, **OBJECTS}, "max_workers": 1},
}


# ---- the choice ------------------------------------------------------------------------------------------------------


def test_auto_counts_what_the_autoscaler_can_start() -> None:
    have = Capacity((HEAD,), SHIPPED, most_nodes=64)
    assert chosen(DeviceSettings(), have) == Devices(1, 64, "0 GPUs are up, node types gpu and gpu-spot can start 64")


def test_nodes_that_are_up_count_without_an_autoscaler() -> None:
    node = {"CPU": 96.0, "GPU": 8.0}
    assert chosen(DeviceSettings(), Capacity((HEAD, node, node))) == Devices(1, 16, "16 GPUs are up")
    # no more than the type may have: those that are up are of them
    have = Capacity((HEAD, GPU, GPU), (NodeType("gpu", GPU, 3),), most_nodes=8)
    assert chosen(DeviceSettings(), have) == Devices(1, 3, "2 GPUs are up, node type gpu can start 3")


@pytest.mark.parametrize(("each", "most"), [(1, 8), (2, 4), (3, 2), (0.5, 16), (0.3, 24), (16, 0)])
def test_workers_are_as_many_as_hold_their_gpus_on_one_node(each: float, most: int) -> None:
    assert devices.gpu_workers({"CPU": 96.0, "GPU": 8.0}, each, 1) == most


def test_a_worker_of_a_fraction_of_a_gpu_requires_a_cpu_too() -> None:
    assert devices.gpu_workers({"CPU": 2.0, "GPU": 1.0}, 0.25, 1) == 2
    assert devices.gpu_workers({"CPU": 2.0, "GPU": 1.0}, 0.25, 0) == 4


def test_cpus_are_those_of_nodes_without_gpus_but_one() -> None:
    have = Capacity((HEAD,), SHIPPED, most_nodes=64)
    assert chosen(DeviceSettings(device="cpu"), have) == Devices(0, 32 * 32 - 1, "--device cpu is given")
    static = Capacity(({"CPU": 8.0}, {"CPU": 96.0, "GPU": 8.0}))
    assert chosen(DeviceSettings(device="cpu"), static).most == 7
    # all nodes have GPUs, and CPUs are requested
    assert chosen(DeviceSettings(device="cpu"), Capacity((GPU, GPU))).most == 31


def test_cuda_without_a_gpu_anywhere_is_refused_in_one_sentence() -> None:
    refused = "--device cuda requires 1 GPU per worker on one node, but "
    with pytest.raises(Infeasible, match=f"{refused}the cluster has no GPU"):
        chosen(DeviceSettings(device="cuda"), Capacity((CPU,)))
    with pytest.raises(Infeasible, match=f"{refused}0 GPUs are up, and no node type has GPUs"):
        chosen(DeviceSettings(device="cuda"), Capacity((CPU,), SHIPPED[:1], 8))
    for device, flag in (("cuda", "--device cuda"), ("auto", "--gpus-per-worker 2")):
        settings = DeviceSettings.model_validate({"device": device, "gpus_per_worker": 2})
        with pytest.raises(Infeasible, match=f"{flag} requires 2 GPUs per worker on one node, but 0 GPUs are up, node"):
            chosen(settings, Capacity((HEAD,), SHIPPED, 64))


def test_an_autoscaler_that_cannot_be_asked_is_told_to_start_gpus_all_the_same() -> None:
    have = Capacity((CPU,), unknown="RayCluster a: 403 Client Error")
    assert chosen(DeviceSettings(), have).name == "cpu"
    assert chosen(DeviceSettings(device="cuda"), have).gpus == 1
    assert "unknown: RayCluster a: 403" in chosen(DeviceSettings(), have).why


@pytest.mark.parametrize("count", [0, -1, 1.5])
def test_gpus_that_ray_cannot_give_are_refused(count: float) -> None:
    with pytest.raises(ValueError, match="whole number, or a fraction of 1"):
        DeviceSettings(gpus_per_worker=count)


def test_the_line_names_device_workers_and_reason(caplog: pytest.LogCaptureFixture) -> None:
    Devices(1, 8, "0 GPUs are up, node type gpu-l4 can start 8").say(8)
    Devices(0.5, 8, "4 GPUs are up").say(1)
    Devices(0, 3, "the cluster has no GPU", cores=2).say(2)
    assert [record.getMessage() for record in caplog.records] == [
        "device: cuda, 1 GPU per worker, 8 workers: 0 GPUs are up, node type gpu-l4 can start 8",
        "device: cuda, 0.5 GPU per worker, 1 worker (up to 8 fit): 4 GPUs are up",
        "device: cpu, 2 workers: the cluster has no GPU",
    ]


# ---- where the node types are read -----------------------------------------------------------------------------------


def test_the_node_types_of_the_shipped_files() -> None:
    types, most = startable(yaml.safe_load((ROOT / "ray-cluster.yaml").read_text()))
    assert {kind.name: (kind.resources["CPU"], kind.resources.get("GPU", 0), kind.most) for kind in types} == {
        "cpu": (32, 0, 32),
        "gpu": (16, 1, 8),
        "gpu-spot": (16, 1, 64),
    }
    assert most == 64
    assert startable({}) == ((), 0)


def test_on_kubernetes_they_are_those_of_the_ray_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ray.autoscaler._private.kuberay import node_provider

    spec = yaml.safe_load((ROOT / "cluster" / "kuberay-rayjob.yaml").read_text())["spec"]["rayClusterSpec"]
    (tmp_path / "namespace").write_text("search")
    asked: list[str] = []

    def get(client: Any, path: str) -> dict[str, Any]:
        asked.append(f"{client._namespace}/{path}")
        return {"metadata": {"name": "zsr", "namespace": "search"}, "spec": spec}

    monkeypatch.setattr(node_provider.KubernetesHttpApiClient, "get", get)
    types, most = startable(autoscaler.kubernetes_config("zsr", tmp_path))
    assert asked == ["search/rayclusters/zsr"]
    assert {kind.name: (kind.resources.get("GPU", 0), kind.most) for kind in types} == {
        "cpu": (0, 32),
        "gpu": (1, 8),
        "gpu-spot": (1, 64),
    }
    assert most == 104
    spec["enableInTreeAutoscaling"] = False
    assert autoscaler.kubernetes_config("zsr", tmp_path) == {}
    with pytest.raises(ConfigError, match=r"RayCluster zsr: .*No such file"):
        autoscaler.kubernetes_config("zsr", tmp_path / "none")


def test_the_monitor_of_this_cluster_is_read_and_no_other(tmp_path: Path) -> None:
    for number, port in enumerate((6379, 6380)):
        (tmp_path / str(number)).mkdir()
        config = tmp_path / f"{port}.yaml"
        config.write_text(f"max_workers: {port}\n")
        words = ["python", "-u", "monitor.py", f"--gcs-address=10.0.0.1:{port}", f"--autoscaling-config={config}"]
        (tmp_path / str(number) / "cmdline").write_bytes("\0".join(words).encode())
    assert autoscaler.monitor_config("127.0.0.1:6380", tmp_path) == {"max_workers": 6380}
    assert autoscaler.monitor_config("127.0.0.1:6381", tmp_path) == {}
    (tmp_path / "6380.yaml").unlink()
    with pytest.raises(ConfigError, match=r"6380\.yaml: .*No such file"):
        autoscaler.monitor_config("127.0.0.1:6380", tmp_path)


# ---- nodes are started -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    """DATA with pictures."""
    root = tmp_path_factory.mktemp("pictures")
    ok("prepare", "--source", "sketchy", "--input", toy.write_pictures(root / "raw", each=3), "--output", root / "data")
    return root / "data"


@pytest.fixture(scope="module")
def featured(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> list[object]:
    """DATA, FEATURES and SEMANTICS, as flags."""
    root = tmp_path_factory.mktemp("featured")
    return features_only(root, toy.write_features(root / "raw"))


def submitted(cluster: Autoscaling, name: str, *flags: object, fake: bool = True) -> tuple[dict[str, Any], list[str]]:
    """Results of a job on the cluster, and the lines that say what it runs on."""
    environment = {**cluster.environment, "PYTHONPATH": str(ROOT), **({devices.FAKE: "1"} if fake else {})}
    environment[executor.VARIABLE] = "ray"  # however small the work is
    command = [sys.executable, "-m", "zsr", name, *map(str, flags)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip(), done.stderr[-3000:]
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return results, [line for line in done.stderr.splitlines() if line.startswith("device: ")]


@pytest.mark.faults
def test_features_start_a_gpu_node_from_zero_unless_cpus_are_requested(tmp_path: Path, pictures: Path) -> None:
    flags = ("features", "--data", pictures, "--size", 32)
    with autoscaling_cluster(TYPES) as cluster:
        made, said = submitted(cluster, *flags, "--device", "cpu", "--output", tmp_path / "on-cpus")
        assert made["exit_code"] == 0, made
        assert said == ["device: cpu, 1 worker: --device cpu is given"]
        assert cluster.started() == Counter(cpu=1)

        made, said = submitted(cluster, *flags, "--output", tmp_path / "on-gpus")
        assert made["exit_code"] == 0, made
        assert said == ["device: cuda, 1 GPU per worker, 2 workers: 0 GPUs are up, node type gpu-l4 can start 2"]
        assert cluster.started()["gpu-l4"] >= 1


@pytest.mark.faults
def test_train_starts_a_gpu_node_from_zero(tmp_path: Path, featured: list[object]) -> None:
    flags = (*featured, "--split", "random:3:0", "--validation-classes", 2, "--output", tmp_path / "checkpoint")
    short = ("--model", "contrastive", "--epochs", 1, "--steps-per-epoch", 2, "--batch-size", 8, "--num-workers", 1)
    with autoscaling_cluster(TYPES) as cluster:
        made, said = submitted(cluster, "train", *flags, *short)
        assert made["exit_code"] == 0, made
        why = "0 GPUs are up, node type gpu-l4 can start 2"
        assert said == [f"device: cuda, 1 GPU per worker, 1 worker (up to 2 fit): {why}"]
        assert cluster.started()["gpu-l4"] == 1
        # the node is up, and has no driver
        made, _ = submitted(cluster, "train", *flags, *short, "--seed", 1, fake=False)
        assert made["exit_code"] == 2, made
        assert "finds no CUDA device there; install a driver" in made["error"]


def test_cuda_is_refused_on_a_cluster_without_gpus(tmp_path: Path, pictures: Path) -> None:
    made = job("features", "--data", pictures, "--output", tmp_path / "features", "--device", "cuda")
    assert made["exit_code"] == 2
    assert made["error"] == (
        "--device cuda requires 1 GPU per worker on one node, but the cluster has no GPU; add nodes or a node type "
        "with GPUs, or use --device cpu"
    )
