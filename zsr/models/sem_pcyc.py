"""SEM-PCYC: semantically tied paired cycle consistency.

A. Dutta and Z. Akata, "Semantically Tied Paired Cycle Consistency for Zero-Shot Sketch-based Image Retrieval",
CVPR 2019 (arXiv:1903.03372); extended as "Semantically Tied Paired Cycle Consistency for Any-Shot Sketch-based Image
Retrieval", IJCV 2020 (arXiv:2006.11397).

Two generators G map sketch and photo features into the space of class codes, two generators F map codes back to
features. There is a discriminator per space, cycle losses between G and F, and classification losses by fixed random
classifiers in every space; an autoencoder computes the codes from the class embeddings, with sparse selection of their
dimensions. Retrieval compares G(sketch) with G(photo), or their binary codes, which are computed after training
(`itq`). The backbone that extracts the features is frozen and not part of the model.

Sources of values: "released" is the authors' published code, "recalled" is the paper as others quote it, "ours" is a
decision of this project. Loss weights and soft labels are as released unless stated otherwise.

Shapes: B batch, X sketch feature, Y photo feature, F either of them, S class embedding, M code, N seen classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Final, Literal, cast

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn
from torch.nn import functional

from zsr.batch import Batch
from zsr.models.layers import BatchNorm, world_size
from zsr.models.protocol import Group, Inputs, Model, ModelConfig, Optimizer, Phase, Terms

Fraction = Annotated[float, Field(ge=0, lt=1)]


class Config(ModelConfig):
    """Options. The defaults are ours, for standardized backbone features of about 1,000 dimensions.

    They are the released values except for `dim` (released: 64), `generator_lr` (1e-4) and `metric` (l2); the preset
    "released" has all released values.

    Attributes:
        dim: M, width of a code and so of an embedding.
        words: class embeddings as given (released), or scaled to unit length.
        decoder: output layer of the autoencoder. Released: relu, which cannot reconstruct negative entries.
        dropout: dropout in the generators' hidden layers.
        feature_dropout: dropout on the features. The released code trains through its backbone's dropout of 0.5, which
            extracted features do not have; this option adds similar noise.
        noise: std of the Gaussian noise on the discriminators' inputs.
        gan: lsgan-soft: least squares with noisy labels (released); logistic: as the paper is recalled.
        classifiers: frozen at their random initialization (released), or trained with the generators.
        lambda_semantic, lambda_sketch, lambda_photo: weights of all losses except the adversarial, per space.
        adversarial_weight, cycle_weight, classification_weight, regression_weight: weights of the four kinds of loss.
            The first release had a regression weight of 1, the last has 0.1; the paper, as recalled, has no regression.
        l21_weight: weight of the column sparsity of the encoder. As recalled, the paper adds it to the Frobenius norm
            of the reconstruction error, not divided by B S: that is B S times the released objective, so equivalent
            under SGD with a learning rate lower by that factor.
        generator_lr, generator_betas: of Adam. As recalled, the paper's first beta is 0.5; the released one is 0.9.
        discriminator_lr, discriminator_momentum, autoencoder_lr, autoencoder_momentum: of SGD.
        metric: metric for comparing embeddings, l2 (released) or cosine.
    """

    dim: Annotated[int, Field(ge=2)] = 256
    words: Literal["given", "unit"] = "given"
    decoder: Literal["relu", "linear"] = "relu"
    dropout: Fraction = 0.5
    feature_dropout: Fraction = 0.0
    noise: NonNegativeFloat = 0.3
    gan: Literal["lsgan-soft", "logistic"] = "lsgan-soft"
    classifiers: Literal["frozen", "trained"] = "frozen"
    lambda_semantic: NonNegativeFloat = 10.0
    lambda_sketch: NonNegativeFloat = 10.0
    lambda_photo: NonNegativeFloat = 10.0
    adversarial_weight: NonNegativeFloat = 1.0
    cycle_weight: NonNegativeFloat = 1.0
    classification_weight: NonNegativeFloat = 1.0
    regression_weight: NonNegativeFloat = 0.1
    l21_weight: NonNegativeFloat = 0.001
    generator_lr: PositiveFloat = 1e-3
    generator_betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    discriminator_lr: PositiveFloat = 1e-4
    discriminator_momentum: Fraction = 0.9
    autoencoder_lr: PositiveFloat = 1e-2
    autoencoder_momentum: Fraction = 0.9
    metric: Literal["l2", "cosine"] = "cosine"


RELEASED: Final = Config(dim=64, generator_lr=1e-4, metric="l2")
# the released values with the objective as the paper is recalled
PAPER: Final = RELEASED.model_copy(
    update={"gan": "logistic", "regression_weight": 0.0, "generator_betas": (0.5, 0.999)},
)
PRESETS: Final[Mapping[str, Config]] = {"released": RELEASED, "paper": PAPER}

# -- parts -----------------------------------------------------------------------------------------------------------


def generator(inputs: int, outputs: int, dropout: float) -> nn.Sequential:
    """(B, inputs) -> (B, outputs): two hidden layers of the mean of both widths, no output activation. Released."""
    hidden = (inputs + outputs) // 2
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        BatchNorm(hidden),
        nn.LeakyReLU(0.2),
        nn.Dropout(dropout),
        nn.Linear(hidden, hidden),
        BatchNorm(hidden),
        nn.LeakyReLU(0.2),
        nn.Dropout(dropout),
        nn.Linear(hidden, outputs),
    )


class Noise(nn.Module):
    """Adds noise N(0, deviation^2) to (B, F) in training; the identity in evaluation."""

    def __init__(self, deviation: float) -> None:
        super().__init__()
        self.deviation = deviation

    def forward(self, values: Tensor) -> Tensor:
        return values + self.deviation * torch.randn_like(values) if self.training else values


def discriminator(inputs: int, noise: float) -> nn.Sequential:
    """(B, inputs) -> (B, 1), unbounded: noise, two hidden layers of half the width, no sigmoid. Released."""
    hidden = inputs // 2
    return nn.Sequential(
        Noise(noise),
        nn.Linear(inputs, hidden),
        BatchNorm(hidden),
        nn.LeakyReLU(0.2),
        nn.Linear(hidden, hidden),
        BatchNorm(hidden),
        nn.LeakyReLU(0.2),
        nn.Linear(hidden, 1),
    )


class Autoencoder(nn.Module):
    """Class embeddings (B, S) -> codes (B, M) -> class embeddings: one layer each."""

    def __init__(self, words: int, codes: int, decoder: str) -> None:
        super().__init__()
        self.encoder = nn.Linear(words, codes)
        self.decoder = nn.Linear(codes, words)
        self.output = nn.ReLU() if decoder == "relu" else nn.Identity()

    def encode(self, word_BS: Tensor) -> Tensor:
        return functional.relu(self.encoder(word_BS))

    def decode(self, code_BM: Tensor) -> Tensor:
        return cast(Tensor, self.output(self.decoder(code_BM)))


# -- losses ----------------------------------------------------------------------------------------------------------


def column_sparsity(weight_MS: Tensor, batch: int) -> Tensor:
    """l2,1 norm of the encoder's weight over the batch size: sum over columns j of |W_j|_2 / B.

    A column belongs to one dimension of the class embedding, so this disables dimensions that do not help. The released
    code divides by the batch size; `batch` must be the rows of all ranks, so that the number of ranks has no effect.
    """
    norm_S: Tensor = torch.linalg.vector_norm(weight_MS, dim=0)
    return norm_S.sum() / batch


def soft_label(logit_B1: Tensor, real: bool) -> Tensor:
    """One label per row, sampled at each call: U(0.7, 1) for real, U(0, 0.3) for fake. Released."""
    low, high = (0.7, 1.0) if real else (0.0, 0.3)
    return torch.empty_like(logit_B1).uniform_(low, high)


def least_squares(logit_B1: Tensor, real: bool) -> Tensor:
    """mean (o - t)^2 with soft labels t. Released, instead of the paper's logarithms."""
    return functional.mse_loss(logit_B1, soft_label(logit_B1, real))


