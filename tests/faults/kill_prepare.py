"""Kills zsr prepare at each of its fault points and at random times, and compares digests with an unbroken run.

    python -m tests.faults.kill_prepare OUTPUT [--rows 2000] [--kills 5] [--seed 0] [--points prepare.shard@3 ...]

Too long for the tests of each change. At a point that tasks pass, workers die and Ray starts others; at the rest the
driver dies and is started again. Exit status 0 when all digests are equal and no staging area is left.
"""

import argparse
import random
import sys
import time
from pathlib import Path

from benchmarks.data_memory import generate
from tests.faults.killing import finish, kill_after, kill_at

# where to fire: a worker that dies at its first passing would die for ever
POINTS = (
    "artifact.write@7",
    "artifact.receipt@7",
    "prepare.listing@3",
    "prepare.shard@3",
    "artifact.manifest",
    "artifact.link",
)


def command(raw: Path, output: Path) -> list[str]:
    """The job, with slices so small that there are many."""
    flags = ["--source", "folders", "--input", str(raw), "--output", str(output), "--rows-per-shard", "100"]
    return [sys.executable, "-m", "zsr", "prepare", *flags]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--points", nargs="*", default=POINTS, help="fault points, with @N for the N-th passing")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    coin, raw = random.Random(arguments.seed), arguments.output / "raw"
    generate(raw, arguments.rows)
    started = time.monotonic()
    unbroken = finish(command(raw, arguments.output / "unbroken"))["digest"]
    whole = time.monotonic() - started
    print(f"seed {arguments.seed}; unbroken: {whole:.0f} s, {unbroken}", flush=True)
    wrong = 0
    for point in arguments.points:
        job = command(raw, arguments.output / point)
        code = kill_at(job, point)
        wrong += _differs(f"{point} (ended with {code})", job, arguments.output / point, unbroken)
    job = command(raw, arguments.output / "killed")
    for kill in range(arguments.kills):
        seconds = coin.uniform(1, whole)
        hit = kill_after(job, seconds)
        print(f"kill {kill}: after {seconds:.0f} s, {'in the middle' if hit else 'it had finished'}", flush=True)
    wrong += _differs("killed at random", job, arguments.output / "killed", unbroken)
    return 1 if wrong else 0


def _differs(what: str, job: list[str], output: Path, unbroken: str) -> bool:
    found = finish(job)["digest"]
    left = list((output / "staging").glob("*"))
    same = found == unbroken and not left
    print(f"{what}: {'equal digest' if same else f'DIFFERENT: {found}, left {left}'}", flush=True)
    return not same


if __name__ == "__main__":
    sys.exit(main())
