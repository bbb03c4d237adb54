"""Kills zsr features, zsr embed and zsr index build, and fills their disk; whatever happens, the digests are equal.

    python -m tests.faults.kill_gallery OUTPUT [--jobs features embed index] [--kills 5] [--disks 20] [--seed 0]

Too long for the tests of each change; needs the right to mount a tmpfs. Each job has published a version before, which
a reader opens again and again meanwhile, every file of it: it must find that version or the new one, whole.

points  SIGKILL at each fault point that the job passes. Where tasks pass it, workers die and Ray starts others; at the
        rest the driver dies, and the job is started again.
times   SIGKILL to the driver at random times, one after the other on one output until it is finished.
disks   a tmpfs of a share of what the job takes, in so many steps: the job names the full disk and ends with its exit
        code, the version of before opens, and the same command on the grown disk goes on.

In the end all CPUs of the cluster are free again, no staging area is left, and no file of ours lies in /dev/shm.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import ray

from benchmarks.data_memory import generate
from tests.faults.killing import finish, kill_after, kill_at
from tests.index.helpers import KEY, make_world
from zsr import cluster
from zsr.artifact import open_artifact
from zsr.errors import DiskFull, ZsrError

ROWS: Final = 400  # pictures
PHOTOS: Final = 20_000  # vectors of the index
FREE: Final = 60.0  # seconds until all CPUs are free again
ROOM: Final = 1 << 30  # bytes of a disk that is large enough
# every process counts for itself: a driver passes artifact points for what it writes itself, a task once a piece
ARTIFACT: Final = ("artifact.write@2", "artifact.receipt@2", "artifact.manifest", "artifact.seal", "artifact.link")


@dataclass(frozen=True)
class Job:
    """A job under test: the kind of its artifact, the words before its output, and those of the version before."""

    name: str
    kind: str
    words: Sequence[object]
    to: str
    before: Sequence[object]
    points: Sequence[str]

    def command(self, output: Path, *more: object) -> list[str]:
        """What a user types."""
        return [sys.executable, "-m", "zsr", *map(str, (*self.words, self.to, output, *more))]


def jobs_of(root: Path) -> Iterator[Job]:
    """The three jobs, with what they read, made below `root`."""
    generate(root / "raw", ROWS)
    at = {name: root / name for name in ("data", "features", "checkpoint")}
    run("prepare", "--source", "folders", "--input", root / "raw", "--output", at["data"], "--rows-per-shard", 40)
    small = ("features", "--data", at["data"], "--size", 32, "--num-workers", 2)
    run(*small, "--output", at["features"])
    inputs = [word for name in ("data", "features") for word in (f"--{name}", at[name])]
    train = ("train", *inputs, "--output", at["checkpoint"], "--model", "raw", "--split", "random:2:0")
    run(*train, "--validation-classes", 0, "--num-workers", 1)
    world = make_world(root / "world", photos=PHOTOS, sketches=200, shards=8)
    embed = ("embed", *inputs, "--checkpoint", at["checkpoint"], "--modality")
    vectors = ("--embeddings", world.root / "gallery", "--queries", world.root / "queries", "--index-key", KEY)
    index = ("index", "build", *vectors)
    build = ("index.train", "index.add@2", "index.merge", "index.tune")
    yield Job("features", "features", small, "--output", (*small[:4], 48), ("features.shard@3", *ARTIFACT))
    yield Job("embed", "embeddings", (*embed, "photo"), "--output", (*embed, "sketch"), ("embed.shard@3", *ARTIFACT))
    yield Job("index", "index", index, "--index-dir", (*index, "--seed", 1), (*build, *ARTIFACT))


def run(*words: object) -> None:
    """A job that only prepares."""
    subprocess.run([sys.executable, "-m", "zsr", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


@dataclass
class Reader:
    """Opens the newest version of `output` and reads all of it, again and again."""

    output: Path
    kind: str
    allowed: frozenset[str]
    opened: int = 0
    errors: list[str] = field(default_factory=list)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Read in a thread while the block runs."""
        over = threading.Event()
        thread = threading.Thread(target=self._watch, args=(over,))
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(0.05):
            self.look()

    def look(self) -> None:
        """Read the newest version once."""
        try:
            found = open_artifact(self.output, self.kind)
            for entry in found.files:
                found.local(entry.path)
        except ZsrError as error:
            self.errors.append(str(error))
            return
        self.opened += 1
        if found.digest not in self.allowed:
            self.errors.append(f"opened {found.digest}, which is neither the version before nor the new one")


