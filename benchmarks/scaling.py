"""How long and how dear a rebuild is on many nodes: a simulation from measured CPU seconds a row, assumptions as flags.

    python -m benchmarks.scaling measure --output rates.json          # generated pictures on 1, 2 and 3 local nodes
    python -m benchmarks.scaling simulate --rates rates.json --price 1.6 --cpus 32 > docs/scaling.md

`measure` runs the pipeline on pictures of natural size, and adds vectors of `index_world` to an index of KEY, on local
clusters of 1, 2 and 3 worker nodes, in rounds: each number of nodes once a round, in another order each time. CPU
seconds that processes take from each other (caches, the other half of a core) count as theirs, so that one run says
little; such disturbance only adds, and the least of the rounds stands for a number of nodes. Printed are that, all
rounds, and the largest over the smallest by nodes: two cores cannot show a shorter wall clock, but work that grows
with nodes would show. The nodes of a cluster offer SLOTS CPUs together, however many they are: more tasks at a time on
the same two cores would take more from each other, which says nothing about nodes.

`simulate` is the model below and no more; what it leaves out (stragglers, spot losses, contention in the storage) makes
a real cluster slower. A stage of R rows in shards of S on N nodes with C CPUs each takes

    start + max(ceil(ceil(R / S) / (N C)) S c, R b / min(N w, W)) + ceil(R / S) d

with c CPU seconds and b bytes a row, w and W bytes a second of a node and of the storage, and d seconds of the driver a
shard. It stops scaling where twice the nodes take more than 0.9 of the time: no shard is left for another CPU, the
storage is full, or the driver and the start of machines take longer than the work.
"""

import argparse
import json
import math
import secrets
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from benchmarks.index_world import World, write
from benchmarks.stream import CLASSES, write_files
from cluster.local import ROOT, LocalCluster, local_cluster
from zsr.cluster import connect, disconnect

NODES: Final = (1, 2, 3)
SLOTS: Final = 6
KEY: Final = "IVF1024,PQ32"
VECTORS, WIDTH = 393_216, 64  # six shards
WORDS: Final = ("apple", "ball", "cat", "dog", "egg", "fish", "goat", "house", "king", "lion")
# stages of a rebuild by what map_pieces calls them
STAGES: Final = ("prepare", "features", "embed", "add")


@dataclass(frozen=True)
class Machine:
    """The assumptions about a cluster: everything that is not measured.

    Attributes:
        cpus: of a node. speed: of one of its CPUs, as a multiple of those that the rates were measured on.
        price: of a node's hour, in any currency.
        node_bytes, storage_bytes: a second, of one node's link to the storage and of the storage as a whole.
        start: seconds until a new machine works. dispatch: seconds of the driver a shard.
    """

    cpus: int
    speed: float
    price: float
    node_bytes: float
    storage_bytes: float
    start: float
    dispatch: float


@dataclass(frozen=True)
class Estimate:
    """Of one stage: seconds on the wall, and what they go to ("CPU", "storage" or "driver")."""

    seconds: float
    bound: str


def estimate(rows: float, nodes: int, shard: int, cpu: float, size: float, machine: Machine) -> Estimate:
    """The formula above.

    Args:
        shard: rows of one. cpu: seconds a row, measured. size: bytes a row, read and written.
    """
    shards = math.ceil(rows / shard)
    parts = {
        "CPU": math.ceil(shards / (nodes * machine.cpus)) * min(shard, rows) * cpu / machine.speed,
        "storage": rows * size / min(nodes * machine.node_bytes, machine.storage_bytes),
    }
    driver = shards * machine.dispatch
    bound = max(parts, key=lambda name: parts[name])
    return Estimate(machine.start + parts[bound] + driver, "driver" if driver > parts[bound] else bound)


