"""The main job end to end on the embedded emoji: drawings search for pictures of classes that no model was trained on.

prepare -> semantics -> features -> train -> embed -> index -> evaluate; each stage is the job of that name. A killed
demo, started again, goes on from the stage and shard where it was.
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jobs import embed, evaluate, features, index, prepare, semantics, train
from jobs._job import JobConfig, Results, main
from zsr.models import configure


class Config(JobConfig):
    """Flags of jobs.demo.

    Attributes:
        output: directory that takes every artifact and the report.
        seeds: one training run each; the index serves the first.
        split: random:UNSEEN:SEED of the emoji classes.
        model: which model.
        size: side in pixels that pictures are resized to before the backbone sees them.
        epochs: at most; validation classes stop the run earlier.
        num_workers: Ray Train workers.
    """

    output: Path = Path("runs/demo")
    seeds: tuple[int, ...] = (0,)
    split: str = "random:14:0"
    model: str = "contrastive"
    size: int = 96
    epochs: int = 8
    num_workers: int = 2


DIGESTS = ("data", "semantics", "features", "checkpoint", "embeddings", "digest")  # what stages call their result
Stage = tuple[str, Callable[[], Results]]


def stages(config: Config) -> list[Stage]:
    """The stages in order, by name."""
    at = {name: config.output / name for name in ("data", "semantics", "features")}
    first = config.output / f"checkpoint-{config.seeds[0]}"
    found: list[Stage] = [
        ("prepare", lambda: prepare.work(prepare.Config(source="emoji", output=at["data"], rows_per_shard=500))),
        ("semantics", lambda: semantics.work(semantics.Config(data=at["data"], output=at["semantics"]))),
        (
            "features",
            lambda: features.work(features.Config(data=at["data"], output=at["features"], size=config.size)),
        ),
    ]
    found += [(f"train seed {seed}", _train(config, at, seed)) for seed in config.seeds]
    found += [(f"embed {m}", _embed(config, at, first, m)) for m in ("photo", "sketch")]
    found += [
        ("index", lambda: index.do_build(_index(config))),
        ("evaluate", lambda: evaluate.work(_report(config, at))),
    ]
    return found


def _train(config: Config, at: dict[str, Path], seed: int) -> Callable[[], Results]:
    flags = train.config_for(["--model", config.model])(
        **at,
        model=config.model,
        split=config.split,
        output=config.output / f"checkpoint-{seed}",
        options=configure(config.model, {}),
        epochs=config.epochs,
        steps_per_epoch=20,
        patience=5,
        num_workers=config.num_workers,
        seed=seed,
    )
    return lambda: train.work(flags)


def _embed(config: Config, at: dict[str, Path], checkpoint: Path, modality: Any) -> Callable[[], Results]:
    flags = embed.Config(
        data=at["data"],
        features=at["features"],
        checkpoint=checkpoint,
        modality=modality,
        output=config.output / f"embeddings-{modality}",
        classes="unseen",
    )
    return lambda: embed.work(flags)


def _index(config: Config) -> index.Build:
    return index.Build(
        embeddings=config.output / "embeddings-photo",
        queries=config.output / "embeddings-sketch",
        index_dir=config.output / "index",
    )


def _report(config: Config, at: dict[str, Path]) -> evaluate.Config:
    return evaluate.Config(
        **at,
        checkpoint=tuple(config.output / f"checkpoint-{seed}" for seed in config.seeds),
        index_dir=(config.output / "index",),
        output=config.output / "report",
        title="Find the picture by drawing it",
    )


def plan(config: Config) -> Results:
    return {"stages": [name for name, _ in stages(config)], "output": str(config.output)}


def work(config: Config) -> Results:
    results: Results = {}
    seconds: dict[str, float] = {}
    digests: dict[str, str] = {}
    for name, stage in stages(config):
        started = time.monotonic()
        results = stage()
        seconds[name] = round(time.monotonic() - started, 1)
        digests.update((name, results[key]) for key in DIGESTS if key in results)
        print(f"{name}: {seconds[name]} s", file=sys.stderr, flush=True)
    return {**results, "seconds": seconds, "digests": digests}


def run(argv: Sequence[str] | None = None) -> int:
    return main(Config, plan, work, argv)


if __name__ == "__main__":
    sys.exit(run())
