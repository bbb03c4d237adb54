"""Export a checkpoint as one safetensors file, its configuration and a model card, for `zsr.load`."""

from collections.abc import Sequence
from pathlib import Path

from zsr.artifact import open_artifact
from zsr.commands.base import JobConfig, Results, main, wrote
from zsr.storage import read_file


class Config(JobConfig):
    """Export a checkpoint as one safetensors file, its configuration and a model card.

    Attributes:
        checkpoint: ROOT of a checkpoint, or one object in it.
        output: directory to create.
        data: DATA that it was trained on, for the name and attribution in the model card.
        include_backbone: include the backbone that computed its features.
        weights: weights of that backbone, if its package does not include them: a file or directory, or the ROOT of
            the checkpoint that fine-tuned it.
    """

    checkpoint: Path
    output: Path
    data: Path | None = None
    include_backbone: bool = False
    weights: Path | None = None


def plan(config: Config) -> Results:
    from zsr.export import WEIGHTS

    checkpoint = open_artifact(config.checkpoint, "checkpoint")
    return {
        "checkpoint": checkpoint.digest,
        "model": checkpoint.config["model"],
        "bytes_without_backbone": checkpoint.entry(WEIGHTS).bytes,
        "output": str(config.output),
    }


def work(config: Config) -> Results:
    from zsr.export import WEIGHTS, export

    description = export(
        open_artifact(config.checkpoint, "checkpoint"),
        config.output,
        data=None if config.data is None else open_artifact(config.data, "data"),
        include_backbone=config.include_backbone,
        weights=config.weights,
    )
    weights = read_file(config.output / WEIGHTS)
    about = {"model": description.model, "checkpoint": description.checkpoint, "bytes": len(weights)}
    return wrote(config.output, "export", weights, **about)


def run(argv: Sequence[str]) -> int:
    return main(Config, plan, work, argv, "zsr export")
