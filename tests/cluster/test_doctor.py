"""The doctor's table, and that it finds a node whose environment is another."""

import json
import subprocess
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path

import pytest

from cluster.local import ROOT, LocalCluster
from zsr.commands import checks, doctor, probes
from zsr.commands.base import Results
from zsr.commands.checks import Check, Node, comparable, gpus, same_extras, same_versions


def examine(cluster: LocalCluster) -> tuple[int, Results, str]:
    command = [sys.executable, "-m", "zsr", "doctor", "--megabytes", "8", "--min-free-gib", "0.1"]
    environment = cluster.environment | {"RAY_ADDRESS": cluster.about["address"]}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.stdout.strip(), done.stderr[-3000:]
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stdout


def with_another_version(folder: Path, package: str, version: str) -> Path:
    """An environment that has what this one has, and one package in another version; its interpreter."""
    venv.create(folder, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (site / "all.pth").write_text(sysconfig.get_path("purelib") + "\n")
    about = site / f"{package}-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    return folder / "bin" / "python"


@pytest.mark.faults
def test_the_doctor_finds_a_node_with_another_version(tmp_path: Path, local: LocalCluster) -> None:
    code, healthy, table = examine(local)
    assert code == 0, healthy
    assert all(
        word in table
        for word in (
            "same versions",
            "extras on all nodes",
            "s3",
            "all-reduce over 3 nodes, gloo",
            "free disk",
            "clock of",
        )
    )
    name = local.add("cpu", str(with_another_version(tmp_path / "venv", "simplejpeg", "1.0.0")))
    try:
        code, results, table = examine(local)
    finally:
        local.remove(name)
    assert code == 2
    wrong = [check for check in results["checks"] if check["fix"]]
    assert [check["what"] for check in wrong] == ["version of simplejpeg"]
    assert "1.0.0 on cpu" in wrong[0]["found"]
    assert "FIX" in table


@pytest.mark.parametrize(("flags", "well"), [({}, False), ({"max_skew": 3.0}, True)])
def test_a_clock_may_differ_by_max_skew(flags: dict[str, float], well: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "clock_skew", lambda _: -2.0)
    (check,) = checks.clocks([node("a", "2.13.0")], doctor.Config(**flags))
    assert (check.found, not check.fix) == ("-2.000 s", well)


def test_builds_and_the_two_packages_of_faiss_may_differ() -> None:
    cpu = {"torch": "2.13.0+cpu", "faiss-cpu": "1.15.1", "faiss-gpu": ""}
    gpu = {"torch": "2.13.0", "faiss-cpu": "", "faiss-gpu": "1.15.1"}
    assert comparable(cpu) == comparable(gpu) == {"torch": "2.13.0", "faiss": "1.15.1"}


def node(name: str, torch: str, seen: int = 0, offered: int = 0, extras: tuple[str, ...] = ()) -> Node:
    facts = {"versions": {"torch": torch}, "gpus_torch": seen, "extras": list(extras)}
    return Node(name, name, {"GPU": float(offered)}, facts)


def test_the_odd_node_is_named_with_what_to_install() -> None:
    checks = list(same_versions([node("a", "2.13.0"), node("b", "2.12.1"), node("c", "2.13.0+cpu")]))
    fix = "change torch to 2.13.0 there, or start these nodes from the image of the others"
    assert checks == [Check("version of torch", "2.13.0 on 2 nodes, 2.12.1 on b", fix)]


@pytest.mark.parametrize(
    ("seen", "offered", "word"),
    [(1, 1, ""), (0, 1, "torch cannot use CUDA"), (2, 1, "--num-gpus")],  # faiss runs on CPUs
)
def test_gpus_that_are_not_seen_are_told(seen: int, offered: int, word: str) -> None:
    (check,) = gpus([node("a", "2.13.0", seen, offered)])
    assert (word in check.fix) if word else not check.fix


def test_an_extra_that_a_node_lacks_is_named() -> None:
    nodes = [node("a", "2", extras=("s3", "text")), node("b", "2", extras=("text",))]
    fix = "install zsr[s3] there, or start these nodes from the image of the others"
    missing = "text; without s3, no artifact can be in a bucket"
    assert list(same_extras(nodes)) == [Check("extra s3", "not on b", fix), Check("extras on all nodes", missing)]
    assert list(same_extras(nodes[:1])) == [Check("extras on all nodes", "s3, text")]


def test_an_extra_is_there_when_all_of_its_packages_are(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = probes.extras()
    assert {"s3", "text", "towers", "demo"} <= set(whole)
    version = metadata.version

    def without(package: str) -> str:
        if package == "nltk":
            raise metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(metadata, "version", without)
    assert set(probes.extras()) == set(whole) - {"text"}
