"""Decoded pictures a second: class-balanced pairs through our stream against a torch DataLoader on the same shards.

    python -m benchmarks.stream [--files 50000] [--root DIR]

Both sides decode with the same function to 224 pixels in two processes, in one run, round after round in turn. The
DataLoader reads its shards in their order, without pairs or balance: the least work there is. Ours draws same-class
pairs, uniform over classes, from reservoirs that move on. The first batches of a round are not timed, so that neither
side lives on what it had read ahead. Wall-clock time is what counts on an idle machine; CPU seconds of all processes
stand beside it. Last come rows of features, against the rate at which SEM-PCYC trains on them here.

Files are drawn pictures of 256 to 500 pixels a side, half of them photos and half sketches, kept in --root.
"""

import argparse
import io
import json
import logging
import os
import time
import warnings
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import psutil
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from zsr import cluster
from zsr.artifact import Artifact, Plan, Store
from zsr.data.decode import Pictures, Resize
from zsr.data.features import feature_table, seal_features
from zsr.data.pictures import pixels, shard
from zsr.data.prepare import Prepare, prepare
from zsr.data.sampling import Draws, Reservoir
from zsr.data.shards import stream
from zsr.data.sources.folders import Folders
from zsr.data.stream import Stream, survey
from zsr.models import build, configure
from zsr.models.protocol import Inputs, Model
from zsr.training.batches import Sums, begin, fit_scale
from zsr.training.config import TrainSettings
from zsr.training.engines import Engines, deepspeed_config, init_distributed
from zsr.training.loop import Place, train_step

CLASSES: Final = tuple(f"class{i:03d}" for i in range(100))
SIDE: Final = 224
PAIRS: Final = 64  # a batch
CONTENTS: Final = 500  # distinct pictures a modality; each file is one of them
WARM: Final = 6400  # samples of a round that are not timed: as many as the reservoirs hold
DIM: Final = 1280


