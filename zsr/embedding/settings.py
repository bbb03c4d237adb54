"""What a caller can choose about features and embeddings; imports nothing heavy."""

from dataclasses import dataclass
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from zsr.models.choices import Fit, PixelScaling
from zsr.training.config import TrainSettings

Classes = Literal["all", "unseen", "validation", "training"]  # of a checkpoint's split: whose rows are embedded


@dataclass(frozen=True)
class Prices:
    """What an hour costs, in any currency. Zero prices nothing."""

    cpu_hour: float = 0.0
    gpu_hour: float = 0.0


FREE: Final = Prices()


class BackboneSettings(BaseModel):
    """What shapes FEATURES.

    Attributes:
        backbone: name in `backbones.BACKBONES`.
        layer: which of its outputs; None takes the first.
        size: side in pixels that pictures are resized to; None takes the backbone's own.
        fit: `stretch` keeps the whole picture and not its aspect, as the papers of this field do; `published` cuts out
            the middle as the backbone's publishers do.
        scaling: of pixels: as published with the backbone, or `unit`, pixels / 255 and nothing else.
        invert_sketches: white strokes on black, as SEM-PCYC's backbones were tuned on.
        jpegs: what decodes them; a GPU's pixels differ by some of 255, see `zsr.embedding.nvjpeg`.
        texts: what text rows go through, if there are any; `none` leaves them without features.
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