@dataclass
class Trials:
    """All that is done to one job."""

    job: Job
    root: Path
    before: str = ""
    unbroken: str = ""
    whole: float = 0.0
    wrong: int = 0

    def start(self) -> None:
        """The version before, and an unbroken run after it."""
        command = [sys.executable, "-m", *map(str, (*self.job.before, self.job.to, self.root / "before"))]
        self.before = _digest(command)
        place, began = self._place("unbroken"), time.monotonic()
        self.unbroken = _digest(self.job.command(place))
        self.whole = time.monotonic() - began
        print(f"{self.job.name}: unbroken {self.unbroken}, {self.whole:.0f} s", flush=True)

    def points(self) -> None:
        """A kill at each point."""
        for point in self.job.points:
            command = self.job.command(self._place(point))
            with self._read(point) as reader, reader.watching():
                code = kill_at(command, point)
            self._check(f"{point}, ended with {code}", command, reader)

    def times(self, kills: int, coin: random.Random) -> None:
        """So many kills in the middle of a run; where one comes after the end, another output is begun."""
        hit, outputs, span = 0, 0, self.whole
        while hit < kills:
            outputs += 1
            name, before, began = f"times-{outputs}", hit, time.monotonic()
            command = self.job.command(self._place(name))
            with self._read(name) as reader, reader.watching():
                while hit < kills and kill_after(command, coin.uniform(0.2 * span, span)):
                    hit += 1
            if hit == before:
                span = time.monotonic() - began  # of a run on this machine as busy as it is now
            self._check(f"{hit - before} random kills in the middle", command, reader)

    def disks(self, steps: int) -> None:
        """Disks of a share of what the job takes beside the version before."""
        with mounted(self.root / "large", ROOM) as disk:
            least = _used(shutil.copytree(self.root / "before", disk / "out"))
            most = _most_used(disk, self.job.command(disk / "out"))
        print(f"{self.job.name}: {(most - least) / 1e6:.1f} MB at most", flush=True)
        for step in range(steps):
            size = least + round((most - least) * step / steps) // 4096 * 4096
            with mounted(self.root / f"disk-{step}", size) as disk:
                output = Path(shutil.copytree(self.root / "before", disk / "out"))
                command = self.job.command(output)
                reader = Reader(output, self.job.kind, frozenset((self.before, self.unbroken)))
                with reader.watching():
                    done = subprocess.run(command, capture_output=True, text=True, check=False)
                said = done.returncode == DiskFull.exit_code and "no space left" in done.stdout + done.stderr
                if not said:
                    print(f"ended with {done.returncode}: {done.stdout[-300:]} {done.stderr[-300:]}", flush=True)
                self.wrong += not said
                subprocess.run(["mount", "-o", f"remount,size={ROOM}", str(disk)], check=True)
                self._check(f"disk full after {(size - least) / 1e6:.1f} MB", command, reader)

    def _place(self, name: str) -> Path:
        return Path(shutil.copytree(self.root / "before", self.root / name))

    @contextmanager
    def _read(self, name: str) -> Iterator[Reader]:
        yield Reader(self.root / name, self.job.kind, frozenset((self.before, self.unbroken)))

    def _check(self, what: str, command: list[str], reader: Reader) -> None:
        with reader.watching():
            found = _digest(command)
        left = [path.name for path in (reader.output / "staging").glob("*")]
        good = found == self.unbroken and not left and not reader.errors and reader.opened > 0
        self.wrong += not good
        told = "equal digest" if good else f"WRONG: digest {found}, left {left}, reader {reader.errors[:2]}"
        print(f"{self.job.name}, {what}: {told}; opened {reader.opened} times", flush=True)


@contextmanager
def mounted(place: Path, size: int) -> Iterator[Path]:
    """A tmpfs of `size` bytes at `place`."""
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "zsr", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def _used(place: str | Path) -> int:
    """Bytes that are used on the disk of `place`."""
    return shutil.disk_usage(place).used


def _most_used(disk: Path, command: list[str]) -> int:
    """The most that is used while the job runs."""
    most, over = [0], threading.Event()

    def look() -> None:
        while not over.wait(0.01):
            most[0] = max(most[0], _used(disk))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        _digest(command)
    finally:
        over.set()
        thread.join()
    return most[0]


def _digest(command: list[str]) -> str:
    results = finish(command)
    found = [results[name] for name in ("features", "embeddings", "digest") if name in results]
    return str(found[0])


def _shm() -> set[str]:
    """What lies in shared memory, Ray's own object stores apart."""
    return {path.name for path in Path("/dev/shm").iterdir() if not path.name.startswith("plasma")}


def nothing_left(shm: set[str]) -> bool:
    """Whether all CPUs are free within a minute, and shared memory is as it was."""
    every: Callable[[], dict[str, float]] = ray.cluster_resources
    idle: Callable[[], dict[str, float]] = ray.available_resources
    until, held = time.monotonic() + FREE, -1.0
    while held and time.monotonic() < until:
        time.sleep(1)
        held = every()["CPU"] - idle().get("CPU", 0)
    more = _shm() - shm
    print(f"CPUs still held: {held:.0f}; left in /dev/shm: {sorted(more) or 'nothing'}", flush=True)
    return held == 0 and not more


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--jobs", nargs="+", choices=("features", "embed", "index"), default=["features", "embed", "index"]
    )
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--disks", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    shutil.rmtree(asked.output, ignore_errors=True)
    asked.output.mkdir(parents=True)
    cluster.connect()
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address  # one cluster for all jobs: they start sooner
    coin, shm, wrong = random.Random(asked.seed), _shm(), 0
    try:
        for job in jobs_of(asked.output):
            if job.name in asked.jobs:
                trials = Trials(job, asked.output / "trials" / job.name)
                trials.start()
                trials.points()
                trials.times(asked.kills, coin)
                trials.disks(asked.disks)
                wrong += trials.wrong
        clean = nothing_left(shm)
    finally:
        cluster.disconnect()
    return 0 if clean and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
