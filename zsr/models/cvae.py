"""CVAE: a conditional variational autoencoder that generates photo features from a sketch.

S. K. Yelamarthi, S. K. Reddy, A. Mishra, A. Mittal, "A Zero-Shot Framework for Sketch-based Image Retrieval",
ECCV 2018 (arXiv:1807.11724).

The encoder maps a photo and a sketch of it to a Gaussian q(z | photo, sketch); the decoder reconstructs the photo's
features from a sample of z and the sketch; a third network reconstructs the sketch from that photo. A query is decoded
with many samples z of the prior, and the results are compared with the gallery's features, which are used as they are.
No class embeddings are used. Sketches should be paired with the photo that they were drawn from.

Sources of values: "released" is the authors' published code, "recalled" is the paper as others quote it, "ours" is a
decision of this project. The architectures, the losses and the retrieval are as released; the sizes and the feature
scaling are ours, for backbone features of about 1,000 dimensions, and the preset "released" has those of the authors.

Shapes: B batch, X sketch feature, Y photo feature, Z latent, H hidden, P samples per sketch, K clusters.
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

BLOCK: Final = 2**24  # maximum number of decoded values in memory: 64 MiB
ROUNDS: Final = 20  # of Lloyd's algorithm; a hundred points in a few clusters converge in fewer


class Options(ModelConfig):
    """Options of the networks and of retrieval, shared by CVAE and CAAE.

    Defaults are ours, for standardized backbone features. Released: `latent` 1024, `hidden` 2048, `features` raw,
    `sketch_weight` 10, `lr` 2e-4; all others are as released.

    Attributes:
        latent: Z.
        hidden: H, width of the decoders' hidden layer; the encoder has one of width 2 H and one of H.
        dropout: dropout in the encoder.
        features: raw: non-negative features such as VGG-16's fc7 after its ReLU, generated with a ReLU output
            (released); standardised: standardized features, generated with a linear output (ours). Retrieval compares
            in the same space, where every cosine of raw features includes the mean that all photos share.
        reduction: squared errors are the mean over features (released), or the sum, as the objective is written. The
            mean makes the relative weight of the prior about a thousand times larger, and latents are hardly used.
        sketch_weight: weight of the reconstruction error of the sketch. At the released value of 10, generated photos
            learn to encode the sketch before they resemble the photo.
        retrieval: mean: use the mean of all samples (released); min: use the best-matching sample; kmeans: use the
            best-matching cluster center of the samples (recalled as the paper's).
        samples: P, number of photo features generated per sketch.
        clusters: K, for kmeans. Not known from the paper; ours.
        seed: of the samples' noise, which is the same for every sketch.
        lr, betas: of Adam.
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
            raise ValueError(f"{self.clusters} clusters of {self.samples} samples; use more samples or fewer clusters")
        return self


class Config(Options):
    """Options of CVAE: those above, and its prior.

    Attributes:
        prior: standard: N(0, I) for every sketch (released); conditional: a Gaussian predicted from the sketch, since
            the objective is written with p(z | sketch), by a network with the encoder's architecture (ours).
        kl_weight: weight of the Kullback-Leibler loss, which is a sum over the latent with either `reduction`.
        noise: corrected: noise of a latent is sampled per row; released: one sample for all rows of a batch (a bug).
    """

    prior: Literal["standard", "conditional"] = "standard"
    kl_weight: NonNegativeFloat = 1.0
    noise: Literal["corrected", "released"] = "corrected"


# values of the released code, also used for CAAE
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
    """A diagonal Gaussian per row: mean and log variance, each (B, Z)."""

    mean_BZ: Tensor
    log_var_BZ: Tensor


def trunk(inputs: int, hidden: int, dropout: float) -> nn.Sequential:
    """(B, inputs) -> (B, H): two layers, batch norm after the ReLU with Keras's momentum and epsilon. Released."""
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
    """(B, inputs) -> a Gaussian per row. Released: both heads end in tanh, so mean and log variance are in (-1, 1)."""

    def __init__(self, inputs: int, hidden: int, latent: int, dropout: float) -> None:
        super().__init__()
        self.trunk = trunk(inputs, hidden, dropout)
        self.mean = nn.Linear(hidden, latent)
        self.log_var = nn.Linear(hidden, latent)

    def forward(self, values: Tensor) -> Gaussian:
        hidden_BH = self.trunk(values)
        return Gaussian(torch.tanh(self.mean(hidden_BH)), torch.tanh(self.log_var(hidden_BH)))


def output(features: str) -> nn.Module:
    """Output activation of networks that generate `features`: raw ones are non-negative."""
    return nn.ReLU() if features == "raw" else nn.Identity()


class Decoder(nn.Module):
    """Latents (B, Z) and sketches (B, X) -> photos (B, Y): one hidden layer, without batch norm or dropout."""

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

        The first layer is applied to latent and sketch separately, so once per sketch instead of P times.
        """
        of_latent, of_sketch = self.first.weight[:, : self.latent], self.first.weight[:, self.latent :]
        hidden_BPH = functional.linear(latent_BPZ, of_latent)
        hidden_BPH = hidden_BPH + functional.linear(sketch_BX, of_sketch, self.first.bias).unsqueeze(1)
        return functional.relu(hidden_BPH)

    def many(self, latent_BPZ: Tensor, sketch_BX: Tensor) -> Tensor:
        """Photos (B, P, Y) of every sketch with each of its latents, or with the same latents (1, P, Z) for all."""
        return cast(Tensor, self.last[1:](self.hidden(latent_BPZ, sketch_BX)))

    def mean(self, latent_BPZ: Tensor, sketch_BX: Tensor) -> Tensor:
        """The mean (B, 1, Y) over P of `many`.

        With a linear output, it is the output for the mean of the hidden layers, at 1/P of the cost.
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
    """|made - wanted|^2 of rows (B, F), mean or sum over F, averaged over B."""
    error = functional.mse_loss(made, wanted)
    return error if reduction == "mean" else error * wanted.shape[1]


def released_draw(mean_BZ: Tensor, log_var_BZ: Tensor) -> Tensor:
    """A sample of N(mean, exp(log_var)) with the same noise (1, Z) in every row, as in the released code."""
    return mean_BZ + torch.exp(0.5 * log_var_BZ) * torch.randn_like(mean_BZ[:1])


def divergence(posterior: Gaussian, prior: Gaussian) -> Tensor:
    """KL(N(m, e^l) || N(n, e^k)) = 1/2 (k - l + (e^l + (m - n)^2) / e^k - 1), summed over Z, averaged over B."""
    spread_BZ = posterior.log_var_BZ.exp() + (posterior.mean_BZ - prior.mean_BZ).square()
    ratio_BZ = spread_BZ * torch.exp(-prior.log_var_BZ)
    return 0.5 * (prior.log_var_BZ - posterior.log_var_BZ + ratio_BZ - 1.0).sum(1).mean()


def centres(points_BPY: Tensor, count: int) -> Tensor:
    """Centers (B, K, Y) of K-means over the P points of each row, by Lloyd's algorithm.

    It is initialized with the first K points, which are random samples; an empty cluster keeps its center.
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
    """Base class of CVAE and CAAE: a decoder, sketch reconstruction, and retrieval by generated photos.

    A photo's embedding is its own feature vector, (B, 1, Y). A sketch's is (B, 1, Y), (B, P, Y) or (B, K, Y), by
    `retrieval`, and depends only on the sketch, not on the encoder, on photos or on its batch.
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
        # determined by the options, so not saved in checkpoints
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
        """Latents of the prior to decode with sketches: (1, P, Z), the same for all sketches, or (B, P, Z)."""
        return self.noise.unsqueeze(0)

    def imagine(self, sketch_BX: Tensor) -> Tensor:
        """Generated photos (B, 1, Y), (B, P, Y) or (B, K, Y) that represent the sketches in retrieval."""
        latent_BPZ = self.latents(sketch_BX)
        if self.config.retrieval == "mean":
            return self.decoder.mean(latent_BPZ, sketch_BX)
        photo_BPY = self.decoder.many(latent_BPZ, sketch_BX)
        return photo_BPY if self.config.retrieval == "min" else centres(photo_BPY, self.config.clusters)

    def embed(self, modality: str, features: Tensor) -> Tensor:
        """Photos as they are; sketches as generated photos, computed in blocks."""
        if modality == "photo":
            return features.unsqueeze(1)
        c = self.config
        rows = max(1, BLOCK // (c.samples * max(c.hidden, self.dim)))
        return torch.cat([self.imagine(block) for block in torch.split(features, rows)])


class CVAE(SketchToPhoto):
    """CVAE on extracted features.

    All losses are means over the batch, and batch norm is synchronized over ranks: except for the noise, which each
    rank samples itself, 2 ranks with B rows each are equivalent to 1 rank with 2B rows.
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
        """The prior of a sketch's latents."""
        if self.prior is not None:
            return cast(Gaussian, self.prior(sketch_BX))
        zero_BZ = sketch_BX.new_zeros(len(sketch_BX), self.config.latent)
        return Gaussian(zero_BZ, zero_BZ)

    def latents(self, sketch_BX: Tensor) -> Tensor:
        if self.prior is None:
            return super().latents(sketch_BX)
        mean_BZ, log_var_BZ = self.prior_of(sketch_BX)
        return mean_BZ.unsqueeze(1) + torch.exp(0.5 * log_var_BZ).unsqueeze(1) * self.noise
