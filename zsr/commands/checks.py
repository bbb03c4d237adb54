"""Checks of `zsr doctor`: comparisons over the nodes of a cluster, measurements, and what to fix."""

import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import ray
from rich.console import Console
from rich.table import Table

from zsr.cluster import connect
from zsr.commands import probes
from zsr.commands.doctor import Config


@dataclass(frozen=True)
class Check:
    """One row of the table.

    Attributes:
        what: name of the check.
        found: the result, in words.
        fix: what to do; empty if the check passed.
    """

    what: str
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Node:
    """A node that Ray reports as alive.

    Attributes:
        offered: its Ray resources, by name.
        facts: the result of `probes.describe` there, or {"failed": reason}.
    """

    identity: str
    name: str
    offered: Mapping[str, float]
    facts: Mapping[str, Any]


def nodes_of(described: Sequence[Mapping[str, Any]]) -> list[Node]:
    """Ray's live nodes, each with the result of `probes.describe`."""
    alive = sorted((n for n in described if n["Alive"]), key=lambda n: n["NodeID"])
    asked: dict[str, Any] = {
        n["NodeID"]: probes.describe.options(**probes.on(n["NodeID"])).remote(tempfile.gettempdir()) for n in alive
    }
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=probes.WAIT)
    return [
        Node(
            identity=n["NodeID"],
            name=f"{n['Labels'].get('zsr/kind', 'node')} {n['NodeManagerAddress']} {n['NodeID'][:6]}",
            offered=n["Resources"],
            facts=answer(asked[n["NodeID"]]),
        )
        for n in alive
    ]


def answer(reference: Any) -> probes.Facts:
    """The result of a probe, or in one line why it failed."""
    try:
        return dict(ray.get(reference, timeout=0))
    except ray.exceptions.GetTimeoutError:
        return {"failed": f"no answer within {probes.WAIT:.0f} s"}
    except ray.exceptions.RayError as error:
        return {"failed": str(error).strip().splitlines()[-1]}


def answers(nodes: Sequence[Node]) -> Iterator[Check]:
    """Check that every node ran the probe."""
    for node in nodes:
        why = node.facts.get("failed", "")
        fix = "check its raylet.log and its environment, or remove the node" if why else ""
        yield Check(f"{node.name} answers", why or "yes", fix)


def same_versions(nodes: Sequence[Node]) -> Iterator[Check]:
    """One row per package whose version differs between nodes, or one row if none does."""
    found = {node.name: comparable(node.facts["versions"]) for node in nodes}
    packages = sorted(set().union(*found.values()))
    differing = [p for p in packages if len({versions.get(p) for versions in found.values()}) > 1]
    for package in differing:
        counted = Counter(versions.get(package, "") for versions in found.values())
        usual = counted.most_common(1)[0][0]
        odd = {name: v.get(package, "") or "none" for name, v in found.items() if v.get(package, "") != usual}
        listed = ", ".join(f"{version} on {name}" for name, version in odd.items())
        fix = f"change {package} to {usual or 'none'} there, or start these nodes from the image of the others"
        yield Check(f"version of {package}", f"{usual or 'none'} on {counted[usual]} nodes, {listed}", fix)
    if not differing:
        known = [f"{p} {v}" for p, v in next(iter(found.values())).items() if v]
        yield Check("same versions", ", ".join(known))


def comparable(versions: Mapping[str, str]) -> dict[str, str]:
    """Versions without the legitimate differences of CPU and GPU nodes: the build tag, and faiss-cpu or faiss-gpu."""
    plain = {package: version.partition("+")[0] for package, version in versions.items()}
    faiss = [plain.pop(package) for package in ("faiss-cpu", "faiss-gpu") if package in plain]
    return plain | {"faiss": " and ".join(version for version in faiss if version)}


