"""CVAE: a conditional variational autoencoder that imagines the photo of a sketch.

S. K. Yelamarthi, S. K. Reddy, A. Mishra, A. Mittal, "A Zero-Shot Framework for Sketch-based Image Retrieval",
ECCV 2018 (arXiv:1807.11724).

The encoder sees a photo and a sketch of it and proposes a Gaussian q(z | photo, sketch); the decoder makes the photo's
features out of a draw of z and the sketch; a third network makes the sketch back out of that photo. A query is decoded
with many z of the prior, and what comes out is compared with the features of the gallery, which are embedded as they
are. No class vectors are used. Sketches are to be paired with the very photo that they were drawn from.

Where a number comes from is said in words: "released" is what the authors' published code does, "recalled" is the paper
as others quote it, "ours" is a decision of this project. The networks' shapes, the losses and the retrieval are as
released; the sizes and the scale of the features are ours, for backbone features of some 1,000 dimensions, and the
preset "released" has those of the authors.

Shapes: B batch, X sketch feature, Y photo feature, Z latent, H hidden, P samples a sketch, K clusters.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, NamedTuple, Self, cast

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional

from zsr.batch import Batch
from zsr.models.layers import BatchNorm
from zsr.models.losses import reparameterise
from zsr.models.protocol import Group, Inputs, Model, ModelConfig, Optimizer, Phase, Scaling, Shared, Terms

Fraction = Annotated[float, Field(ge=0, lt=1)]

BLOCK: Final = 2**24  # decoded values held at once: 64 MiB
ROUNDS: Final = 20  # of Lloyd's algorithm; a hundred points in a handful of clusters settle in fewer


class Options(ModelConfig):
    """Options of the networks and of retrieval, which CVAE and CAAE share.

    Defaults are ours for standardised backbone features. Released: `latent` 1024, `hidden` 2048, `features` raw,
    `sketch_weight` 10, `lr` 2e-4; all others are as released.

    Attributes:
        latent: Z.
        hidden: H, width of the decoders' hidden layers; the encoder has one of 2 H and one of H.
        dropout: in the encoder.
        features: raw, for non-negative ones such as VGG-16's fc7 after its ReLU, which networks with a ReLU at their
            output can make (released); or standardised, made by a linear output (ours). Retrieval compares in the same
            space, and in every cosine of raw ones there is the mean that all photos share.
        reduction: squared errors are a mean over the features (released), or a sum over them, as the objective is
            written. The mean makes the prior's weight some thousand times heavier, and the latents nearly idle.
        sketch_weight: of the error of the sketch made back from the photo. At the released 10 the photo comes to hold
            what makes the sketch, before it resembles the photo.
        retrieval: mean, of all samples (released); min, where the best sample counts; or kmeans, where the best of
            the samples' cluster centres counts (recalled as the paper's).
        samples: P, photos imagined a sketch.
        clusters: K, for kmeans. Not known from the paper; ours.
        seed: of the samples' noise, which is the same for every sketch.
        lr, betas: Adam.
    """

    latent: PositiveInt = 64
    hidden: PositiveInt = 512
    dropout: Fraction = 0.3
    features: Literal["raw", "standardised"] = "standardised"
    reduction: Literal["mean", "sum"] = "mean"
    sketch_weight: NonNegativeFloat = 1.0
    retrieval: Literal["mean", "min", "kmeans"] = "mean"
    samples: PositiveInt = 100
    clusters: PositiveInt = 5
    seed: int = 0
    lr: PositiveFloat = 1e-3
    betas: tuple[Fraction, Fraction] = (0.5, 0.999)

    @model_validator(mode="after")
    def _enough_samples(self) -> Self:
        if self.retrieval == "kmeans" and self.clusters > self.samples:
            raise ValueError(f"{self.clusters} clusters of {self.samples} samples; take more samples or fewer clusters")
        return self


class Config(Options):
    """Options of CVAE: those above, and its prior.

    Attributes:
        prior: standard, N(0, I) whatever the sketch (released); or conditional, a Gaussian that a network makes of the
            sketch, as the objective is written with p(z | sketch). That network is the encoder's (ours).
        kl_weight: of the Kullback-Leibler term, which is a sum over the latent either way.
        noise: of a latent: each row its own, or one draw for all rows of a batch (released; a slip).
    """

    prior: Literal["standard", "conditional"] = "standard"
    kl_weight: NonNegativeFloat = 1.0
    noise: Literal["corrected", "released"] = "corrected"


# what the released code has, CAAE's share of it too
RELEASED_OPTIONS: Final[Mapping[str, Any]] = {
    "latent": 1024,
    "hidden": 2048,
    "features": "raw",
    "sketch_weight": 10.0,
    "lr": 2e-4,
}
RELEASED: Final = Config(**RELEASED_OPTIONS, noise="released")
# objective and retrieval as the paper is recalled to write them
PAPER: Final = Config(**RELEASED_OPTIONS, prior="conditional", reduction="sum", retrieval="kmeans")
PRESETS: Final[Mapping[str, Config]] = {"released": RELEASED, "paper": PAPER}
SMALL: Final = {"latent": 4, "hidden": 8, "samples": 6}

# -- parts -----------------------------------------------------------------------------------------------------------


class Gaussian(NamedTuple):
    """A diagonal Gaussian a row: mean and log variance, each (B, Z)."""

    mean_BZ: Tensor
    log_var_BZ: Tensor


def trunk(inputs: int, hidden: int, dropout: float) -> nn.Sequential:
    """(B, inputs) -> (B, H): two layers, normalised after their ReLU, with Keras's momentum and epsilon. Released."""
    return nn.Sequential(
        nn.Linear(inputs, 2 * hidden),
        nn.ReLU(),
        BatchNorm(2 * hidden, eps=1e-3, momentum=0.01),
        nn.Dropout(dropout),
        nn.Linear(2 * hidden, hidden),
        nn.ReLU(),
        BatchNorm(hidden, eps=1e-3, momentum=0.01),
    )


