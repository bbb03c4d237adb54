"""Calls jobs as a user does, and reads the JSON line that they end with."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from zsr.artifact import Artifact, Store
from zsr.cli import main


def job(name: str, *flags: object) -> dict[str, Any]:
    """Run `zsr NAME FLAGS` in this process; the results, exit code included."""
    out = io.StringIO()
    with redirect_stdout(out):
        code = main([name, *map(str, flags)])
    results: dict[str, Any] = json.loads(out.getvalue().splitlines()[-1])
    assert results["exit_code"] == code
    return results


def ok(name: str, *flags: object) -> dict[str, Any]:
    """`job`, which must succeed."""
    results = job(name, *flags)
    assert results["exit_code"] == 0, results
    return results


def every_version(root: Path) -> list[Artifact]:
    """The artifacts of all versions below `root`, oldest first."""
    store = Store.at(root)
    return [store.open(store.digest_of(number)) for number in store.versions()]


def read_all(artifact: Artifact) -> int:
    """Read every file of `artifact` as its readers do; rows in its shards."""
    rows = 0
    for entry in artifact.files:
        artifact.read(entry.path)
        artifact.local(entry.path)
        if entry.path.startswith("modality="):
            rows += artifact.read_table(entry.path).num_rows
    return rows


def features_only(root: Path, raw: Path) -> list[object]:
    """Prepare a feature-only set below `root`; the flags that name its artifacts."""
    at = {name: root / name for name in ("data", "features", "semantics")}
    ok("prepare", "--source", "parquet", "--input", raw, "--output", at["data"], "--features-output", at["features"],
       "--rows-per-shard", 50)  # fmt: skip
    ok("semantics", "--data", at["data"], "--output", at["semantics"])
    return [word for name, path in at.items() for word in (f"--{name}", path)]
