"""Base classes of models: an embedder, trained either by gradient descent in phases or in closed form.

    Embedder        interface for the rest of zsr: scale, embed, metric
    |-- Model       trained by gradient descent: disjoint parameter groups, and phases that each update one of them
    `-- ClosedForm  fitted in one pass over the rows

Adversarial training requires no special loop: a VAE has one phase, a GAN two or three. For each batch, the training
loop calls `shared` once, then computes the losses of each phase and steps the group that the phase updates. No Ray, no
DeepSpeed, no I/O: a model file runs in a notebook.
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
    """Base class of every model's options: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True, slots=True)
class Optimizer:
    """A parameter group's optimizer, as in the paper. `clip` is the maximum global gradient norm; 0 is no clipping."""

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
        """Build the torch optimizer for parameters, or for torch's parameter groups.

        It is fused: one pass over memory instead of about ten. A fused optimizer rounds the last elements of a tensor
        differently than the others, so ZeRO stages, which shard parameters differently, agree up to rounding.
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
    """Parameters of one optimizer. Groups of a model share no parameter.

    Attributes:
        tower: a part of `module` whose learning rate is multiplied by `tower_rate`, or None.
        whole: whether each rank must hold all of its parameters (ZeRO stage 2 at most), because a loss reads one
            outside of its module's forward.
    """

    module: nn.Module
    optimizer: Optimizer
    tower: nn.Module | None = None
    tower_rate: float = 1.0
    whole: bool = False

    def build(self) -> torch.optim.Optimizer:
        """Build the torch optimizer for the group's parameters."""
        slow = [] if self.tower is None else list(self.tower.parameters())
        held = set(map(id, slow))
        fast = [p for p in self.module.parameters() if id(p) not in held]
        groups: list[dict[str, Any]] = [{"params": fast}]
        if slow:
            groups.append({"params": slow, "lr": self.optimizer.lr * self.tower_rate})
        return self.optimizer.build(groups)


@dataclass(frozen=True, slots=True)
class Phase:
    """One optimizer step per batch: the losses `terms` are summed and logged by name; only group `moves` is updated.

    The step is repeated `repeat` times; with `fresh_batch`, each repetition uses another batch.
    """

    name: str
    moves: str
    terms: Callable[[Batch, Shared], Terms]
    repeat: int = 1
    fresh_batch: bool = False


class Tower(BaseModel):
    """An image tower in front of a model, which then takes images as input and trains the tower end to end.

    Attributes:
        architecture: argument of `backbones.build`.
        size: side in pixels that images are resized to.
        fit: use the whole image, or its center crop as published with the backbone.
        invert_sketches: use white strokes on black.
        shared: use one tower for both modalities, or one per modality.
        rate: learning rate of the tower, as a multiple of the model's; 0 freezes it.
        tune: parameters to train: `all`; `norms`, those of normalization layers and prompts; or those whose name
            matches this regular expression (anywhere in the name).
        weights: SHA-256 of the initial weights.
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
    """Input sizes of a model, given by the data and stored in the checkpoint with the options.

    Attributes:
        sketch_dim, photo_dim: feature width F of the query modality and of the photos.
        semantic_dim: width S of the class embeddings.
        classes: seen class names, sorted; label i is classes[i].
        query: modality of the queries. A model calls its query side `sketch` whatever the modality.
        tower: the image tower that computes features of images, or None if the input is extracted features.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sketch_dim: int
    photo_dim: int
    semantic_dim: int
    classes: tuple[str, ...]
    query: Query = "sketch"
    tower: Tower | None = None


