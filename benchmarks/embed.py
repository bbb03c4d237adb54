"""Pictures a second of zsr features against a plain loop with a DataLoader, and against its slower stage alone.

    python -m benchmarks.embed SCRATCH [--files 20000] [--rounds 4] [--actors 2] [--threads 2]

JPEGs of natural size through EfficientNet-Lite0 at 224 pixels, from the same shards with the same decoder, in one run.
A machine's speed may drift by a tenth within minutes, so that the files are cut into rounds, everything is measured in
each, and ours is compared with the mean of the stages before and after it:

    stages  decoding only, and ready pixels through the network only in batches of the job's size, by so many bare
            processes of one thread at once. The slower stage bounds every design that puts each stage on all CPUs at a
            time.
    ours    zsr features: each actor decodes and computes in turn, on one thread. Start-up apart: rows over the
            seconds that an actor works, times actors; wall seconds with start-up stand beside it.
    in turn a Ray Data stage whose actors make the features of a shard as ours, then pass ready pixels through the
            network alone for some seconds, and so on: what a job loses by decoding, reading and writing, apart from
            what Ray's own processes take of the CPUs.
    loader  a torch DataLoader with as many workers that decode, and the network in the main process on all threads,
            over some of the shards; once as everybody runs it, and once with our setting of the allocator
            (`process.keep_freed_memory`) and our folded batch norms. It writes nothing. Start-up apart: from its second
            batch on.
"""

import argparse
import itertools
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
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
from zsr.embedding.backbone import ShardExtractor, extract, plan, shards
from zsr.embedding.encode import Featurizer, featurizer
from zsr.embedding.settings import BackboneSettings, Prices
from zsr.embedding.shards import compute, fingerprint
from zsr.models import backbones
from zsr.process import keep_freed_memory

BATCH: Final = backbones.pictures_at_once("cpu")
ROWS: Final = 250  # of a shard
SHARDS: Final = 6  # that the loader passes: sketches, which decode faster than photos
SETTLE: Final = 6.0  # seconds of a stage alone that do not count: the other processes are starting
LASTING: Final = 15.0  # and those that do
TURNS: Final = 12  # shards of ours in turn with the network alone


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


def rate(stage: str, own: Featurizer, images: Sequence[bytes], seconds: float) -> float:
    """Pictures a second of one stage, "decode" or "model", and nothing else."""
    ready = np.stack([own.pixels("photo", image) for image in images[:BATCH]])
    seen, began = 0, time.perf_counter()
    while (took := time.perf_counter() - began) < seconds:
        if stage == "decode":
            own.pixels("photo", images[seen % len(images)])
        else:
            own.features("photo", ready)
        seen += 1 if stage == "decode" else BATCH
    return seen / took


def pictures_in(data: Artifact) -> list[bytes]:
    """The encoded photos of a shard."""
    images: list[bytes] = data.read_table(data.shards("photo")[0].path, columns=["image"]).column("image").to_pylist()
    return images


def in_process(stage: str, data: Artifact) -> float:
    """Pictures a second of one stage, once all processes have started."""
    keep_freed_memory()
    torch.set_num_threads(1)
    own, images = made().ready("cpu"), pictures_in(data)
    rate(stage, own, images, SETTLE)
    return rate(stage, own, images, LASTING)


def at_once(count: int, function: Callable[..., float], *arguments: object) -> float:
    """The sum of what so many fresh processes measure."""
    with ProcessPoolExecutor(count, get_context("spawn")) as pool:
        return sum(one.result() for one in [pool.submit(function, *arguments) for _ in range(count)])


def stages(data: Artifact, actors: int) -> dict[str, float]:
    """Every stage alone."""
    names = {"decode": "decoding alone, bare processes", "model": "the network alone, bare processes"}
    return {name: at_once(actors, in_process, stage, data) for stage, name in names.items()}


class InTurn(ShardExtractor):
    """The job's own actor, which after each shard does nothing but the network for some seconds."""

    def __init__(self, **shared: Any) -> None:
        super().__init__(**shared)
        self.images = pictures_in(self.maker.data)

    def __call__(self, piece: dict[str, Any]) -> dict[str, Any]:
        result = super().__call__(piece)
        return {**result, "alone": rate("model", self.maker.featurizer, self.images, LASTING / 3)}