def same_extras(nodes: Sequence[Node]) -> Iterator[Check]:
    """One row per extra that some nodes lack, and one for the extras that all nodes have."""
    found = {node.name: set(node.facts["extras"]) for node in nodes}
    everywhere = set.intersection(*found.values())
    for extra in sorted(set().union(*found.values()) - everywhere):
        lacking = [name for name, extras in found.items() if extra not in extras]
        fix = f"install zsr[{extra}] there, or start these nodes from the image of the others"
        yield Check(f"extra {extra}", f"not on {', '.join(lacking)}", fix)
    without = "" if "s3" in everywhere else "; without s3, no artifact can be in a bucket"
    yield Check("extras on all nodes", (", ".join(sorted(everywhere)) or "none") + without)


def gpus(nodes: Sequence[Node]) -> Iterator[Check]:
    """Check that torch sees as many GPUs as Ray offers."""
    for node in nodes:
        offered, torch = int(node.offered.get("GPU", 0)), node.facts["gpus_torch"]
        fix = ""
        if torch < offered:
            fix = "torch cannot use CUDA there: use the GPU image, or install a driver for its CUDA version"
        elif torch > offered:
            fix = "Ray offers fewer GPUs than the node has: start the node with --num-gpus set to all, or without it"
        yield Check(f"GPUs of {node.name}", f"Ray {offered}, torch {torch}", fix)


def disks(nodes: Sequence[Node], config: Config) -> Iterator[Check]:
    """Check the free space of the disk for Ray's spilled objects and logs."""
    for node in nodes:
        free = node.facts["free_bytes"] / 2**30
        few = free < config.min_free_gib
        fix = f"free {config.min_free_gib - free:.1f} GiB, or set --object-spilling-directory to a larger disk"
        yield Check(f"free disk of {node.name}", f"{free:.1f} GiB", fix if few else "")


def clocks(nodes: Sequence[Node], config: Config) -> Iterator[Check]:
    """Compare every node's clock with the driver's."""
    for node in nodes:
        skew = probes.clock_skew(node.identity)
        fix = "run a time service there (chrony)" if abs(skew) > config.max_skew else ""
        yield Check(f"clock of {node.name}", f"{skew:+.3f} s", fix)


def links(nodes: Sequence[Node], config: Config) -> Iterator[Check]:
    """Measure the bandwidth between nodes, for gradients (all-reduce) and for data (object store)."""
    with_gpu = [node for node in nodes if node.offered.get("GPU", 0) >= 1]
    ring = with_gpu if len(with_gpu) > 1 else nodes
    if len(nodes) < 2:
        return
    size = config.megabytes << 20
    backend = "NCCL" if ring is with_gpu else "gloo"
    names = f"all-reduce over {len(ring)} nodes, {backend}"
    speed = probes.all_reduce_speed([node.identity for node in ring], ring is with_gpu, size) * 8 / 1e9
    fix = "NCCL_DEBUG=INFO logs which link is used; NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME selects another"
    yield Check(names, f"{speed:.2f} Gbit/s", fix if speed < config.min_all_reduce_gbit else "")
    for source, target in zip(nodes, [*nodes[1:], nodes[0]], strict=True):
        speed = probes.object_store_speed(source.identity, target.identity, size) * 8 / 1e9
        fix = "increase --object-store-memory or /dev/shm, or place the nodes in one zone"
        what = f"object store {source.name} to {target.name}"
        yield Check(what, f"{speed:.2f} Gbit/s", fix if speed < config.min_object_store_gbit else "")


def examine(config: Config) -> list[Check]:
    """Run every check, in the order of the table."""
    connect()
    nodes = nodes_of(ray.nodes())  # type: ignore[no-untyped-call]
    checks = list(answers(nodes))
    well = [node for node in nodes if "failed" not in node.facts]
    checks += [
        *same_versions(well),
        *same_extras(well),
        *gpus(well),
        *disks(well, config),
        *clocks(well, config),
        *links(well, config),
    ]
    return checks


def show(checks: Sequence[Check]) -> None:
    """Print the table to stdout."""
    table = Table("", "what", "found", "fix", box=None, pad_edge=False)
    for check in checks:
        table.add_row("FIX" if check.fix else "ok", check.what, check.found, check.fix)
    Console(width=None if sys.stdout.isatty() else 200).print(table)


ALL: Final = (answers, same_versions, same_extras, gpus, disks, clocks, links)
