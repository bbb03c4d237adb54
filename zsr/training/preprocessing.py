"""What a model reads: FEATURES, or the pictures that its image tower wants."""

from collections.abc import Mapping
from typing import Any

from zsr.data.decode import Pictures, Resize
from zsr.models.choices import Fit
from zsr.models.protocol import Tower


def resize_of(architecture: Mapping[str, Any], size: int, fit: Fit) -> Resize:
    """How pictures of any shape become what a backbone takes."""
    return Resize(size, architecture["interpolation"], architecture["crop"] if fit == "published" else None)


def pictures_of(tower: Tower) -> Pictures:
    """The pictures that a tower was trained on, and wants for ever after."""
    return Pictures(resize_of(tower.architecture, tower.size, tower.fit), tower.invert_sketches)
