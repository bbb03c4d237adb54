"""Every sketch model on Sketchy, from raw folders to a table: mean and spread over seeds beside the floors.

    python -m benchmarks.sketchy --input FOLDER --split SPLIT --output OUT

FOLDER holds photo/CLASS and sketch/CLASS; SPLIT is a JSON file or the name of a published split. Each model is trained
once a seed and kind of class vectors by the jobs that users run, in one process and so on one Ray cluster. The step is
chosen on validation classes, which depend on the seed; then all seen classes are trained to that step (`--no-refit`
leaves that out). A killed run, started again, goes on where it was.
"""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import tyro
from pydantic import BaseModel, ConfigDict

from zsr.commands import evaluate, features, prepare, semantics, train
from zsr.models import configure

# what differs from the defaults of zsr train: short epochs, since small sets peak early
BRIEF: Final[Mapping[str, Any]] = {"steps_per_epoch": 20, "epochs": 8, "patience": 4}
RECIPES: Final[Mapping[str, Mapping[str, Any]]] = {
    "raw": {},
    "raw standardised": {"preset": "standardised"},
    "ridge": {},
    "cvae": BRIEF,
    "caae": BRIEF,
    "sem-pcyc": BRIEF,
    "doodle2search": BRIEF,
    "sketch-gcn": BRIEF,
    # its warm-ups count epochs, 30 of them
    "lcale": {"steps_per_epoch": 10, "epochs": 30, "patience": 30, "batch_size": 64},
    # as good at 512 as at its default of 1024, and twice as fast
    "cfsa": {"options": {"hidden": 512}, "steps_per_epoch": 20, "epochs": 10, "patience": 6, "batch_size": 64},
    "contrastive": {"steps_per_epoch": 10, "epochs": 12, "patience": 4},
    # behind an image tower, on pictures: all but the first blocks of it train
    "contrastive lite0": {
        "tower": "lite0",
        "tower_rate": 0.5,
        "tower_tune": r"_blocks\.([4-9]|1\d)\.|_conv_head|_bn1",
        "size": 160,
        "augment": True,
        "features": None,
        "batch_size": 32,
        "steps_per_epoch": 20,
        "epochs": 6,
        "patience": 3,
        "threads": 2,
    },
}


class Config(BaseModel):
    """Flags.

    Attributes:
        input: folder with photo/CLASS and sketch/CLASS.
        split: a JSON file, or the name of a published split.
        output: takes every artifact and a report for each kind of class vectors.
        seeds: of the validation draw, the initial weights and the batches.
        kinds: of class vectors, one table each.
        models: which rows.
        refit: train again on all seen classes for the chosen number of steps.
        batch: rows a step, where a recipe does not say it; one worker.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    input: Path
    split: str
    output: Path
    seeds: tuple[int, ...] = (0, 1, 2)
    kinds: tuple[str, ...] = ("glove", "minilm")
    models: tuple[str, ...] = tuple(RECIPES)
    refit: bool = True
    batch: int = 128


def main(config: Config) -> None:
    """Prepare once, then a table for each kind of class vectors."""
    at = {"data": config.output / "data", "features": config.output / "features"}
    prepare.work(prepare.Config(source="sketchy", input=config.input, output=at["data"], rows_per_shard=500))
    features.work(features.Config(data=at["data"], output=at["features"]))
    for kind in config.kinds:
        at["semantics"] = config.output / f"semantics-{kind}"
        semantics.work(semantics.Config(data=at["data"], kinds=(kind,), output=at["semantics"]))
        for name in config.models:
            for seed in config.seeds:
                fit(config, at, name, kind, seed)
        report = config.output / f"report-{kind}"
        checkpoints = tuple(where(config, name, kind, seed) for name in config.models for seed in config.seeds)
        evaluate.work(evaluate.Config(**at, checkpoint=checkpoints, output=report, title=f"Sketchy, {kind}"))
        show(kind, json.loads((report / "report.json").read_text()))


def where(config: Config, name: str, kind: str, seed: int) -> Path:
    """ROOT of one checkpoint."""
    return config.output / f"{name.replace(' ', '-')}-{kind}-{seed}"


def fit(config: Config, at: Mapping[str, Path], name: str, kind: str, seed: int) -> None:
    """One training run, or what an earlier one left."""
    model, recipe = name.partition(" ")[0], RECIPES[name]
    options = configure(model, recipe.get("options", {}), recipe.get("preset"))
    flags = train.config_of(model)(
        **{"batch_size": config.batch, **at, **recipe, "options": options},
        split=config.split,
        output=where(config, name, kind, seed),
        model=model,
        seed=seed,
        refit=config.refit,
        num_workers=1,
    )
    done = train.work(flags)
    score = done["validation_map_all"]
    print(f"{name} {kind} seed {seed}: step {done['best_step']}, validation {score:.3f}", file=sys.stderr, flush=True)


def show(kind: str, report: Mapping[str, Any]) -> None:
    """The table: a line a model, the mean, spread and single seeds of mAP@all over the unseen classes."""
    print(f"\nclass vectors: {kind}\n\n| model | mean | spread | seeds |\n|---|---|---|---|")
    lines = {row["name"]: [row["scores"]["mAP@all"]] for row in report["rows"] if row["search"] is None}
    lines |= {seeds["model"]: list(seeds["scores"].values()) for seeds in report["seeds"]}
    for name, scores in sorted(lines.items(), key=lambda item: statistics.fmean(item[1])):
        spread = f"{statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
        print(f"| {name} | {statistics.fmean(scores):.3f} | {spread} | {' '.join(f'{s:.3f}' for s in scores)} |")


def run(argv: Sequence[str] | None = None) -> None:
    """Parse and go."""
    main(tyro.cli(Config, args=argv))


if __name__ == "__main__":
    run()
