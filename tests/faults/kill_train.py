"""Kills workers, nodes and drivers of training runs, and compares with unbroken ones: `make faults`.

    python -m tests.faults.kill_train OUTPUT [--models sem-pcyc cfsa lcale] [--kills 3] [--nodes 1] [--drivers 1]

On a cluster of three nodes, on generated features. For each model, against an unbroken run with two workers:

    B1  one of the two workers is killed with SIGKILL at a random passing of a named point: in a step, before a state is
        written, after it, in the middle of a write, just after `report`. Equal digests of the checkpoint, and equal
        losses in every step of its metrics.
    B2  the node of the workers is removed; the driver is killed and the job submitted again. Equal as above. That each
        step then trains the rows of the unbroken run follows: its losses are equal in every bit.
    B3  --num-workers 1:2: half of the steps with two workers, some with one, the rest with two again. Final loss within
        1% of the unbroken run's, validation mAP within 0.01.
    B14 afterwards all CPUs are free within 60 s, and no staged state and no folder of Ray Train is left.

Kills are drawn from --seed, which is printed. Exit status 0 when all of it holds.
"""

import argparse
import json
import logging
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import ray
from ray.cluster_utils import Cluster

from tests import toy
from tests.faults.killing import finish
from tests.pipeline import features_only

EPOCH: Final = 5  # steps, and so the most that a kill may repeat
EPOCHS: Final = 6
SHORT: Final = (
    *("--split", "random:3:0", "--validation-classes", "2", "--epochs", str(EPOCHS), "--patience", str(EPOCHS)),
    *("--steps-per-epoch", str(EPOCH), "--batch-size", "16", "--log-every", "1"),
)
POINTS: Final = ("train.step", "train.save", "train.saved", "train.report", "artifact.write", "artifact.receipt")
FREE: Final = 60.0  # seconds until all CPUs are free again


@dataclass
class Nodes:
    """A cluster of a head and two nodes, whose workers' node can be taken away.

    Attributes:
        cpus: of a node; two workers fit one, beside the tasks that read what they eat.
    """

    cpus: int = 3
    cluster: Cluster = field(init=False)

    def __post_init__(self) -> None:
        # the head takes neither workers nor tasks, so that every node of theirs may go
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 200 << 20})
        for _ in range(2):
            self.add()
        os.environ["RAY_ADDRESS"] = str(self.cluster.address)
        ray.init(address=self.cluster.address, logging_level=logging.ERROR, log_to_driver=False)

    def add(self) -> None:
        """One more node."""
        self.cluster.add_node(num_cpus=self.cpus, object_store_memory=200 << 20)

    def remove_busiest(self) -> None:
        """Take away the node with the fewest free CPUs, abruptly, and put a fresh one in its place."""
        free = ray._private.state.available_resources_per_node()  # type: ignore[no-untyped-call]
        busiest = min(self.cluster.worker_nodes, key=lambda node: free.get(node.node_id, {}).get("CPU", 0.0))
        self.cluster.remove_node(busiest, allow_graceful=False)
        self.add()

    def all_free(self) -> bool:
        """Whether no CPU is held, within a minute."""
        until = time.monotonic() + FREE
        while time.monotonic() < until:
            offered, free = ray.cluster_resources(), ray.available_resources()  # type: ignore[no-untyped-call]
            if offered.get("CPU") == free.get("CPU"):
                return True
            time.sleep(1.0)
        return False

    def stop(self) -> None:
        ray.shutdown()
        self.cluster.shutdown()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Runs:
    """Training runs of one model on the same inputs, each in a folder of its own."""

    inputs: list[str]
    root: Path
    model: str

    def command(self, name: str, *more: str) -> list[str]:
        where = str(self.root / self.model / name)
        flags = [*self.inputs, *SHORT, "--model", self.model, "--output", where, *more]
        return [sys.executable, "-m", "jobs.train", *flags]

    def metrics(self, name: str) -> Path | None:
        """The file of a run's metrics, once it is there."""
        found = list((self.root / self.model / name / "logs").glob("*/metrics.jsonl"))
        return found[0] if found else None

    def losses(self, name: str) -> list[dict[str, Any]]:
        """Step, losses and scores of every line of the metrics; what depends on time is left out."""
        path = self.metrics(name)
        lines = [] if path is None else [json.loads(line) for line in path.read_text().splitlines()]
        kept = ("step", "kind", "validation_map_all")
        return [{k: v for k, v in line.items() if k in kept or k.startswith("loss/")} for line in lines]

    def step(self, name: str) -> int:
        """The last step that a run has logged."""
        path = self.metrics(name)
        lines = [] if path is None else path.read_text().splitlines()
        whole = [line for line in lines if line.endswith("}")]
        return int(json.loads(whole[-1])["step"]) if whole else 0

    def left_over(self, name: str) -> list[str]:
        """What a finished run should have removed."""
        where = self.root / self.model / name
        return [str(p) for folder in ("staging", "ray") for p in (where / folder).glob("*")]

    @contextmanager
    def started(self, name: str, *more: str) -> Iterator[subprocess.Popen[bytes]]:
        quiet = subprocess.DEVNULL
        with subprocess.Popen(self.command(name, *more), stdout=quiet, stderr=quiet) as process:
            yield process

    def until(self, name: str, step: int, then: Callable[[subprocess.Popen[bytes]], None], *more: str) -> bool:
        """Start a run, do something once it has logged that step, and wait for its end; whether it came to it."""
        with self.started(name, *more) as process:
            while process.poll() is None:
                if self.step(name) >= step:
                    then(process)
                    process.wait()
                    return True
                time.sleep(0.05)
        return False


