"""Encode images to features, and features or images to embeddings, without Ray.

Shared by zsr features, zsr embed and exported models.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from torch.nn import functional

from zsr import progress
from zsr.artifact import Artifact
from zsr.checkpoint import open_model
from zsr.data.decode import BadImage, Limits, Pictures, decode
from zsr.embedding.settings import BackboneSettings
from zsr.errors import ConfigError
from zsr.models import backbones
from zsr.models.protocol import Embedder, Inputs, Tower
from zsr.preprocessing import pictures_of, resize_of

BATCH: Final = 1024  # feature rows per forward pass
SIDES: Final = ("sketch", "photo")


def architecture_of(settings: BackboneSettings, weights: Path) -> dict[str, Any]:
    """See `backbones.architecture`."""
    return backbones.architecture(settings.backbone, weights, layer=settings.layer, scaling=settings.scaling)


def tower_of(checkpoint: Artifact) -> Tower:
    """The image tower that a checkpoint was trained with. Raises ConfigError if it has none."""
    tower = Inputs.model_validate(checkpoint.config["inputs"]).tower
    if tower is None:
        raise ConfigError(f"checkpoint {checkpoint.digest[:12]} has no image tower to compute features with")
    return tower


@dataclass(frozen=True)
class Featurizer:
    """Computes features of images.

    Attributes:
        backbones: one per modality, in eval mode; the same object if the modalities share it.
        pictures: preprocessing of the images.
    """

    backbones: Mapping[str, backbones.Backbone]
    pictures: Pictures

    def ready(self, device: str) -> "Featurizer":
        """A copy for inference on a device, with folded batch norms: see `backbones.folded`."""
        distinct = {id(backbone): backbone for backbone in self.backbones.values()}
        made = {number: backbones.folded(backbone).to(device) for number, backbone in distinct.items()}
        return Featurizer({side: made[id(backbone)] for side, backbone in self.backbones.items()}, self.pictures)

    def pixels(self, side: str, image: bytes | None) -> np.ndarray:
        """Pixels (H, W, 3) uint8 of an encoded image. Raises BadImage if there is none or it cannot be decoded."""
        if image is None:
            raise BadImage("empty", "the row has no picture")
        return self.pictures.look(side, decode(image, self.pictures.resize, Limits()))

    @torch.inference_mode()
    def features(self, side: str, pixels: np.ndarray) -> np.ndarray:
        """Features (N, F) of pixels (N, H, W, 3) uint8 in one forward pass, as float16 like in FEATURES."""
        backbone = self.backbones[side]
        device = next(backbone.parameters()).device
        return np.asarray(backbone(torch.from_numpy(pixels).to(device)).half().cpu().numpy())


def featurizer(settings: BackboneSettings, weights: Path | Artifact, sha256: str) -> Featurizer:
    """The Featurizer for `settings`.

    Args:
        weights: weights of the backbone, or a checkpoint whose image towers are the fine-tuned backbone.
        sha256: expected digest of the weights.

    Raises:
        ConfigError: no such backbone, layer or size.
        DamagedArtifact: the weights have another digest, or do not fit the backbone.
    """
    if isinstance(weights, Artifact):
        model, resize = open_model(weights), pictures_of(tower_of(weights)).resize
        towers = {side: cast(backbones.Backbone, model.tower(side)) for side in SIDES}
        return Featurizer(towers, Pictures(resize, settings.invert_sketches))
    made = architecture_of(settings, weights)
    resize = resize_of(made, backbones.side(made, settings.size), settings.fit)
    loaded = backbones.load(settings.backbone, weights, sha256, layer=settings.layer, scaling=settings.scaling)
    return Featurizer(dict.fromkeys(SIDES, loaded), Pictures(resize, settings.invert_sketches))


def ready(model: Embedder, device: str) -> Embedder:
    """The model on a device, for inference only, its image towers with folded batch norms: see `backbones.folded`."""
    for name, tower in model.towers.items():
        model.towers[name] = backbones.folded(cast(backbones.Backbone, tower))
    return model.to(device)


def vectors_of(model: Embedder, modality: str, items: np.ndarray, device: str) -> np.ndarray:
    """Embeddings (N, P, D) float32 of raw features (N, F) or images (N, H, W, 3); unit length for the cosine metric."""
    found = []
    for block in torch.split(torch.from_numpy(items), BATCH if items.ndim == 2 else backbones.pictures_at_once(device)):
        embedded = model.encode(modality, block.to(device))
        progress.advance(len(block))
        found.append((functional.normalize(embedded, dim=-1) if model.metric == "cosine" else embedded).cpu())
    return torch.cat(found).numpy() if found else np.zeros((0, 1, model.dim), np.float32)
