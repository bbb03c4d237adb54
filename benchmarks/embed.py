"""Pictures a second of jobs.features against a plain loop with a DataLoader, and against its slower stage alone.

    python -m benchmarks.embed SCRATCH [--files 20000] [--processes 2] [--threads 2]

JPEGs of natural size through EfficientNet-Lite0 at 224 pixels, from the same shards with the same decoder, in one run:

    stages  so many processes at once, one thread each, that decode only, and that pass ready pixels through the
            network only, in batches of the job's size and of 32; and the same by so many Ray actors, which is the
            network's stage of the job alone. Each is measured before and after ours, since a machine's speed drifts,
            and the mean of both stands. The slower stage bounds every design that puts each stage on all CPUs at a
            time.
    ours    jobs.features: each actor decodes and computes in turn, on one thread. Start-up apart: rows over the
            seconds that an actor works, times actors; wall seconds with start-up stand beside it.
    loader  a torch DataLoader with W workers that decode, and the network in the main process on all threads, for W of
            1 and 2, over some of the shards; once as everybody runs it, and once with our setting of the allocator
            (`worker.keep_freed_memory`) and our folded batch norms. It writes nothing. Start-up apart: from its second
            batch on.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import numpy as np
import ray
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from benchmarks.stream import write_files
from zsr import cluster
from zsr.artifact import Artifact, Store
from zsr.data.prepare import Prepare, prepare
from zsr.data.sources.folders import Folders
from zsr.embedding.backbone import extract
from zsr.embedding.encode import BackboneSettings, Featurizer, featurizer
from zsr.embedding.shards import Prices
from zsr.models import backbones
from zsr.worker import keep_freed_memory

BATCH: Final = 32
ROWS: Final = 500  # of a shard
SHARDS: Final = 8  # that the loader passes: sketches, which decode faster than photos
SETTLE: Final = 8.0  # seconds of a stage alone that do not count: the other processes are starting
LASTING: Final = 15.0  # and those that do


def made() -> Featurizer:
    """Lite0 with its package's weights."""
    weights = backbones.weights_path("lite0", None)
    return featurizer(BackboneSettings(), weights, backbones.digest(weights))


class Pictures(IterableDataset[Tensor]):
    """Decoded pixels (B, 224, 224, 3), shard after shard, each by one of the workers."""

    def __init__(self, data: Artifact) -> None:
        self.data, self.names = data, [e.path for e in data.shards()][-SHARDS:]

    def __iter__(self) -> Iterator[Tensor]:
        about, own = get_worker_info(), made()
        names = self.names if about is None else self.names[about.id :: about.num_workers]
        for name in names:
            side = name.partition("/")[0].removeprefix("modality=")
            images = self.data.read_table(name, columns=["image"]).column("image").to_pylist()
            for start in range(0, len(images), BATCH):
                yield torch.from_numpy(np.stack([own.pixels(side, i) for i in images[start : start + BATCH]]))


def alone(stage: str, batch: int, data: Artifact) -> float:
    """Pictures a second of one stage, "decode" or "model", once all processes have started."""
    keep_freed_memory()
    torch.set_num_threads(1)
    own, name = made().ready("cpu"), data.shards("photo")[0].path
    images = data.read_table(name, columns=["image"]).column("image").to_pylist()
    pixels = np.stack([own.pixels("photo", image) for image in images[:batch]])
    seen, began = 0, time.perf_counter()
    counted_from, counted = began + SETTLE, 0
    while (now := time.perf_counter()) < counted_from + LASTING:
        if not counted and now >= counted_from:
            counted, counted_from = seen, now
        if stage == "decode":
            own.pixels("photo", images[seen % len(images)])
        else:
            own.features("photo", pixels)
        seen += 1 if stage == "decode" else batch
    return (seen - counted) / (now - counted_from)


class Stage:
    """A Ray actor of the network's stage alone."""

    def rate(self, batch: int, data: Artifact) -> float:
        return alone("model", batch, data)


def by_processes(stage: str, batch: int, data: Artifact, processes: int) -> float:
    """Pictures a second of `processes` that do nothing but one stage."""
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        return sum(one.result() for one in [pool.submit(alone, stage, batch, data) for _ in range(processes)])


def by_actors(batch: int, data: Artifact, actors: int) -> float:
    """Pictures a second of the network's stage alone, in processes as jobs.features has them."""
    made: list[Any] = [ray.remote(num_cpus=1)(Stage).remote() for _ in range(actors)]
    return float(sum(ray.get([one.rate.remote(batch, data) for one in made])))


def ceilings(data: Artifact, processes: int) -> dict[str, float]:
    """Every stage alone."""
    job = backbones.pictures_at_once("cpu")
    cluster.connect()
    actors = by_actors(job, data, processes)
    cluster.disconnect()
    return {
        "decoding alone": by_processes("decode", 1, data, processes),
        f"the network alone, {job} at a time": by_processes("model", job, data, processes),
        f"the network alone, {BATCH} at a time": by_processes("model", BATCH, data, processes),
        f"the network's stage alone, Ray actors, {job} at a time": actors,
    }


def loader(data: Artifact, workers: int, threads: int, *, quick: bool) -> float:
    """Pictures a second of the plain loop; `quick` with what jobs.features does to the network and the allocator."""
    torch.set_num_threads(threads)
    if quick:
        keep_freed_memory()  # for good: the plain loops come first
    own, seen, began, kept = made().ready("cpu") if quick else made(), 0, 0.0, list[np.ndarray]()
    for pixels in DataLoader(Pictures(data), batch_size=None, num_workers=workers, multiprocessing_context="spawn"):
        kept.append(own.features("photo", pixels.numpy()))
        if began:
            seen += len(pixels)
        else:
            began = time.perf_counter()
    return seen / (time.perf_counter() - began)


def ours(data: Artifact, scratch: Path, actors: int) -> dict[str, Any]:
    """What the job itself reports."""
    weights, output = backbones.weights_path("lite0", None), Store.at(scratch / "features")
    _, tally = extract(data, BackboneSettings(), weights, output, batch=None, actors=actors)
    return {**tally.report(Prices()), "actors": tally.actors}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    cluster.connect()
    source = Folders(write_files(asked.scratch, asked.files))
    data = prepare(source, Store.at(asked.scratch / "data"), Prepare(rows_per_shard=ROWS))
    cluster.disconnect()
    before = ceilings(data, asked.processes)
    cluster.connect()
    found = ours(data, asked.scratch, asked.processes)
    cluster.disconnect()
    print(json.dumps(found, indent=1), flush=True)
    after = ceilings(data, asked.processes)
    stages = {name: (one + after[name]) / 2 for name, one in before.items()}
    plain = {f"DataLoader, {w} workers": loader(data, w, asked.threads, quick=False) for w in (1, 2)}
    plain |= {f"the same, allocator and folding, {w}": loader(data, w, asked.threads, quick=True) for w in (1, 2)}
    rate = found["rows_a_second_an_actor"] * found["actors"]
    print("| what | pictures a second | before, after | ours against it |\n|---|---|---|---|")
    for name, one in {**stages, **plain, "ours": rate}.items():
        rounds = f"{before[name]:.1f}, {after[name]:.1f}" if name in before else ""
        print(f"| {name} | {one:.1f} | {rounds} | {rate / one:.3f} |")
    print(f"| ours with start-up | {found['rows_a_second']} | | |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
