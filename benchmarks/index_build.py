"""Index builds on the synthetic gallery of `index_world`: ours, plain faiss in one process, and autofaiss.

    python -m benchmarks.index_build STAGE --root runs/index_build [--count 1000000] [--dim 128] [--budget 89MB]

Stages, each a process of its own that keeps its results under ROOT, so that a run may be broken off and taken up:
`data`, `plan`, `build`, `plain`, `auto` and `table`. `plain` is the best practice of plain faiss in one process, with
the key and the training sample that `build` used. `auto` makes an environment for autofaiss, which wants an older
faiss, and builds there. `edit` measures a rebuild of a copy after 1% changed, in whole shards or (--scattered) in rows
of all shards, and compares what it finds with plain faiss's full build from the same template. `offline` answers so
many sketches (--queries) as an artifact, with --ranges also by so many ranges of lists, and compares some with answers
from an opened index. Peak memory is that of the hungriest process.
"""

import argparse
import json
import shutil
import subprocess
import sys
import venv
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.index_world import World, write
from zsr import cluster, telemetry
from zsr.artifact import Store, open_artifact
from zsr.clock import Clock
from zsr.index import faiss_backend
from zsr.index.building.build import Job, build
from zsr.index.building.plan import IndexConfig
from zsr.index.ground_truth import GroundTruth, K, exact
from zsr.index.maintaining import edit
from zsr.index.searching.batch import search_all
from zsr.index.searching.results import SearchParams
from zsr.index.searching.searcher import Searcher
from zsr.index.storage.embeddings import Vectors
from zsr.index.storage.segment import INDEX

CHANGED: Final = 0.01
SAMPLED: Final = 1000  # answers of `offline` that are asked again one by one
PROBES: Final = (1, 2, 4, 8, 16, 32, 64, 128)
THEIRS: Final = ("autofaiss", "pyarrow<22", "faiss-cpu==1.8.0.post1")
AUTOFAISS: Final = """
import json, resource, sys, time
import faiss, numpy as np
from autofaiss import build_index
root, key, budget, probes = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
clock, cpu = time.perf_counter(), time.process_time()
index, _ = build_index(root + "/auto/vectors", index_path=root + "/auto/index", index_infos_path=root + "/auto/infos",
    max_index_memory_usage=budget, current_memory_available="8GB", metric_type="ip", nb_cores=2,
    index_key=None if key == "-" else key, min_nearest_neighbors_to_retrieve=10)
out = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - clock,
    "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "bytes": len(faiss.serialize_index(index))}
queries = np.load(root + "/auto/queries.npy")
faiss.omp_set_num_threads(1)
ivf = faiss.extract_index_ivf(index)
found, rates = [], []
for probe in probes:
    ivf.nprobe = probe
    clock = time.perf_counter()
    found.append(index.search(queries, 10)[1].tolist())
    rates.append(len(queries) / (time.perf_counter() - clock))
json.dump({**out, "found": found, "rates": rates}, open(root + "/auto/" + sys.argv[5], "w"))
"""