class Encoder(nn.Module):
    """(B, inputs) -> a Gaussian a row. Released: both heads end in tanh, so mean and log variance are in (-1, 1)."""

    def __init__(self, inputs: int, hidden: int, latent: int, dropout: float) -> None:
        super().__init__()
        self.trunk = trunk(inputs, hidden, dropout)
        self.mean = nn.Linear(hidden, latent)
        self.log_var = nn.Linear(hidden, latent)

    def forward(self, values: Tensor) -> Gaussian:
        hidden_BH = self.trunk(values)
        return Gaussian(torch.tanh(self.mean(hidden_BH)), torch.tanh(self.log_var(hidden_BH)))


def output(features: str) -> nn.Module:
    """The last activation of whatever makes `features`: raw ones are not negative."""
    return nn.ReLU() if features == "raw" else nn.Identity()


class Decoder(nn.Module):
    """Latents (B, Z) and sketches (B, X) -> photos (B, Y): one hidden layer, neither normalised nor dropped out."""

    def __init__(self, latent: int, sketch: int, hidden: int, photo: int, features: str) -> None:
        super().__init__()
        self.latent = latent
        self.linear = features != "raw"
        self.first = nn.Linear(latent + sketch, hidden)
        self.last = nn.Sequential(nn.ReLU(), nn.Linear(hidden, photo), output(features))

    def forward(self, latent_BZ: Tensor, sketch_BX: Tensor) -> Tensor:
        return cast(Tensor, self.last(self.first(torch.cat([latent_BZ, sketch_BX], 1))))

    def hidden(self, latent_BPZ: Tensor, sketch_BX: Tensor) -> Tensor:
        """The hidden layer (B, P, H), after its ReLU, of every sketch with each of its latents, or with (1, P, Z).

        The first layer acts on latent and sketch apart, so a sketch passes it once and not P times.
        """
        of_latent, of_sketch = self.first.weight[:, : self.latent], self.first.weight[:, self.latent :]
        hidden_BPH = functional.linear(latent_BPZ, of_latent)
        hidden_BPH = hidden_BPH + functional.linear(sketch_BX, of_sketch, self.first.bias).unsqueeze(1)
        return functional.relu(hidden_BPH)

    def many(self, latent_BPZ: Tensor, sketch_BX: Tensor) -> Tensor:
        """Photos (B, P, Y) of every sketch with each of its latents, or with those of a single row (1, P, Z)."""
        return cast(Tensor, self.last[1:](self.hidden(latent_BPZ, sketch_BX)))

    def mean(self, latent_BPZ: Tensor, sketch_BX: Tensor) -> Tensor:
        """The mean (B, 1, Y) over P of `many`.

        A linear output has the mean of its outputs for the mean of its inputs, at a P-th of the work.
        """
        hidden_BPH = self.hidden(latent_BPZ, sketch_BX)
        if self.linear:
            return cast(Tensor, self.last[1:](hidden_BPH.mean(1, keepdim=True)))
        return cast(Tensor, self.last[1:](hidden_BPH)).mean(1, keepdim=True)


