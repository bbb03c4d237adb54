"""The main job end to end on the embedded emoji: drawings search for pictures of classes that no model was trained on.

It is `zsr pipeline` with a configuration of few flags. A killed demo, started again, goes on from the stage and shard
where it was.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zsr.commands import pipeline
from zsr.commands.base import JobConfig, Results, main


class Config(JobConfig):
    """Flags of zsr demo.

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


def composed(config: Config) -> Any:
    """The pipeline's configuration."""
    return pipeline.config_of(config.model)(
        dry_run=config.dry_run,
        output=config.output,
        seeds=config.seeds,
        prepare={"source": "emoji", "rows_per_shard": 500},
        features={"size": config.size},
        train={
            "model": config.model,
            "split": config.split,
            "epochs": config.epochs,
            "steps_per_epoch": 20,
            "patience": 5,
            "num_workers": config.num_workers,
        },
        evaluate={"title": "Find the picture by drawing it"},
    )


def plan(config: Config) -> Results:
    return pipeline.plan(composed(config))


def work(config: Config) -> Results:
    return pipeline.work(composed(config))


def run(argv: Sequence[str]) -> int:
    return main(Config, plan, work, argv, "zsr demo")
