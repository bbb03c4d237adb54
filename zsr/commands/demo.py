"""Run the whole pipeline on the embedded emoji data set: drawings retrieve images of classes unseen in training.

It is `zsr pipeline` with a preset configuration and few flags. Run again after a kill, it resumes at the stage and
shard where it stopped.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from zsr.commands import pipeline
from zsr.commands.base import JobConfig, Results, main, refusals
from zsr.errors import ConfigError


class Config(JobConfig):
    """Run the whole pipeline on the embedded emoji data set, from images to a report.

    Attributes:
        output: directory for all artifacts and the report.
        seeds: one training run per seed; the index is built with the first.
        split: random:UNSEEN:SEED, a random split of the emoji classes.
        model: name of the model.
        size: side in pixels to which images are resized for the backbone.
        epochs: max epochs; early stopping on validation classes may end training sooner.
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
    kind = pipeline.config_of(config.model)
    try:
        return kind(**_sections(config))
    except ValidationError as error:
        raise ConfigError(refusals(error, kind)) from error


def _sections(config: Config) -> dict[str, Any]:
    return dict(
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
