"""Pictures a second of jobs.features against a plain loop with a DataLoader, and against its slower stage alone.

    python -m benchmarks.embed SCRATCH [--files 20000] [--processes 2] [--threads 2]

JPEGs of natural size through EfficientNet-Lite0 at 224 pixels, from the same shards with the same decoder, in one run:

    stages  so many processes at once, one thread each, that decode only, and that pass ready pixels through the
            network only. The slower of the two bounds every design that puts each stage on all CPUs at a time.
    ours    jobs.features: each actor decodes and computes in turn, on one thread. Start-up apart: rows over the
            seconds that an actor works, times actors; wall seconds with start-up stand beside it.
    loader  a torch DataLoader with W workers that decode, and the network in the main process on all threads, for W of
            1 and 2, over some of the shards; once as everybody runs it, and once with our setting of the allocator
            (`worker.keep_freed_memory`). It writes nothing. Start-up apart: from its second batch on.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import numpy as np
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
ALONE: Final = 640  # pictures a process of each stage alone


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


def alone(stage: str, data: Artifact, barrier: Any, results: Any) -> None:
    """Seconds a picture of one stage; runs in a process of its own."""
    keep_freed_memory()
    torch.set_num_threads(1)
    own, name = made(), data.shards("photo")[0].path
    images = data.read_table(name, columns=["image"]).column("image").to_pylist()
    pixels = np.stack([own.pixels("photo", image) for image in images[:BATCH]])
    own.features("photo", pixels)
    barrier.wait()
    began = time.perf_counter()
    for start in range(0, ALONE, BATCH):
        if stage == "decode":
            for number in range(start, start + BATCH):
                own.pixels("photo", images[number % len(images)])
        else:
            own.features("photo", pixels)
    results.put((time.perf_counter() - began) / ALONE)


def ceiling(stage: str, data: Artifact, processes: int) -> float:
    """Pictures a second of `processes` that do nothing but one stage."""
    context = get_context("spawn")
    barrier, results = context.Barrier(processes), context.Queue()
    running = [context.Process(target=alone, args=(stage, data, barrier, results)) for _ in range(processes)]
    for process in running:
        process.start()
    rate = sum(1 / results.get() for _ in running)
    for process in running:
        process.join()
    return float(rate)


def loader(data: Artifact, workers: int, threads: int) -> float:
    """Pictures a second of the plain loop."""
    torch.set_num_threads(threads)
    own, seen, began, kept = made(), 0, 0.0, []
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
    try:
        source = Folders(write_files(asked.scratch, asked.files))
        data = prepare(source, Store.at(asked.scratch / "data"), Prepare(rows_per_shard=ROWS))
        found = ours(data, asked.scratch, asked.processes)
    finally:
        cluster.disconnect()
    print(json.dumps(found, indent=1), flush=True)
    stages = {stage: ceiling(stage, data, asked.processes) for stage in ("decode", "model")}
    plain = {f"{w} workers": loader(data, w, asked.threads) for w in (1, 2)}
    keep_freed_memory()
    plain |= {f"{w} workers, allocator": loader(data, w, asked.threads) for w in (1, 2)}
    rate = found["rows_a_second_an_actor"] * found["actors"]
    every = {**{f"{name} alone": one for name, one in stages.items()}, **plain, "ours": rate}
    print("| what | pictures a second | ours against it |\n|---|---|---|")
    for name, one in every.items():
        print(f"| {name} | {one:.1f} | {rate / one:.3f} |")
    print(f"| ours with start-up | {found['rows_a_second']} | |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
