"""Kills workers, nodes and drivers of training runs, and compares with unbroken ones: `make faults`.

    python -m tests.faults.kill_train OUTPUT [--models sem-pcyc cfsa lcale] [--pictures doodle2search] [--kills 3]
        [--nodes 1] [--drivers 1]

On a local cluster of three nodes with two logical CPUs each, on generated features, and for --pictures on pictures with
a small tower that trains along. For each model, against an unbroken run with two workers:

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
import os
import random
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cluster.local import LocalCluster, local_cluster
from tests import toy
from tests.faults.killing import finish

EPOCH: Final = 5  # steps, and so the most that a kill may repeat
EPOCHS: Final = 8  # after 6, LCALE still gains .3 of mAP in an epoch, and two runs are compared in the middle of it
SHORT: Final = (
    *("--split", "random:3:0", "--validation-classes", "2", "--epochs", str(EPOCHS), "--patience", str(EPOCHS)),
    *("--steps-per-epoch", str(EPOCH), "--batch-size", "16", "--log-every", "1"),
)
POINTS: Final = ("train.step", "train.save", "train.saved", "train.report", "artifact.write", "artifact.receipt")
Deed = Callable[[subprocess.Popen[bytes]], None]  # what is done to a running job
FREE: Final = 60.0  # seconds until all CPUs are free again
ASK: Final = """
import json, ray, ray._private.state as state
ray.init("auto", logging_level="ERROR", log_to_driver=False)
free = state.available_resources_per_node()
up = [node for node in ray.nodes() if node["Alive"]]
print(json.dumps({n["NodeID"]: (n["Resources"].get("CPU", 0), free.get(n["NodeID"], {}).get("CPU", 0)) for n in up}))
"""


@dataclass
class Nodes:
    """The three-node cluster that jobs started from here run on: a head without CPUs, and two nodes.

    The token and address are in this process's environment, from which jobs inherit them.
    """

    cluster: LocalCluster
    ids: dict[str, str]

    def remove_busiest(self) -> None:
        """Take away the node with the fewest free CPUs, abruptly, and put a fresh one in its place."""
        free = {node: left for node, (_, left) in cpus().items()}
        busiest = min(self.ids, key=lambda name: free.get(self.ids[name], 0.0))
        self.cluster.remove(busiest)
        del self.ids[busiest]
        added = self.cluster.ask("add cpu")
        self.ids[added["added"]] = added["id"]


def cpus() -> dict[str, tuple[float, float]]:
    """CPUs of each node that is up, and how many of them are free.

    In a process of its own: Ray reads its addresses and whether it has a token when it is imported.
    """
    return {node: (held, left) for node, (held, left) in finish([sys.executable, "-c", ASK]).items()}


def all_free() -> bool:
    """Whether no CPU is held, within a minute."""
    until = time.monotonic() + FREE
    while time.monotonic() < until:
        if all(offered == left for offered, left in cpus().values()):
            return True
        time.sleep(1.0)
    return False


@contextmanager
def used(token: Path, **flags: Any) -> Iterator[LocalCluster]:
    """A local cluster that jobs started meanwhile run on."""
    before = dict(os.environ)
    with local_cluster(token, **flags) as cluster:
        os.environ |= {**cluster.environment, "RAY_ADDRESS": cluster.about["address"]}
        try:
            yield cluster
        finally:
            os.environ.clear()
            os.environ |= before


@dataclass(frozen=True)
class Runs:
    """Training runs of one model on the same inputs, each in a folder of its own."""

    inputs: list[str]
    root: Path
    model: str

    def command(self, name: str, *more: str) -> list[str]:
        where = str(self.root / self.model / name)
        flags = [*self.inputs, *SHORT, "--model", self.model, "--output", where, *more]
        return [sys.executable, "-m", "zsr", "train", *flags]

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

    def until(self, name: str, step: int, then: Deed, *more: str) -> bool:
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
    found = finish(runs.command(name))["digest"]
    wrong = [f"checkpoint {found[:12]}, expected {digest[:12]}"] if found != digest else []
    wrong += ["other losses"] if runs.losses(name) != runs.losses("unbroken") else []
    wrong += [f"left {path}" for path in runs.left_over(name)]
    print(f"{runs.model}: {what}: {'; '.join(wrong).upper() or 'equal'}", flush=True)
    return not wrong


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


def interrupted(runs: Runs, digest: str, what: str, count: int, coin: random.Random, do: Deed) -> bool:
    """B2. So many runs, each with something done to it after some step, and then submitted again."""
    good = True
    for number in range(count):
        name, step = f"{what.split()[0]}-{number}", coin.randint(2, EPOCH * EPOCHS - 2)
        good &= runs.until(name, step, do) and equal(runs, name, digest, f"{what} after step {step}")
    return good


def other_worlds(runs: Runs, unbroken: dict[str, Any], token: Path) -> bool:
    """B3. A job that may have one worker or two gets what a cluster of its own has room for."""
    steps = EPOCH * EPOCHS
    for cpus, stop in ((3, steps // 3), (2, 2 * steps // 3)):
        with used(token, nodes=1, head_cpus=cpus):
            runs.until("worlds", stop, lambda process: process.kill(), "--num-workers", "1:2")
    with used(token, nodes=1, head_cpus=3):
        found = finish(runs.command("worlds", "--num-workers", "1:2"))
    last, wanted = (
        sum(v for k, v in runs.losses(name)[-1].items() if k.startswith("loss/")) for name in ("worlds", "unbroken")
    )
    apart = abs(last - wanted) / abs(wanted)
    score = abs(found["validation_map_all"] - unbroken["validation_map_all"])
    print(f"{runs.model}: two workers, one, two: loss {apart:.2%} apart, mAP {score:.4f} apart", flush=True)
    return bool(apart <= 0.01 and score <= 0.01)


def faults(runs: Runs, asked: argparse.Namespace, coin: random.Random, nodes: Nodes, token: Path) -> bool:
    """Everything that is asked for, of one model."""
    unbroken = finish(runs.command("unbroken"))
    digest = unbroken["digest"]
    good = kill_workers(runs, digest, asked.kills, coin)
    good &= interrupted(
        runs, digest, "node of the workers removed", asked.nodes, coin, lambda _: nodes.remove_busiest()
    )
    good &= interrupted(runs, digest, "driver killed", asked.drivers, coin, lambda process: process.kill())
    for _ in range(asked.worlds):
        good &= other_worlds(runs, unbroken, token)
    return good


def made(root: Path, source: str, raw: Path, *kinds: str, **more: object) -> list[str]:
    """Prepare `raw` and its class vectors below `root`; the flags that name its artifacts of these kinds."""
    at = {kind: str(root / kind) for kind in kinds}
    job = [sys.executable, "-m"]
    flags = ["--source", source, "--input", str(raw), "--output", at["data"], "--rows-per-shard", "50"]
    finish([*job, "zsr", "prepare", *flags, *(f"--{name}={value}" for name, value in more.items())])
    finish([*job, "zsr", "semantics", "--data", at["data"], "--output", at["semantics"]])
    return [word for kind, path in at.items() for word in (f"--{kind}", path)]


def runs_of(asked: argparse.Namespace) -> list[Runs]:
    """The runs that are asked for, their inputs made."""
    root, kinds = asked.output, ("data", "features", "semantics")
    raw = toy.write_features(root / "raw", each=40)
    inputs = made(root, "parquet", raw, *kinds, **{"features-output": root / "features"}) if asked.models else []
    runs = [Runs(inputs, root, model) for model in asked.models]
    if not asked.pictures:
        return runs
    place = root / "pictures"
    inputs = made(place, "folders", toy.write_pictures(place / "raw", each=20), "data", "semantics")
    behind = [*inputs, "--tower", "tiny", "--random-weights", "--size", "32", "--augment"]
    return runs + [Runs(behind, place, model) for model in asked.pictures]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--models", nargs="*", default=["sem-pcyc", "cfsa", "lcale"])
    parser.add_argument("--pictures", nargs="*", default=["doodle2search"])
    for name, default in (("kills", 3), ("nodes", 1), ("drivers", 1), ("worlds", 1), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    coin = random.Random(asked.seed)
    asked.output.mkdir(parents=True)
    token = asked.output.absolute() / "token"
    token.touch(0o600)
    token.write_text(secrets.token_hex(32))
    print(f"seed {asked.seed}", flush=True)
    with used(token, nodes=3, kinds=("cpu",)) as cluster:
        models = runs_of(asked)
        nodes = Nodes(cluster, dict(cluster.about["ids"]))
        good = all([faults(runs, asked, coin, nodes, token) for runs in models])
        free = all_free()
        print("all CPUs are free" if free else "CPUS ARE STILL HELD", flush=True)
    return 0 if good and free else 1


if __name__ == "__main__":
    sys.exit(main())
