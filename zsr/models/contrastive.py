"""Supervised contrastive learning across modalities, starting from the backbone's feature space.

Designed in this project, not taken from a paper.

What a backbone encodes about unseen classes is in the relations of its features. So the head is linear and initialized
as the identity: at step 0 rows are compared by their backbone features, and training only changes that space slightly.
In trials, any full-width initialization that preserves distances did as well; narrower or other random ones did worse.
With z the standardized features of modality m,

    embedding e = W_m asinh(z) / |W_m asinh(z)|, compared by cosine        W_m = I before training

asinh is the identity near 0 and logarithmic for large values: it compresses the long tails of features that were
average-pooled after a ReLU. The loss pulls every row i of a batch, sketch or photo, to the rows j of its class:

    across = -mean_i sum_j t_ij log softmax_j(e_i e_j / temperature)        j: the rows of the other modality
    within = the same                                                       j: the other rows of i's own modality

with targets t_ij proportional to 1 within a class, else to exp((cos(s_i, s_j) - 1) / softness), s the class embeddings,
and summing to 1 over j. Supervised contrastive learning is that of P. Khosla et al., "Supervised Contrastive Learning",
NeurIPS 2020, as recalled; the split by modality, the soft targets, the initialization and the asinh are this project's.

Shapes: B batch, F feature, D embedding, S class embedding, G rows of all ranks, R = 2G those of both modalities.
"""

from collections.abc import Mapping
from typing import Final

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from zsr.batch import Batch
from zsr.models.layers import gather_over_ranks
from zsr.models.protocol import Group, Inputs, Model, ModelConfig, Optimizer, Phase, Shared, Terms

MODALITIES: Final = ("sketch", "photo")
# scores peak within 20 to 120 steps (docs/models.md), so validation must be frequent
SCHEDULE: Final = {"epochs": 60, "steps_per_epoch": 10}


class Config(ModelConfig):
    """Options.

    Attributes:
        dim: D, width of an embedding; None uses the photos' F. A smaller head is initialized with D rows of a random
            rotation, the same for both modalities.
        temperature: temperature of the similarities of embeddings.
        softness: temperature of the soft targets from cosines of class embeddings. With 0, targets are rows of the same
            class only.
        across_weight, within_weight: weights of the two losses.
        lr, weight_decay: of AdamW.
    """

    dim: PositiveInt | None = None
    temperature: PositiveFloat = 0.1
    softness: NonNegativeFloat = 0.1
    across_weight: NonNegativeFloat = 1.0
    within_weight: NonNegativeFloat = 1.0
    lr: PositiveFloat = 1e-4
    weight_decay: NonNegativeFloat = 0.0


# -- parts -----------------------------------------------------------------------------------------------------------


def starts(widths: Mapping[str, int], dim: int) -> dict[str, Tensor]:
    """Initial map (D, F) per modality. Equal widths get equal maps: the identity, or D rows of a random rotation.

    Modalities of different widths have no common space, so each gets its own random map, with orthonormal rows or
    columns.
    """
    maps = {m: nn.init.orthogonal_(torch.empty(dim, width)) for m, width in widths.items()}
    if len(set(widths.values())) > 1:
        return maps
    common = maps["photo"]
    return {m: torch.eye(dim) if common.shape == (dim, dim) else common.clone() for m in widths}


# -- losses ----------------------------------------------------------------------------------------------------------


def class_targets(label_R: Tensor, word_RS: Tensor, softness: float) -> Tensor:
    """Target similarity of rows i and j, (R, R): 1 within a class, else exp((cos(s_i, s_j) - 1) / softness)."""
    same_RR = label_R.unsqueeze(1) == label_R
    if not softness:
        return same_RR.to(word_RS)
    unit_RS = functional.normalize(word_RS)
    return torch.where(same_RR, 1.0, ((unit_RS @ unit_RS.T - 1.0) / softness).exp())


def contrast(logits_RR: Tensor, target_RR: Tensor, among_RR: Tensor) -> Tensor:
    """-mean_i sum_j t_ij log softmax_j(logits_ij), over the rows j for which `among_RR[i, j]` is true.

    `target` is first normalized to sum 1 over these j; the loss of a row without any target is 0.
    """
    logits_RR = logits_RR.masked_fill(~among_RR, torch.finfo(logits_RR.dtype).min)
    share_RR = functional.normalize(target_RR * among_RR, p=1.0)
    return -(share_RR * logits_RR.log_softmax(1)).masked_fill(~among_RR, 0.0).sum(1).mean()


# -- model -----------------------------------------------------------------------------------------------------------


class Contrastive(Model):
    """A linear head per modality on standardized features; embeddings are (B, 1, D), of unit length.

    Both losses are batch-dependent and use the rows of all ranks: 2 ranks with B rows each are equivalent to 1 rank
    with 2B rows. The batch size is a hyperparameter of the model.
    """

    def __init__(self, config: Config, inputs: Inputs) -> None:
        super().__init__(inputs)
        self.config = config
        widths = {"sketch": inputs.sketch_dim, "photo": inputs.photo_dim}
        self.heads = nn.ModuleDict({m: nn.Linear(width, self.dim, bias=False) for m, width in widths.items()})
        for modality, start in starts(widths, self.dim).items():
            self.heads.get_parameter(f"{modality}.weight").data.copy_(start)

    @property
    def dim(self) -> int:
        return self.config.dim or self.inputs.photo_dim

    @property
    def groups(self) -> Mapping[str, Group]:
        c = self.config
        return {"heads": Group(self.heads, Optimizer("adamw", c.lr, weight_decay=c.weight_decay))}

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase("heads", "heads", self.terms),)

    def terms(self, batch: Batch, _: Shared) -> Terms:
        """across_weight * across + within_weight * within, over the rows of all ranks."""
        c = self.config
        columns = {"sketch": batch.sketch, "photo": batch.photo}
        rows_RD = torch.cat([gather_over_ranks(self.project(m, columns[m])) for m in MODALITIES])
        label_R, word_RS = (
            gather_over_ranks(values).repeat(2, *[1] * (values.dim() - 1)) for values in (batch.label, batch.word)
        )
        logits_RR = rows_RD @ rows_RD.T / c.temperature
        target_RR = class_targets(label_R, word_RS, c.softness)
        photo_R = torch.arange(len(rows_RD), device=rows_RD.device) >= len(rows_RD) // 2
        alike_RR = photo_R.unsqueeze(1) == photo_R
        return {
            "across": c.across_weight * contrast(logits_RR, target_RR, ~alike_RR),
            "within": c.within_weight * contrast(logits_RR, target_RR, alike_RR.clone().fill_diagonal_(False)),
        }

    def project(self, modality: str, features: Tensor) -> Tensor:
        """Unit-length embeddings (B, D) of standardized features (B, F)."""
        return functional.normalize(self.heads[modality](features.asinh()))

    def embed(self, modality: str, features: Tensor) -> Tensor:
        return self.project(modality, features).unsqueeze(1)
