"""Scaling of class embeddings. Shapes: N trained classes, B rows, S class embedding."""

from typing import Final, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from zsr.models.layers import Scale

SOFT: Final = 1e-3  # Scale adds this to every divisor; subtracted below, since it would shrink small class embeddings
WordScaling = Literal["given", "unit", "standard", "minmax"]


class Words(nn.Module):
    """Scales class embeddings (B, S): as given, to unit length, standard, or to [0, 1].

    standard: subtract the mean of the trained classes, divide by the root mean square of all centered entries. The
    divisor is one number for all dimensions, so angles about the mean are preserved.
    minmax: each dimension to [0, 1] over the trained classes; other classes may be outside.
    Both are fitted on the trained classes, and are the identity before.
    """

    def __init__(self, kind: WordScaling, dim: int) -> None:
        super().__init__()
        self.kind = kind
        self.scale = Scale(dim)

    @torch.no_grad()
    def fit(self, word_NS: Tensor) -> None:
        """Fit the constants to the embeddings of the trained classes."""
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
