"""Doodle2Search: triplets, a domain classifier behind reversed gradients, and class vectors to decode.

S. Dey, P. Riba, A. Dutta, J. Llados, Y.-Z. Song, "Doodle to Search: Practical Zero-Shot Sketch-based Image Retrieval",
CVPR 2019 (arXiv:1904.03451).

One encoder a modality maps features into a common space, where a sketch is to be nearer to a photo of its class than to
one of a similar class. A classifier tells sketches from photos, and the encoders are turned against it; a decoder makes
the sketch's class vector out of sketch and photo, and the photo encoder is turned against it for the photo of the other
class. All is one loss, one backward pass, one optimizer.

Where a number comes from is said in words: "released" is what the authors' published code does, "recalled" is the paper
as others quote it, "ours" is a decision of this project. Losses, weights and the two heads are as released.

Shapes: B batch, F feature, D embedding, S class vector, N seen classes.
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

REVERSAL_EPOCHS: Final = (5.0, 25.0)  # the domain's reversal grows from 0 to 1 between these ticks of the clock


class Config(ModelConfig):
    """Options. The defaults are ours for standardised backbone features of some 1,000 dimensions.

    They are the released values but for `start` (apart), `metric` (l2), `lr` (1e-4, for a network that begins at
    ImageNet weights) and `clock`; the preset "released" has those too.

    Attributes:
        dim: D, width of an embedding.
        layers: hidden layers of an encoder. The released one ends in VGG-16's two, at their ImageNet weights, and a
            single new layer; features of a backbone, or of a tower cut at fc7, are past the two, so none is left here.
            For features that are not, 2 is the released shape.
        hidden: width of those hidden layers.
        start: whether both encoders begin with the same weights, as can be where the features of both modalities are
            of one width, or apart (released, for the layer that is new).
        metric: how embeddings are compared: cosine, or l2 as in the triplets (released).
        dropout: before each layer of an encoder but the first of several, and in both heads' hidden layers.
        margin: by which a photo of the sketch's class is to be nearer.
        triplet_weight, domain_weight, semantic_weight: alpha 1 to 3.
        semantic_reversal: share of the decoder's gradient that is turned against the photo encoder on the negative.
        clock: what the schedule of the domain's reversal counts: epochs (recalled as the paper's), or the batches
            inside an epoch, over and over (released: of about 2,600 batches an epoch the first 25 are not at 1).
        words: class vectors at unit length, or as given, for the choice of negative classes. The released choice
            depends on the file: its temperature of 0.1 fits unit vectors only.
        temperature: of that choice.
        lr, momentum, weight_decay: SGD with Nesterov's momentum.
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
    """(B, inputs) -> (B, outputs): hidden layers, no activation at the end and no unit length.

    Two hidden layers are the released encoder from VGG-16's flattened maps on; none is what it has after them.
    """
    if layers == 0:
        return nn.Sequential(nn.Dropout(dropout), nn.Linear(inputs, outputs))
    widths = [inputs] + layers * [hidden]
    blocks = [part for i, o in pairwise(widths) for part in (nn.Linear(i, o), nn.ReLU(), nn.Dropout(dropout))]
    return nn.Sequential(*blocks, nn.Linear(hidden, outputs))


def domain_classifier(dim: int, dropout: float) -> nn.Sequential:
    """Embeddings (B, D) -> logits (B, 1) of being a photo. Released; its sigmoid is part of the loss here."""
    return nn.Sequential(
        nn.Linear(dim, 64), nn.ReLU(), nn.Dropout(dropout), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
    )


def semantic_decoder(dim: int, words: int, dropout: float) -> nn.Sequential:
    """Embeddings (B, D) -> class vectors (B, S), with a hidden layer of S: released, where S is 300."""
    return nn.Sequential(nn.Linear(dim, words), nn.ReLU(), nn.Dropout(dropout), nn.Linear(words, words))


def reverse(values: Tensor, strength: float) -> Tensor:
    """`values`, whose gradient comes back multiplied by -strength."""
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

    All terms are means over the batch: but for dropout, which each rank draws for itself, 2 ranks of B rows equal 1 of
    2B.
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
        """exp(-|s_j - s_k|^2 / temperature), (N, N): the nearer a class, the more often it is the negative.

        In float64: as given, long vectors underflow, and the sampler refuses a class that is left without any.
        """
        word_NS = functional.normalize(word.double()) if self.config.words == "unit" else word.double()
        return (-squared_distances(word_NS, word_NS) / self.config.temperature).exp()

    def terms(self, batch: Batch, _: Shared) -> Terms:
        """alpha1 triplet + alpha2 domain + alpha3 (semantic + semantic of the negative). Per sample."""
        if batch.negative is None:
            raise ValueError("Doodle2Search eats triplets, and this batch has no negative")
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
        """How strongly the domain's gradient is reversed: clip((k - 5) / 20, 0, 1) at tick k of the clock."""
        return warm_up(batch.epoch if self.config.clock == "epoch" else batch.index, *REVERSAL_EPOCHS)

    def domain_loss(self, sketch_BD: Tensor, photos: tuple[Tensor, Tensor], strength: float) -> Tensor:
        """1/3 the sum of cross entropies: sketches are 0; positives and negatives, so photos twice, are 1."""
        sketch = functional.softplus(self.domain(reverse(sketch_BD, strength))).mean()
        photo = [functional.softplus(-self.domain(reverse(photo_BD, strength))).mean() for photo_BD in photos]
        return (sketch + photo[0] + photo[1]) / 3.0

    def semantic_loss(self, embedded_BD: Tensor, word_BS: Tensor) -> Tensor:
        """Cosine loss of the decoded class vector. The sketch's class is the target, even of the negative photo."""
        return cosine_loss(self.semantic(embedded_BD), word_BS)

    def embed(self, modality: str, features: Tensor) -> Tensor:
        """The modality's encoder, as a single part."""
        return cast(Tensor, self.encoder[modality](features)).unsqueeze(1)
