"""Ridge regression to class embeddings: the baseline that any use of semantics has to beat.

Designed in this project, not taken from a paper. Each modality is regressed separately, in closed form. Z (R, F) are
the standardized features of its seen rows. Y (R, S) are their targets: the class embedding of each row's class, scaled
to unit length and centered, that is, minus the mean of these unit-length embeddings over all R rows. Then

    A = (Z'Z + penalty I)^-1 Z'Y = Z'(ZZ' + penalty I)^-1 Y        embedding = zA / |zA|, compared by cosine.

Z'Z and Z'Y are sums over rows, so one streamed pass suffices; Y depends only on the class, so Z'Y requires only one
feature sum per class. It generalizes to unseen classes because the targets are in the space of all class embeddings.

Shapes: B batch, R seen rows of a modality, F feature, S class embedding, N seen classes.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn
from torch.nn import functional

from zsr.errors import ConfigError
from zsr.models.layers import sum_over_ranks
from zsr.models.protocol import Choice, ClosedForm, Inputs, ModelConfig, Rows


class Config(ModelConfig):
    """Options.

    Attributes:
        penalties: grid of penalties; the one with the best validation score is used for both modalities.
    """

    penalties: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (
        100.0,
        300.0,
        1000.0,
        2000.0,
        3000.0,
        10000.0,
        30000.0,
    )


class Moments:
    """The normal equations of one modality, summed in float64 over any number of blocks.

    Attributes:
        gram_FF: Z'Z.
        total_NF: sum of the features of each class.
        count_N: rows of each class.
    """

    def __init__(self, dim: int, classes: int, device: torch.device) -> None:
        self.gram_FF = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self.total_NF = torch.zeros(classes, dim, dtype=torch.float64, device=device)
        self.count_N = torch.zeros(classes, dtype=torch.float64, device=device)

    def accumulate(self, features: Tensor, label: Tensor) -> None:
        """Add a block of standardized features (B, F) with labels (B,)."""
        rows_BF = features.to(torch.float64)
        self.gram_FF.addmm_(rows_BF.T, rows_BF)
        self.total_NF.index_add_(0, label, rows_BF)
        self.count_N += torch.bincount(label, minlength=len(self.count_N))

    def sum_over_ranks(self) -> None:
        """Replace each rank's sums by the sums over all ranks."""
        self.gram_FF = sum_over_ranks(self.gram_FF)
        self.total_NF = sum_over_ranks(self.total_NF)
        self.count_N = sum_over_ranks(self.count_N)

    def solve(self, word_NS: Tensor, penalty: float) -> Tensor:
        """A (F, S) for the class embeddings `word_NS`."""
        unit_NS = functional.normalize(word_NS.to(self.gram_FF))
        target_NS = unit_NS - self.count_N @ unit_NS / self.count_N.sum()
        ridge_FF = self.gram_FF + penalty * torch.eye(len(self.gram_FF)).to(self.gram_FF)
        return torch.cholesky_solve(self.total_NF.T @ target_NS, torch.linalg.cholesky(ridge_FF))


class Ridge(ClosedForm):
    """Linear maps from standardized features (B, F) to unit-length embeddings (B, 1, S)."""

    def __init__(self, config: Config, inputs: Inputs) -> None:
        super().__init__(inputs)
        self.config = config
        widths = {"sketch": inputs.sketch_dim, "photo": inputs.photo_dim}
        self.maps = nn.ModuleDict(
            {modality: nn.Linear(width, inputs.semantic_dim, bias=False) for modality, width in widths.items()}
        ).requires_grad_(False)

    @property
    def dim(self) -> int:
        return self.inputs.semantic_dim

    def fit(self, rows: Iterable[Rows], word: Tensor, score: Callable[[], float] | None) -> Choice:
        moments = self.moments(rows)
        penalties = self.config.penalties
        if score is None and len(penalties) > 1:
            raise ConfigError(
                f"no validation class to choose one of {len(penalties)} penalties; hold some out, or set a single one"
            )
        scores: dict[float, float] = {}
        for penalty in penalties:
            self.solve(moments, word, penalty)
            scores[penalty] = 0.0 if score is None else score()
        best = max(scores, key=lambda penalty: scores[penalty])
        self.solve(moments, word, best)
        tried = {} if score is None else {f"penalty {penalty:g}": value for penalty, value in scores.items()}
        return Choice(tried, {"penalties": [best]})

    @torch.no_grad()
    def moments(self, rows: Iterable[Rows]) -> Mapping[str, Moments]:
        """The normal equations of both modalities, summed over `rows` and over all ranks."""
        classes, device = len(self.inputs.classes), next(self.maps.parameters()).device
        moments = {
            "sketch": Moments(self.inputs.sketch_dim, classes, device),
            "photo": Moments(self.inputs.photo_dim, classes, device),
        }
        for modality, features, label in rows:
            moments[modality].accumulate(self.scale[modality](features), label)
        for part in moments.values():
            part.sum_over_ranks()
        return moments

    @torch.no_grad()
    def solve(self, moments: Mapping[str, Moments], word: Tensor, penalty: float) -> None:
        """Set both maps to the solution for `word` (N, S) and `penalty`."""
        for modality, part in moments.items():
            self.maps.get_parameter(f"{modality}.weight").copy_(part.solve(word, penalty).T)

    def embed(self, modality: str, features: Tensor) -> Tensor:
        return functional.normalize(self.maps[modality](features)).unsqueeze(1)