def in_turn(data: Artifact, output: Path, actors: int) -> tuple[float, float]:
    """Pictures a second of ours, and of the network alone in the same actors of Ray Data."""
    cluster.connect()
    shutil.rmtree(output, ignore_errors=True)
    weights, settings, store = backbones.weights_path("lite0", None), BackboneSettings(), Store.at(output)
    work = plan(data, settings, weights)
    wanted = {name: fingerprint(work, data.entry(name)) for name in shards(data, settings)[:TURNS]}
    shared = {"data": data, "settings": settings, "weights": weights, "batch": None}
    shared |= {"sha256": work.config["weights"], "texts": ""}
    tally = compute("in turn", InTurn, wanted, store, store.staging(work), shared, actors)
    cluster.disconnect()
    both = tally.results[:-actors]  # at the end an actor has no neighbour
    own = sum(int(one["rows"]) for one in both) / sum(sum(one["seconds"].values()) for one in both)
    return actors * own, actors * mean(one["alone"] for one in both)


def loader(data: Artifact, workers: int, threads: int, quick: bool) -> float:
    """Pictures a second of the plain loop; `quick` with what zsr features does to the network and the allocator."""
    torch.set_num_threads(threads)
    if quick:
        keep_freed_memory()
    own, seen, began, kept = made().ready("cpu") if quick else made(), 0, 0.0, list[np.ndarray]()
    for pixels in DataLoader(Pictures(data), batch_size=None, num_workers=workers, multiprocessing_context="spawn"):
        kept.append(own.features("photo", pixels.numpy()))
        if began:
            seen += len(pixels)
        else:
            began = time.perf_counter()
    return seen / (time.perf_counter() - began)


def ours(data: Artifact, output: Path, actors: int) -> dict[str, Any]:
    """What the job itself reports."""
    weights = backbones.weights_path("lite0", None)
    cluster.connect()
    _, tally = extract(data, BackboneSettings(), weights, Store.at(output), batch=None, actors=actors)
    cluster.disconnect()
    report = tally.report(Prices())
    return {**report, "rate": report["rows_a_second_an_actor"] * tally.actors}


def line(name: str, rates: Sequence[float], against: Sequence[float]) -> str:
    """Of a table: the rates of all rounds, and `against` over them round by round."""
    ratios = [one / other for one, other in zip(against, rates, strict=True)]
    rounds = " ".join(f"{rate:.1f}" for rate in rates)
    return (
        f"| {name} | {median(rates):.1f} | {rounds} | {median(ratios):.3f} | {min(ratios):.3f} to {max(ratios):.3f} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    parts = []
    cluster.connect()
    for part in range(asked.rounds):
        source = Folders(write_files(asked.scratch / f"{part}", asked.files // asked.rounds))
        parts.append(prepare(source, Store.at(asked.scratch / f"{part}" / "data"), Prepare(rows_per_shard=ROWS)))
    cluster.disconnect()
    alone, found, turns, loops = [stages(parts[0], asked.actors)], [], [], []
    for part, data in enumerate(parts):
        found.append(ours(data, asked.scratch / f"{part}" / "features", asked.actors))
        alone.append(stages(data, asked.actors))
        turns.append(in_turn(data, asked.scratch / f"{part}" / "turns", asked.actors))
        loops.append(
            {
                f"a DataLoader, {how}": at_once(1, loader, data, asked.actors, asked.threads, quick)
                for how, quick in (("as everybody runs it", False), ("with our allocator and folded norms", True))
            }
        )
        print(found[-1], alone[-2:], turns[-1], loops[-1], flush=True)
    rates = [one["rate"] for one in found]
    print("| what | pictures a second | in each round | ours against it | from, to |\n|---|---|---|---|---|")
    for name in alone[0]:
        print(line(name, [(one[name] + two[name]) / 2 for one, two in itertools.pairwise(alone)], rates))
    for name in loops[0]:
        print(line(name, [one[name] for one in loops], rates))
    print(line("in turn: the network alone", [other for _, other in turns], [own for own, _ in turns]))
    print(line("ours", rates, rates))
    print(line("ours with start-up", [one["rows_a_second"] for one in found], rates))
    return 0


if __name__ == "__main__":
    sys.exit(main())