def drawn(modality: str, number: int) -> bytes:
    """A JPEG of natural size: shapes over waves, or strokes on white."""
    rng = np.random.default_rng([number, modality == "photo"])
    width, height = rng.integers(256, 501, 2).tolist()
    if modality == "sketch":
        picture = Image.new("RGB", (width, height), "white")
    else:
        y, x = np.mgrid[0:height, 0:width]
        waves = [np.sin(x * a + y * b + c) for a, b, c in rng.uniform(0.02, 0.9, (9, 3))]
        bands = [128 + 40 * sum(waves[i::3]) for i in range(3)]
        picture = Image.fromarray(np.clip(np.stack(bands, 2), 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for corners in rng.uniform(0, 1, (30, 3, 2)) * (width, height):
        points = [(float(px), float(py)) for px, py in corners]
        if modality == "sketch":
            pen.line(points, fill="black", width=3)
        else:
            pen.polygon(points, fill=tuple(rng.integers(0, 256, 3).tolist()))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=88)
    return out.getvalue()


def write_files(root: Path, files: int) -> Path:
    """ROOT/MODALITY/CLASS/N.jpg, `files` of them in all; classes and contents alternate."""
    folder = root / f"raw-{files}"
    for modality in ("photo", "sketch"):
        contents = [drawn(modality, number) for number in range(min(CONTENTS, files // 2))]
        for name in CLASSES:
            (folder / modality / name).mkdir(parents=True, exist_ok=True)
        for number, content in zip(range(files // 2), cycle(contents), strict=False):
            path = folder / modality / CLASSES[number % len(CLASSES)] / f"{number}.jpg"
            if not path.exists():
                path.write_bytes(content)
    return folder


def seconds_of_cpu() -> float:
    """CPU seconds of this process and of all below it, those of ended children included."""
    own = psutil.Process()
    times = own.cpu_times()
    total = times.user + times.system + times.children_user + times.children_system
    for child in own.children(recursive=True):
        try:
            spent = child.cpu_times()
            total += spent.user + spent.system + spent.children_user + spent.children_system
        except psutil.Error:
            pass
    return float(total)


class Plain(IterableDataset[Tensor]):
    """A sketch and a photo in turn, in the order of the shards, round and round; a worker takes every second group."""

    def __init__(self, data: Artifact, names: tuple[str, ...], skip: int) -> None:
        self.data, self.names, self.skip = data, names, skip

    def __iter__(self) -> Iterator[Tensor]:
        wanted = Pictures(Resize(SIDE))
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # a batch is a copy
        for both in zip(*(self._encoded(modality) for modality in ("sketch", "photo")), strict=True):
            for encoded in both:
                yield torch.from_numpy(pixels(encoded, wanted, "photo"))

    def _encoded(self, modality: str) -> Iterator[bytes]:
        info = get_worker_info()
        assert info is not None  # of a loader with workers
        names = [name for name in self.names if name.startswith(f"modality={modality}/")]
        for name in islice(cycle(names), self.skip, None):
            at = shard(self.data, name)
            for number in range(info.id, len(at.bounds) - 1, info.num_workers):
                yield from at.group(number).to_pylist()


def loader_batches(data: Artifact, names: tuple[str, ...], round_: int) -> Iterator[Tensor]:
    """Batches (2 * PAIRS, S, S, 3) of a DataLoader with two workers."""
    yield from DataLoader(Plain(data, names, round_), batch_size=2 * PAIRS, num_workers=2)


def our_batches(feed: Stream, first: int) -> Iterator[Tensor]:
    """Batches of pairs, from step `first`."""
    step = first
    while True:
        batch = feed.batch(step, PAIRS)
        yield batch.photo
        step += 1


def timed(batches: Iterator[Any], samples: int) -> dict[str, float]:
    """The rate of a steady stretch, and the seconds to the first batch."""
    started = time.perf_counter()
    next(batches)
    first = time.perf_counter() - started
    for _ in islice(batches, WARM // (2 * PAIRS)):
        pass
    cpu, started = seconds_of_cpu(), time.perf_counter()
    count = sum(2 * PAIRS for _ in islice(batches, samples // (2 * PAIRS)))
    seconds, spent = time.perf_counter() - started, seconds_of_cpu() - cpu
    cast(Any, batches).close()
    return {"first_s": first, "a_second": count / seconds, "cpu_ms_each": 1000 * spent / count}


def against(data: Artifact, rounds: int, samples: int) -> dict[str, Any]:
    """Both sides in turn, and the ratio of their rates, median over rounds."""
    started = time.perf_counter()
    sides = survey(data, ("sketch", "photo"), CLASSES, TrainSettings().window, 0)
    surveyed = time.perf_counter() - started
    last_step = (rounds * (samples + 8 * WARM)) // PAIRS
    feed = Stream(
        data, Pictures(Resize(SIDE)), sides, Draws(sides.sketch, sides.photo, 0), torch.zeros(len(CLASSES), 1),
        augment=False, last_step=last_step,
    )  # fmt: skip
    found: dict[str, list[dict[str, float]]] = {"ours": [], "loader": []}
    for round_ in range(rounds):
        decoded = feed.decoded
        found["ours"].append(timed(our_batches(feed, 1 + round_ * (last_step // rounds)), samples))
        found["ours"][-1]["decoded"] = feed.decoded - decoded
        feed.close()
        found["loader"].append(timed(loader_batches(data, sides.names, round_), samples))
        print(json.dumps({name: rounds[-1] for name, rounds in found.items()}), flush=True)
    median = {
        name: {key: float(np.median([one[key] for one in each])) for key in each[0]} for name, each in found.items()
    }
    ratio = {key: median["ours"][key] / median["loader"][key] for key in ("a_second", "cpu_ms_each")}
    return {"survey_s": surveyed, **median, "ratio": ratio}


def features_of(data: Artifact, root: Path) -> Artifact:
    """Random FEATURES of the data's rows."""
    store = Store.at(root)
    plan = Plan("features", {"backbone": "random"}, {"data": data.digest})
    if done := store.made(plan):
        return done
    staging = store.staging(plan)
    names = [entry.path for entry in data.shards()]
    for number, name in enumerate(names):
        ids = data.read_table(name, columns=["id"]).column("id").to_pylist()
        rows = np.random.default_rng(number).normal(size=(len(ids), DIM)).astype(np.float16)
        facts = {"rows": len(ids), "quarantined": 0, "dim": DIM}
        staging.write_table(name, feature_table(ids, rows), facts=facts)
    return seal_features(staging, store, names, {"backbone": "random"})


def feature_rates(data: Artifact, features: Artifact) -> dict[str, float]:
    """Rows a second that are streamed once the first block is there, that are drawn, and on which SEM-PCYC trains.

    A batch counts both of its sides; the seconds to the first blocks of both modalities stand beside it.
    """
    words = torch.eye(len(CLASSES))
    inputs = Inputs(
        sketch_dim=DIM, photo_dim=DIM, semantic_dim=len(CLASSES), classes=CLASSES, query="sketch", tower=None
    )
    model = cast(Model, build("sem-pcyc", configure("sem-pcyc", {}).model_dump(), inputs))
    pools, rows, first, steady = [], 0, 0.0, 0.0
    for modality in ("sketch", "photo"):
        held, sums = Reservoir(len(CLASSES), 20_000, 0), Sums()
        started = time.perf_counter()
        for number, block in enumerate(stream(data, features, modality, CLASSES)):
            held.add(block)
            sums.add(block.features)
            rows += len(block.ids) if number else 0
            if not number:
                first, started = first + time.perf_counter() - started, time.perf_counter()
        steady += time.perf_counter() - started
        fit_scale(model, modality, sums)
        pools.append(held.finish("cpu"))
    streamed = rows / steady
    sampler = begin(model, pools[0], pools[1], words, 0)
    started = time.perf_counter()
    for step in range(300):
        sampler.batch(step, PAIRS)
    drawn_rows = 300 * 2 * PAIRS / (time.perf_counter() - started)
    return {
        "first_s": first,
        "streamed": streamed,
        "drawn": drawn_rows,
        "trained": 2 * PAIRS * steps_a_second(model, sampler),
    }


def steps_a_second(model: Model, sampler: Any) -> float:
    """The rate of SEM-PCYC's training steps here, drawing included."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29581",
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
    }
    dist.init_process_group("gloo")
    init_distributed("gloo")
    engines = Engines(model, PAIRS, deepspeed_config())
    model.train()
    settings = TrainSettings(batch_size=PAIRS)
    for step in range(1, 31):
        if step == 11:
            started = time.perf_counter()
        train_step(engines, sampler, settings, Place(0, 1, "cpu"), step)
    rate = 20 / (time.perf_counter() - started)
    dist.destroy_process_group()
    return rate


def main() -> None:
    """Make the data if need be, measure, and print a table of JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=50_000)
    parser.add_argument("--root", type=Path, default=Path("runs/benchmark-stream"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("all", "prepare", "pictures", "features"), default="all")
    flags = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    torch.set_num_threads(1)
    started = time.perf_counter()
    data = prepare(
        Folders(write_files(flags.root, flags.files)), Store.at(flags.root / f"data-{flags.files}"), Prepare()
    )
    print(json.dumps({"files": flags.files, "made_s": round(time.perf_counter() - started, 1)}), flush=True)
    if flags.only in ("all", "pictures"):
        print(json.dumps({"pictures": against(data, flags.rounds, max(4096, flags.files // flags.rounds))}))
    if flags.only in ("all", "features"):
        rates = feature_rates(data, features_of(data, flags.root / f"features-{flags.files}"))
        print(
            json.dumps(
                {"feature_rows_a_second": rates, "ratio": min(rates["streamed"], rates["drawn"]) / rates["trained"]}
            )
        )
    cluster.disconnect()


if __name__ == "__main__":
    main()
