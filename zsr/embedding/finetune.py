"""Fine-tune a backbone to classify the seen classes, as SEM-PCYC and others do before training."""

from pathlib import Path

from zsr.artifact import Artifact, Store
from zsr.data import splits
from zsr.devices import AUTO, DeviceSettings
from zsr.embedding.encode import architecture_of
from zsr.embedding.settings import BackboneSettings, Finetune
from zsr.models import backbones, configure
from zsr.models.protocol import Tower
from zsr.training.run import Run, TowerStart, train_model


def finetune(
    data: Artifact,
    settings: BackboneSettings,
    weights: Path,
    split: str,
    how: Finetune,
    output: Store,
    device: DeviceSettings = AUTO,
) -> Artifact:
    """Train the model `classifier` on top of this backbone on the seen classes of a split; returns the checkpoint.

    Raises:
        ConfigError: see `splits.choose`, `backbones.architecture` and `train_model`.
    """
    made = architecture_of(settings, weights)
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
            device=device,
        )
    )
