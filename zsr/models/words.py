"""Class vectors as a model takes them. Shapes: N trained classes, B rows, S class vector."""

from typing import Final, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from zsr.models.layers import Scale

SOFT: Final = 1e-3  # what Scale adds to every divisor: small class vectors would lose their size to it
WordScaling = Literal["given", "unit", "standard", "minmax"]


class Words(nn.Module):
    """Class vectors (B, S) as given, at unit length, standard, or in [0, 1].

    standard: less the mean of the trained classes, over the root mean square of all that is left. It is one number for
    all entries, so angles about that mean stay what they are.
    minmax: each entry from 0 to 1 over the trained classes; other classes may lie outside.
    Both are fitted on the trained classes, and are the identity until then.
    """

    def __init__(self, kind: WordScaling, dim: int) -> None:
        super().__init__()
        self.kind = kind
        self.scale = Scale(dim)

    @torch.no_grad()
    def fit(self, word_NS: Tensor) -> None:
        """Take the constants from the vectors of the trained classes."""
        if self.kind == "standard":
            mean_S = word_NS.mean(0)
            size = (word_NS - mean_S).square().mean().sqrt()
            self.scale.fit(mean_S, size.expand_as(mean_S) - SOFT)
        elif self.kind == "minmax":
            least, most = word_NS.aminmax(dim=0)
            self.scale.fit(least, most - least)

    def forward(self, word_BS: Tensor) -> Tensor:
        if self.kind == "unit":
            return functional.normalize(word_BS)
        scaled: Tensor = word_BS if self.kind == "given" else self.scale(word_BS)
        return scaled
