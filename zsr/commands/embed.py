"""Embed the rows of one modality: DATA, FEATURES and a checkpoint to EMB."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from zsr.artifact import Artifact, Store, open_artifact
from zsr.commands.base import JobConfig, Results, made, main
from zsr.data.rows import Modality
from zsr.devices import DeviceSettings
from zsr.embedding.settings import Classes, Prices


class Config(DeviceSettings, JobConfig):
    """Embed the rows of one modality with a trained checkpoint.

    Attributes:
        data: DATA artifact.
        features: FEATURES of that data; omit for a checkpoint with an image tower.
        checkpoint: ROOT of a checkpoint, or one object in it.
        modality: modality of the rows to embed.
        output: ROOT of the EMB artifact.
        classes: all rows, or only those of unseen, validation or training classes of the checkpoint's split.
        num_workers: processes that hold the model; by default as many as fit on nodes that are up or that the
            autoscaler can start.
        decoders: decoding tasks per worker, as in zsr features; for a checkpoint with an image tower.
        cpu_price: price per CPU hour, in any currency; the results then include the cost per million rows.
        gpu_price: price per GPU hour.
        measure: with --dry-run: run for a few seconds to predict the total time and cost.
    """

    data: Path
    checkpoint: Path
    modality: Modality
    output: Path
    features: Path | None = None
    classes: Classes = "all"
    num_workers: int | None = Field(None, ge=1)
    decoders: int | None = None
    cpu_price: float = 0.0
    gpu_price: float = 0.0
    measure: bool = False

    def open(self) -> tuple[Artifact, Artifact | None, Artifact]:
        """The opened data, features and checkpoint."""
        return (
            open_artifact(self.data, "data"),
            None if self.features is None else open_artifact(self.features, "features"),
            open_artifact(self.checkpoint, "checkpoint"),
        )


def plan(config: Config) -> Results:
    from zsr.embedding import gallery

    data, features, checkpoint = config.open()
    source = gallery.source_of(data, features, checkpoint, config.modality)
    rows, dim = (features or data).facts["rows"][config.modality], checkpoint.facts["dim"]
    digest = gallery.plan(data, source, checkpoint, config.modality, config.classes).digest
    found = {"plan": digest, "rows_at_most": rows, "dim": dim, "bytes_at_most": rows * dim * 4}
    if not config.measure:
        return found
    cost = gallery.predict(
        data,
        features,
        checkpoint,
        config.modality,
        classes=config.classes,
        actors=config.num_workers,
        prices=Prices(config.cpu_price, config.gpu_price),
        device=config.devices,
    )
    return {**found, "cost": cost}


def work(config: Config) -> Results:
    from zsr.embedding import gallery

    data, features, checkpoint = config.open()
    store = Store.at(config.output)
    embeddings, tally = gallery.embed(
        data,
        features,
        checkpoint,
        config.modality,
        store,
        classes=config.classes,
        actors=config.num_workers,
        decoders=config.decoders,
        device=config.devices,
    )
    prices = Prices(config.cpu_price, config.gpu_price)
    return made(embeddings, config.output, **embeddings.facts, cost=tally.report(prices))


def run(argv: Sequence[str]) -> int:
    return main(Config, plan, work, argv, "zsr embed")
