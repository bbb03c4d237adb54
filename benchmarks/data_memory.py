"""Peak unique memory of every process in each stage from raw pictures to answers, for galleries of two sizes.

    python -m benchmarks.data_memory SCRATCH [--rows 50000 200000] [--stages prepare epoch features embed index search]

Small pictures (32 to 48 pixels, JPEG and PNG) of 100 classes are written class by class, as folders
MODALITY/CLASS/FILE; every stage then runs as the job that a user starts, in a process of its own, and is sampled until
it ends. Unique memory is what only that process holds (USS) without the mapped object store, which is shared by all
and capped; it is reported beside it. The bar: no process above 1.5 GiB, and no more for 200,000 rows than for 50,000.

The epoch trains an image tower, whose checkpoint then embeds both modalities; photos are indexed, and all sketches
searched for in each of the three ways of zsr search: whole index a worker, by list range, and by segment over nodes.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import psutil
import simplejpeg
import torch
from PIL import Image
from safetensors.torch import save_file

from zsr.models import backbones

BAR: Final = 1536  # MiB
CLASSES: Final = 100
PAIRS: Final = 256  # a batch of the epoch
EVERY: Final = 1.0  # seconds between samples
STORE: Final = "/dev/shm"  # what Ray's object store is mapped from

Command = Callable[[Path, int], list[str]]


def prepare_command(scratch: Path, rows: int) -> list[str]:
    """The job that turns the raw pictures below `scratch` into DATA."""
    return job("prepare", source="folders", input=raw(scratch, rows), output=scratch / f"data-{rows}")


def epoch_command(scratch: Path, rows: int) -> list[str]:
    """The job that passes one epoch of pairs, as many as there are photos, through an untrained tower that stays so."""
    flags = {
        "data": scratch / f"data-{rows}",
        "output": scratch / f"checkpoint-{rows}",
        "split": "random:2:0",
        "model": "classifier",
        "tower": "tiny",
        "size": 32,
        "batch-size": PAIRS,
        "epochs": 1,
        "steps-per-epoch": rows * 9 // 10 // PAIRS,
        "validation-classes": 0,
        "num-workers": 1,
        "resume": "never",
    }
    return [*job("train", **flags), "--random-weights", "--augment"]


def features_command(scratch: Path, rows: int) -> list[str]:
    """Features of all pictures by a small backbone with random weights."""
    weights = scratch / "tiny.safetensors"
    if not weights.exists():
        torch.manual_seed(0)
        save_file(backbones.build(backbones.architecture("tiny")).network.state_dict(), weights)
    return job(
        "features",
        data=scratch / f"data-{rows}",
        backbone="tiny",
        weights=weights,
        size=32,
        output=scratch / f"features-{rows}",
    )


def embed_command(modality: str) -> Command:
    """Embeddings of a modality by the tower of the epoch."""

    def command(scratch: Path, rows: int) -> list[str]:
        sources = {"data": scratch / f"data-{rows}", "checkpoint": scratch / f"checkpoint-{rows}"}
        return job("embed", **sources, modality=modality, output=scratch / f"embed-{modality}-{rows}")

    return command


def index_command(scratch: Path, rows: int) -> list[str]:
    """An index of the photos in segments of 25,000, tuned on the sketches."""
    sides = {"embeddings": "photo", "queries": "sketch"}
    given = {flag: scratch / f"embed-{side}-{rows}" for flag, side in sides.items()}
    flags = {**given, "index-dir": scratch / f"index-{rows}", "index-key": "IVF256,SQ8", "recall-target": 0.01}
    return job("index build", **flags, **{"segment-rows": 25_000})


def search_command(**way: object) -> Command:
    """Answers to all sketches as an artifact."""

    def command(scratch: Path, rows: int) -> list[str]:
        sources = {"index-dir": scratch / f"index-{rows}", "queries": scratch / f"embed-sketch-{rows}"}
        name = "-".join(way) or "whole"
        return job("search", **sources, output=scratch / f"search-{name}-{rows}", **way)

    return command


def job(name: str, **flags: object) -> list[str]:
    """The words of a job."""
    words = [word for flag, value in flags.items() for word in (f"--{flag.replace('_', '-')}", str(value))]
    first, *rest = name.split()
    return [sys.executable, "-m", "zsr", first, *rest, *words]


STAGES: Final[dict[str, tuple[Command, ...]]] = {
    "prepare": (prepare_command,),
    "epoch": (epoch_command,),
    "features": (features_command,),
    "embed": (embed_command("photo"), embed_command("sketch")),
    "index": (index_command,),
    "search": (search_command(), search_command(list_ranges=4), search_command(replicas=1)),
}


def raw(scratch: Path, rows: int) -> Path:
    """Where the pictures of a set lie."""
    return scratch / f"raw-{rows}"


def generate(place: Path, rows: int) -> None:
    """Write `rows` pictures, every tenth a sketch (PNG), the rest photos (JPEG), class by class."""
    if place.is_dir():
        return
    partial = place.with_name(f"{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for label in range(CLASSES):
        random = np.random.default_rng(label)
        for modality in ("photo", "sketch"):
            (partial / modality / f"class_{label:03d}").mkdir(parents=True)
        for row in range(rows // CLASSES):
            side = int(random.integers(32, 49))
            pixels = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
            if row % 10:
                file = partial / "photo" / f"class_{label:03d}" / f"{row:06d}.jpg"
                file.write_bytes(simplejpeg.encode_jpeg(pixels, quality=80))
            else:
                file = partial / "sketch" / f"class_{label:03d}" / f"{row:06d}.png"
                Image.fromarray(np.where(pixels[..., 0] > 127, 255, 0).astype(np.uint8)).save(file)
    partial.rename(place)


@dataclass
class Peaks:
    """Greatest unique memory in MiB by what a process does, of any process, and of the mapped object store."""

    unique: dict[str, float] = field(default_factory=dict)
    most_together: float = 0.0
    store: float = 0.0

    def sample(self, root: psutil.Process) -> None:
        together = 0.0
        for process in (root, *root.children(recursive=True)):
            try:
                role, unique, shared = self._of(process, root)
            except psutil.Error:
                continue  # it ended between two looks
            together += unique
            self.unique[role] = max(self.unique.get(role, 0.0), unique)
            self.store = max(self.store, shared)
        self.most_together = max(self.most_together, together)

    @staticmethod
    def _of(process: psutil.Process, root: psutil.Process) -> tuple[str, float, float]:
        role = "driver" if process.pid == root.pid else _role(process)
        unique = shared = 0
        for region in process.memory_maps(grouped=True):
            if region.path.startswith(STORE):
                shared += region.rss
            else:
                unique += region.private_clean + region.private_dirty
        return role, unique / 2**20, shared / 2**20


def _role(process: psutil.Process) -> str:
    """What a process of Ray does: trains, decodes or computes as an actor, holds segments, or is any other worker."""
    words = process.cmdline()
    name = os.path.basename(words[0]) if words else str(process.name())
    if name.startswith("ray::") or any("default_worker.py" in word for word in words):
        return {"ray::MapWorker": "actor", "ray::RayTrainWorker": "trainer", "ray::ShardActor": "host"}.get(
            name.split("(")[0].split(".")[0], "worker"
        )
    return next((os.path.basename(word) for word in words if word.endswith(".py")), name)


def run(command: list[str]) -> dict[str, object]:
    """Run a job to its end and sample it; its peaks in MiB, seconds, CPU seconds and last line."""
    peaks, started = Peaks(), time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as job:
        root, cpu = psutil.Process(job.pid), 0.0
        while job.poll() is None:
            peaks.sample(root)
            cpu = max(cpu, _cpu(root))
            time.sleep(EVERY)
        assert job.stdout is not None
        last = job.stdout.read().strip().splitlines()[-1]
    if job.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {job.returncode}: {last}")
    return {
        "unique_mib": {role: round(peak) for role, peak in sorted(peaks.unique.items())},
        "all_processes_mib": round(peaks.most_together),
        "object_store_mib": round(peaks.store),
        "seconds": round(time.monotonic() - started),
        "cpu_seconds": round(cpu),
        "result": json.loads(last),
    }


def _cpu(root: psutil.Process) -> float:
    total = 0.0
    for process in (root, *root.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def made_by(command: list[str]) -> Path:
    """The ROOT that a job writes."""
    flag = "--output" if "--output" in command else "--index-dir"
    return Path(command[command.index(flag) + 1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[50_000, 200_000])
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    arguments = parser.parse_args()
    worst = 0
    for rows in arguments.rows:
        generate(raw(arguments.scratch, rows), rows)
        for stage in arguments.stages:
            for command in (make(arguments.scratch, rows) for make in STAGES[stage]):
                shutil.rmtree(made_by(command), ignore_errors=True)
                found = run(command)
                peaks = found["unique_mib"]
                assert isinstance(peaks, dict)
                worst = max(worst, *peaks.values())
                print(f"{made_by(command).name}: {json.dumps(found)}", flush=True)
    print(f"largest process {worst} MiB, bar {BAR} MiB: {'held' if worst < BAR else 'NOT held'}")
    return 0 if worst < BAR else 1


if __name__ == "__main__":
    sys.exit(main())
