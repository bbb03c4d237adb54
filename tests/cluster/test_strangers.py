"""B12: strangers get nothing from a cluster, and it listens on loopback alone."""

import os
import secrets
import subprocess
import sys
import urllib.error
import urllib.request

import psutil
import pytest

from cluster.local import ROOT, LocalCluster
from zsr.process import LOOPBACK

PATHS = (
    "/api/jobs/",
    "/api/jobs/none",
    "/nodes?view=summary",
    "/api/cluster_status",
    "/api/v0/tasks",
    "/logical/actors",
)


def ask(cluster: LocalCluster, path: str, headers: dict[str, str], method: str = "GET") -> int:
    """The HTTP status that the dashboard answers with."""
    request = urllib.request.Request(str(cluster.about["dashboard"]) + path, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def secret_of(cluster: LocalCluster) -> str:
    with open(cluster.environment["RAY_AUTH_TOKEN_PATH"]) as file:
        return file.read()


@pytest.mark.parametrize("path", PATHS)
def test_strangers_are_refused(local: LocalCluster, path: str) -> None:
    secret = secret_of(local)
    joint = "&" if "?" in path else "?"
    assert ask(local, path, {}) == 401
    assert ask(local, path, {"Authorization": f"Bearer {secrets.token_hex(32)}"}) == 403
    assert ask(local, path, {"Authorization": secret}) == 403, "a token without its scheme"
    assert ask(local, f"{path}{joint}token={secret}&Authorization=Bearer%20{secret}", {}) == 401
    assert ask(local, path, {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"}) in (401, 403)


@pytest.mark.parametrize(
    ("method", "path"), [("DELETE", "/api/jobs/none"), ("POST", "/api/jobs/"), ("PUT", "/api/jobs/")]
)
def test_strangers_change_nothing(local: LocalCluster, method: str, path: str) -> None:
    assert ask(local, path, {}, method) in (401, 405)
    assert ask(local, path, {"Authorization": "Bearer wrong"}, method) in (403, 405)
    # a page of another site, in the browser of someone who is logged in: the browser sends the token along
    own = {"Cookie": f"ray-authentication-token={secret_of(local)}", "Origin": "http://evil.example"}
    browser = own | {"Sec-Fetch-Site": "cross-site", "User-Agent": "Mozilla/5.0"}
    assert ask(local, path, browser, method) in (401, 403, 405)


def test_the_owner_is_let_in(local: LocalCluster) -> None:
    assert ask(local, "/api/jobs/", {"Authorization": f"Bearer {secret_of(local)}"}) == 200


def test_every_process_of_the_cluster_listens_on_loopback_alone(local: LocalCluster) -> None:
    head = psutil.Process(local.about["pid"])
    listening = [
        connection.laddr.ip
        for process in (head, *head.children(recursive=True))
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 10
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}


def test_the_cluster_that_a_lone_job_starts_listens_on_loopback_alone() -> None:
    code = """
import psutil
from zsr.cluster import connect, disconnect
from zsr.executor import map_pieces
connect()
map_pieces("double", lambda piece: {"twice": 2 * piece["one"]}, [{"one": 1}])
own = psutil.Process()
every = [c for p in (own, *own.children(recursive=True)) for c in p.net_connections("tcp")]
seen = [c.laddr.ip for c in every if c.status == psutil.CONN_LISTEN]
print(len(seen) > 5, sorted({ip.removeprefix("::ffff:") for ip in seen}))
disconnect()
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", *LOOPBACK)}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.stdout.splitlines()[-1:] == ["True ['127.0.0.1']"], done.stderr[-2000:]


def test_a_driver_without_the_token_cannot_connect(local: LocalCluster) -> None:
    code = f"import ray; ray.init(address={local.about['address']!r}, logging_level='ERROR')"
    environment = {k: v for k, v in local.environment.items() if not k.startswith("RAY_AUTH")}
    stranger = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        out, _ = stranger.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        stranger.kill()
        out, _ = stranger.communicate()
    assert stranger.returncode != 0
    assert "auth" in out.lower()


def test_a_command_without_the_token_says_so_at_once(local: LocalCluster) -> None:
    environment = {k: v for k, v in local.environment.items() if not k.startswith("RAY_AUTH")}
    environment["RAY_ADDRESS"] = local.about["address"]
    command = [sys.executable, "-m", "zsr", "doctor"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "requires a token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH" in done.stderr
    assert len(done.stderr.splitlines()) == 1