def last_useful(rows: float, shard: int, cpu: float, size: float, machine: Machine) -> int:
    """Nodes, a power of two, of which twice as many would take more than 0.9 of the time."""
    nodes = 1
    while True:
        now, then = (estimate(rows, n, shard, cpu, size, machine).seconds for n in (nodes, 2 * nodes))
        if then > 0.9 * now:
            return nodes
        nodes *= 2


def configuration(folder: Path, raw: Path, size: int) -> Path:
    """The pictures below `raw` through a small pipeline, the network's at `size` pixels."""
    names = folder / "names.json"  # the classes mean nothing; training only wants a vector for each
    names.write_text(json.dumps({name: WORDS[number % len(WORDS)] for number, name in enumerate(CLASSES)}))
    settings: dict[str, Any] = {
        "output": str(folder / "run"),
        "prepare": {"source": "folders", "input": str(raw), "rows_per_shard": 500},
        "semantics": {"names": str(names)},
        "features": {"actors": 3, "size": size},
        "train": {"model": "ridge", "split": "random:5:0", "num_workers": 1},
        "embed": {"actors": 2, "classes": "all"},
    }
    file = folder / "pipeline.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def submit(cluster: LocalCluster, job: str, *words: object) -> dict[str, Any]:
    """The job's JSON line. Raises CalledProcessError where it failed."""
    command = [sys.executable, "-m", "cluster.submit", job, "--", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=cluster.environment, stdout=subprocess.PIPE, text=True, check=True)
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return results


def measured(workers: int, raw: Path, world: Path, size: int) -> dict[str, float]:
    """CPU seconds a row of each stage on so many worker nodes, of pictures below `raw` and vectors in `world`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        token = folder / "token"
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        with local_cluster(token, nodes=workers + 1, kinds=("cpu",), cpus=SLOTS // workers) as cluster:
            results = submit(cluster, "pipeline", "--config", configuration(folder, raw, size))
            vectors = ("--embeddings", world / "photo", "--queries", world / "sketch", "--index-dir", folder / "index")
            built = submit(cluster, "index", "build", *vectors, "--index-key", KEY, "--recall-target", 0.1)
        report = json.loads((folder / "index" / "reports" / built["digest"] / "build.json").read_text())
        spent: dict[str, float] = {}
        for lap in results["timeline"]:
            for what, seconds in lap["task_cpu_seconds"].items():
                spent[what] = spent.get(what, 0.0) + seconds
        pictures = rows_of(folder / "run" / "data")
    added = report["stages"]["add"]["tasks_cpu"] / VECTORS
    return {**{stage: spent[stage] / pictures for stage in STAGES if stage != "add"}, "add": added}


def rows_of(root: Path) -> int:
    """Rows of the artifact at `root`."""
    (manifest,) = root.glob("objects/*/manifest.json")
    found = json.loads(manifest.read_text())["facts"]["rows"]
    return int(sum(found.values()) if isinstance(found, dict) else found)


def measure(output: Path, files: int, rounds: int, size: int) -> int:
    """Measure on 1, 2 and 3 nodes; 1 where a stage's CPU seconds a row differ by more than 20%."""
    every: dict[int, list[dict[str, float]]] = {nodes: [] for nodes in NODES}
    with tempfile.TemporaryDirectory() as name:
        raw, world = write_files(Path(name), files), Path(name) / "world"
        connect()
        for side in ("photo", "sketch"):
            write(World(VECTORS, WIDTH), world / side, side)
        disconnect()
        for number in range(rounds):
            for nodes in NODES[number % len(NODES) :] + NODES[: number % len(NODES)]:
                every[nodes].append(measured(nodes, raw, world, size))
                print(f"round {number + 1}, {nodes} nodes: {json.dumps(every[nodes][-1])}", flush=True)
    least = {nodes: {stage: min(one[stage] for one in found) for stage in STAGES} for nodes, found in every.items()}
    spread = {s: max(r[s] for r in least.values()) / min(r[s] for r in least.values()) for s in STAGES}
    print("| stage | " + " | ".join(f"{n} nodes, ms a row (rounds)" for n in NODES) + " | largest / smallest |")
    print("|---|" + "---|" * (len(NODES) + 1))
    for stage in STAGES:
        cells = [
            f"{1000 * least[n][stage]:.3f} ({', '.join(f'{1000 * one[stage]:.3f}' for one in every[n])})" for n in NODES
        ]
        print(f"| {stage} | {' | '.join(cells)} | {spread[stage]:.2f} |")
    output.write_text(json.dumps(least[1], indent=1) + "\n")
    return 0 if max(spread.values()) <= 1.2 else 1


