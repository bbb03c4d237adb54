"""Doodle2Search: triplet loss, domain classifier with gradient reversal, and decoding of class embeddings.

S. Dey, P. Riba, A. Dutta, J. Llados, Y.-Z. Song, "Doodle to Search: Practical Zero-Shot Sketch-based Image Retrieval",
CVPR 2019 (arXiv:1904.03451).

One encoder per modality maps features into a common space, where a sketch is trained to be closer to a photo of its
class than to one of a similar class. A classifier discriminates sketches from photos, and the encoders are trained
against it; a decoder predicts the sketch's class embedding from sketch and photo, and the photo encoder is trained
against it for the photo of the other class. There is one loss, one backward pass and one optimizer.

Sources of values: "released" is the authors' published code, "recalled" is the paper as others quote it, "ours" is a
decision of this project. Losses, weights and the two heads are as released.

Shapes: B batch, F feature, D embedding, S class embedding, N seen classes.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Annotated, Final, Literal, cast

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from zsr.batch import Batch
from zsr.models.losses import squared_distances, warm_up
from zsr.models.protocol import Group, Inputs, Metric, Model, ModelConfig, Optimizer, Phase, Shared, Terms

Fraction = Annotated[float, Field(ge=0, lt=1)]

REVERSAL_EPOCHS: Final = (5.0, 25.0)  # the domain's reversal grows from 0 to 1 between these counts of `Config.clock`


class Config(ModelConfig):
    """Options. The defaults are ours, for standardized backbone features of about 1,000 dimensions.

    They are the released values except for `start` (released: apart), `metric` (l2), `lr` (1e-4, for a network with
    ImageNet weights) and `clock` (batch); the preset "released" has all released values.

    Attributes:
        dim: D, width of an embedding.
        layers: number of hidden layers of an encoder. The released encoder ends in VGG-16's two, with ImageNet weights,
            and a new output layer. Features of a backbone, or of a tower up to fc7, already include the two, so the
            default is 0; for other features 2 is the released architecture.
        hidden: width of the hidden layers.
        start: same: both encoders start with the same weights, if the features of both modalities have the same width;
            apart: with different ones (released, for the new layer).
        metric: metric for comparing embeddings: cosine, or l2 as in the triplet loss (released).
        dropout: dropout before each layer of an encoder except the first of several, and in both heads' hidden layers.
        margin: margin of the triplet loss.
        triplet_weight, domain_weight, semantic_weight: alpha 1 to 3.
        semantic_reversal: factor of the reversed gradient from the decoder into the photo encoder on the negative.
        clock: unit of the domain reversal schedule: epochs (recalled as the paper's), or batches within each epoch
            (released: of about 2,600 batches per epoch, all but the first 25 have full strength).
        words: class embeddings at unit length, or as given, for sampling negative classes. The released sampling
            depends on the scale in the file: its temperature of 0.1 suits unit vectors only.
        temperature: temperature of that sampling.
        lr, momentum, weight_decay: of SGD with Nesterov momentum.
    """

    dim: Annotated[int, Field(ge=2)] = 256
    layers: NonNegativeInt = 0
    hidden: PositiveInt = 4096
    start: Literal["same", "apart"] = "same"
    metric: Literal["cosine", "l2"] = "cosine"
    dropout: Fraction = 0.5
    margin: NonNegativeFloat = 1.0
    triplet_weight: NonNegativeFloat = 1.0
    domain_weight: NonNegativeFloat = 1.0
    semantic_weight: NonNegativeFloat = 1.0
    semantic_reversal: NonNegativeFloat = 0.5
    clock: Literal["epoch", "batch"] = "epoch"
    words: Literal["unit", "given"] = "unit"
    temperature: PositiveFloat = 0.1
    lr: PositiveFloat = 1e-2
    momentum: Annotated[float, Field(gt=0, lt=1)] = 0.9
    weight_decay: NonNegativeFloat = 5e-4


RELEASED: Final = Config(start="apart", metric="l2", lr=1e-4, clock="batch")
PRESETS: Final[Mapping[str, Config]] = {"released": RELEASED}
SMALL: Final = {"dim": 6, "hidden": 8}

# -- parts -----------------------------------------------------------------------------------------------------------


def head(inputs: int, layers: int, hidden: int, outputs: int, dropout: float) -> nn.Sequential:
    """(B, inputs) -> (B, outputs): hidden layers, no output activation, not normalized.

    Two hidden layers are the released encoder after VGG-16's flattened feature maps; zero is its new output layer only.
    """
    if layers == 0:
        return nn.Sequential(nn.Dropout(dropout), nn.Linear(inputs, outputs))
    widths = [inputs] + layers * [hidden]
    blocks = [part for i, o in pairwise(widths) for part in (nn.Linear(i, o), nn.ReLU(), nn.Dropout(dropout))]
    return nn.Sequential(*blocks, nn.Linear(hidden, outputs))


def domain_classifier(dim: int, dropout: float) -> nn.Sequential:
    """Embeddings (B, D) -> logits (B, 1) for "photo". Released; the sigmoid is part of the loss here."""
    return nn.Sequential(
        nn.Linear(dim, 64), nn.ReLU(), nn.Dropout(dropout), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
    )


def semantic_decoder(dim: int, words: int, dropout: float) -> nn.Sequential:
    """Embeddings (B, D) -> class embeddings (B, S), with a hidden layer of width S. Released, where S is 300."""
    return nn.Sequential(nn.Linear(dim, words), nn.ReLU(), nn.Dropout(dropout), nn.Linear(words, words))


def reverse(values: Tensor, strength: float) -> Tensor:
    """Gradient reversal: returns `values`; the gradient is multiplied by -strength."""
    same = values.view_as(values)
    if same.requires_grad:
        hook: Callable[[Callable[[Tensor], Tensor]], object] = same.register_hook
        hook(lambda gradient: -strength * gradient)
    return same


# -- losses ----------------------------------------------------------------------------------------------------------


def triplet(anchor_BD: Tensor, positive_BD: Tensor, negative_BD: Tensor, margin: float) -> Tensor:
    """mean max(0, margin + |anchor - positive| - |anchor - negative|), with distances that are not squared."""
    return functional.triplet_margin_loss(anchor_BD, positive_BD, negative_BD, margin=margin, eps=1e-6)


def cosine_loss(made_BS: Tensor, word_BS: Tensor) -> Tensor:
    """mean (1 - cos(made, word)) / 2, from 0 to 1."""
    return 0.5 * (1.0 - functional.cosine_similarity(made_BS, word_BS)).mean()


# -- model -----------------------------------------------------------------------------------------------------------


class Doodle2Search(Model):
    """Doodle2Search on extracted features; embeddings are (B, 1, D).

    All losses are means over the batch: except for dropout, which each rank samples itself, 2 ranks with B rows each
    are equivalent to 1 rank with 2B rows.
    """

    batch_kind: Literal["pairs", "triplets"] = "triplets"
    coupled = False

    def __init__(self, config: Config, inputs: Inputs) -> None:
        super().__init__(inputs)
        self.config = c = config
        self.metric: Metric = c.metric
        widths = {"sketch": inputs.sketch_dim, "photo": inputs.photo_dim}
        self.encoder = nn.ModuleDict(
            {m: head(width, c.layers, c.hidden, c.dim, c.dropout) for m, width in widths.items()}
        )
        if c.start == "same" and inputs.sketch_dim == inputs.photo_dim:
            self.encoder["photo"].load_state_dict(self.encoder["sketch"].state_dict())
        self.domain = domain_classifier(c.dim, c.dropout)
        self.semantic = semantic_decoder(c.dim, inputs.semantic_dim, c.dropout)

    @property
    def dim(self) -> int:
        return self.config.dim

    @property
    def groups(self) -> Mapping[str, Group]:
        c = self.config
        optimizer = Optimizer("sgd", c.lr, momentum=c.momentum, nesterov=True, weight_decay=c.weight_decay)
        return {"all": Group(nn.ModuleList([self.encoder, self.domain, self.semantic]), optimizer)}

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase("all", "all", self.terms),)

    def negatives(self, word: Tensor) -> Tensor:
        """exp(-|s_j - s_k|^2 / temperature), (N, N): the closer a class, the more often it is the negative.

        In float64, since large distances underflow, and the sampler refuses a class without any negative class.
        """
        word_NS = functional.normalize(word.double()) if self.config.words == "unit" else word.double()
        return (-squared_distances(word_NS, word_NS) / self.config.temperature).exp()

    def terms(self, batch: Batch, _: Shared) -> Terms:
        """alpha1 triplet + alpha2 domain + alpha3 (semantic + semantic of the negative). Per sample."""
        if batch.negative is None:
            raise ValueError("Doodle2Search requires triplets, but this batch has no negative")
        c = self.config
        anchor_BD, positive_BD = self.encoder["sketch"](batch.sketch), self.encoder["photo"](batch.photo)
        negative_BD = self.encoder["photo"](batch.negative)
        return {
            "triplet": c.triplet_weight * triplet(anchor_BD, positive_BD, negative_BD, c.margin),
            "domain": c.domain_weight * self.domain_loss(anchor_BD, (positive_BD, negative_BD), self.reversal(batch)),
            "semantic": c.semantic_weight
            * (self.semantic_loss(anchor_BD, batch.word) + self.semantic_loss(positive_BD, batch.word)),
            "semantic_negative": c.semantic_weight
            * self.semantic_loss(reverse(negative_BD, c.semantic_reversal), batch.word),
        }

    def reversal(self, batch: Batch) -> float:
        """Strength of the domain's gradient reversal: clip((k - 5) / 20, 0, 1) at count k of `clock`."""
        return warm_up(batch.epoch if self.config.clock == "epoch" else batch.index, *REVERSAL_EPOCHS)

    def domain_loss(self, sketch_BD: Tensor, photos: tuple[Tensor, Tensor], strength: float) -> Tensor:
        """Mean of three binary cross entropies: sketches have label 0; positive and negative photos have label 1."""
        sketch = functional.softplus(self.domain(reverse(sketch_BD, strength))).mean()
        photo = [functional.softplus(-self.domain(reverse(photo_BD, strength))).mean() for photo_BD in photos]
        return (sketch + photo[0] + photo[1]) / 3.0

    def semantic_loss(self, embedded_BD: Tensor, word_BS: Tensor) -> Tensor:
        """Cosine loss of the decoded class embedding. The target is the sketch's class, also for the negative photo."""
        return cosine_loss(self.semantic(embedded_BD), word_BS)

    def embed(self, modality: str, features: Tensor) -> Tensor:
        """The output of the modality's encoder, one vector per item."""
        return cast(Tensor, self.encoder[modality](features)).unsqueeze(1)
