"""Kills the demo's driver at random times, starts it again, and compares digests with an unbroken run: `make faults`.

    python -m tests.faults.kill_demo OUTPUT [--kills 5] [--seed 0]

Too long for the tests of each change. Exit status 0 when all digests are equal.
"""

import argparse
import random
import sys
import time
from pathlib import Path

from tests.faults.killing import finish, kill_after

FLAGS = ("--size", "64", "--epochs", "3")


def command(output: Path) -> list[str]:
    """The demo, small."""
    return [sys.executable, "-m", "zsr", "demo", "--output", str(output), *FLAGS]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    coin = random.Random(arguments.seed)
    started = time.monotonic()
    unbroken = finish(command(arguments.output / "unbroken"))
    whole = time.monotonic() - started
    print(f"seed {arguments.seed}; unbroken: {whole:.0f} s, {unbroken['digests']}")
    for kill in range(arguments.kills):
        seconds = coin.uniform(8, whole * 0.6)
        hit = kill_after(command(arguments.output / "killed"), seconds)
        print(f"kill {kill}: after {seconds:.0f} s, {'in the middle' if hit else 'it had finished'}", flush=True)
    resumed = finish(command(arguments.output / "killed"))
    same = resumed["digests"] == unbroken["digests"]
    print("equal digests" if same else f"DIFFERENT: {resumed['digests']}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