def equal(runs: Runs, name: str, digest: str, what: str) -> bool:
    """Finish a run, and compare it with the unbroken one."""
    found = finish(runs.command(name))["checkpoint"]
    good = found == digest and runs.losses(name) == runs.losses("unbroken") and not runs.left_over(name)
    print(
        f"{runs.model}: {what}: {'equal' if good else f'DIFFERENT: {found[:12]}, left {runs.left_over(name)}'}",
        flush=True,
    )
    return good


def kill_workers(runs: Runs, digest: str, kills: int, coin: random.Random) -> bool:
    """B1."""
    good = True
    for kill in range(kills):
        name, point = f"worker-{kill}", coin.choice(POINTS)
        most = EPOCH * EPOCHS if point == "train.step" else EPOCHS
        marker = runs.root / runs.model / f"{name}.fired"
        marker.parent.mkdir(parents=True, exist_ok=True)
        armed = f"{point}=kill@{coin.randint(1, most)}@{marker}"
        finish(["env", f"ZSR_FAULT={armed}", *runs.command(name)])
        fired = "" if marker.exists() else " (did not fire)"
        good &= marker.exists() and equal(runs, name, digest, f"a worker killed at {armed.rpartition('@')[0]}{fired}")
    return good


def remove_nodes(runs: Runs, digest: str, count: int, coin: random.Random, nodes: Nodes) -> bool:
    """B2, nodes."""
    good = True
    for number in range(count):
        step = coin.randint(2, EPOCH * EPOCHS - 2)
        hit = runs.until(f"node-{number}", step, lambda _: nodes.remove_busiest())
        good &= hit and equal(runs, f"node-{number}", digest, f"the workers' node removed after step {step}")
    return good


def kill_drivers(runs: Runs, digest: str, count: int, coin: random.Random) -> bool:
    """B2, drivers."""
    good = True
    for number in range(count):
        step = coin.randint(2, EPOCH * EPOCHS - 2)
        hit = runs.until(f"driver-{number}", step, lambda process: process.kill())
        good &= hit and equal(runs, f"driver-{number}", digest, f"the driver killed after step {step}, submitted again")
    return good


def other_worlds(runs: Runs, unbroken: dict[str, Any]) -> bool:
    """B3. A job that may have one worker or two gets what a cluster of its own has room for."""
    steps = EPOCH * EPOCHS
    for cpus, stop in ((3, steps // 3), (2, 2 * steps // 3)):
        with room(cpus):
            runs.until("worlds", stop, lambda process: process.kill(), "--num-workers", "1:2")
    with room(3):
        found = finish(runs.command("worlds", "--num-workers", "1:2"))
    last, wanted = (
        sum(v for k, v in runs.losses(name)[-1].items() if k.startswith("loss/")) for name in ("worlds", "unbroken")
    )
    apart = abs(last - wanted) / abs(wanted)
    score = abs(found["validation_map_all"] - unbroken["validation_map_all"])
    print(f"{runs.model}: two workers, one, two: loss {apart:.2%} apart, mAP {score:.3f} apart", flush=True)
    return bool(apart <= 0.01 and score <= 0.01)


@contextmanager
def room(cpus: int) -> Iterator[None]:
    """A cluster of so many CPUs for the jobs that are started meanwhile."""
    before = os.environ["RAY_ADDRESS"]
    head = {"num_cpus": cpus, "object_store_memory": 200 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    os.environ["RAY_ADDRESS"] = str(cluster.address)
    try:
        yield
    finally:
        os.environ["RAY_ADDRESS"] = before
        cluster.shutdown()  # type: ignore[no-untyped-call]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--models", nargs="+", default=["sem-pcyc", "cfsa", "lcale"])
    for name, default in (("kills", 3), ("nodes", 1), ("drivers", 1), ("worlds", 1), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    coin = random.Random(asked.seed)
    inputs = [str(word) for word in features_only(asked.output, toy.write_features(asked.output / "raw", each=40))]
    nodes, good = Nodes(), True
    print(f"seed {asked.seed}", flush=True)
    try:
        for model in asked.models:
            runs = Runs(inputs, asked.output, model)
            unbroken = finish(runs.command("unbroken"))
            digest = unbroken["checkpoint"]
            good &= kill_workers(runs, digest, asked.kills, coin)
            good &= remove_nodes(runs, digest, asked.nodes, coin, nodes)
            good &= kill_drivers(runs, digest, asked.drivers, coin)
            good &= not asked.worlds or other_worlds(runs, unbroken)
        free = nodes.all_free()
        print("all CPUs are free" if free else "CPUS ARE STILL HELD", flush=True)
        return 0 if good and free else 1
    finally:
        nodes.stop()


if __name__ == "__main__":
    sys.exit(main())