def keras(module: nn.Module) -> None:
    """Glorot-uniform weights and zero biases, Keras's default. Released."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


# -- losses and retrieval --------------------------------------------------------------------------------------------


def squared_error(made: Tensor, wanted: Tensor, reduction: str) -> Tensor:
    """|made - wanted|^2 of rows (B, F), a mean or a sum over F, averaged over B."""
    error = functional.mse_loss(made, wanted)
    return error if reduction == "mean" else error * wanted.shape[1]


def released_draw(mean_BZ: Tensor, log_var_BZ: Tensor) -> Tensor:
    """A draw of N(mean, exp(log_var)) with the same noise (1, Z) in every row, as the released code draws."""
    return mean_BZ + torch.exp(0.5 * log_var_BZ) * torch.randn_like(mean_BZ[:1])


def divergence(posterior: Gaussian, prior: Gaussian) -> Tensor:
    """KL(N(m, e^l) || N(n, e^k)) = 1/2 (k - l + (e^l + (m - n)^2) / e^k - 1), summed over Z, averaged over B."""
    spread_BZ = posterior.log_var_BZ.exp() + (posterior.mean_BZ - prior.mean_BZ).square()
    ratio_BZ = spread_BZ * torch.exp(-prior.log_var_BZ)
    return 0.5 * (prior.log_var_BZ - posterior.log_var_BZ + ratio_BZ - 1.0).sum(1).mean()


def centres(points_BPY: Tensor, count: int) -> Tensor:
    """Centres (B, K, Y) of K-means over the P points of each row, by Lloyd's algorithm.

    It begins at the first K points, which are as random as any; a cluster that loses its points keeps its centre.
    """
    centre_BKY = points_BPY[:, :count]
    for _ in range(ROUNDS):
        nearest_BP = torch.cdist(points_BPY, centre_BKY).argmin(2)
        member_BKP = functional.one_hot(nearest_BP, count).transpose(1, 2).to(points_BPY.dtype)
        size_BK1 = member_BKP.sum(2, keepdim=True)
        mean_BKY = member_BKP @ points_BPY / size_BK1.clamp(min=1.0)
        centre_BKY = torch.where(size_BK1 > 0, mean_BKY, centre_BKY)
    return centre_BKY


# -- model -----------------------------------------------------------------------------------------------------------


class SketchToPhoto(Model):
    """What CVAE and CAAE share: a decoder, the way back to the sketch, and retrieval by imagined photos.

    A photo's embedding is its own feature vector, (B, 1, Y). A sketch's is (B, 1, Y), (B, P, Y) or (B, K, Y), by
    `retrieval`, and depends on nothing but the sketch: neither the encoder nor any photo nor its batch takes part.
    """

    config: Options
    noise: Tensor
    paired = True
    wants_words = False

    def __init__(self, config: Options, inputs: Inputs) -> None:
        super().__init__(inputs)
        self.config = config
        self.scaling: Scaling = "standard" if config.features == "standardised" else "none"
        sketch, photo = inputs.sketch_dim, inputs.photo_dim
        self.decoder = Decoder(config.latent, sketch, config.hidden, photo, config.features)
        self.to_sketch = nn.Sequential(
            nn.Linear(photo, config.hidden), nn.ReLU(), nn.Linear(config.hidden, sketch), output(config.features)
        )
        draw = torch.Generator().manual_seed(config.seed)
        # a function of the options, so no part of a checkpoint
        self.register_buffer("noise", torch.randn(config.samples, config.latent, generator=draw), persistent=False)

    @property
    def dim(self) -> int:
        return self.inputs.photo_dim

    def adam(self) -> Optimizer:
        """The optimizer of every group. Released."""
        return Optimizer("adam", self.config.lr, betas=self.config.betas)

    def reconstruction(self, latent_BZ: Tensor, batch: Batch) -> Terms:
        """|photo' - photo|^2 + sketch_weight |f(photo') - sketch|^2 with photo' = decoder(z, sketch). Per sample."""
        c = self.config
        photo_BY = self.decoder(latent_BZ, batch.sketch)
        return {
            "photo": squared_error(photo_BY, batch.photo, c.reduction),
            "sketch": c.sketch_weight * squared_error(self.to_sketch(photo_BY), batch.sketch, c.reduction),
        }

    def latents(self, sketch_BX: Tensor) -> Tensor:
        """Latents of the prior to decode with sketches: (1, P, Z) for all alike, or (B, P, Z)."""
        return self.noise.unsqueeze(0)

    def imagine(self, sketch_BX: Tensor) -> Tensor:
        """Photos (B, 1, Y), (B, P, Y) or (B, K, Y) that stand for the sketches."""
        latent_BPZ = self.latents(sketch_BX)
        if self.config.retrieval == "mean":
            return self.decoder.mean(latent_BPZ, sketch_BX)
        photo_BPY = self.decoder.many(latent_BPZ, sketch_BX)
        return photo_BPY if self.config.retrieval == "min" else centres(photo_BPY, self.config.clusters)

    def embed(self, modality: str, features: Tensor) -> Tensor:
        """Photos as they are; sketches as imagined photos, a block of sketches at a time."""
        if modality == "photo":
            return features.unsqueeze(1)
        c = self.config
        rows = max(1, BLOCK // (c.samples * max(c.hidden, self.dim)))
        return torch.cat([self.imagine(block) for block in torch.split(features, rows)])


class CVAE(SketchToPhoto):
    """CVAE on extracted features.

    All terms are means over the batch, and batch normalisation is over all ranks: but for the noise, which each rank
    draws for itself, 2 ranks of B rows equal 1 of 2B.
    """

    config: Config

    def __init__(self, config: Config, inputs: Inputs) -> None:
        super().__init__(config, inputs)
        hidden, latent, both = config.hidden, config.latent, inputs.photo_dim + inputs.sketch_dim
        self.encoder = Encoder(both, hidden, latent, config.dropout)
        conditional = config.prior == "conditional"
        self.prior = Encoder(inputs.sketch_dim, hidden, latent, config.dropout) if conditional else None
        self.apply(keras)

    @property
    def groups(self) -> Mapping[str, Group]:
        """One Adam over all networks. Released."""
        parts = [self.encoder, self.decoder, self.to_sketch] + ([self.prior] if self.prior is not None else [])
        return {"autoencoder": Group(nn.ModuleList(parts), self.adam())}

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase("autoencoder", "autoencoder", self.terms),)

    def terms(self, batch: Batch, _: Shared) -> Terms:
        """Reconstruction + kl_weight KL(q(z | photo, sketch) || prior). Per sample."""
        posterior = self.encoder(torch.cat([batch.photo, batch.sketch], 1))
        kl = divergence(posterior, self.prior_of(batch.sketch))
        draw = reparameterise if self.config.noise == "corrected" else released_draw
        return {**self.reconstruction(draw(*posterior), batch), "kl": self.config.kl_weight * kl}

    def prior_of(self, sketch_BX: Tensor) -> Gaussian:
        """The Gaussian from which a sketch's latents come."""
        if self.prior is not None:
            return cast(Gaussian, self.prior(sketch_BX))
        zero_BZ = sketch_BX.new_zeros(len(sketch_BX), self.config.latent)
        return Gaussian(zero_BZ, zero_BZ)

    def latents(self, sketch_BX: Tensor) -> Tensor:
        if self.prior is None:
            return super().latents(sketch_BX)
        mean_BZ, log_var_BZ = self.prior_of(sketch_BX)
        return mean_BZ.unsqueeze(1) + torch.exp(0.5 * log_var_BZ).unsqueeze(1) * self.noise
