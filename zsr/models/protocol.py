"""What a model is: something that embeds, and either phases that a loop steps or a fit in closed form.

    Embedder        what the rest of zsr sees: scale, embed, metric
    |-- Model       learns by gradient: disjoint parameter groups, and phases that each move one of them
    `-- ClosedForm  learns from one pass over the rows

Adversarial training is data here, not a special loop: a VAE has one phase, a GAN two or three. The training loop asks a
model for `shared` work once a batch, then for the named terms of each phase, and steps the group that the phase moves.
No Ray, no DeepSpeed, no I/O: a model file runs in a notebook.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from zsr.batch import Batch
from zsr.models.layers import Scale

Terms = dict[str, Tensor]
Shared = Any
Metric = Literal["cosine", "l2", "hamming"]


class ModelConfig(BaseModel):
    """Base of every model's options: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True, slots=True)
class Optimizer:
    """A group's optimizer as its paper gives it. `clip` is a global gradient norm; 0 means the paper does not clip."""

    name: Literal["adam", "adamw", "sgd"]
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    amsgrad: bool = False
    clip: float = 0.0

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The torch optimizer over `parameters`."""
        if self.name == "sgd":
            return torch.optim.SGD(
                parameters,
                self.lr,
                momentum=self.momentum,
                nesterov=self.nesterov,
                weight_decay=self.weight_decay,
            )
        kind = torch.optim.Adam if self.name == "adam" else torch.optim.AdamW
        return kind(
            parameters,
            self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            amsgrad=self.amsgrad,
        )


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that one optimizer steps. Groups of a model share no parameter."""

    module: nn.Module
    optimizer: Optimizer


@dataclass(frozen=True, slots=True)
class Phase:
    """One optimizer step a batch: `terms` are summed to the loss and logged by name; only group `moves` changes."""

    name: str
    moves: str
    terms: Callable[[Batch, Shared], Terms]
    repeat: int = 1
    fresh_batch: bool = False


class Inputs(BaseModel):
    """Sizes that the data dictates, written into the checkpoint beside the options.

    Attributes:
        sketch_dim, photo_dim: feature width F of each modality.
        semantic_dim: width S of the class vectors.
        classes: seen class names, sorted; label i is classes[i].
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sketch_dim: int
    photo_dim: int
    semantic_dim: int
    classes: tuple[str, ...]


class Embedder(nn.Module, ABC):
    """Base of every model: maps the features of each modality into one space.

    Attributes:
        inputs: the sizes it was built for.
        scale: one `Scale` a modality, stored in the checkpoint.
        standardises: whether `scale` is to be fitted on the seen rows before training; else it stays the identity.
        metric: how its embeddings are compared.
    """

    standardises: bool = True
    metric: Metric = "cosine"

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.inputs = inputs
        self.scale = nn.ModuleDict({"sketch": Scale(inputs.sketch_dim), "photo": Scale(inputs.photo_dim)})

    @property
    @abstractmethod
    def dim(self) -> int:
        """Width D of an embedding."""

    @abstractmethod
    def embed(self, modality: str, features: Tensor) -> Tensor:
        """Embeddings (B, P, D) of scaled features (B, F): P parts an item, 1 for most models. Call in eval mode."""

    @torch.no_grad()
    def encode(self, modality: str, features: Tensor) -> Tensor:
        """Embeddings (B, P, D) of raw features (B, F), in eval mode, whatever mode the model is in."""
        training = self.training
        self.eval()
        try:
            embedded: Tensor = self.embed(modality, self.scale[modality](features.float()))
        finally:
            self.train(training)
        return embedded


class Model(Embedder):
    """A model that learns by gradient. `eats` is the kind of batch it wants."""

    eats: Literal["pairs", "triplets"] = "pairs"

    @property
    @abstractmethod
    def groups(self) -> Mapping[str, Group]:
        """Disjoint parameter groups by name. A parameter in no group is frozen."""

    @property
    @abstractmethod
    def phases(self) -> tuple[Phase, ...]:
        """Phases in the order in which a batch passes them."""

    def shared(self, batch: Batch) -> Shared:
        """Work that every phase of this batch uses, done once. Default: none."""
        return None

    def negatives(self, word: Tensor) -> Tensor | None:
        """How the class of a triplet's negative is drawn: weights (N, N), row by anchor, or None for all others alike.

        Args:
            word: (N, S) class vectors, row i for label i.
        """
        return None

    def scaled(self, batch: Batch) -> Batch:
        """`batch` with every feature tensor passed through the modality's Scale."""
        sketch, photo = self.scale["sketch"], self.scale["photo"]
        changes = {"sketch": sketch(batch.sketch), "photo": photo(batch.photo)}
        if batch.negative is not None:
            changes["negative"] = photo(batch.negative)
        return batch.map(**changes)


class Rows(NamedTuple):
    """Some seen rows of one modality: raw `features` (B, F) and `label` (B,) int64, index into the seen classes."""

    modality: str
    features: Tensor
    label: Tensor


class ClosedForm(Embedder):
    """A model that is solved, not stepped."""

    @abstractmethod
    def fit(self, rows: Iterable[Rows], word: Tensor, score: Callable[[], float]) -> Mapping[str, float]:
        """Fit to one pass over `rows`, after `scale` has been fitted.

        Args:
            rows: the seen rows of both modalities, in any order and in blocks of any size. With several ranks, the rows
                of this rank: statistics are summed over ranks, so every rank ends with the same weights.
            word: (N, S) class vectors, row i for label i.
            score: quality of the model as it stands on held-out classes, higher is better, equal on all ranks.

        Returns:
            The score of each setting tried, by its name; the model holds the best one. Empty where nothing was chosen.
        """