class Embedder(nn.Module, ABC):
    """Base class of every model: maps the features of each modality into a common embedding space.

    Attributes:
        inputs: the input sizes that it was built for.
        scale: one `Scale` per modality, stored in the checkpoint.
        towers: one image tower per side, or one for `both`; empty if the input is extracted features.
        scaling: how `scale` is fitted on the seen rows before training: to mean 0 and std 1, to [0, 1], or not at all.
        metric: distance or similarity by which its embeddings are compared.
        wants_words: whether it requires class embeddings.
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
        """Embeddings (B, P, D) of scaled features (B, F): P vectors per item, 1 for most models. Call in eval mode.

        Args:
            modality: `photo`, or `sketch` for the query side.
        """

    def train(self, mode: bool = True) -> Self:
        """As in nn.Module, but batch norm in towers keeps its pretrained statistics: small batches would spoil them."""
        super().train(mode)
        for module in self.towers.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def features(self, side: str, items: Tensor) -> Tensor:
        """Scaled features (B, F) of raw features (B, F), or of images (B, H, W, 3) if the model has towers."""
        tower = self.tower(side)
        scaled: Tensor = self.scale[side](items if tower is None else tower(items))
        return scaled

    def tower(self, side: str) -> nn.Module | None:
        """The image tower of a side, or None."""
        return self.towers[side if side in self.towers else "both"] if self.towers else None

    @torch.no_grad()
    def encode(self, modality: str, items: Tensor) -> Tensor:
        """Embeddings (B, P, D) of raw features (B, F) or images (B, H, W, 3). Switches to eval mode for the call.

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
    """A model trained by gradient descent.

    Attributes:
        batch_kind: the kind of batch that it requires.
        paired: whether its paper samples the photo that belongs to the sketch instead of any photo of its class.
        coupled: whether its losses are batch-dependent (a row's loss depends on other rows of the batch), or it has
            several phases. Otherwise the losses are means over rows, and gradients are accumulated over micro-batches.
        second_order: whether a loss requires second derivatives, as a gradient penalty does.
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
        """Phases, in the order in which they run on a batch."""

    @property
    def trained(self) -> Mapping[str, Group]:
        """`groups`, with the towers' parameters added to the only group.

        Raises:
            ConfigError: a trained tower and several phases, the later of which would use outdated features.
        """
        tower = self.inputs.tower
        if tower is None or tower.rate == 0:
            return self.groups
        if len(self.phases) > 1:
            raise ConfigError(
                f"{type(self).__name__} takes {len(self.phases)} steps per batch and cannot train an image tower; "
                "train it on features from zsr features, or use --tower-rate 0"
            )
        ((name, group),) = self.groups.items()
        slow = nn.ParameterList(tuned(self.towers, tower.tune))
        return {name: Group(nn.ModuleList([group.module, slow]), group.optimizer, slow, tower.rate)}

    def begin(self, word: Tensor) -> None:
        """Called once before training with the class embeddings (N, S), row i for label i. Does nothing by default."""

    def shared(self, batch: Batch) -> Shared:
        """Forward pass that all phases of a batch share, computed once. None by default."""
        return None

    def negatives(self, word: Tensor) -> Tensor | None:
        """Sampling weights (N, N) of a triplet's negative class, per anchor class in rows; None for a uniform choice.

        Args:
            word: (N, S) class embeddings, row i for label i.
        """
        return None

    def scaled(self, batch: Batch) -> Batch:
        """`batch` with raw features or images replaced by `features`; with gradient if the towers are trained."""
        tower = self.inputs.tower
        with torch.set_grad_enabled(tower is not None and tower.rate > 0):
            changes = {"sketch": self.features("sketch", batch.sketch), "photo": self.features("photo", batch.photo)}
            if batch.negative is not None:
                changes["negative"] = self.features("photo", batch.negative)
        return batch.map(**changes)


def tuned(towers: nn.Module, tune: str) -> list[nn.Parameter]:
    """The parameters of `towers` selected by `Tower.tune`.

    Raises:
        ConfigError: not a regular expression, or one that matches no parameter.
    """
    norms = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
    held = {id(p) for module in towers.modules() if isinstance(module, norms) for p in module.parameters()}
    named = dict(towers.named_parameters())
    try:
        wanted = {name for name, p in named.items() if id(p) in held or "prompt" in name}
        if tune != "norms":
            wanted = {name for name in named if tune == "all" or re.search(tune, name)}
    except re.error as error:
        raise ConfigError(f"--tower-tune {tune!r} is not a regular expression: {error}") from error
    if not wanted:
        raise ConfigError(
            f"--tower-tune {tune!r} matches no parameter of the tower; their names are like {list(named)[-3:]}"
        )
    return [p for name, p in named.items() if name in wanted]


class Rows(NamedTuple):
    """A block of seen rows of one modality: raw `features` (B, F) and `label` (B,) int64, index into seen classes."""

    modality: str
    features: Tensor
    label: Tensor


class Choice(NamedTuple):
    """The setting that a closed-form model chose: the score of each setting by name, and the options of the best."""

    scores: Mapping[str, float]
    options: Mapping[str, Any]


class ClosedForm(Embedder):
    """A model that is solved in closed form."""

    @abstractmethod
    def fit(self, rows: Iterable[Rows], word: Tensor, score: Callable[[], float] | None) -> "Choice":
        """Fit to one pass over `rows`, after `scale` has been fitted.

        Args:
            rows: the seen rows of both modalities, in any order and in blocks of any size. With several ranks, the rows
                of this rank: statistics are summed over ranks, so every rank ends with the same weights.
            word: (N, S) class embeddings, row i for label i.
            score: score of the model's current state on validation classes, higher is better, equal on all ranks; None
                if no class is held out.

        Returns:
            The chosen setting, which the model has been set to.

        Raises:
            ConfigError: several settings to choose from, but no score.
        """
