"""The files about machines that cannot be run here are held to what their readers accept."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from botocore.session import get_session
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.local import Config, node_labels
from zsr import telemetry

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ray_cluster_file() -> dict[str, Any]:
    """What `ray up` makes of the file: its schema checked, defaults filled in."""
    content = yaml.safe_load((ROOT / "ray-cluster.yaml").read_text())
    prepared: dict[str, Any] = prepare_config(content)
    validate_config(prepared)
    return prepared


def test_ray_up_accepts_the_file_and_refuses_a_misspelt_one(ray_cluster_file: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError, match="max_worker'"):
        validate_config(ray_cluster_file | {"max_worker": 3})


def test_ec2_accepts_every_machine(ray_cluster_file: dict[str, Any]) -> None:
    shape = get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for name, kind in ray_cluster_file["available_node_types"].items():
        report = ParamValidator().validate({**kind["node_config"], "MinCount": 1, "MaxCount": 1}, shape)
        assert not report.has_errors(), f"{name}: {report.generate_report()}"
    wrong = ParamValidator().validate({"InstanceTyp": "x", "MinCount": 1, "MaxCount": 1}, shape)
    assert wrong.has_errors()


def test_google_clouds_variant_is_accepted_too(ray_cluster_file: dict[str, Any]) -> None:
    text = (ROOT / "ray-cluster.yaml").read_text()
    lines = text[text.index("# provider:") : text.index("# node_config of head")].splitlines()
    variant = yaml.safe_load("\n".join(line.removeprefix("# ") for line in lines))
    assert variant["provider"]["type"] == "gcp"
    validate_config(ray_cluster_file | variant)


def test_workers_go_down_to_zero_and_the_head_takes_no_work(ray_cluster_file: dict[str, Any]) -> None:
    types = ray_cluster_file["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert {name: kind["min_workers"] for name, kind in types.items()} == dict.fromkeys(types, 0)
    spot = {name for name, kind in types.items() if "InstanceMarketOptions" in kind["node_config"]}
    assert spot == {name for name, kind in types.items() if kind["labels"]["ray.io/market-type"] == "spot"}


def test_tokens_are_on_and_no_secret_is_in_a_file(ray_cluster_file: dict[str, Any]) -> None:
    assert "--env RAY_AUTH_MODE=token" in ray_cluster_file["docker"]["run_options"]
    starts = ray_cluster_file["head_start_ray_commands"] + ray_cluster_file["worker_start_ray_commands"]
    assert all("python -m cluster.start" in command for command in starts if command != "ray stop")
    for path in (ROOT / "ray-cluster.yaml", *(ROOT / "cluster").iterdir()):
        if path.is_file():
            secret = re.search(
                r"AKIA[0-9A-Z]{16}|-----BEGIN|(?i:password|secret[_-]?key)\s*[:=]\s*['\"]?\w{8,}", path.read_text()
            )
            assert secret is None, f"{path}: {secret}"


def test_the_local_cluster_has_the_kinds_of_the_real_one(ray_cluster_file: dict[str, Any]) -> None:
    for kind in ("head", *Config.model_fields["kinds"].default):
        assert node_labels(kind) == ray_cluster_file["available_node_types"][kind]["labels"]


# What KubeRay 1.6 knows of a RayJob, written from its API reference: its own schema is 1.2 MB, mostly of pods.
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
NUMBER, TEXT, FLAG = {"type": "integer", "minimum": 0}, {"type": "string"}, {"type": "boolean"}
POD = {
    "type": "object",
    "required": ["spec"],
    "properties": {
        "metadata": {"type": "object"},
        "spec": {
            "type": "object",
            "required": ["containers"],
            "properties": {
                "containers": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "required": ["name", "image", "resources"],
                        "properties": {
                            "resources": {
                                "type": "object",
                                "additionalProperties": False,
                                "properties": {"requests": TEXTS, "limits": TEXTS},
                            }
                        },
                    },
                }
            },
        },
    },
    "additionalProperties": False,
}
GROUP = {"template": POD, "rayStartParams": TEXTS, "resources": TEXTS, "labels": TEXTS}
CLUSTER = {
    "type": "object",
    "required": ["headGroupSpec"],
    "additionalProperties": False,
    "properties": {
        "rayVersion": TEXT,
        "suspend": FLAG,
        "managedBy": TEXT,
        "enableInTreeAutoscaling": FLAG,
        "gcsFaultToleranceOptions": {"type": "object"},
        "headServiceAnnotations": TEXTS,
        "authOptions": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"mode": {"enum": ["disabled", "token"]}, "secretName": TEXT, "enableK8sTokenAuth": FLAG},
        },
        "autoscalerOptions": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "version": {"enum": ["v1", "v2"]},
                "idleTimeoutSeconds": NUMBER,
                "upscalingMode": {"enum": ["Default", "Aggressive", "Conservative"]},
                **dict.fromkeys(("image", "imagePullPolicy"), TEXT),
                **{key: {"type": "object"} for key in ("resources", "securityContext")},
                **{key: {"type": "array"} for key in ("env", "envFrom", "volumeMounts")},
            },
        },
        "headGroupSpec": {
            "type": "object",
            "required": ["template"],
            "additionalProperties": False,
            "properties": {**GROUP, "enableIngress": FLAG, "headService": {"type": "object"}, "serviceType": TEXT},
        },
        "workerGroupSpecs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["groupName", "template", "maxReplicas", "minReplicas"],
                "additionalProperties": False,
                "properties": {
                    **GROUP,
                    "groupName": TEXT,
                    **dict.fromkeys(
                        ("replicas", "minReplicas", "maxReplicas", "numOfHosts", "idleTimeoutSeconds"), NUMBER
                    ),
                    "scaleStrategy": {"type": "object"},
                    "suspend": FLAG,
                },
            },
        },
    },
}
RAY_JOB = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayJob"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "required": ["entrypoint"],
            "additionalProperties": False,
            "properties": {
                "rayClusterSpec": CLUSTER,
                "metadata": TEXTS,
                "clusterSelector": TEXTS,
                "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
                **dict.fromkeys(("entrypoint", "runtimeEnvYAML", "jobId", "entrypointResources", "managedBy"), TEXT),
                **{key: {"type": "number"} for key in ("entrypointNumCpus", "entrypointNumGpus")},
                **dict.fromkeys(("activeDeadlineSeconds", "backoffLimit", "ttlSecondsAfterFinished"), NUMBER),
                **dict.fromkeys(("shutdownAfterJobFinishes", "suspend"), FLAG),
                **{key: {"type": "object"} for key in ("submitterPodTemplate", "submitterConfig", "deletionStrategy")},
            },
        },
    },
}


def test_kuberay_knows_every_field_of_the_job() -> None:
    job = yaml.safe_load((ROOT / "cluster" / "kuberay-rayjob.yaml").read_text())
    jsonschema.validate(job, RAY_JOB)
    groups = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert {group["minReplicas"] for group in groups} == {0}
    kinds = {
        group["groupName"]: dict(pair.split("=") for pair in group["rayStartParams"]["labels"].split(","))
        for group in groups
    }
    assert kinds == {kind: node_labels(kind) for kind in ("cpu", "gpu", "gpu-spot")}
    mounted = {
        volume["name"] for volume in job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"]
    }
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} <= mounted
        assert container["resources"]["limits"] == container["resources"]["requests"]


def test_the_rayjob_with_a_misspelt_field_is_refused() -> None:
    job = yaml.safe_load((ROOT / "cluster" / "kuberay-rayjob.yaml").read_text())
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["minReplica"] = 0
    with pytest.raises(jsonschema.ValidationError, match="minReplica'"):
        jsonschema.validate(job, RAY_JOB)


@pytest.mark.parametrize("command", [["bash", "-n"], ["shellcheck"]])
def test_the_shell_script_is_sound(command: list[str]) -> None:
    script = ROOT / "cluster" / "setup_node.sh"
    done = subprocess.run([tool(command[0]), *command[1:], str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dockerfile_passes_its_linter() -> None:
    file = ROOT / "cluster" / "Dockerfile"
    done = subprocess.run([tool("hadolint"), str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert re.findall(r"^FROM \S+ AS (\w+)$", file.read_text(), re.MULTILINE) == ["base", "cpu", "gpu"]


def test_the_images_hold_what_the_documented_commands_need() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = (ROOT / "cluster" / "Dockerfile").read_text()
    (given,) = re.findall(r"^ARG EXTRAS=(\S+)$", text, re.MULTILINE)
    assert set(given.split(",")) == {"cluster", "aws"}  # boto3 is what the head starts nodes with
    assert set(re.findall(r'--editable "\.\[(\S+)\]"', text)) == {"${EXTRAS}", "${EXTRAS},nvjpeg"}
    (whole,) = extras["cluster"]
    stages = set(whole.removeprefix("zsr[").removesuffix("]").split(","))
    assert {"s3", "demo", "text", "towers", "report"} <= stages <= set(extras)
    docs = (ROOT / "docs" / "cluster.md").read_text()
    assert "--editable '.[cluster]'" in docs
    named = {
        extra for words in re.findall(r"\.\[([\w,]+)\]|EXTRAS=([\w,]+)", docs) for extra in ",".join(words).split(",")
    }
    assert named - {""} <= set(extras)


def test_kubernetes_objects_that_the_job_names_are_made() -> None:
    job = yaml.safe_load((ROOT / "cluster" / "kuberay-rayjob.yaml").read_text())
    pod = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    made = {
        (each["kind"], each["metadata"]["name"])
        for each in yaml.safe_load_all((ROOT / "cluster" / "kuberay-storage.yaml").read_text())
    }
    claims = {
        volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume
    }
    assert made == {
        ("ServiceAccount", pod["serviceAccountName"]),
        *(("PersistentVolumeClaim", name) for name in claims),
    }


def tool(name: str) -> str:
    """A command of this environment, or of the system."""
    return shutil.which(name, path=f"{Path(sys.executable).parent}") or name


def test_a_node_without_a_token_does_not_pass_its_setup(tmp_path: Path) -> None:
    environment = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    script = ["bash", str(ROOT / "cluster" / "setup_node.sh"), str(tmp_path)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert f"no token file {tmp_path}/.ray/auth_token" in done.stderr
    assert "RAY_AUTH_MODE is ''" in done.stderr
    assert not list(tmp_path.glob(".zsr-probe*"))


@pytest.mark.parametrize("shared", [True, False])
def test_a_node_without_an_s3_client_is_told(tmp_path: Path, shared: bool) -> None:
    (tmp_path / "s3fs.py").write_text("raise ImportError('not here')\n")
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    environment = {"PATH": path, "HOME": str(tmp_path), "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    script = ["bash", str(ROOT / "cluster" / "setup_node.sh"), *([str(tmp_path)] if shared else [])]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=120, check=False)
    needed = "no shared folder was named and s3fs is not installed; install zsr[cluster]"
    assert (needed in done.stderr) is not shared
    assert ("s3fs is not installed; artifacts can be in" in done.stdout) is shared


def test_the_dashboard_shows_exactly_the_metrics_that_are_counted() -> None:
    dashboard = json.loads((ROOT / "cluster" / "grafana.json").read_text())
    shown = set(re.findall(r"\bray_zsr_\w+", json.dumps([panel["targets"] for panel in dashboard["panels"]])))
    assert shown == set(telemetry.exported())