class Bench:
    """Its places and sizes."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.root: Path = arguments.root
        self.world = World(arguments.count, arguments.dim)
        self.budget: str | None = arguments.budget
        self.key: str | None = arguments.key
        self.target: float = arguments.target
        self.workers: int = arguments.workers
        self.name: str = arguments.name
        self.truth_of: str = arguments.truth
        self.keep_mean: bool = arguments.keep_mean
        self.scattered: bool = arguments.scattered
        self.queries: int = arguments.queries
        self.ranges: int = arguments.ranges
        self.nprobe: int | None = arguments.nprobe

    @property
    def store(self) -> Store:
        return Store.at(self.root / f"index-{self.name}")

    def inputs(self) -> tuple[Any, Any]:
        """Gallery and sketches."""
        return open_artifact(self.root / "photo", "embeddings"), open_artifact(self.root / "sketch", "embeddings")

    def truth(self) -> GroundTruth:
        """The sketches that every index is measured with, and their exact neighbours."""
        return Searcher.open(self.root / f"index-{self.truth_of}").golden

    def job(self) -> Job:
        """The build, planned."""
        config = IndexConfig(
            index_key=self.key,
            recall_target=self.target,
            max_index_memory_usage=self.budget,
            threads=2,
            num_workers=self.workers,
        )
        return Job.of(*self.inputs(), config, self.store)

    def keep(self, stage: str, results: dict[str, Any]) -> None:
        """Keep and show the results of a stage."""
        (self.root / f"{stage}-{self.name}.json").write_text(json.dumps(results, indent=1))
        print(json.dumps({name: value for name, value in results.items() if name != "evidence"}, indent=1), flush=True)

    def kept(self, stage: str) -> dict[str, Any]:
        """What `keep` kept."""
        results: dict[str, Any] = json.loads((self.root / f"{stage}-{self.name}.json").read_text())
        return results


def curve_of(truth: GroundTruth, search: Any) -> list[dict[str, float]]:
    """Recall@10 and queries a second on one thread, for each of PROBES. `search`: nprobe -> ordinals (Q, 10)."""
    rows = []
    with faiss_backend.threads(1):
        for nprobe in PROBES:
            clock = Clock()
            found = search(nprobe)
            rows.append(
                {
                    "nprobe": nprobe,
                    "recall": truth.recall(found),
                    "qps": round(len(truth.queries) / clock.spent()["wall"], 1),
                }
            )
    return rows


def do_data(bench: Bench) -> None:
    for side in ("photo", "sketch"):
        write(bench.world, bench.root / side, side)


def do_plan(bench: Bench) -> None:
    cluster.connect()
    clock = Clock()
    chosen = bench.job().chosen
    bench.keep("plan", {**chosen.as_json(), **clock.spent()})


def do_build(bench: Bench) -> None:
    cluster.connect()
    published = build(bench.job(), bench.store)
    searcher = Searcher.of(published.artifact)
    report = json.loads((bench.store.root / "reports" / published.artifact.digest / "build.json").read_text())
    factor = int(published.artifact.facts["operating_point"]["refine_factor"])
    curve = curve_of(searcher.golden, lambda n: searcher.nearest(searcher.golden.queries, K, n, factor)[0])
    size = sum(entry.bytes for entry in published.artifact.files)
    stages = report["stages"]
    core = sum(stages[s]["cpu"] + stages[s].get("tasks_cpu", 0) for s in ("sample", "train", "add", "merge"))
    rss = max(max(s["rss"], s.get("tasks_rss", 0)) for s in stages.values())
    bench.keep(
        "build",
        {
            **published.as_json(),
            "cpu": round(core, 1),
            "rss": rss,
            "disk_per_vector": size / bench.world.count,
            "index_bytes": report["plan"]["index_bytes"],
            "train_size": report["plan"]["train_size"],
            "stages": stages,
            "curve": curve,
        },
    )


def do_plain(bench: Bench) -> None:
    """One process: draw the same sample while reading, train, read again and add, write; no tasks, no receipts."""
    ours, gallery = bench.kept("build"), Vectors.of(bench.inputs()[0])
    clock = Clock()
    rows = gallery.drawn(ours["train_size"], 0)
    parts = []
    for shard in range(len(gallery.shards)):
        here = rows[(rows >= gallery.starts[shard]) & (rows < gallery.starts[shard + 1])] - gallery.starts[shard]
        parts.append(gallery.read(shard).vectors[here])
    sample = np.concatenate(parts)
    parts.clear()
    with faiss_backend.threads(2):
        index = faiss_backend.faiss.index_factory(bench.world.dim, ours["index_key"].partition(",Refine")[0], 0)
        ivf = faiss_backend.ivf_of(index)
        if hasattr(ivf, "do_polysemous_training"):
            ivf.do_polysemous_training = False
        if isinstance(index, faiss_backend.faiss.IndexPreTransform) and not bench.keep_mean:
            faiss_backend.train_transform(index.chain.at(0), sample, "ip")
        index.train(sample)
        for shard in range(len(gallery.shards)):
            index.add(gallery.read(shard).vectors)
    faiss_backend.faiss.write_index(index, str(bench.root / "plain.faiss"))
    spent = clock.spent()
    truth = bench.truth()
    curve = curve_of(truth, lambda n: faiss_backend.probe(index, truth.queries, K, n)[0])
    bench.keep("plain", {"index_key": ours["index_key"], "cpu": spent["cpu"], "rss": spent["rss"], "curve": curve})


def do_auto(bench: Bench) -> None:
    """autofaiss, in an environment of its own: its choice under the budget, or `--key`."""
    place, python = bench.root / "auto", bench.root / "autofaiss-venv" / "bin" / "python"
    if not (bench.root / "autofaiss-venv" / "ready").exists():
        venv.create(bench.root / "autofaiss-venv", with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *THEIRS], check=True)
        (bench.root / "autofaiss-venv" / "ready").touch()
    (place / "vectors").mkdir(parents=True, exist_ok=True)
    gallery = Vectors.of(bench.inputs()[0])
    for shard in range(len(gallery.shards)):
        path = place / "vectors" / f"{shard:05d}.npy"
        if not path.exists():
            np.save(path, gallery.read(shard).vectors)
    truth = bench.truth()
    np.save(place / "queries.npy", truth.queries)
    words = [bench.key or "-", bench.budget or "100MB", json.dumps(PROBES), "out.json"]
    subprocess.run([python, "-c", AUTOFAISS, str(bench.root), *words], check=True)
    out = json.loads((place / "out.json").read_text())
    curve = [
        {"nprobe": nprobe, "recall": truth.recall(np.array(found)), "qps": round(rate, 1)}
        for nprobe, found, rate in zip(PROBES, out.pop("found"), out.pop("rates"), strict=True)
    ]
    infos = (place / "infos").read_text() if (place / "infos").exists() else "{}"
    key = bench.key or json.loads(infos).get("index_key", "its choice")
    bench.keep("auto", {"index_key": key, **out, "curve": curve})


def do_edit(bench: Bench) -> None:
    """Change 1% of the gallery and rebuild; the cost beside that of the full build, and the answers beside faiss's."""
    cluster.connect()
    count, stage = len(Vectors.of(bench.inputs()[0]).shards), "edit-scattered" if bench.scattered else "edit"
    shards = () if bench.scattered else tuple(range(max(1, round(count * CHANGED))))
    changed = World(bench.world.count, bench.world.dim, changed=shards, scattered=CHANGED if bench.scattered else 0.0)
    gallery = write(changed, bench.root / f"photo-{stage}", "photo")
    place = bench.root / f"index-{stage}-{bench.name}"
    shutil.rmtree(place, ignore_errors=True)
    store = Store.at(shutil.copytree(bench.store.root, place))
    before, clock = dict(telemetry.spent()), Clock()
    done = edit.rebuild(store, gallery, workers=bench.workers)
    spent = clock.spent()
    tasks = {what: seconds - before.get(what, 0.0) for what, seconds in telemetry.spent().items()}
    total, full = spent["cpu"] + sum(tasks.values()), bench.kept("build")["cpu"]
    same = same_answers(Searcher.of(store.latest()), Vectors.of(gallery))
    cost = {"tasks": tasks, "full_build_cpu": full, "share": round(total / full, 4), "same_as_full_build": same}
    bench.keep(stage, {**done.as_json(), **spent, **cost})