def logistic(logit_B1: Tensor, real: bool) -> Tensor:
    """-mean log sigmoid(o) for real, -mean log (1 - sigmoid(o)) for fake. Recalled as the paper's form.

    Generators minimize the first on their fakes (non-saturating), since the paper's minimax form has almost no gradient
    early in training.
    """
    return functional.softplus(-logit_B1 if real else logit_B1).mean()


# -- model -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Passes:
    """The forward pass that the phases share. All fields have a gradient to the networks that computed them.

    `code` is the encoder's own output; every other field is computed from its detached copy, so no generator or
    discriminator loss has a gradient for the autoencoder.
    """

    sketch_BX: Tensor  # input of the generators, after feature dropout; also target of the cycle loss
    photo_BY: Tensor
    code_BM: Tensor
    sketch_code_BM: Tensor  # G_sketch(sketch)
    photo_code_BM: Tensor  # G_photo(photo)
    fake_sketch_BX: Tensor  # F_sketch(code)
    fake_photo_BY: Tensor  # F_photo(code)
    sketch_cycle_BX: Tensor  # F_sketch(G_sketch(sketch))
    photo_cycle_BY: Tensor  # F_photo(G_photo(photo))
    code_cycle_sketch_BM: Tensor  # G_sketch(F_sketch(code))
    code_cycle_photo_BM: Tensor  # G_photo(F_photo(code))


