"""A submitted pipeline on three local nodes loses a node, then its driver, and ends with the unbroken run's digests.

    python -m tests.faults.cluster OUTPUT

Too long for the tests of each change. Exit status 0 when all digests are equal and no stage was done twice.
"""

import argparse
import json
import os
import secrets
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from cluster.local import ROOT, LocalCluster, local_cluster
from tests import toy
from zsr import telemetry

WAIT = 400  # seconds for any one thing to happen


def written(folder: Path, name: str, raw: Path) -> Path:
    """The configuration of one small pipeline."""
    settings = {
        "output": str(folder / name),
        "features_from": "source",
        "prepare": {"source": "parquet", "input": str(raw), "rows_per_shard": 40},
        "train": {
            "model": "contrastive",
            "split": "random:3:0",
            "validation_classes": 2,
            "num_workers": 1,
            "epochs": 3,
            "steps_per_epoch": 5,
            "batch_size": 16,
        },
        "embed": {"actors": 1},
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def command(file: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "cluster.submit", "pipeline", *words, "--", "--config", str(file)]


def submit(cluster: LocalCluster, file: Path, *words: str) -> dict[str, Any]:
    """Submit it; the JSON line, which must be of a success."""
    done = subprocess.run(
        command(file, *words), cwd=ROOT, env=cluster.environment, stdout=subprocess.PIPE, text=True, check=False
    )
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if done.returncode != 0:
        raise SystemExit(f"the job ended with {done.returncode}: {results}")
    return results


def finished(folder: Path) -> list[str]:
    """Stages that the running job has finished."""
    try:
        return [lap["stage"] for lap in json.loads((folder / "report" / "timeline.json").read_text())]
    except FileNotFoundError:
        return []


def wait_for(folder: Path, stage: str) -> None:
    deadline = time.monotonic() + WAIT
    while stage not in finished(folder):
        if time.monotonic() > deadline:
            raise SystemExit(f"{stage} did not finish in {WAIT} s; {finished(folder)} did")
        time.sleep(0.2)


def stop(cluster: LocalCluster, identity: str) -> None:
    """Kill a job's driver, as `ray job stop` does."""
    ray = [str(Path(sys.executable).parent / "ray"), "job", "stop", identity]
    subprocess.run(ray, env=cluster.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)


def versions(folder: Path) -> dict[str, list[str]]:
    """Published versions of every artifact."""
    return {path.parent.name: sorted(os.listdir(path)) for path in sorted(folder.glob("*/versions"))}


def unseen_metrics(cluster: LocalCluster) -> list[str]:
    """Metrics that a stage should have counted, and no node exports."""
    token = Path(cluster.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    request = urllib.request.Request(f"{cluster.about['dashboard']}/api/prometheus/sd")
    request.add_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(request, timeout=30) as answer:
        targets = [target for group in json.load(answer) for target in group["targets"]]
    text = ""
    for target in targets:
        with urllib.request.urlopen(f"http://{target}/metrics", timeout=30) as answer:
            text += answer.read().decode()
    return [name for name in telemetry.exported() if f"\n{name}{{" not in text]


def run(cluster: LocalCluster, folder: Path) -> int:
    raw = toy.write_features(folder / "raw")
    began = time.monotonic()
    unbroken = submit(cluster, written(folder, "unbroken", raw))
    print(f"unbroken: {time.monotonic() - began:.0f} s", unbroken["digests"], flush=True)
    print("not exported:", unseen_metrics(cluster) or "nothing", flush=True)
    began, file = time.monotonic(), written(folder, "broken", raw)
    first = submit(cluster, file, "--no-wait")["submission_id"]
    wait_for(folder / "broken", "prepare")
    cluster.remove(next(name for name in cluster.about["nodes"] if name.startswith("gpu-spot")))
    print("node removed after", finished(folder / "broken"), flush=True)
    print("node added:", cluster.add("gpu-spot"), flush=True)
    wait_for(folder / "broken", "train seed 0")
    stop(cluster, first)
    print(f"{first} killed after", finished(folder / "broken"), flush=True)
    resumed = submit(cluster, file)
    print(f"resumed as {resumed['submission_id']}: {time.monotonic() - began:.0f} s", resumed["timeline"], flush=True)
    same, once = resumed["digests"] == unbroken["digests"], versions(folder / "broken")
    print("equal digests" if same else f"DIFFERENT: {resumed['digests']}")
    print("every stage published once" if (good := once == versions(folder / "unbroken")) else f"TWICE: {once}")
    return 0 if same and good else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    folder = parser.parse_args().output.absolute() / secrets.token_hex(4)
    folder.mkdir(parents=True)
    token = folder / "token"
    token.touch(0o600)
    token.write_text(secrets.token_hex(32))
    with local_cluster(token, nodes=3) as cluster:
        return run(cluster, folder)


if __name__ == "__main__":
    sys.exit(main())
