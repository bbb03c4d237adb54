"""What a model is: something that embeds, and either phases that a loop steps or a fit in closed form.

    Embedder        what the rest of zsr sees: scale, embed, metric
    |-- Model       learns by gradient: disjoint parameter groups, and phases that each move one of them
    `-- ClosedForm  learns from one pass over the rows

Adversarial training is data here, not a special loop: a VAE has one phase, a GAN two or three. The training loop asks a
model for `shared` work once a batch, then for the named terms of each phase, and steps the group that the phase moves.
No Ray, no DeepSpeed, no I/O: a model file runs in a notebook.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from zsr.batch import Batch
from zsr.errors import ConfigError
from zsr.models import backbones
from zsr.models.choices import Fit, Query
from zsr.models.layers import Scale

Terms = dict[str, Tensor]
Shared = Any
Metric = Literal["cosine", "l2", "hamming"]
Scaling = Literal["standard", "unit", "none"]


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

    def build(self, parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]]) -> torch.optim.Optimizer:
        """The torch optimizer over parameters, or over torch's parameter groups.

        Fused: one pass over the memory in place of some ten. It rounds the last numbers of a tensor in another way than
        the others, so ZeRO stages, which cut parameters up differently, agree up to rounding.
        """
        if self.name == "sgd":
            return torch.optim.SGD(
                parameters,
                self.lr,
                momentum=self.momentum,
                nesterov=self.nesterov,
                weight_decay=self.weight_decay,
                fused=True,
            )
        kind = torch.optim.Adam if self.name == "adam" else torch.optim.AdamW
        return kind(
            parameters,
            self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            amsgrad=self.amsgrad,
            fused=True,
        )


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that one optimizer steps. Groups of a model share no parameter.

    Attributes:
        tower: a part of `module` that is stepped at `tower_rate` times the rate, or None.
        whole: whether each rank has to hold all of its parameters (ZeRO stage 2 at most), as a term reads one outside
            of its module's forward.
    """

    module: nn.Module
    optimizer: Optimizer
    tower: nn.Module | None = None
    tower_rate: float = 1.0
    whole: bool = False

    def build(self) -> torch.optim.Optimizer:
        """The torch optimizer over the group's parameters."""
        slow = [] if self.tower is None else list(self.tower.parameters())
        held = set(map(id, slow))
        fast = [p for p in self.module.parameters() if id(p) not in held]
        groups: list[dict[str, Any]] = [{"params": fast}]
        if slow:
            groups.append({"params": slow, "lr": self.optimizer.lr * self.tower_rate})
        return self.optimizer.build(groups)


@dataclass(frozen=True, slots=True)
class Phase:
    """One optimizer step a batch: `terms` are summed to the loss and logged by name; only group `moves` changes."""

    name: str
    moves: str
    terms: Callable[[Batch, Shared], Terms]
    repeat: int = 1
    fresh_batch: bool = False


class Tower(BaseModel):
    """An image tower in front of a model: it eats pictures and trains the tower along.

    Attributes:
        architecture: what `backbones.build` makes it of.
        size: side in pixels that pictures are resized to.
        fit: the whole picture, or its middle as the backbone's publishers have it.
        invert_sketches: white strokes on black.
        shared: one tower for both modalities, or one each.
        rate: its learning rate, as a multiple of the model's; 0 keeps it frozen.
        tune: which of its parameters train: `all`; `norms`, those of its normalisations and its prompts; or those whose
            name holds a match of this regular expression.
        weights: SHA-256 of the weights that training starts from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: dict[str, Any]
    size: int
    fit: Fit = "stretch"
    invert_sketches: bool = False
    shared: bool = True
    rate: float = 0.1
    tune: str = "all"
    weights: str = ""


class Inputs(BaseModel):
    """Sizes that the data dictates, written into the checkpoint beside the options.

    Attributes:
        sketch_dim, photo_dim: feature width F of the query modality and of the photos.
        semantic_dim: width S of the class vectors.
        classes: seen class names, sorted; label i is classes[i].
        query: what the queries are. A model calls its query side `sketch` whatever they are.
        tower: the image tower that makes the features of pictures, or None where features come ready.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sketch_dim: int
    photo_dim: int
    semantic_dim: int
    classes: tuple[str, ...]
    query: Query = "sketch"
    tower: Tower | None = None


