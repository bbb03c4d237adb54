"""`ray job submit` on loopback, with token authentication, ends with the checkpoint of the direct run."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import toy
from tests.pipeline import features_only, ok
from zsr.artifact import open_artifact

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).parent / "ray"


def free_port() -> int:
    """A port that is free now, outside of Ray's own range of worker ports."""
    for port in range(20100 + os.getpid() % 500, 30000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise AssertionError("no free port")


@pytest.fixture
def head(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A head with a dashboard on loopback; the environment of a client that may use it."""
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    dashboard = free_port()
    command = [
        str(RAY), "start", "--head", "--block", "--num-cpus=4", "--port", str(dashboard + 1),
        "--dashboard-host=127.0.0.1", "--dashboard-port", str(dashboard), "--object-store-memory", str(300 << 20),
        "--ray-client-server-port", str(dashboard + 2), "--disable-usage-stats",
        # the default is taken where another cluster runs, and a job could then never start
        "--dashboard-agent-listen-port", str(dashboard + 3),
    ]  # fmt: skip
    log = (tmp_path / "head.log").open("w")
    with subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True) as process:
        try:
            _wait(dashboard)
            yield environment | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:  # a busy machine: its children are in its process group
                os.killpg(process.pid, signal.SIGKILL)


def _wait(port: int) -> None:
    for _ in range(300):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError("the dashboard did not start")


@pytest.mark.usefixtures("ray_cluster")
def test_a_submitted_job_ends_with_the_digest_of_the_direct_run(tmp_path: Path, head: dict[str, str]) -> None:
    inputs = features_only(tmp_path, toy.write_features(tmp_path / "raw"))
    flags = [str(flag) for flag in (*inputs, "--split", "random:3:0", "--validation-classes", 2, "--epochs", 2)]
    flags += ["--steps-per-epoch", "5", "--batch-size", "16", "--num-workers", "2"]
    direct = ok("train", *flags, "--output", tmp_path / "direct")
    excludes = {"excludes": [".git", ".venv", "runs", "*.egg-info", "tests", ".*_cache"]}
    submit = [
        str(RAY), "job", "submit", "--working-dir", str(ROOT), "--runtime-env-json", json.dumps(excludes),
        "--", sys.executable, "-m", "jobs.train", *flags, "--output", str(tmp_path / "submitted"),
    ]  # fmt: skip
    done = _submit(submit, head)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert direct["checkpoint"] in done.stdout
    assert open_artifact(tmp_path / "submitted", "checkpoint").digest == direct["checkpoint"]


def _submit(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Submit, again and again while the head has not started the agent that runs jobs yet."""
    for _ in range(5):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
        if "No available agent" not in done.stderr:
            break
        time.sleep(1)
    return done


def test_a_stranger_may_not_submit(head: dict[str, str], tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text(secrets.token_hex(32))
    wrong.chmod(0o600)
    submit = [str(RAY), "job", "submit", "--", "true"]
    stranger = head | {"RAY_AUTH_TOKEN_PATH": str(wrong)}
    refused = subprocess.run(submit, env=stranger, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode != 0
    assert "403" in refused.stdout + refused.stderr or "authenti" in (refused.stdout + refused.stderr).lower()