class SemPcyc(Model):
    """SEM-PCYC on extracted features; embeddings are (B, 1, M).

    All losses are means over the batch, and batch norm is synchronized over ranks: 2 ranks with B rows each are
    equivalent to 1 rank with 2B rows.
    """

    def __init__(self, config: Config, inputs: Inputs) -> None:
        super().__init__(inputs)
        self.config = config
        self.metric = config.metric
        widths = {"sketch": inputs.sketch_dim, "photo": inputs.photo_dim}
        codes, classes = config.dim, len(inputs.classes)
        self.autoencoder = Autoencoder(inputs.semantic_dim, codes, config.decoder)
        self.to_code = nn.ModuleDict({m: generator(width, codes, config.dropout) for m, width in widths.items()})
        self.to_feature = nn.ModuleDict({m: generator(codes, width, config.dropout) for m, width in widths.items()})
        spaces = {"semantic": codes, **widths}
        self.discriminators = nn.ModuleDict({s: discriminator(width, config.noise) for s, width in spaces.items()})
        self.classifiers = nn.ModuleDict({s: nn.Linear(width, classes, bias=False) for s, width in spaces.items()})
        self.classifiers.requires_grad_(config.classifiers == "trained")

    @property
    def dim(self) -> int:
        return self.config.dim

    @property
    def groups(self) -> Mapping[str, Group]:
        c = self.config
        moved = [self.to_code, self.to_feature] + ([self.classifiers] if c.classifiers == "trained" else [])
        return {
            "autoencoder": Group(
                self.autoencoder, Optimizer("sgd", c.autoencoder_lr, momentum=c.autoencoder_momentum), whole=True
            ),
            "generators": Group(nn.ModuleList(moved), Optimizer("adam", c.generator_lr, betas=c.generator_betas)),
            "discriminators": Group(
                self.discriminators, Optimizer("sgd", c.discriminator_lr, momentum=c.discriminator_momentum)
            ),
        }

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Autoencoder, generators, discriminators, all on one forward pass, before any is updated. Released."""
        return (
            Phase("autoencoder", "autoencoder", self.autoencoder_terms),
            Phase("generators", "generators", self.generator_terms),
            Phase("discriminators", "discriminators", self.discriminator_terms),
        )

    def shared(self, batch: Batch) -> Passes:
        """The forward pass that all three phases use."""
        sketch_BX = functional.dropout(batch.sketch, self.config.feature_dropout, self.training)
        photo_BY = functional.dropout(batch.photo, self.config.feature_dropout, self.training)
        code_BM = self.autoencoder.encode(self.word(batch))
        target_BM = code_BM.detach()
        sketch_code_BM, photo_code_BM = self.to_code["sketch"](sketch_BX), self.to_code["photo"](photo_BY)
        fake_sketch_BX, fake_photo_BY = self.to_feature["sketch"](target_BM), self.to_feature["photo"](target_BM)
        return Passes(
            sketch_BX=sketch_BX,
            photo_BY=photo_BY,
            code_BM=code_BM,
            sketch_code_BM=sketch_code_BM,
            photo_code_BM=photo_code_BM,
            fake_sketch_BX=fake_sketch_BX,
            fake_photo_BY=fake_photo_BY,
            sketch_cycle_BX=self.to_feature["sketch"](sketch_code_BM),
            photo_cycle_BY=self.to_feature["photo"](photo_code_BM),
            code_cycle_sketch_BM=self.to_code["sketch"](fake_sketch_BX),
            code_cycle_photo_BM=self.to_code["photo"](fake_photo_BY),
        )

    def word(self, batch: Batch) -> Tensor:
        """Class embeddings (B, S), the input of the autoencoder."""
        return functional.normalize(batch.word) if self.config.words == "unit" else batch.word

    def autoencoder_terms(self, batch: Batch, passes: Passes) -> Terms:
        """mean (dec(enc(s)) - s)^2 + l21_weight * l2,1 of the encoder. Per sample."""
        rows = len(batch) * world_size()
        return {
            "reconstruction": functional.mse_loss(self.autoencoder.decode(passes.code_BM), self.word(batch)),
            "sparsity": self.config.l21_weight * column_sparsity(self.autoencoder.encoder.weight, rows),
        }

    def generator_terms(self, batch: Batch, passes: Passes) -> Terms:
        """Adversarial + cycle + classification + regression, each times its weight. Per sample."""
        c = self.config
        families = {
            "adversarial": (c.adversarial_weight, self.adversarial(passes)),
            "cycle": (c.cycle_weight, self.cycle(passes)),
            "classification": (c.classification_weight, self.classification(passes, batch.label)),
            "regression": (c.regression_weight, self.regression(passes)),
        }
        return {
            f"{family}_{space}": weight * term
            for family, (weight, terms) in families.items()
            for space, term in terms.items()
        }

    def judge(self, space: str, values: Tensor, real: bool) -> Tensor:
        """l(D(values), real): the loss of the space's discriminator on `values` (B, M or F) with the label `real`."""
        compare = least_squares if self.config.gan == "lsgan-soft" else logistic
        return compare(self.discriminators[space](values), real)

    def adversarial(self, passes: Passes) -> Terms:
        """l(D_se(G y), real) + l(D_se(G x), real); l(D_sk(F e), real); l(D_im(F e), real)."""
        return {
            "semantic": self.judge("semantic", passes.photo_code_BM, True)
            + self.judge("semantic", passes.sketch_code_BM, True),
            "sketch": self.judge("sketch", passes.fake_sketch_BX, True),
            "photo": self.judge("photo", passes.fake_photo_BY, True),
        }

    def cycle(self, passes: Passes) -> Terms:
        """lambda * mean absolute error of F(G(x)) and x, F(G(y)) and y, and twice of G(F(e)) and e."""
        c = self.config
        target_BM = passes.code_BM.detach()
        return {
            "semantic": c.lambda_semantic
            * (
                functional.l1_loss(passes.code_cycle_sketch_BM, target_BM)
                + functional.l1_loss(passes.code_cycle_photo_BM, target_BM)
            ),
            "sketch": c.lambda_sketch * functional.l1_loss(passes.sketch_cycle_BX, passes.sketch_BX),
            "photo": c.lambda_photo * functional.l1_loss(passes.photo_cycle_BY, passes.photo_BY),
        }

    def classification(self, passes: Passes, label_B: Tensor) -> Terms:
        """lambda * cross entropy of C_se(G y) and C_se(G x), of C_sk(F e), and of C_im(F e), with the class label."""
        c = self.config

        def entropy(space: str, values: Tensor) -> Tensor:
            return functional.cross_entropy(self.classifiers[space](values), label_B)

        return {
            "semantic": c.lambda_semantic
            * (entropy("semantic", passes.photo_code_BM) + entropy("semantic", passes.sketch_code_BM)),
            "sketch": c.lambda_sketch * entropy("sketch", passes.fake_sketch_BX),
            "photo": c.lambda_photo * entropy("photo", passes.fake_photo_BY),
        }

    def regression(self, passes: Passes) -> Terms:
        """lambda * squared error: twice of G y and G x, with gradient into both; of F e and x; of F e and y.

        In the released code; not in the paper as recalled.
        """
        c = self.config
        return {
            "semantic": c.lambda_semantic * 2.0 * functional.mse_loss(passes.photo_code_BM, passes.sketch_code_BM),
            "sketch": c.lambda_sketch * functional.mse_loss(passes.fake_sketch_BX, passes.sketch_BX),
            "photo": c.lambda_photo * functional.mse_loss(passes.fake_photo_BY, passes.photo_BY),
        }

    def discriminator_terms(self, batch: Batch, passes: Passes) -> Terms:
        """0.25 (2 l(D e, real) + l(D G y, fake) + l(D G x, fake)); of features, 0.5 (l(D x, real) + l(D F e, fake)).

        Fakes are detached: the released code lets their gradient flow and zeroes it before use, which is the same.
        Per sample.
        """
        code_BM, sketch_code_BM = passes.code_BM.detach(), passes.sketch_code_BM.detach()
        semantic = 2.0 * self.judge("semantic", code_BM, True)
        semantic = semantic + self.judge("semantic", passes.photo_code_BM.detach(), False)
        semantic = semantic + self.judge("semantic", sketch_code_BM, False)
        sketch = self.judge("sketch", passes.sketch_BX, True)
        photo = self.judge("photo", passes.photo_BY, True)
        return {
            "semantic": 0.25 * semantic,
            "sketch": 0.5 * (sketch + self.judge("sketch", passes.fake_sketch_BX.detach(), False)),
            "photo": 0.5 * (photo + self.judge("photo", passes.fake_photo_BY.detach(), False)),
        }

    def embed(self, modality: str, features: Tensor) -> Tensor:
        """The output of the modality's G, one vector per item."""
        return cast(Tensor, self.to_code[modality](features)).unsqueeze(1)
