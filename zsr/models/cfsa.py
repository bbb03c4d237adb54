"""CFSA: correlated features synthesis and alignment with two coupled Wasserstein GANs.

X. Xu, K. Lin, H. Lu, L. Gao, H. T. Shen, "Correlated Features Synthesis and Alignment for Zero-shot Cross-modal
Retrieval", SIGIR 2020.

Per modality, a generator G synthesizes features from a class embedding and noise, a critic D scores features given
their class embedding, and a regressor R maps features, true or synthetic, to the space of class embeddings. A cycle
loss requires R(G(class)) to equal the class embedding, and an alignment loss brings the two modalities' regressions
together. Retrieval compares R(query) with R(photo). Queries are texts as published, or sketches.

Neither paper nor code of CFSA was available, so this is our reconstruction. Sources of values: "abstract" is CFSA's,
"JFSE" the released code of its authors' next method, which has the same parts and nearly the same scores, "ours" a
decision of this project.

Shapes: B batch, F feature, S class embedding, Z noise. Pairs of tensors are by modality.
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
    """Options. Architecture, loss weights and learning rates are JFSE's; its other values are in the preset "released".

    The preset "paper" is "released" without the parts that CFSA is not known to have: the modality classifier, and
    sharing a batch between all critic steps. The default scaling of class embeddings did best on held-out classes:
    initial outputs of regressors are about 0.2, and with much smaller class embeddings, such as those of sentence
    encoders, training takes many more steps.

    Attributes:
        hidden: width of every hidden layer. JFSE: 4096, for features of 4096 dimensions.
        noise: Z, width of the generators' noise.
        scaling: scaling of features, fitted on the training rows: standard, unit ([0, 1] per column; JFSE, there per
            mini-batch) or none.
        words: scaling of class embeddings: given, unit (unit length), standard (centered on the trained classes' mean
            and divided by one number; ours), or minmax: [0, 1] per dimension over the trained classes (JFSE, there per
            mini-batch).
        output: output layer of generators and regressors. JFSE: relu, for features and class embeddings in [0, 1];
            linear is for standardized features and signed class embeddings (ours).
        critic_steps: critic steps per step of the other networks.
        critic_batches: fresh: each critic step samples a new batch and noise (as f-CLSWGAN does); same: all use the
            same batch and noise (JFSE). The other networks use those of the last critic step.
        penalty_weight: weight of the gradient penalty.
        adversarial_weight: weight of the critics' scores in the generators' loss.
        cycle_weight: weight of the cycle loss, in every loss that includes it.
        generator_cycle_weight: weight of cycle loss and modality confusion on synthetic features in the generators'
            loss.
        alignment: alignment loss: cmpm (JFSE's default), coral, coral-log or mmd (also in JFSE). CFSA's is not known.
        alignment_weight: weight of the alignment loss, on true and on synthetic features.
        synthetic_weight: weight of all losses on synthetic features in the regressors' loss; with 0, regressors are
            trained on true features only.
        modality_weight: weight of the modality classifier with gradient reversal. JFSE has 0.01; CFSA is not known to
            have one, so the default is 0, without the classifier.
        modality_epochs: number of epochs until the gradient reversal has full strength.
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
    """Features (B, F) and class embeddings (B, S) -> scores (B, 1), unbounded. JFSE."""

    def __init__(self, features: int, words: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(features + words, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, 1))

    def forward(self, features: Tensor, word_BS: Tensor) -> Tensor:
        return cast(Tensor, self.layers(torch.cat([features, word_BS], 1)))


def modality_classifier(words: int) -> nn.Sequential:
    """Regressions (B, S) -> logits (B, 2) of photo and query. JFSE: three layers without activations between them."""
    return nn.Sequential(nn.Linear(words, 150), nn.Linear(150, 75), nn.Linear(75, 2))


# -- losses ----------------------------------------------------------------------------------------------------------


def gradient_penalty(critic: Callable[[Tensor, Tensor], Tensor], true: Tensor, fake: Tensor, word_BS: Tensor) -> Tensor:
    """mean (|d D(x, c) / d x|_2 - 1)^2 at x = a true + (1 - a) fake, with a from U(0, 1) per row.

    The gradient is with respect to the features only: the class embedding c is the same at both ends. Its graph is
    kept, so that the penalty has a gradient for the critic's weights.
    """
    share_B1 = torch.rand(len(true), 1, device=true.device, dtype=true.dtype)
    between = (share_B1 * true + (1 - share_B1) * fake).detach().requires_grad_(True)
    # the gradient of the sum over rows has each row's own gradient, since scores of rows are independent
    (slope,) = torch.autograd.grad(critic(between, word_BS).sum(), between, create_graph=True)
    norm_B: Tensor = torch.linalg.vector_norm(slope, dim=1)
    return (norm_B - 1.0).square().mean()


def cmpm(photo_BS: Tensor, sketch_BS: Tensor, label_B: Tensor) -> Tensor:
    """Cross-modal projection matching, both directions: mean_i sum_j p_ij log(p_ij / (q_ij + 1e-8) + 1e-8).

    p_i = softmax_j of a_i . b_j / |b_j|, q_i = uniform over the rows of i's class. Batch-dependent.
    """
    same_BB = (label_B[:, None] == label_B[None, :]).to(photo_BS.dtype)
    q_BB = same_BB / same_BB.sum(1, keepdim=True)

    def one_way(a_BS: Tensor, b_BS: Tensor) -> Tensor:
        p_BB = (a_BS @ functional.normalize(b_BS).T).softmax(1)
        return (p_BB * torch.log(p_BB / (q_BB + 1e-8) + 1e-8)).sum(1).mean()

    return one_way(photo_BS, sketch_BS) + one_way(sketch_BS, photo_BS)


def coral(left_BS: Tensor, right_BS: Tensor) -> Tensor:
    """Mean squared difference of the covariance matrices (1 / (B - 1)). Batch-dependent."""
    return functional.mse_loss(torch.cov(left_BS.T), torch.cov(right_BS.T))


def coral_log(left_BS: Tensor, right_BS: Tensor) -> Tensor:
    """Mean squared difference of the logarithms of the covariance matrices + 1e-3 I: log-Euclidean. Batch-dependent."""
    return functional.mse_loss(log_matrix(torch.cov(left_BS.T)), log_matrix(torch.cov(right_BS.T)))


def log_matrix(matrix_SS: Tensor) -> Tensor:
    """Logarithm of a positive semidefinite matrix + 1e-3 I.

    Its gradient is implemented explicitly: that of an eigendecomposition is infinite for equal eigenvalues, which
    occur when a batch has fewer rows than dimensions.
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
    """The alignment loss `kind` of the two modalities' regressions (B, S), over the rows of all ranks."""
    photo_BS, sketch_BS = (gather_over_ranks(regressed[m]) for m in MODALITIES)
    if kind == "cmpm":
        return cmpm(photo_BS, sketch_BS, gather_over_ranks(label_B))
    return ALIGNMENTS[kind](photo_BS, sketch_BS)


def entropy(judge: nn.Module, code: ByModality) -> Tensor:
    """Mean cross entropy of the classifier `judge` (B, S) -> (B, 2) of photos (0) and queries (1)."""
    logits = torch.cat([judge(code[m]) for m in MODALITIES])
    truth = torch.arange(len(MODALITIES), device=logits.device).repeat_interleave(len(logits) // len(MODALITIES))
    return functional.cross_entropy(logits, truth)


def reversal(progress: float) -> float:
    """Strength of the gradient reversal, 2 / (1 + exp(-10 progress)) - 1: from 0 at the start to almost 1. JFSE."""
    return 2.0 / (1.0 + math.exp(-10.0 * progress)) - 1.0


# -- model -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Draws:
    """Values without gradient that the phases share, computed before any group except the critics is updated.

    JFSE updates generators, regressors and classifier simultaneously, each based on the others' previous parameters.
    Each phase here computes only its own group with gradient and takes the rest from this object, so that consecutive
    phases are equivalent to that.
    """

    noise: ByModality  # (B, Z)
    fake: ByModality  # (B, F), G(class, noise)
    true_code: ByModality  # (B, S), R(features); with a modality classifier only
    fake_code: ByModality  # (B, S), R(G(class, noise)); with a modality classifier only


class Cfsa(Model):
    """CFSA on extracted features; embeddings are (B, 1, S), the regressions to the space of class embeddings.

    All losses are per sample except the alignment, which is over the rows of all ranks: except for noise and
    interpolation, which each rank samples itself, 2 ranks with B rows each are equivalent to 1 rank with 2B rows.
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
        """First `critic_steps` critic steps, then all other networks, equivalent to a simultaneous update. JFSE."""
        c = self.config
        phases = (
            Phase("critics", "critics", self.critic_terms, c.critic_steps, c.critic_batches == "fresh"),
            Phase("generators", "generators", self.generator_terms),
            Phase("regressors", "regressors", self.regressor_terms),
        )
        return phases if self.modality is None else (*phases, Phase("modality", "modality", self.modality_terms))

    def begin(self, word: Tensor) -> None:
        """Fit the scaling of class embeddings to those of the trained classes, (N, S)."""
        self.words.fit(word)

    @torch.no_grad()
    def shared(self, batch: Batch) -> Draws:
        """Noise, synthetic features, and regressions of these and of the batch, by the current networks."""
        x, word_BS = self.true(batch), self.word(batch)
        noise = self.draw_noise(batch)
        fake = {m: self.generate(m, word_BS, noise[m]) for m in MODALITIES}
        if self.modality is None:
            return Draws(noise, fake, {}, {})
        codes = [{m: self.regressors[m](values[m]) for m in MODALITIES} for values in (x, fake)]
        return Draws(noise, fake, *codes)

    def draw_noise(self, batch: Batch) -> ByModality:
        """Noise from N(0, 1), (B, Z) per modality.

        The loop calls this at each critic step. With critic_batches "same", all calls must return the same noise, so it
        is seeded by the seed that the loop sets at each step and by the batch's epoch and index.
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
        """Scaled class embeddings (B, S): condition of generators and critics, target of regressors."""
        return cast(Tensor, self.words(batch.word))

    def generate(self, modality: str, word_BS: Tensor, noise_BZ: Tensor) -> Tensor:
        """G(class, noise): synthetic features (B, F)."""
        return cast(Tensor, self.generators[modality](torch.cat([word_BS, noise_BZ], 1)))

    def critic_terms(self, batch: Batch, draws: Draws) -> Terms:
        """E D(fake, c) - E D(true, c) + penalty_weight * gradient penalty, per modality."""
        x, word_BS = self.true(batch), self.word(batch)
        terms: Terms = {}
        for m, critic in self.critics.items():
            terms[f"wasserstein_{m}"] = critic(draws.fake[m], word_BS).mean() - critic(x[m], word_BS).mean()
            penalty = gradient_penalty(critic, x[m], draws.fake[m], word_BS)
            terms[f"penalty_{m}"] = self.config.penalty_weight * penalty
        return terms

    def generator_terms(self, batch: Batch, draws: Draws) -> Terms:
        """-E D(fake, c) + 0.1 * (cycle + modality confusion), on fakes recomputed with gradient from the same noise."""
        c, word_BS = self.config, self.word(batch)
        fake = {m: self.generate(m, word_BS, draws.noise[m]) for m in MODALITIES}
        code = {m: self.regressors[m](fake[m]) for m in MODALITIES}
        terms = {f"adversarial_{m}": -c.adversarial_weight * self.critics[m](fake[m], word_BS).mean() for m in fake}
        terms["cycle"] = c.generator_cycle_weight * self.cycle(code, word_BS)
        if self.modality is not None:
            terms["confusion"] = c.generator_cycle_weight * self.confusion(self.modality, batch, code)
        return terms

    def regressor_terms(self, batch: Batch, draws: Draws) -> Terms:
        """Cycle + alignment + modality confusion of true features + 0.01 times the same of synthetic features."""
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
        """Cross entropy of classifying the modality of true and of synthetic regressions."""
        judge = cast(nn.Module, self.modality)
        return {"true": entropy(judge, draws.true_code), "synthetic": entropy(judge, draws.fake_code)}

    def cycle(self, code: ByModality, word_BS: Tensor) -> Tensor:
        """cycle_weight * sum over modalities of mean (R(.) - class)^2."""
        errors = [functional.mse_loss(code[m], word_BS) for m in MODALITIES]
        return self.config.cycle_weight * torch.stack(errors).sum()

    def confusion(self, judge: nn.Module, batch: Batch, code: ByModality) -> Tensor:
        """-modality_weight * reversal * cross entropy of the modality classifier.

        The classifier has its own phase, so gradient reversal is equivalent to negating the loss.
        """
        c = self.config
        return -c.modality_weight * reversal(batch.epoch / c.modality_epochs) * entropy(judge, code)

    def embed(self, modality: str, features: Tensor) -> Tensor:
        """The output of the modality's R, one vector per item."""
        return cast(Tensor, self.regressors[modality](features)).unsqueeze(1)
