"""Image preprocessing of backbones and image towers."""

from collections.abc import Mapping
from typing import Any

from zsr.data.decode import Pictures, Resize
from zsr.models.choices import Fit
from zsr.models.protocol import Tower


def resize_of(architecture: Mapping[str, Any], size: int, fit: Fit) -> Resize:
    """How images of any shape are resized for a backbone."""
    return Resize(size, architecture["interpolation"], architecture["crop"] if fit == "published" else None)


def pictures_of(tower: Tower) -> Pictures:
    """The preprocessing that a tower was trained with, which it also requires afterwards."""
    return Pictures(resize_of(tower.architecture, tower.size, tower.fit), tower.invert_sketches)
