"""CFSA: correlated features synthesis and alignment with two coupled Wasserstein GANs.

X. Xu, K. Lin, H. Lu, L. Gao, H. T. Shen, "Correlated Features Synthesis and Alignment for Zero-shot Cross-modal
Retrieval", SIGIR 2020.

A generator G a modality makes features out of a class vector and noise, a critic D a modality judges features beside
their class vector, and a regressor R a modality maps features, true or synthetic, into the space of class vectors. A
cycle asks R(G(class)) to be the class again, and an alignment draws the two modalities' regressions together. Retrieval
compares R(query) with R(photo). Queries are texts as published, or sketches.

Neither text nor code of CFSA was to be had, so this is our reconstruction. Where a number comes from is said in words:
"abstract" is CFSA's, "JFSE" the released code of its authors' next method, which has the same parts and nearly the same
scores, "ours" a decision of this project.

Shapes: B batch, F feature, S class vector, Z noise. Pairs of tensors are by modality.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Final, Literal, cast

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from zsr.batch import Batch
from zsr.models.layers import gather_over_ranks
from zsr.models.losses import MMD_FLOOR, mmd
from zsr.models.protocol import Group, Inputs, Model, ModelConfig, Optimizer, Phase, Scaling, Terms
from zsr.models.words import Words, WordScaling

Fraction = Annotated[float, Field(ge=0, lt=1)]
ByModality = Mapping[str, Tensor]

MODALITIES: Final = ("photo", "sketch")


class Config(ModelConfig):
    """Options. Structure, weights and rates are JFSE's; what it has else is in the preset "released".

    The preset "paper" leaves out of that what is not known of CFSA: the modality classifier, and a batch that all
    critic steps share. The default for class vectors did best on held-out classes: regressors begin with outputs of
    about 0.2, beside which small vectors, as those of sentence encoders are, take many steps to show.

    Attributes:
        hidden: width of every hidden layer. JFSE: 4096, for features of 4096 dimensions.
        noise: Z, width of the generators' noise.
        scaling: of features, by the trained rows: standard, unit ([0, 1] a column; JFSE, there by mini-batch) or none.
        words: class vectors as given, of unit length, standard (less the trained classes' mean, and of one size; ours),
            or minmax: [0, 1] an entry over the trained classes (JFSE, there by mini-batch).
        output: last layer of generators and regressors. JFSE: relu, for features and class vectors scaled to [0, 1];
            linear fits standardised features and signed class vectors (ours).
        critic_steps: steps of the critics before each one of the others.
        critic_batches: each critic step draws a batch and noise anew (as f-CLSWGAN does), or takes the same batch with
            the same noise (JFSE). The others then use those of the last critic step.
        penalty_weight: of the gradient penalty.
        adversarial_weight: of the critics' judgement in the generators' loss.
        cycle_weight: of the cycle, wherever it enters.
        generator_cycle_weight: of cycle and modality confusion of synthetic features in the generators' loss.
        alignment: cmpm (what JFSE runs), coral, coral-log or mmd (which it offers too). Which CFSA has is not known.
        alignment_weight: of the alignment, true or synthetic.
        synthetic_weight: of everything on synthetic features in the regressors' loss; 0 trains them on true ones only.
        modality_weight: of the modality classifier behind gradient reversal. JFSE has 0.01; for CFSA no such part is
            known, so with the default 0 there is none.
        modality_epochs: the epochs over which the reversal reaches its full strength.
        lr, betas: of every Adam.
    """

    hidden: PositiveInt = 1024
    noise: PositiveInt = 300
    scaling: Scaling = "standard"
    words: WordScaling = "standard"
    output: Literal["linear", "relu"] = "linear"
    critic_steps: PositiveInt = 5
    critic_batches: Literal["fresh", "same"] = "fresh"
    penalty_weight: NonNegativeFloat = 10.0
    adversarial_weight: NonNegativeFloat = 1.0
    cycle_weight: NonNegativeFloat = 1.0
    generator_cycle_weight: NonNegativeFloat = 0.1
    alignment: Literal["cmpm", "coral", "coral-log", "mmd"] = "cmpm"
    alignment_weight: NonNegativeFloat = 1e-4
    synthetic_weight: NonNegativeFloat = 0.01
    modality_weight: NonNegativeFloat = 0.0
    modality_epochs: PositiveFloat = 500.0
    lr: PositiveFloat = 1e-4
    betas: tuple[Fraction, Fraction] = (0.5, 0.999)


RELEASED: Final = Config(
    hidden=4096, scaling="unit", words="minmax", output="relu", critic_batches="same", modality_weight=0.01
)
PAPER: Final = RELEASED.model_copy(update={"critic_batches": "fresh", "modality_weight": 0.0})
PRESETS: Final[Mapping[str, Config]] = {"released": RELEASED, "paper": PAPER}
SMALL: Final = {"hidden": 8, "noise": 4}

# -- parts -----------------------------------------------------------------------------------------------------------


def mapping(inputs: int, hidden: int, outputs: int, output: str) -> nn.Sequential:
    """A generator or a regressor: (B, inputs) -> (B, outputs), one hidden layer. JFSE."""
    last = nn.ReLU() if output == "relu" else nn.Identity()
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs), last)


class Critic(nn.Module):
    """Features (B, F) beside class vectors (B, S) -> (B, 1), unbounded. JFSE."""

    def __init__(self, features: int, words: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(features + words, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, 1))

    def forward(self, features: Tensor, word_BS: Tensor) -> Tensor:
        return cast(Tensor, self.layers(torch.cat([features, word_BS], 1)))


def modality_classifier(words: int) -> nn.Sequential:
    """Regressions (B, S) -> logits (B, 2) of photo and query; JFSE's three layers have no activation between them."""
    return nn.Sequential(nn.Linear(words, 150), nn.Linear(150, 75), nn.Linear(75, 2))


# -- losses ----------------------------------------------------------------------------------------------------------


def gradient_penalty(critic: Callable[[Tensor, Tensor], Tensor], true: Tensor, fake: Tensor, word_BS: Tensor) -> Tensor:
    """mean (|d D(x, c) / d x|_2 - 1)^2 at x = a true + (1 - a) fake, one a in U(0, 1) a row.

    The slope is that of the features alone: the class vector c is the same on either end. Its own graph is kept, so
    that the penalty reaches the critic's weights.
    """
    share_B1 = torch.rand(len(true), 1, device=true.device, dtype=true.dtype)
    between = (share_B1 * true + (1 - share_B1) * fake).detach().requires_grad_(True)
    # a sum over rows gives each row its own slope, as no row enters another one's score
    (slope,) = torch.autograd.grad(critic(between, word_BS).sum(), between, create_graph=True)
    norm_B: Tensor = torch.linalg.vector_norm(slope, dim=1)
    return (norm_B - 1.0).square().mean()


def cmpm(photo_BS: Tensor, sketch_BS: Tensor, label_B: Tensor) -> Tensor:
    """Cross-modal projection matching, both directions: mean_i sum_j p_ij log(p_ij / (q_ij + 1e-8) + 1e-8).

    p_i = softmax_j of a_i . b_j / |b_j|, q_i = uniform over the rows of i's class. Batch-coupled.
    """
    same_BB = (label_B[:, None] == label_B[None, :]).to(photo_BS.dtype)
    q_BB = same_BB / same_BB.sum(1, keepdim=True)

    def one_way(a_BS: Tensor, b_BS: Tensor) -> Tensor:
        p_BB = (a_BS @ functional.normalize(b_BS).T).softmax(1)
        return (p_BB * torch.log(p_BB / (q_BB + 1e-8) + 1e-8)).sum(1).mean()

    return one_way(photo_BS, sketch_BS) + one_way(sketch_BS, photo_BS)


def coral(left_BS: Tensor, right_BS: Tensor) -> Tensor:
    """Mean squared difference of the covariance matrices (1 / (B - 1)). Batch-coupled."""
    return functional.mse_loss(torch.cov(left_BS.T), torch.cov(right_BS.T))


def coral_log(left_BS: Tensor, right_BS: Tensor) -> Tensor:
    """Mean squared difference of the logarithms of the covariance matrices + 1e-3 I: log-Euclidean. Batch-coupled."""
    return functional.mse_loss(log_matrix(torch.cov(left_BS.T)), log_matrix(torch.cov(right_BS.T)))


def log_matrix(matrix_SS: Tensor) -> Tensor:
    """Logarithm of a positive semidefinite matrix + 1e-3 I.

    Its gradient is written out: that of an eigendecomposition is infinite where eigenvalues coincide, as they do when
    a batch has fewer rows than dimensions.
    """
    return cast(Tensor, _LogMatrix.apply(matrix_SS))  # type: ignore[no-untyped-call]


class _LogMatrix(torch.autograd.Function):
    """V log(e + 1e-3) V', with the derivative of Daleckii and Krein: V (K * V' G V) V'.

    K_ij = (log e_i - log e_j) / (e_i - e_j), and 1 / e_i where they are equal; 1e-3 is in e.
    """

    @staticmethod
    def forward(ctx: Any, matrix_SS: Tensor) -> Tensor:
        e_S, v_SS = torch.linalg.eigh(matrix_SS)
        e_S = e_S.clamp(min=0) + 1e-3
        ctx.save_for_backward(e_S, v_SS)
        logarithm_SS: Tensor = (v_SS * e_S.log()) @ v_SS.T
        return logarithm_SS

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        e_S, v_SS = ctx.saved_tensors
        gap_SS = e_S[:, None] - e_S[None, :]
        mean_SS = 0.5 * (e_S[:, None] + e_S[None, :])
        close_SS = gap_SS.abs() < 1e-4 * mean_SS
        slope_SS = (e_S.log()[:, None] - e_S.log()[None, :]) / torch.where(close_SS, 1.0, gap_SS)
        k_SS = torch.where(close_SS, 1.0 / mean_SS, slope_SS)
        gradient_SS: Tensor = v_SS @ (k_SS * (v_SS.T @ gradients[0] @ v_SS)) @ v_SS.T
        return gradient_SS


ALIGNMENTS: Final[Mapping[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "coral": coral,
    "coral-log": coral_log,
    "mmd": partial(mmd, floor=MMD_FLOOR),
}


def align(kind: str, regressed: ByModality, label_B: Tensor) -> Tensor:
    """The chosen alignment of the two modalities' regressions (B, S), over the rows of all ranks."""
    photo_BS, sketch_BS = (gather_over_ranks(regressed[m]) for m in MODALITIES)
    if kind == "cmpm":
        return cmpm(photo_BS, sketch_BS, gather_over_ranks(label_B))
    return ALIGNMENTS[kind](photo_BS, sketch_BS)


def entropy(judge: nn.Module, code: ByModality) -> Tensor:
    """Mean cross entropy of `judge` (B, S) -> (B, 2) telling photos (0) from queries (1)."""
    logits = torch.cat([judge(code[m]) for m in MODALITIES])
    truth = torch.arange(len(MODALITIES), device=logits.device).repeat_interleave(len(logits) // len(MODALITIES))
    return functional.cross_entropy(logits, truth)


def reversal(progress: float) -> float:
    """Strength of the gradient reversal, 2 / (1 + exp(-10 progress)) - 1: from 0 at the start to almost 1. JFSE."""
    return 2.0 / (1.0 + math.exp(-10.0 * progress)) - 1.0


# -- model -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Draws:
    """What the phases share: values without gradient, made before any group but the critics moved.

    JFSE steps generators, regressors and classifier in one run, each on what the others were. Each phase here computes
    with gradient only what it moves and takes the rest from this, so that phases one after the other do just that.
    """

    noise: ByModality  # (B, Z)
    fake: ByModality  # (B, F), G(class, noise)
    true_code: ByModality  # (B, S), R(features); with a modality classifier only
    fake_code: ByModality  # (B, S), R(G(class, noise)); with a modality classifier only


class Cfsa(Model):
    """CFSA on extracted features; embeddings are (B, 1, S), the regressions into the space of class vectors.

    Every term is per sample but the alignments, which are over the rows of all ranks: but for noise and interpolation,
    which each rank draws for itself, 2 ranks of B rows equal 1 of 2B.
    """

    paired = True
    second_order = True

    def __init__(self, config: Config, inputs: Inputs) -> None:
        super().__init__(inputs)
        self.config = config
        self.scaling: Scaling = config.scaling
        self.words = Words(config.words, inputs.semantic_dim)
        widths = {"photo": inputs.photo_dim, "sketch": inputs.sketch_dim}
        words, hidden, output = inputs.semantic_dim, config.hidden, config.output
        self.generators = nn.ModuleDict(
            {m: mapping(words + config.noise, hidden, width, output) for m, width in widths.items()}
        )
        self.critics = nn.ModuleDict({m: Critic(width, words, hidden) for m, width in widths.items()})
        self.regressors = nn.ModuleDict({m: mapping(width, hidden, words, output) for m, width in widths.items()})
        self.modality = modality_classifier(words) if config.modality_weight else None

    @property
    def dim(self) -> int:
        return self.inputs.semantic_dim

    @property
    def groups(self) -> Mapping[str, Group]:
        adam = Optimizer("adam", self.config.lr, betas=self.config.betas)
        modules: dict[str, nn.Module] = {
            "critics": self.critics,
            "generators": self.generators,
            "regressors": self.regressors,
        }
        if self.modality is not None:
            modules["modality"] = self.modality
        return {name: Group(module, adam) for name, module in modules.items()}

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The critics some steps ahead, then all others as if at once. JFSE."""
        c = self.config
        phases = (
            Phase("critics", "critics", self.critic_terms, c.critic_steps, c.critic_batches == "fresh"),
            Phase("generators", "generators", self.generator_terms),
            Phase("regressors", "regressors", self.regressor_terms),
        )
        return phases if self.modality is None else (*phases, Phase("modality", "modality", self.modality_terms))

    def begin(self, word: Tensor) -> None:
        """Fit the scale of class vectors to those of the trained classes, (N, S)."""
        self.words.fit(word)

    @torch.no_grad()
    def shared(self, batch: Batch) -> Draws:
        """Noise, and what generators and regressors make of it and of the batch as they stand."""
        x, word_BS = self.true(batch), self.word(batch)
        noise = self.draw_noise(batch)
        fake = {m: self.generate(m, word_BS, noise[m]) for m in MODALITIES}
        if self.modality is None:
            return Draws(noise, fake, {}, {})
        codes = [{m: self.regressors[m](values[m]) for m in MODALITIES} for values in (x, fake)]
        return Draws(noise, fake, *codes)

    def draw_noise(self, batch: Batch) -> ByModality:
        """N(0, 1), (B, Z) a modality.

        The loop asks anew at each critic step. For the same noise at all of them, it is a function of the seed that
        the loop sets at each step and of the batch's place in training.
        """
        source = None
        if self.config.critic_batches == "same":
            seed = torch.initial_seed() + 1_000_003 * batch.epoch + batch.index + 1
            source = torch.Generator(batch.word.device).manual_seed(seed % 2**63)
        size, like = (len(batch), self.config.noise), batch.word
        return {m: torch.randn(size, generator=source, device=like.device, dtype=like.dtype) for m in MODALITIES}

    def true(self, batch: Batch) -> ByModality:
        """The true features (B, F) of each modality."""
        return {"photo": batch.photo, "sketch": batch.sketch}

    def word(self, batch: Batch) -> Tensor:
        """Class vectors (B, S): condition of generators and critics, target of regressors."""
        return cast(Tensor, self.words(batch.word))

    def generate(self, modality: str, word_BS: Tensor, noise_BZ: Tensor) -> Tensor:
        """G(class, noise): synthetic features (B, F)."""
        return cast(Tensor, self.generators[modality](torch.cat([word_BS, noise_BZ], 1)))

    def critic_terms(self, batch: Batch, draws: Draws) -> Terms:
        """E D(fake, c) - E D(true, c) + penalty_weight * gradient penalty, a modality each."""
        x, word_BS = self.true(batch), self.word(batch)
        terms: Terms = {}
        for m, critic in self.critics.items():
            terms[f"wasserstein_{m}"] = critic(draws.fake[m], word_BS).mean() - critic(x[m], word_BS).mean()
            penalty = gradient_penalty(critic, x[m], draws.fake[m], word_BS)
            terms[f"penalty_{m}"] = self.config.penalty_weight * penalty
        return terms

    def generator_terms(self, batch: Batch, draws: Draws) -> Terms:
        """-E D(fake, c), and 0.1 * (cycle of fakes + their modality confusion), on the fakes of `draws` made anew."""
        c, word_BS = self.config, self.word(batch)
        fake = {m: self.generate(m, word_BS, draws.noise[m]) for m in MODALITIES}
        code = {m: self.regressors[m](fake[m]) for m in MODALITIES}
        terms = {f"adversarial_{m}": -c.adversarial_weight * self.critics[m](fake[m], word_BS).mean() for m in fake}
        terms["cycle"] = c.generator_cycle_weight * self.cycle(code, word_BS)
        if self.modality is not None:
            terms["confusion"] = c.generator_cycle_weight * self.confusion(self.modality, batch, code)
        return terms

    def regressor_terms(self, batch: Batch, draws: Draws) -> Terms:
        """Cycle + alignment + modality confusion of true features, and 0.01 times those of synthetic ones."""
        c, x, word_BS = self.config, self.true(batch), self.word(batch)
        terms: Terms = {}
        for kind, weight, values in (("true", 1.0, x), ("synthetic", c.synthetic_weight, draws.fake)):
            code = {m: self.regressors[m](values[m]) for m in MODALITIES}
            terms[f"cycle_{kind}"] = weight * self.cycle(code, word_BS)
            terms[f"alignment_{kind}"] = weight * c.alignment_weight * align(c.alignment, code, batch.label)
            if self.modality is not None:
                terms[f"confusion_{kind}"] = weight * self.confusion(self.modality, batch, code)
        return terms

    def modality_terms(self, batch: Batch, draws: Draws) -> Terms:
        """Cross entropy of telling the modality of true and of synthetic regressions."""
        judge = cast(nn.Module, self.modality)
        return {"true": entropy(judge, draws.true_code), "synthetic": entropy(judge, draws.fake_code)}

    def cycle(self, code: ByModality, word_BS: Tensor) -> Tensor:
        """cycle_weight * sum over modalities of mean (R(.) - class)^2."""
        errors = [functional.mse_loss(code[m], word_BS) for m in MODALITIES]
        return self.config.cycle_weight * torch.stack(errors).sum()

    def confusion(self, judge: nn.Module, batch: Batch, code: ByModality) -> Tensor:
        """-modality_weight * reversal * cross entropy of the modality classifier.

        As the classifier has a phase of its own, the reversed gradient is that of the loss with its sign turned.
        """
        c = self.config
        return -c.modality_weight * reversal(batch.epoch / c.modality_epochs) * entropy(judge, code)

    def embed(self, modality: str, features: Tensor) -> Tensor:
        """R of the modality, as a single part."""
        return cast(Tensor, self.regressors[modality](features)).unsqueeze(1)