class Embedder(nn.Module, ABC):
    """Base of every model: maps the features of each modality into one space.

    Attributes:
        inputs: the sizes it was built for.
        scale: one `Scale` a modality, stored in the checkpoint.
        towers: an image tower a side, or one for `both`; empty for models of features.
        scaling: how `scale` is fitted on the seen rows before training: to mean 0 and deviation 1, to [0, 1], or not.
        metric: how its embeddings are compared.
        wants_words: whether it learns from class vectors.
    """

    scaling: Scaling = "standard"
    metric: Metric = "cosine"
    wants_words: bool = True

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.inputs = inputs
        self.scale = nn.ModuleDict({"sketch": Scale(inputs.sketch_dim), "photo": Scale(inputs.photo_dim)})
        self.towers = nn.ModuleDict()
        if inputs.tower is not None:
            for name in ("both",) if inputs.tower.shared else ("sketch", "photo"):
                self.towers[name] = backbones.build(inputs.tower.architecture).requires_grad_(False)

    @property
    @abstractmethod
    def dim(self) -> int:
        """Width D of an embedding."""

    @abstractmethod
    def embed(self, modality: str, features: Tensor) -> Tensor:
        """Embeddings (B, P, D) of scaled features (B, F): P parts an item, 1 for most models. Call in eval mode.

        Args:
            modality: `photo`, or `sketch` for the query side.
        """

    def train(self, mode: bool = True) -> Self:
        """As in nn.Module; batch norm in the towers keeps its pretrained statistics: small batches would spoil them."""
        super().train(mode)
        for module in self.towers.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def features(self, side: str, items: Tensor) -> Tensor:
        """Scaled features (B, F) of raw features (B, F), or of pictures (B, H, W, 3) where the model has towers."""
        tower = self.tower(side)
        scaled: Tensor = self.scale[side](items if tower is None else tower(items))
        return scaled

    def tower(self, side: str) -> nn.Module | None:
        """The image tower of a side, or None."""
        return self.towers[side if side in self.towers else "both"] if self.towers else None

    @torch.no_grad()
    def encode(self, modality: str, items: Tensor) -> Tensor:
        """Embeddings (B, P, D) of raw features (B, F) or pictures (B, H, W, 3), in eval mode, whatever the mode is.

        Args:
            modality: `sketch`, `photo` or `text`.
        """
        training = self.training
        side = "photo" if modality == "photo" else "sketch"
        self.eval()
        try:
            embedded: Tensor = self.embed(side, self.features(side, items))
        finally:
            self.train(training)
        return embedded


class Model(Embedder):
    """A model that learns by gradient.

    Attributes:
        eats: the kind of batch it wants.
        paired: whether its paper draws a sketch's own photo instead of any photo of its class.
        coupled: whether a row's part in the loss depends on the batch's other rows, or it has several phases. Only the
            terms of one phase that are all means over rows may be taken a piece of the batch at a time.
        second_order: whether a term is made of gradients, as a gradient penalty is.
    """

    batch_kind: Literal["pairs", "triplets"] = "pairs"
    paired: bool = False
    coupled: bool = True
    second_order: bool = False

    @property
    @abstractmethod
    def groups(self) -> Mapping[str, Group]:
        """Disjoint parameter groups by name. A parameter in no group is frozen."""

    @property
    @abstractmethod
    def phases(self) -> tuple[Phase, ...]:
        """Phases in the order in which a batch passes them."""

    @property
    def trained(self) -> Mapping[str, Group]:
        """`groups`, with the towers beside the parameters of the only one.

        Raises:
            ConfigError: towers under a model of several phases, whose later ones would see features of before.
        """
        tower = self.inputs.tower
        if tower is None or tower.rate == 0:
            return self.groups
        if len(self.phases) > 1:
            raise ConfigError(
                f"{type(self).__name__} takes {len(self.phases)} steps a batch and cannot train an image tower along; "
                "train it on the features of zsr features, or take --tower-rate 0"
            )
        ((name, group),) = self.groups.items()
        slow = nn.ParameterList(tuned(self.towers, tower.tune))
        return {name: Group(nn.ModuleList([group.module, slow]), group.optimizer, slow, tower.rate)}

    def begin(self, word: Tensor) -> None:
        """Called once before training with the class vectors (N, S), row i for label i. Default: nothing."""

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
        """`batch` with `features` in place of every raw feature or picture; with gradient into towers that train."""
        tower = self.inputs.tower
        with torch.set_grad_enabled(tower is not None and tower.rate > 0):
            changes = {"sketch": self.features("sketch", batch.sketch), "photo": self.features("photo", batch.photo)}
            if batch.negative is not None:
                changes["negative"] = self.features("photo", batch.negative)
        return batch.map(**changes)


def tuned(towers: nn.Module, tune: str) -> list[nn.Parameter]:
    """The parameters of `towers` that `Tower.tune` names.

    Raises:
        ConfigError: no regular expression, or one that names none.
    """
    norms = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
    held = {id(p) for module in towers.modules() if isinstance(module, norms) for p in module.parameters()}
    named = dict(towers.named_parameters())
    try:
        wanted = {name for name, p in named.items() if id(p) in held or "prompt" in name}
        if tune != "norms":
            wanted = {name for name in named if tune == "all" or re.search(tune, name)}
    except re.error as error:
        raise ConfigError(f"--tower-tune {tune!r} is no regular expression: {error}") from error
    if not wanted:
        raise ConfigError(
            f"--tower-tune {tune!r} names no parameter of the tower; its names are like {list(named)[-3:]}"
        )
    return [p for name, p in named.items() if name in wanted]


class Rows(NamedTuple):
    """Some seen rows of one modality: raw `features` (B, F) and `label` (B,) int64, index into the seen classes."""

    modality: str
    features: Tensor
    label: Tensor


class Choice(NamedTuple):
    """What a closed form chose: the score of each setting by its name, and the options that give the best one alone."""

    scores: Mapping[str, float]
    options: Mapping[str, Any]


class ClosedForm(Embedder):
    """A model that is solved, not stepped."""

    @abstractmethod
    def fit(self, rows: Iterable[Rows], word: Tensor, score: Callable[[], float] | None) -> "Choice":
        """Fit to one pass over `rows`, after `scale` has been fitted.

        Args:
            rows: the seen rows of both modalities, in any order and in blocks of any size. With several ranks, the rows
                of this rank: statistics are summed over ranks, so every rank ends with the same weights.
            word: (N, S) class vectors, row i for label i.
            score: quality of the model as it stands on held-out classes, higher is better, equal on all ranks; None
                where no class is held out.

        Returns:
            What was chosen; the model holds it.

        Raises:
            ConfigError: several settings to choose from, and no score.
        """
