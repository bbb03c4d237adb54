"""VGG-16 and VGG-19, with and without batch norm, and Doodle2Search's spatial attention.

K. Simonyan, A. Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015.

Layers and parameter names are torchvision's, so that its weights files load. Published numbers of parameters, with
1000 classes: VGG-16 138,357,544 and with batch norm 138,365,992; VGG-19 143,667,240.

Doodle2Search's encoder (released code) is VGG-16 with batch norm up to fc7 and `nn.Linear(4096, 256)`: 135,317,824
parameters. Its attention, off by default, adds 195,321.

Shapes: B batch, H x W pixels, h x w positions (H / 32 and W / 32, rounded down), F features.
"""

from itertools import pairwise
from typing import Final, Literal

import torch
from torch import Tensor, nn

Depth = Literal[16, 19]
Layer = Literal["conv", "fc6", "fc7", "logits"]

CHANNELS: Final = (64, 128, 256, 512, 512)
CONVOLUTIONS: Final = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}  # of each block
POSITIONS: Final = 7  # side of the feature map that is input to the classifier
# widths of the linear layers up to each output
WIDTHS: Final[dict[Layer, tuple[int, ...]]] = {
    "conv": (512,),
    "fc6": (512 * POSITIONS**2, 4096),
    "fc7": (512 * POSITIONS**2, 4096, 4096),
    "logits": (512 * POSITIONS**2, 4096, 4096, 1000),
}


def trunk(depth: Depth, batch_norm: bool) -> nn.Sequential:
    """Images (B, 3, H, W) -> feature maps (B, 512, h, w): five blocks of 3 x 3 convolutions and 2 x 2 max pooling."""
    layers: list[nn.Module] = []
    inputs = 3
    for outputs, count in zip(CHANNELS, CONVOLUTIONS[depth], strict=True):
        for _ in range(count):
            norm = [nn.BatchNorm2d(outputs)] if batch_norm else []
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), *norm, nn.ReLU(inplace=True)]
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def classifier(layer: Layer) -> nn.Sequential:
    """Maps (B, 512 * 7 * 7) -> features (B, F): linear layers, with ReLU and dropout of 0.5 after each hidden one.

    There is no dropout at the end: models that use the features apply their own.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(WIDTHS[layer]):
        hidden = [nn.ReLU(inplace=True), nn.Dropout()] if outputs == 4096 else []
        layers += [nn.Linear(inputs, outputs), *hidden]
    ends_in_dropout = bool(layers) and isinstance(layers[-1], nn.Dropout)
    return nn.Sequential(*(layers[:-1] if ends_in_dropout else layers))


class Attention(nn.Module):
    """x + x * m, where m is a softmax over all positions of conv(conv(x)), 1 x 1 convolutions 512 -> 380 -> 1.

    As in Doodle2Search's released code, which has no non-linearity between the two. m sums to 1 over an image.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Conv2d(512, 380, 1)
        self.score = nn.Conv2d(380, 1, 1)

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (B, 512, h, w) -> (B, 512, h, w)."""
        scores = self.score(self.hidden(maps))
        return maps + maps * torch.softmax(scores.flatten(1), dim=1).view_as(scores)


class VGG(nn.Module):
    """The network up to one of its layers; later layers are not built.

    Args:
        layer: `fc6` or `fc7`, 4096-d and non-negative (after the ReLU); `conv`, 512-d, the average-pooled output of the
            last block; `logits`, 1000-d.
        attention: Doodle2Search's, between convolutions and classifier.
    """

    def __init__(self, depth: Depth, batch_norm: bool, layer: Layer, attention: bool = False) -> None:
        super().__init__()
        self.features = trunk(depth, batch_norm)
        self.attention: nn.Module = Attention() if attention else nn.Identity()
        self.pool = nn.AdaptiveAvgPool2d(1 if layer == "conv" else POSITIONS)  # 7 x 7 is the identity at 224 pixels
        self.classifier = classifier(layer)
        self.dim = WIDTHS[layer][-1]

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images (B, 3, H, W), H and W at least 32 -> features (B, F)."""
        features: Tensor = self.classifier(self.pool(self.attention(self.features(images))).flatten(1))
        return features
