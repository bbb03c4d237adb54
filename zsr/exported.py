"""An exported checkpoint in use: pictures, texts or features in, embeddings out. No Ray, no DeepSpeed.

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

BLOCK: Final = 32  # pictures or texts in one forward pass of what makes features; zsr features' own default
TOWER_BLOCK: Final = 64  # pictures in one forward pass of an image tower, as zsr embed takes


class Exported:
    """A model with all that turns pictures and texts into what it eats. Made by `load`.

    Attributes:
        description: what the export says of itself.
        metric: how its embeddings are compared. Under `cosine` they have unit length, so that a product ranks them.
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
        """Embeddings (N, D) float32 of N sketches, dark strokes on white; (N, P, D) of models with P parts an item.

        Args:
            images: paths, PIL images or arrays (H, W, 3) or (H, W) uint8; or one array (N, H, W, 3) uint8. A path
                goes through the decoding of zsr features and zsr embed, and gives what they give. So does a PIL image
                of any mode: it is turned as its Exif says, gray of more than 8 bits is scaled, and transparency becomes
                white. Of a large JPEG it has slightly other pixels, since a path is read at a reduced scale.

        Raises:
            ConfigError: the model's queries are texts; it learned from imported features; or a picture is none.
            DamagedArtifact: the backbone's weights are not those that made the features.
        """
        return self._embed_pictures("sketch", images)

    def embed_photo(self, images: Sequence[Picture] | np.ndarray) -> np.ndarray:
        """Embeddings (N, D) or (N, P, D) float32 of N photos. Arguments and errors as of `embed_sketch`."""
        return self._embed_pictures("photo", images)

    def embed_text(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings (N, D) or (N, P, D) float32 of N texts by the sentence encoder that made the features.

        Raises:
            ConfigError: the model's queries are no texts, or its features were imported.
            DamagedArtifact: the encoder here is another than the one that made the features.
        """
        self._require("text")
        if isinstance(texts, str):
            raise ConfigError("embed_text wants a sequence of texts, found one text; put it into a list")
        blocks = [self._encoder(texts[start : start + BLOCK]) for start in range(0, len(texts), BLOCK)]
        return self._embed("text", np.concatenate(blocks).astype(np.float16) if blocks else np.zeros((0, 0)))

    def embed_features(self, modality: str, features: np.ndarray) -> np.ndarray:
        """Embeddings (N, D) or (N, P, D) float32 of ready features (N, F) of `sketch`, `text` or `photo`.

        Raises:
            ConfigError: not a modality of this model, not its width, or it has an image tower.
        """
        self._require(modality)
        inputs = self.description.inputs
        if inputs.tower is not None:
            raise ConfigError("this model has an image tower: it embeds pictures, not features")
        width = inputs.photo_dim if modality == "photo" else inputs.sketch_dim
        if features.ndim != 2 or features.shape[1] != width:
            raise ConfigError(f"{modality} features have shape {features.shape}, expected (N, {width})")
        return self._embed(modality, features)

    def _embed_pictures(self, modality: str, images: Sequence[Picture] | np.ndarray) -> np.ndarray:
        self._require(modality)
        if isinstance(images, str | Path | Image.Image) or (isinstance(images, np.ndarray) and images.ndim != 4):
            raise ConfigError("found one picture, expected a sequence of pictures or an array (N, H, W, 3)")
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
        """Loaded when the first picture comes: who has features, or texts alone, needs no backbone."""
        found = self._included or featurizer_of(self.description.features, self._weights)
        return found.ready(self.device)

    @cached_property
    def _encoder(self) -> SentenceEncoder:
        sha256 = (self.description.features or {}).get("texts")
        if sha256 is None:
            raise ConfigError("the text features of this checkpoint were imported: what made them is not known here")
        return SentenceEncoder(encoder_folder(None), sha256, self.device)


def of_checkpoint(checkpoint: Artifact, weights: str | Path | None = None, device: str = "cpu") -> Exported:
    """A checkpoint in use as its export would be. Arguments as of `load`.

    Raises:
        DamagedArtifact: it does not verify.
    """
    description = description_of(checkpoint, checkpoint.entry(WEIGHTS).sha256)
    return Exported(description, open_model(checkpoint).eval(), None, weights, device)


def load(path: str | Path, *, weights: str | Path | None = None, device: str = "cpu") -> Exported:
    """Open what zsr export has written.

    Args:
        weights: of the backbone that made its features, where the export does not include it: a file or directory, of a
            fine-tuned backbone the ROOT of its checkpoint; None takes what the backbone's package brings. Read when
            the first picture comes.
        device: `cpu`, `cuda`, or what else torch knows.

    Raises:
        ConfigError: not an export, or of a model or option that this version does not know.
        DamagedArtifact: the configuration or the weights are not what was written.
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
    """The backbone that lies in the export itself."""
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
    """Pixels (at most `size`, H, W, 3) uint8 of consecutive pictures."""
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
        raise ConfigError(f"picture {number}{shown}: {error}") from error
