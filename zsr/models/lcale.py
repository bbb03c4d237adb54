"""LCALE: learning cross-aligned latent embeddings with three variational autoencoders.

K. Lin, X. Xu, L. Gao, Z. Wang, H. T. Shen, "Learning Cross-Aligned Latent Embeddings for Zero-Shot Cross-Modal
Retrieval", AAAI 2020.

Photo, query (a text as published, or a sketch) and class vector each have a variational autoencoder, and the three
share one latent space: each latent must rebuild the others' inputs, cycles must lead back to where they began, both
modalities' Gaussians are drawn to the class's in 2-Wasserstein distance, and to each other in maximum mean discrepancy.
Retrieval compares the means of the latents.

Neither text nor code of LCALE was to be had, so this is our reconstruction. Where a number comes from is said in words:
"abstract" is LCALE's, "CADA-VAE" is the released code of the method that it builds on, "JFSE" the released code of its
authors' next paper, "survey" a survey's account of LCALE, "ours" a decision of this project.

Shapes: B batch, F feature of any space, S class vector, Z latent.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Final, Literal, cast

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from zsr.batch import Batch
from zsr.models.layers import gather_over_ranks, world_size
from zsr.models.losses import MMD_FLOOR, gaussian_kl, mmd, reparameterise, warm_up
from zsr.models.protocol import Group, Inputs, Model, ModelConfig, Optimizer, Phase, Shared, Terms

Space = Literal["photo", "sketch", "word"]
Widths = tuple[PositiveInt, PositiveInt]
Epochs = tuple[NonNegativeFloat, NonNegativeFloat]

SPACES: Final[tuple[Space, ...]] = ("photo", "sketch", "word")
MODALITIES: Final[tuple[Space, ...]] = ("photo", "sketch")
SIX: Final[tuple[tuple[Space, Space], ...]] = tuple((i, j) for i in SPACES for j in SPACES if i != j)


class Config(ModelConfig):
    """Options. Widths, weights and schedules are CADA-VAE's, whose image encoder stands for the photos.

    The autoencoders are meant for features scaled to [0, 1] (JFSE); ours are standardised, which a linear output and
    an absolute error take as well. Warm-ups count the loop's own epochs from 0. CADA-VAE had 100 of them, so a run that
    is much shorter wants the preset "short", or it ends before they do.

    Attributes:
        dim: Z, width of a latent and so of an embedding. 64 in a later paper's table of LCALE, and in CADA-VAE.
        photo_hidden, sketch_hidden, word_hidden: hidden widths of (encoder, decoder). CADA-VAE has none for a query;
            it takes those that CADA-VAE has for class vectors (ours).
        words: class vectors as given, or scaled to unit length.
        reconstruction: l1 (CADA-VAE's default) or l2, squared.
        reduction: every term but the discrepancy is a mean over the batch, or a sum over it (CADA-VAE: its learning
            rate and the weight of the discrepancy then depend on the batch size, which was 50).
        noise: a draw is mean + exp(log variance / 2) * noise with noise in each entry; or "released", CADA-VAE's
            mean + exp(log variance) * noise with a single number a sample, against its own Kullback-Leibler term.
        cross: ordered pairs (i, j): the latent of i has to rebuild j. LCALE has such terms (abstract); all six is ours.
        beta, beta_epochs: weight of the Kullback-Leibler terms, and the epochs (start, end) of its warm-up.
        gamma, gamma_epochs: weight of cross reconstructions and cycles together, and their warm-up.
        delta, delta_epochs: weight of the 2-Wasserstein distances, and their warm-up.
        cross_weight: within gamma, of the cross reconstructions.
        class_cycle_weight: within gamma, of class -> photo -> class and class -> query -> class. That there is a cycle
            on class vectors is known; its form is ours.
        modality_cycle_weight: within gamma, of photo -> query -> photo and back (survey). Its form is ours.
        mmd_weight: of the discrepancy between photos' and queries' latents (survey); its kernels are JFSE's.
        mmd_on: whether the discrepancy is that of drawn latents or of their means.
        lr: of Adam with amsgrad.
    """

    dim: Annotated[int, Field(ge=2)] = 64
    photo_hidden: Widths = (1560, 1660)
    sketch_hidden: Widths = (1450, 665)
    word_hidden: Widths = (1450, 665)
    words: Literal["given", "unit"] = "given"
    reconstruction: Literal["l1", "l2"] = "l1"
    reduction: Literal["mean", "sum"] = "mean"
    noise: Literal["corrected", "released"] = "corrected"
    cross: Annotated[tuple[tuple[Space, Space], ...], Field(min_length=1)] = SIX
    beta: NonNegativeFloat = 0.25
    beta_epochs: Epochs = (0.0, 93.0)
    gamma: NonNegativeFloat = 2.37
    gamma_epochs: Epochs = (21.0, 75.0)
    delta: NonNegativeFloat = 8.13
    delta_epochs: Epochs = (6.0, 22.0)
    cross_weight: NonNegativeFloat = 1.0
    class_cycle_weight: NonNegativeFloat = 1.0
    modality_cycle_weight: NonNegativeFloat = 1.0
    mmd_weight: NonNegativeFloat = 1.0
    mmd_on: Literal["draws", "means"] = "draws"
    lr: PositiveFloat = 1.5e-4


# the released quirks of CADA-VAE; and its schedule squeezed from 100 epochs into 30 (ours)
RELEASED: Final = Config(noise="released", reduction="sum")
SHORT: Final = Config(beta_epochs=(0.0, 28.0), gamma_epochs=(6.0, 22.0), delta_epochs=(2.0, 7.0))
PRESETS: Final[Mapping[str, Config]] = {"released": RELEASED, "short": SHORT}

# -- parts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Latent:
    """A Gaussian a row and one draw of it, each (B, Z)."""

    mean_BZ: Tensor
    log_var_BZ: Tensor
    draw_BZ: Tensor


class Encoder(nn.Module):
    """Inputs (B, F) -> mean and log variance, each (B, Z): one hidden layer, two linear heads."""

    def __init__(self, inputs: int, hidden: int, latent: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, hidden)
        self.mean = nn.Linear(hidden, latent)
        self.log_var = nn.Linear(hidden, latent)

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        hidden = functional.relu(self.hidden(values))
        return self.mean(hidden), self.log_var(hidden)


def decoder(latent: int, hidden: int, outputs: int) -> nn.Sequential:
    """Latents (B, Z) -> (B, F): one hidden layer, linear output."""
    return nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def initialise(module: nn.Module) -> None:
    """Xavier-uniform weights with gain 0.5 and zero biases. CADA-VAE."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight, gain=0.5)
        nn.init.zeros_(module.bias)


# -- losses ----------------------------------------------------------------------------------------------------------


def total(terms: list[Tensor]) -> Tensor:
    """The sum of some terms."""
    return torch.stack(terms).sum()


def released_draw(mean_BZ: Tensor, log_var_BZ: Tensor) -> Tensor:
    """mean + exp(log_var) * noise, one number of noise a row: as CADA-VAE's released code draws."""
    return mean_BZ + torch.exp(log_var_BZ) * torch.randn_like(mean_BZ[:, :1])


def rebuilt(made_BF: Tensor, target_BF: Tensor, kind: str) -> Tensor:
    """|made - target|_1, or the squared l2 norm; summed over F, averaged over B."""
    compare = functional.l1_loss if kind == "l1" else functional.mse_loss
    return compare(made_BF, target_BF, reduction="none").sum(1).mean()


def wasserstein(left: Latent, right: Latent) -> Tensor:
    """2-Wasserstein distance of diagonal Gaussians: sqrt(|mu_1 - mu_2|^2 + |sigma_1 - sigma_2|^2), averaged over B.

    The root is of the sum + 1e-12: its slope at 0 is infinite.
    """
    means = (left.mean_BZ - right.mean_BZ).square().sum(1)
    deviations = (torch.exp(0.5 * left.log_var_BZ) - torch.exp(0.5 * right.log_var_BZ)).square().sum(1)
    return torch.sqrt(means + deviations + 1e-12).mean()


# -- model -----------------------------------------------------------------------------------------------------------


class Lcale(Model):
    """LCALE on extracted features; embeddings are (B, 1, Z), the latents' means.

    Every term is per sample but `discrepancy`, which is that of the rows of all ranks: but for the noise, which each
    rank draws for itself, 2 ranks of B rows equal 1 of 2B.
    """

    def __init__(self, config: Config, inputs: Inputs) -> None:
        super().__init__(inputs)
        self.config = config
        sizes = {
            "photo": (inputs.photo_dim, config.photo_hidden),
            "sketch": (inputs.sketch_dim, config.sketch_hidden),
            "word": (inputs.semantic_dim, config.word_hidden),
        }
        self.encoders = nn.ModuleDict(
            {s: Encoder(width, hidden[0], config.dim) for s, (width, hidden) in sizes.items()}
        )
        self.decoders = nn.ModuleDict(
            {s: decoder(config.dim, hidden[1], width) for s, (width, hidden) in sizes.items()}
        )
        for part in (self.encoders, self.decoders):
            part.apply(initialise)

    @property
    def dim(self) -> int:
        return self.config.dim

    @property
    def groups(self) -> Mapping[str, Group]:
        """One joint Adam over all six networks. CADA-VAE."""
        autoencoders = nn.ModuleList([self.encoders, self.decoders])
        return {"autoencoders": Group(autoencoders, Optimizer("adam", self.config.lr, amsgrad=True))}

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase("autoencoders", "autoencoders", self.terms),)

    def terms(self, batch: Batch, _: Shared) -> Terms:
        """Autoencoders + gamma (cross reconstructions + cycles) + delta W2 + mmd_weight MMD, each warmed up."""
        c, epoch = self.config, batch.epoch
        x = self.targets(batch)
        latents = {space: self.latent(space, values) for space, values in x.items()}
        beta = c.beta * warm_up(epoch, *c.beta_epochs)
        gamma = c.gamma * warm_up(epoch, *c.gamma_epochs)
        delta = c.delta * warm_up(epoch, *c.delta_epochs)
        # a mean over the batch times the rows of all ranks is their sum: ranks are averaged afterwards
        rows = 1 if c.reduction == "mean" else len(batch) * world_size()
        return {
            "reconstruction": rows * self.crossed(x, latents, tuple((s, s) for s in SPACES)),
            "divergence": rows * beta * total([gaussian_kl(z.mean_BZ, z.log_var_BZ) for z in latents.values()]),
            "cross": rows * gamma * c.cross_weight * self.crossed(x, latents, c.cross),
            "class_cycle": rows * gamma * c.class_cycle_weight * self.class_cycle(x, latents),
            "modality_cycle": rows * gamma * c.modality_cycle_weight * self.modality_cycle(x, latents),
            "wasserstein": rows * delta * total([wasserstein(latents[m], latents["word"]) for m in MODALITIES]),
            "discrepancy": c.mmd_weight * self.discrepancy(latents),
        }

    def targets(self, batch: Batch) -> dict[Space, Tensor]:
        """What each autoencoder eats and rebuilds, (B, F) a space."""
        word = functional.normalize(batch.word) if self.config.words == "unit" else batch.word
        return {"photo": batch.photo, "sketch": batch.sketch, "word": word}

    def latent(self, space: Space, values: Tensor) -> Latent:
        """The Gaussian of each row of `values` (B, F), and a draw."""
        mean_BZ, log_var_BZ = self.encoders[space](values)
        draw = reparameterise if self.config.noise == "corrected" else released_draw
        return Latent(mean_BZ, log_var_BZ, draw(mean_BZ, log_var_BZ))

    def crossed(
        self, x: Mapping[Space, Tensor], latents: Mapping[Space, Latent], pairs: tuple[tuple[Space, Space], ...]
    ) -> Tensor:
        """Sum over pairs (i, j) of |x_j - D_j(z_i)|; with i = j, the autoencoders' own reconstruction."""
        kind = self.config.reconstruction
        return total([rebuilt(self.decoders[j](latents[i].draw_BZ), x[j], kind) for i, j in pairs])

    def cycled(self, via: Space, x: Mapping[Space, Tensor], latents: Mapping[Space, Latent], home: Space) -> Tensor:
        """|x - D_home(mean of E_via(D_via(z_home)))|: decoded in `via`, encoded there without noise, and back."""
        there = self.decoders[via](latents[home].draw_BZ)
        mean_BZ, _ = self.encoders[via](there)
        return rebuilt(self.decoders[home](mean_BZ), x[home], self.config.reconstruction)

    def class_cycle(self, x: Mapping[Space, Tensor], latents: Mapping[Space, Latent]) -> Tensor:
        """Class vectors through the photos' space and through the queries' space."""
        return self.cycled("photo", x, latents, "word") + self.cycled("sketch", x, latents, "word")

    def modality_cycle(self, x: Mapping[Space, Tensor], latents: Mapping[Space, Latent]) -> Tensor:
        """Photos through the queries' space, queries through the photos'."""
        return self.cycled("sketch", x, latents, "photo") + self.cycled("photo", x, latents, "sketch")

    def discrepancy(self, latents: Mapping[Space, Latent]) -> Tensor:
        """Maximum mean discrepancy of photos' and queries' latents over all ranks. Batch-coupled."""
        on_draws = self.config.mmd_on == "draws"
        photo, sketch = (gather_over_ranks(latents[m].draw_BZ if on_draws else latents[m].mean_BZ) for m in MODALITIES)
        return mmd(photo, sketch, floor=MMD_FLOOR)

    def embed(self, modality: str, features: Tensor) -> Tensor:
        """The mean of the latent, without noise, as a single part."""
        return cast(Tensor, self.encoders[modality](features)[0]).unsqueeze(1)