def same_answers(rebuilt: Searcher, gallery: Vectors) -> float:
    """Share of golden answers of `rebuilt` that faiss gives, too, with all of `gallery` in the same trained index."""
    first = rebuilt.segments[0]
    index = faiss_backend.from_bytes(faiss_backend.template_of(first.files[INDEX]), "template")
    ids = []
    with faiss_backend.threads(2):
        for shard in range(len(gallery.shards)):
            block = gallery.read(shard)
            index.add(block.vectors.astype(np.float32, copy=False))
            ids.append(block.names.column("id").to_numpy())
        queries, nprobe = rebuilt.golden.queries, int(rebuilt.facts["operating_point"]["nprobe"])
        found = np.concatenate(ids)[faiss_backend.probe(index, queries, K, nprobe)[0]]
    ours = rebuilt.search(queries, K, nprobe, 1).ids
    return float((found[:, :, None] == ours[:, None, :]).any(axis=2).mean())


def do_offline(bench: Bench) -> None:
    """Answer many sketches as zsr search does; some of the answers beside those of an opened index, and the truth."""
    cluster.connect()
    queries = write(replace(bench.world, sketches=bench.queries), bench.root / f"sketch-{bench.queries}", "sketch")
    index, place = bench.store.latest(), bench.root / f"neighbours-{bench.name}"
    shutil.rmtree(place, ignore_errors=True)
    wish = SearchParams(K, bench.nprobe)
    made, told = search_all(index, queries, wish, Store.at(place / "whole"), workers=bench.workers)
    if bench.ranges:
        output = Store.at(place / "ranges")
        same_made, cost = search_all(index, queries, wish, output, list_ranges=bench.ranges, workers=bench.workers)
        told |= {"by_ranges": cost, "equal_digests": same_made.digest == made.digest}
    asked, searcher = Vectors.of(queries), Searcher.of(index)
    same, found, wanted = [], [], []
    for shard in range(len(asked.shards)):
        block = asked.read(shard)
        some = np.sort(np.random.default_rng(shard).choice(len(block.vectors), SAMPLED // len(asked.shards), False))
        online = searcher.search(block.vectors[some], K, bench.nprobe).ids
        table = made.read_table(asked.shards[shard].path)
        answered, ids = (np.asarray(table.column(name)).reshape(-1, K) for name in ("query_id", "id"))
        order = np.argsort(answered[:, 0])
        asked_for = block.names.column("id").to_numpy()[some]
        offline = ids[order[np.searchsorted(answered[order, 0], asked_for)]]
        same.append((online == offline).all(axis=1))
        found.append(offline)
        wanted.append(block.vectors[some])
    gallery = Vectors.of(bench.inputs()[0])
    named = np.concatenate([gallery.read(shard).names.column("id").to_numpy() for shard in range(len(gallery.shards))])
    nearest = named[exact(gallery, np.concatenate(wanted)).ordinals[:, :K]]
    recall = (np.concatenate(found)[:, :, None] == nearest[:, None, :]).any(axis=2).mean()
    compared = {"compared": len(nearest), "equal": float(np.concatenate(same).mean()), "recall": float(recall)}
    bench.keep("offline", {**told, "queries": bench.queries, **compared})


def do_table(bench: Bench) -> None:
    """What there is, as a table in Markdown."""
    print("| index | key | MB | CPU s | peak MB | recall@10 at 16 / 64 | queries a second at 16 / 64 |")
    print("|---|---|---|---|---|---|---|")
    for path in sorted(bench.root.glob("*-*.json")):
        row = json.loads(path.read_text())
        if "curve" not in row or "cpu" not in row:
            continue
        at = {p["nprobe"]: p for p in row["curve"]}
        size = row.get("index_bytes", row.get("bytes", 0)) / 1e6
        print(
            f"| {path.stem} | {row['index_key']} | {size:.0f} | {row['cpu']:.0f} | {row['rss'] / 1e6:.0f} | "
            f"{at[16]['recall']:.3f} / {at[64]['recall']:.3f} | {at[16]['qps']:.0f} / {at[64]['qps']:.0f} |"
        )


STAGES: Final = {
    "data": do_data,
    "plan": do_plan,
    "build": do_build,
    "plain": do_plain,
    "auto": do_auto,
    "edit": do_edit,
    "offline": do_offline,
    "table": do_table,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--root", type=Path, default=Path("runs/index_build"))
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--budget", help="of the index, such as 89MB")
    parser.add_argument("--key", help="an index key instead of the planner's or autofaiss's choice")
    parser.add_argument("--target", type=float, default=0.9, help="recall@10 of the sketches")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--keep-mean", action="store_true", help="plain: let PCA move the origin, as faiss does")
    parser.add_argument("--queries", type=int, default=1_000_000, help="offline: how many")
    parser.add_argument("--nprobe", type=int, help="offline: in place of the index's own; each query needs ten hits")
    parser.add_argument("--ranges", type=int, default=0, help="offline: of lists")
    parser.add_argument("--scattered", action="store_true", help="edit: the 1%% are rows of all shards")
    parser.add_argument("--truth", default="main", help="name of a build, whose queries are used")
    parser.add_argument("--name", default="main", help="of this variant; results are kept as STAGE-NAME.json")
    arguments = parser.parse_args()
    arguments.root.mkdir(parents=True, exist_ok=True)
    try:
        STAGES[arguments.stage](Bench(arguments))
    finally:
        cluster.disconnect()
    return 0


if __name__ == "__main__":
    sys.exit(main())
