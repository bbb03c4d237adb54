"""Use exported checkpoints: embed images, texts or features, without Ray or DeepSpeed.

model = zsr.load("export")
model.embed_sketch(["drawing.png"]) @ model.embed_photo(photos).T
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zsr.artifact import Artifact, sha256
from zsr.checkpoint import open_model, parse
from zsr.data.decode import BadImage, Limits, Pictures, decode, square
from zsr.data.semantics.sentences import SentenceEncoder, encoder_folder
from zsr.embedding.encode import SIDES, Featurizer, ready, vectors_of
from zsr.errors import ConfigError, DamagedArtifact
from zsr.export import (
    BACKBONE,
    CONFIG,
    WEIGHTS,
    Description,
    description_of,
    featurizer_of,
    read_description,
    settings_of,
)
from zsr.models import backbones, build
from zsr.models.protocol import Embedder, Metric
from zsr.preprocessing import pictures_of, resize_of
from zsr.storage import local_path, located, read_file

Picture = Image.Image | str | Path | np.ndarray

BLOCK: Final = 32  # images or texts per forward pass of a backbone or sentence encoder, the default of zsr features
TOWER_BLOCK: Final = 64  # images per forward pass of an image tower, as in zsr embed


class Exported:
    """A model with the preprocessing of images and texts into its inputs. Returned by `load`.

    Attributes:
        description: configuration of the export.
        metric: how to compare its embeddings. For `cosine` they have unit length, so that the inner product ranks them.
        dim: width D of an embedding.
    """

    def __init__(
        self,
        description: Description,
        model: Embedder,
        included: Featurizer | None,
        weights: str | Path | None,
        device: str,
    ) -> None:
        self.description, self.device = description, device
        self.model = ready(model, device)
        self.metric: Metric = model.metric
        self.dim = model.dim
        self._included, self._weights = included, None if weights is None else local_path(weights)

    def embed_sketch(self, images: Sequence[Picture] | np.ndarray) -> np.ndarray:
        """Embed N sketches (dark strokes on white): (N, D) float32, or (N, P, D) for models with P vectors per item.

        Args:
            images: paths, PIL images or arrays (H, W, 3) or (H, W) uint8; or one array (N, H, W, 3) uint8. Paths are
                decoded as in zsr features and zsr embed, with the same results. PIL images of any mode are too: rotated
                by their Exif orientation, gray of more than 8 bits scaled, transparency on white. For a large JPEG
                their pixels differ slightly, since a path is decoded at a reduced scale.

        Raises:
            ConfigError: the model's queries are texts; it was trained on imported features; or an image is invalid.
            DamagedArtifact: the backbone's weights are not those that computed the features.
        """
        return self._embed_pictures("sketch", images)

    def embed_photo(self, images: Sequence[Picture] | np.ndarray) -> np.ndarray:
        """Embed N photos: (N, D) or (N, P, D) float32. Arguments and errors as for `embed_sketch`."""
        return self._embed_pictures("photo", images)

    def embed_text(self, texts: Sequence[str]) -> np.ndarray:
        """Embed N texts with the sentence encoder of the training features: (N, D) or (N, P, D) float32.

        Raises:
            ConfigError: the model's queries are not texts, or its features were imported.
            DamagedArtifact: the installed encoder differs from the one that computed the features.
        """
        self._require("text")
        if isinstance(texts, str):
            raise ConfigError("embed_text requires a sequence of texts, found one text; put it into a list")
        blocks = [self._encoder(texts[start : start + BLOCK]) for start in range(0, len(texts), BLOCK)]
        return self._embed("text", np.concatenate(blocks).astype(np.float16) if blocks else np.zeros((0, 0)))

    def embed_features(self, modality: str, features: np.ndarray) -> np.ndarray:
        """Embed precomputed features (N, F) of `sketch`, `text` or `photo`: (N, D) or (N, P, D) float32.

        Raises:
            ConfigError: the model does not have this modality, expects another width, or has an image tower.
        """
        self._require(modality)
        inputs = self.description.inputs
        if inputs.tower is not None:
            raise ConfigError("this model has an image tower: it embeds images, not features")
        width = inputs.photo_dim if modality == "photo" else inputs.sketch_dim
        if features.ndim != 2 or features.shape[1] != width:
            raise ConfigError(f"{modality} features have shape {features.shape}, expected (N, {width})")
        return self._embed(modality, features)

    def _embed_pictures(self, modality: str, images: Sequence[Picture] | np.ndarray) -> np.ndarray:
        self._require(modality)
        if isinstance(images, str | Path | Image.Image) or (isinstance(images, np.ndarray) and images.ndim != 4):
            raise ConfigError("found one image, expected a sequence of images or an array (N, H, W, 3)")
        tower = self.description.inputs.tower
        if tower is not None:
            blocks = [self._embed(modality, p) for p in _blocks(images, modality, pictures_of(tower), TOWER_BLOCK)]
            return np.concatenate(blocks) if blocks else self._embed(modality, np.zeros((0, 0)))
        found = self._featurizer
        features = [found.features(modality, pixels) for pixels in _blocks(images, modality, found.pictures, BLOCK)]
        return self._embed(modality, np.concatenate(features) if features else np.zeros((0, 0)))

    def _embed(self, modality: str, items: np.ndarray) -> np.ndarray:
        """Embeddings of raw features (N, F), or of pixels (N, H, W, 3) uint8."""
        if not len(items):
            return np.zeros((0, self.dim), np.float32)
        given = items if items.dtype == np.uint8 else items.astype(np.float32)
        embedded = vectors_of(self.model, modality, given, self.device)
        return embedded[:, 0] if embedded.shape[1] == 1 else embedded

    def _require(self, modality: str) -> None:
        known = (self.description.inputs.query, "photo")
        if modality not in known:
            raise ConfigError(f"this model embeds {known[0]} and {known[1]}, not {modality}")

    @cached_property
    def _featurizer(self) -> Featurizer:
        """The backbone, loaded for the first image: features and texts do not need it."""
        found = self._included or featurizer_of(self.description.features, self._weights)
        return found.ready(self.device)

    @cached_property
    def _encoder(self) -> SentenceEncoder:
        sha256 = (self.description.features or {}).get("texts")
        if sha256 is None:
            raise ConfigError("the text features of this checkpoint were imported, so their encoder is unknown")
        return SentenceEncoder(encoder_folder(None), sha256, self.device)


def of_checkpoint(checkpoint: Artifact, weights: str | Path | None = None, device: str = "cpu") -> Exported:
    """Open a checkpoint as if it were exported. Arguments as for `load`.

    Raises:
        DamagedArtifact: it does not verify.
    """
    description = description_of(checkpoint, checkpoint.entry(WEIGHTS).sha256)
    return Exported(description, open_model(checkpoint).eval(), None, weights, device)


def load(path: str | Path, *, weights: str | Path | None = None, device: str = "cpu") -> Exported:
    """Open a directory written by zsr export.

    Args:
        weights: weights of the backbone that computed its features, if the export does not include it: a file or
            directory, or for a fine-tuned backbone the ROOT of its checkpoint; None for the weights of the backbone's
            package. Read for the first image.
        device: `cpu`, `cuda`, or any other torch device.

    Raises:
        ConfigError: not an export, or this version does not know its model or one of its options.
        DamagedArtifact: the configuration or the weights were changed.
    """
    directory: Path = located(Path(path))
    description = read_description(directory)
    try:
        data = read_file(directory / WEIGHTS)
    except OSError as error:
        raise DamagedArtifact(f"{directory / WEIGHTS}: {error.strerror or error}; export again") from error
    if (found := sha256(data)) != description.weights:
        raise DamagedArtifact(f"{directory / WEIGHTS}: sha256 {found[:12]}, {CONFIG} says {description.weights[:12]}")
    state = parse(data, str(directory / WEIGHTS))
    model = build(description.model, description.options, description.inputs)
    _fill(model, {name: v for name, v in state.items() if not name.startswith(BACKBONE)}, directory)
    included = _included(description, state, directory) if description.backbones else None
    return Exported(description, model.eval(), included, weights, device)


def _included(description: Description, state: Mapping[str, Tensor], directory: Path) -> Featurizer:
    """The backbone included in the export."""
    made = {}
    for side, architecture in description.backbones.items():
        made[side] = backbones.build(architecture)
        prefix = f"{BACKBONE}{side}/"
        own = {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}
        _fill(made[side], own, directory)
        made[side].eval()
    settings, first = settings_of(description.features), next(iter(made.values()))
    architecture = first.architecture.model_dump()
    resize = resize_of(architecture, backbones.side(architecture, settings.size), settings.fit)
    return Featurizer({side: made.get(side, first) for side in SIDES}, Pictures(resize, settings.invert_sketches))


def _fill(module: torch.nn.Module, state: Mapping[str, Tensor], directory: Path) -> None:
    try:
        module.load_state_dict(dict(state))
    except RuntimeError as error:
        raise DamagedArtifact(f"{directory / WEIGHTS}: does not fit {CONFIG}: {error}") from error


def _blocks(
    images: Sequence[Picture] | np.ndarray, modality: str, pictures: Pictures, size: int
) -> Iterator[np.ndarray]:
    """Pixels (at most `size`, H, W, 3) uint8 of consecutive images."""
    for start in range(0, len(images), size):
        part = images[start : start + size]
        pixels = [_pixels(picture, pictures, start + i) for i, picture in enumerate(part)]
        yield pictures.look(modality, np.stack(pixels))


def _pixels(picture: Picture, pictures: Pictures, number: int) -> np.ndarray:
    try:
        if isinstance(picture, str | Path):
            return decode(read_file(picture), pictures.resize, Limits())
        if isinstance(picture, np.ndarray):
            if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or (picture.ndim == 3 and picture.shape[2] != 3):
                raise BadImage("wrong_type", f"{picture.dtype} of shape {picture.shape}, expected uint8 (H, W, 3)")
            picture = Image.fromarray(picture)
        return square(picture, pictures.resize)
    except (OSError, BadImage) as error:
        shown = f" ({picture})" if isinstance(picture, str | Path) else ""
        raise ConfigError(f"image {number}{shown}: {error}") from error
