"""Sketch files as queries: decoded, through the checkpoint's image tower or the backbone of its features, embedded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch

from zsr.artifact import Artifact
from zsr.data.decode import BadImage, Limits, Resize, decode
from zsr.embedding.encode import ready, vectors_of
from zsr.errors import ConfigError
from zsr.models import backbones
from zsr.models.protocol import Inputs
from zsr.training.checkpoint import open_model
from zsr.training.source import pictures_of, resize_of

SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp")


def sketch_files(place: Path) -> list[Path]:
    """`place` itself, or the pictures in the folder `place` and below, in name order.

    Raises:
        ConfigError: there is none.
    """
    found = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not found:
        raise ConfigError(f"{place}: no picture there; expected a file or a folder of {', '.join(SUFFIXES)}")
    return found


def embed_files(files: Sequence[Path], checkpoint: Artifact, weights: Path | None = None) -> np.ndarray:
    """Embeddings (N, P, D) float32 of sketch files, as jobs.features and jobs.embed would make them.

    Args:
        weights: of the backbone, for a checkpoint of features whose backbone's package has none.

    Raises:
        ConfigError: a file that is no picture, features that no backbone made, or another backbone's weights.
    """
    torch.set_num_threads(1)
    model, inputs = ready(open_model(checkpoint), "cpu"), Inputs.model_validate(checkpoint.config["inputs"])
    if inputs.tower is not None:
        pictures = pictures_of(inputs.tower)
        return vectors_of(model, "sketch", _pixels(files, pictures.resize, pictures.invert_sketches), "cpu")
    made = checkpoint.config.get("features") or {"backbone": "another version of zsr"}
    name = str(made["backbone"])
    if name not in backbones.BACKBONES or "saw" in made:
        raise ConfigError(
            f"checkpoint {checkpoint.digest[:12]} was trained on features of {name!r}, which no published backbone "
            "makes; embed the sketches with jobs.features and jobs.embed, and give --queries"
        )
    path = backbones.weights_path(name, weights)
    loaded = backbones.load(name, path, str(made["weights"]), layer=made["layer"], scaling=made["scaling"])
    built = backbones.architecture(name, path, layer=made["layer"], scaling=made["scaling"])
    pixels = _pixels(files, resize_of(built, int(made["size"]), made["fit"]), bool(made["invert_sketches"]))
    with torch.inference_mode():
        # half precision, as FEATURES are stored
        features = backbones.folded(loaded)(torch.from_numpy(pixels)).half().float().numpy()
    return vectors_of(model, "sketch", features, "cpu")


def _pixels(files: Sequence[Path], resize: Resize, inverted: bool) -> np.ndarray:
    """Decoded pictures (N, H, W, 3) uint8."""
    found = []
    for path in files:
        try:
            decoded = decode(path.read_bytes(), resize, Limits())
        except (BadImage, OSError) as error:
            raise ConfigError(f"{path}: {error}") from error
        found.append(255 - decoded if inverted else decoded)
    return np.stack(found)
