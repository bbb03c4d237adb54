"""Settings of features and embeddings; imports nothing heavy."""

from dataclasses import dataclass
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from zsr.models.choices import Fit, PixelScaling
from zsr.training.config import TrainSettings

Classes = Literal["all", "unseen", "validation", "training"]  # part of a checkpoint's split whose rows are embedded


@dataclass(frozen=True)
class Prices:
    """Prices per hour, in any currency; with zeros no cost is reported."""

    cpu_hour: float = 0.0
    gpu_hour: float = 0.0


FREE: Final = Prices()


class BackboneSettings(BaseModel):
    """Settings that determine FEATURES.

    Attributes:
        backbone: name in `backbones.BACKBONES`.
        layer: output of the backbone; None for the first.
        size: side in pixels to which images are resized; None for the backbone's own.
        fit: `stretch` resizes the whole image without keeping its aspect ratio, as in the papers of this field;
            `published` takes a center crop as the backbone's publishers do.
        scaling: normalization of pixels: as published with the backbone, or `unit`, pixels / 255 only.
        invert_sketches: turn sketches into white strokes on black, as in the fine-tuning of SEM-PCYC's backbones.
        jpegs: device that decodes JPEGs; pixels of a GPU differ by a few of 255, see `zsr.embedding.nvjpeg`.
        texts: sentence encoder of text rows; `none` computes no features of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    backbone: str = "lite0"
    layer: str | None = None
    size: int | None = None
    fit: Fit = "stretch"
    scaling: PixelScaling = "published"
    invert_sketches: bool = False
    jpegs: Literal["cpu", "gpu"] = "cpu"
    texts: Literal["minilm", "none"] = "minilm"


class Finetune(BaseModel):
    """Fine-tuning of the backbone.

    Papers report that it was fine-tuned, but not how: the default values were chosen in this project.

    Attributes:
        shared: one backbone for both modalities; the papers fine-tune one per modality.
        lr: learning rate of the classifiers on top.
        rate: the backbone's learning rate as a multiple of `lr`.
        tune: parameters of the backbone to train, see zsr train --tower-tune.
        training: settings of the training run; its validation classes choose the step.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    shared: bool = False
    lr: float = Field(1e-3, gt=0)
    rate: float = Field(0.1, gt=0)
    tune: str = "all"
    training: TrainSettings = TrainSettings(epochs=10, batch_size=32, augment=True)
