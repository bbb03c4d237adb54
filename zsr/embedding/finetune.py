"""A backbone fine-tuned to classify the seen classes, which SEM-PCYC and others start from."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from zsr.artifact import Artifact, Store
from zsr.data import splits
from zsr.devices import AUTO, DeviceSettings
from zsr.embedding.encode import BackboneSettings
from zsr.models import backbones, configure
from zsr.models.protocol import Tower
from zsr.training.config import TrainSettings
from zsr.training.loop import Score
from zsr.training.run import Run, TowerStart, train_model


class Finetune(BaseModel):
    """How the backbone is fine-tuned. The specifications say that it was, not how: these numbers are ours.

    Attributes:
        shared: one backbone for both modalities; the papers tune one each.
        lr: of the classifiers on top.
        rate: the backbone's learning rate as a multiple of that.
        tune: which of its parameters train, see zsr train --tower-tune.
        training: of the run; its validation classes choose the step.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    shared: bool = False
    lr: float = Field(1e-3, gt=0)
    rate: float = Field(0.1, gt=0)
    tune: str = "all"
    training: TrainSettings = TrainSettings(epochs=10, batch_size=32, augment=True)


def finetune(
    data: Artifact,
    settings: BackboneSettings,
    weights: Path,
    split: str,
    how: Finetune,
    output: Store,
    score: Score,
    device: DeviceSettings = AUTO,
) -> Artifact:
    """The checkpoint of model `classifier` behind this backbone, trained on the seen classes of a split.

    Raises:
        ConfigError: see `splits.choose`, `backbones.architecture` and `train_model`.
    """
    made = settings.architecture(weights)
    tower = Tower(
        architecture=made,
        size=backbones.side(made, settings.size),
        fit=settings.fit,
        invert_sketches=settings.invert_sketches,
        shared=how.shared,
        rate=how.rate,
        tune=how.tune,
        weights=backbones.digest(weights),
    )
    chosen = splits.choose(split, data.facts["classes"], how.training.validation_classes, how.training.seed)
    return train_model(
        Run(
            data=data,
            features=TowerStart(tower, weights),
            semantics=None,
            split=chosen,
            model="classifier",
            options=configure("classifier", {"lr": how.lr}).model_dump(mode="json"),
            settings=how.training,
            output=output,
            score=score,
            device=device,
        )
    )
