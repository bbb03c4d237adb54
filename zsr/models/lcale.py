"""LCALE: learning cross-aligned latent embeddings with three variational autoencoders.

K. Lin, X. Xu, L. Gao, Z. Wang, H. T. Shen, "Learning Cross-Aligned Latent Embeddings for Zero-Shot Cross-Modal
Retrieval", AAAI 2020.

Photo, query (a text as published, or a sketch) and class embedding each have a variational autoencoder, and the three
share one latent space: each latent must reconstruct the others' inputs (cross reconstruction), cycles must reconstruct
their own input, and both modalities' Gaussians are aligned with that of the class by 2-Wasserstein distance and with
each other by maximum mean discrepancy. Retrieval compares the means of the latents.

Neither paper nor code of LCALE was available, so this is our reconstruction. Sources of values: "abstract" is LCALE's,
"CADA-VAE" is the released code of the method that it builds on, "JFSE" the released code of its authors' next paper,
"survey" a survey's account of LCALE, "ours" a decision of this project.

Shapes: B batch, F feature of any space, S class embedding, Z latent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Literal, cast

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from zsr.batch import Batch
from zsr.models.layers import gather_over_ranks, world_size
from zsr.models.losses import MMD_FLOOR, gaussian_kl, mmd, reparameterise, warm_up
from zsr.models.protocol import Group, Inputs, Model, ModelConfig, Optimizer, Phase, Scaling, Shared, Terms
from zsr.models.words import Words, WordScaling

Space = Literal["photo", "sketch", "word"]
Made = Mapping[tuple[Space, Space], Tensor]
Widths = tuple[PositiveInt, PositiveInt]
Epochs = tuple[NonNegativeFloat, NonNegativeFloat]

SPACES: Final[tuple[Space, ...]] = ("photo", "sketch", "word")
MODALITIES: Final[tuple[Space, ...]] = ("photo", "sketch")
SIX: Final[tuple[tuple[Space, Space], ...]] = tuple((i, j) for i in SPACES for j in SPACES if i != j)


class Config(ModelConfig):
    """Options. Loss weights are CADA-VAE's; its widths, learning rate and schedule are in the preset "paper".

    The defaults are ours: narrower networks with a higher learning rate, warm-ups within 30 epochs instead of 100, and
    standardized features where JFSE scales to [0, 1], each chosen on held-out classes or items. Warm-ups count epochs
    from 0: a run that ends before they do has hardly trained the alignment.

    Attributes:
        dim: Z, width of a latent and so of an embedding. 64 in a later paper's table of LCALE, and in CADA-VAE.
        photo_hidden, sketch_hidden, word_hidden: hidden widths of (encoder, decoder). CADA-VAE has no query modality;
            the presets use its widths for class embeddings (ours).
        scaling: scaling of features, fitted on the training rows: standard, unit ([0, 1] per column; JFSE, there per
            mini-batch) or none.
        words: scaling of class embeddings: given, unit (unit length), standard (centered on the trained classes' mean
            and divided by one number; ours), or minmax: [0, 1] per dimension over the trained classes (JFSE, there per
            mini-batch).
        reconstruction: reconstruction error: l1 (CADA-VAE's default) or l2, squared.
        reduction: all losses except the discrepancy are a mean over the batch, or a sum (CADA-VAE: the learning rate
            and the weight of the discrepancy then depend on the batch size, which was 50).
        noise: corrected: sample latents as mean + exp(log variance / 2) * noise, with noise per entry; released: as
            CADA-VAE, mean + exp(log variance) * noise, with one noise value per row, which is inconsistent with its
            Kullback-Leibler loss; none: use the mean, which with `beta` 0 gives deterministic autoencoders (an
            ablation).
        cross: ordered pairs (i, j): the latent of i must reconstruct j. LCALE has such losses (abstract); that they are
            all six is ours.
        beta, beta_epochs: weight of the Kullback-Leibler losses, and the epochs (start, end) of its warm-up.
        gamma, gamma_epochs: weight of cross reconstruction and cycle losses together, and its warm-up.
        delta, delta_epochs: weight of the 2-Wasserstein distances, and its warm-up.
        cross_weight: relative weight, within gamma, of cross reconstruction.
        class_cycle_weight: relative weight, within gamma, of class -> photo -> class and class -> query -> class. LCALE
            is known to have a cycle on class embeddings; its form is ours.
        modality_cycle_weight: relative weight, within gamma, of photo -> query -> photo and back (survey). Its form is
            ours.
        mmd_weight, mmd_epochs: weight of the discrepancy between photos' and queries' latents (survey), with JFSE's
            kernels, and its warm-up, which is off by default.
        mmd_on: compute the discrepancy on sampled latents ("draws") or on their means.
        lr: of Adam with AMSGrad.
    """

    dim: Annotated[int, Field(ge=2)] = 64
    photo_hidden: Widths = (512, 512)
    sketch_hidden: Widths = (512, 512)
    word_hidden: Widths = (512, 512)
    scaling: Scaling = "standard"
    words: WordScaling = "given"
    reconstruction: Literal["l1", "l2"] = "l1"
    reduction: Literal["mean", "sum"] = "mean"
    noise: Literal["corrected", "released", "none"] = "corrected"
    cross: Annotated[tuple[tuple[Space, Space], ...], Field(min_length=1)] = SIX
    beta: NonNegativeFloat = 0.25
    beta_epochs: Epochs = (0.0, 28.0)
    gamma: NonNegativeFloat = 2.37
    gamma_epochs: Epochs = (6.0, 22.0)
    delta: NonNegativeFloat = 8.13
    delta_epochs: Epochs = (2.0, 7.0)
    cross_weight: NonNegativeFloat = 1.0
    class_cycle_weight: NonNegativeFloat = 1.0
    modality_cycle_weight: NonNegativeFloat = 1.0
    mmd_weight: NonNegativeFloat = 1.0
    mmd_epochs: Epochs = (0.0, 0.0)
    mmd_on: Literal["draws", "means"] = "draws"
    lr: PositiveFloat = 5e-4


# CADA-VAE's networks, learning rate and 100 epochs; with the deviations of its code; with our 30 epochs
PAPER: Final = Config(
    photo_hidden=(1560, 1660),
    sketch_hidden=(1450, 665),
    word_hidden=(1450, 665),
    beta_epochs=(0.0, 93.0),
    gamma_epochs=(21.0, 75.0),
    delta_epochs=(6.0, 22.0),
    lr=1.5e-4,
)
RELEASED: Final = PAPER.model_copy(update={"noise": "released", "reduction": "sum"})
SHORT: Final = PAPER.model_copy(
    update={k: getattr(Config(), k) for k in ("beta_epochs", "gamma_epochs", "delta_epochs")}
)
PRESETS: Final[Mapping[str, Config]] = {"paper": PAPER, "released": RELEASED, "short": SHORT}
SMALL: Final = {"dim": 6, "photo_hidden": (8, 8), "sketch_hidden": (8, 8), "word_hidden": (8, 8)}

# -- parts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Latent:
    """A Gaussian per row and one sample of it, each (B, Z)."""

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
    """The sum of several losses."""
    return torch.stack(terms).sum()


def released_draw(mean_BZ: Tensor, log_var_BZ: Tensor) -> Tensor:
    """mean + exp(log_var) * noise, with one noise value per row, as in CADA-VAE's released code."""
    return mean_BZ + torch.exp(log_var_BZ) * torch.randn_like(mean_BZ[:, :1])


def rebuilt(made_BF: Tensor, target_BF: Tensor, kind: str) -> Tensor:
    """|made - target|_1, or the squared l2 norm; summed over F, averaged over B."""
    compare = functional.l1_loss if kind == "l1" else functional.mse_loss
    return compare(made_BF, target_BF, reduction="none").sum(1).mean()


def wasserstein(left: Latent, right: Latent) -> Tensor:
    """2-Wasserstein distance of diagonal Gaussians: sqrt(|mu_1 - mu_2|^2 + |sigma_1 - sigma_2|^2), averaged over B.

    1e-12 is added under the root, whose gradient at 0 is infinite.
    """
    means = (left.mean_BZ - right.mean_BZ).square().sum(1)
    deviations = (torch.exp(0.5 * left.log_var_BZ) - torch.exp(0.5 * right.log_var_BZ)).square().sum(1)
    return torch.sqrt(means + deviations + 1e-12).mean()


# -- model -----------------------------------------------------------------------------------------------------------


class Lcale(Model):
    """LCALE on extracted features; embeddings are (B, 1, Z), the latents' means.

    All losses are per sample except `discrepancy`, which is over the rows of all ranks: except for the noise, which
    each rank samples itself, 2 ranks with B rows each are equivalent to 1 rank with 2B rows.
    """

    paired = True

    def __init__(self, config: Config, inputs: Inputs) -> None:
        super().__init__(inputs)
        self.config = config
        self.scaling: Scaling = config.scaling
        self.words = Words(config.words, inputs.semantic_dim)
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

    def begin(self, word: Tensor) -> None:
        """Fit the scaling of class embeddings to those of the trained classes, (N, S)."""
        self.words.fit(word)

    def terms(self, batch: Batch, _: Shared) -> Terms:
        """Autoencoders + gamma (cross reconstruction + cycles) + delta W2 + mmd_weight MMD, each with a warm-up."""
        c, epoch = self.config, batch.epoch
        x = self.targets(batch)
        latents = {space: self.latent(space, values) for space, values in x.items()}
        made = self.decoded(latents)
        beta = c.beta * warm_up(epoch, *c.beta_epochs)
        gamma = c.gamma * warm_up(epoch, *c.gamma_epochs)
        delta = c.delta * warm_up(epoch, *c.delta_epochs)
        # the mean over the batch times the rows of all ranks is their sum, since ranks are averaged afterwards
        rows = 1 if c.reduction == "mean" else len(batch) * world_size()
        return {
            "reconstruction": rows * self.crossed(x, made, [(s, s) for s in SPACES]),
            "divergence": rows * beta * total([gaussian_kl(z.mean_BZ, z.log_var_BZ) for z in latents.values()]),
            "cross": rows * gamma * c.cross_weight * self.crossed(x, made, c.cross),
            "class_cycle": rows * gamma * c.class_cycle_weight * self.class_cycle(x, made),
            "modality_cycle": rows * gamma * c.modality_cycle_weight * self.modality_cycle(x, made),
            "wasserstein": rows * delta * total([wasserstein(latents[m], latents["word"]) for m in MODALITIES]),
            "discrepancy": c.mmd_weight * warm_up(epoch, *c.mmd_epochs) * self.discrepancy(latents),
        }

    def targets(self, batch: Batch) -> dict[Space, Tensor]:
        """Input and reconstruction target of each autoencoder, (B, F) per space."""
        return {"photo": batch.photo, "sketch": batch.sketch, "word": self.words(batch.word)}

    def latent(self, space: Space, values: Tensor) -> Latent:
        """The Gaussian of each row of `values` (B, F), and a sample."""
        mean_BZ, log_var_BZ = self.encoders[space](values)
        if self.config.noise == "none":
            return Latent(mean_BZ, log_var_BZ, mean_BZ)
        draw = reparameterise if self.config.noise == "corrected" else released_draw
        return Latent(mean_BZ, log_var_BZ, draw(mean_BZ, log_var_BZ))

    def decoded(self, latents: Mapping[Space, Latent]) -> Made:
        """D_j(z_i) for all nine (i, j), each (B, F) of space j."""
        draws = torch.cat([latents[space].draw_BZ for space in SPACES])
        return {
            (i, j): made_BF
            for j in SPACES
            for i, made_BF in zip(SPACES, self.decoders[j](draws).chunk(len(SPACES)), strict=True)
        }

    def crossed(self, x: Mapping[Space, Tensor], made: Made, pairs: Sequence[tuple[Space, Space]]) -> Tensor:
        """Sum over pairs (i, j) of |x_j - D_j(z_i)|; for i = j, the autoencoders' own reconstruction error."""
        return total([rebuilt(made[i, j], x[j], self.config.reconstruction) for i, j in pairs])

    def cycled(self, via: Space, home: Space, x: Mapping[Space, Tensor], made: Made) -> Tensor:
        """|x - D_home(mean of E_via(D_via(z_home)))|: decode to `via`, encode without noise, and decode to `home`."""
        mean_BZ, _ = self.encoders[via](made[home, via])
        return rebuilt(self.decoders[home](mean_BZ), x[home], self.config.reconstruction)

    def class_cycle(self, x: Mapping[Space, Tensor], made: Made) -> Tensor:
        """Cycle loss of class embeddings through the photos' space and through the queries' space."""
        return self.cycled("photo", "word", x, made) + self.cycled("sketch", "word", x, made)

    def modality_cycle(self, x: Mapping[Space, Tensor], made: Made) -> Tensor:
        """Cycle loss of photos through the queries' space, and of queries through the photos' space."""
        return self.cycled("sketch", "photo", x, made) + self.cycled("photo", "sketch", x, made)

    def discrepancy(self, latents: Mapping[Space, Latent]) -> Tensor:
        """Maximum mean discrepancy of photos' and queries' latents over all ranks. Batch-dependent."""
        on_draws = self.config.mmd_on == "draws"
        photo, sketch = (gather_over_ranks(latents[m].draw_BZ if on_draws else latents[m].mean_BZ) for m in MODALITIES)
        return mmd(photo, sketch, floor=MMD_FLOOR)

    def embed(self, modality: str, features: Tensor) -> Tensor:
        """The mean of the latent, without noise, one vector per item."""
        return cast(Tensor, self.encoders[modality](features)[0]).unsqueeze(1)
