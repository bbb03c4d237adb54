"""Whether the working tree trains the bits that another commit trains: `make loss-compare BASE=main`.

    python -m tests.faults.loss_compare BASE [--models sem-pcyc ...] [--steps 50]

Both trees run their own jobs on the same generated features, with one worker and one thread; the other tree is unpacked
by `git archive` into a temporary folder. Exit status 0 when the chosen weights are equal in every byte.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests import toy
from tests.models.test_models import STEPPED

ROOT = Path(__file__).resolve().parents[2]


def unpack(commit: str, folder: Path) -> Path:
    """The tree of a commit."""
    packed = folder / "base.tar"
    subprocess.run(["git", "archive", "--output", str(packed), commit], cwd=ROOT, check=True)
    with tarfile.open(packed) as tree:
        tree.extractall(folder / "base", filter="data")
    return folder / "base"


def job(tree: Path, name: str, *flags: str) -> dict[str, Any]:
    """The JSON line of a tree's own job."""
    command = [sys.executable, "-m", f"jobs.{name}", *flags]  # which older trees have, too
    environment = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{tree}: {' '.join(command[2:])} ended with {done.returncode}: {done.stderr[-2000:]}")
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return results


def weights(tree: Path, raw: Path, folder: Path, models: Sequence[str], steps: int) -> dict[str, str]:
    """SHA-256 of the weights that a tree trains, by model."""
    at = {name: str(folder / name) for name in ("data", "features", "semantics")}
    prepare = ("--source", "parquet", "--input", str(raw), "--output", at["data"])
    job(tree, "prepare", *prepare, "--features-output", at["features"])
    job(tree, "semantics", "--data", at["data"], "--output", at["semantics"])
    inputs = [word for name, path in at.items() for word in (f"--{name}", path)]
    short = ("--split", "random:3:0", "--validation-classes", "0", "--epochs", "1", "--steps-per-epoch", str(steps))
    found = {}
    for model in models:
        more = ("--model", model, "--output", str(folder / model), "--num-workers", "1", "--batch-size", "16")
        done = job(tree, "train", *inputs, *short, *more)
        manifest = json.loads((folder / model / "objects" / done["digest"] / "manifest.json").read_text())
        found[model] = next(f["sha256"] for f in manifest["files"] if f["path"] == "model.safetensors")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("--models", nargs="+", choices=STEPPED, default=STEPPED)
    parser.add_argument("--steps", type=int, default=50)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw = toy.write_features(folder / "raw")
        trees = {"base tree": unpack(asked.base, folder), "here": ROOT}
        found = {which: weights(tree, raw, folder / which, asked.models, asked.steps) for which, tree in trees.items()}
    for model in asked.models:
        same = found["base tree"][model] == found["here"][model]
        print(f"{model}: {'equal bits' if same else 'DIFFERENT BITS'} after {asked.steps} steps")
    return 0 if found["base tree"] == found["here"] else 1


if __name__ == "__main__":
    sys.exit(main())