def simulate(arguments: argparse.Namespace) -> int:
    """Print the tables as Markdown."""
    rates: dict[str, float] = json.loads(arguments.rates.read_text())
    machine = Machine(**{name: getattr(arguments, name) for name in Machine.__dataclass_fields__})
    vector = 4 * arguments.dim
    size = {"prepare": 2 * arguments.picture, "features": arguments.picture + vector, "embed": 2 * vector}
    size["add"] = 2 * vector
    print("| pictures | nodes | " + " | ".join(STAGES) + " | hours | cost |")
    print("|---|---|" + "---|" * (len(STAGES) + 2))
    for rows in arguments.pictures:
        for nodes in arguments.nodes:
            found = {s: estimate(rows, nodes, arguments.shard, rates[s], size[s], machine) for s in STAGES}
            hours = sum(one.seconds for one in found.values()) / 3600
            cells = [f"{one.seconds / 3600:.2f} h, {one.bound}" for one in found.values()]
            print(
                f"| {rows:.0e} | {nodes} | {' | '.join(cells)} | {hours:.1f} | {hours * nodes * machine.price:,.0f} |"
            )
    print("\n| pictures | " + " | ".join(f"{stage} stops at" for stage in STAGES) + " |")
    print("|---|" + "---|" * len(STAGES))
    for rows in arguments.pictures:
        stops = [last_useful(rows, arguments.shard, rates[s], size[s], machine) for s in STAGES]
        print(f"| {rows:.0e} | " + " | ".join(f"{nodes} nodes" for nodes in stops) + " |")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    with_measure = commands.add_parser("measure", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    with_measure.add_argument("--output", type=Path, required=True)
    with_measure.add_argument("--files", type=int, default=6_000, help="pictures, half of them sketches")
    with_measure.add_argument("--rounds", type=int, default=3)
    with_measure.add_argument("--size", type=int, default=224, help="pixels that the network sees")
    with_flags = commands.add_parser("simulate", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    with_flags.add_argument("--rates", type=Path, required=True)
    with_flags.add_argument("--price", type=float, required=True, help="of a node's hour")
    with_flags.add_argument("--pictures", type=float, nargs="+", default=[1e7, 1e9, 1e10])
    with_flags.add_argument("--nodes", type=int, nargs="+", default=[1, 8, 64])
    with_flags.add_argument("--shard", type=int, default=100_000, help="rows of one")
    with_flags.add_argument("--picture", type=int, default=20_000, help="bytes of an encoded picture")
    with_flags.add_argument("--dim", type=int, default=128)
    with_flags.add_argument("--cpus", type=int, default=32, help="of a node")
    with_flags.add_argument("--speed", type=float, default=1.0, help="of a CPU, against those measured")
    with_flags.add_argument("--node-bytes", type=float, default=1e9, help="a second, of a node's link to the storage")
    with_flags.add_argument("--storage-bytes", type=float, default=2e10, help="a second, of the storage as a whole")
    with_flags.add_argument("--start", type=float, default=300, help="seconds until new machines work")
    with_flags.add_argument("--dispatch", type=float, default=0.01, help="seconds of the driver a shard")
    arguments = parser.parse_args()
    if arguments.command == "measure":
        return measure(arguments.output, arguments.files, arguments.rounds, arguments.size)
    return simulate(arguments)


if __name__ == "__main__":
    sys.exit(main())
