"""SketchGCN: encoders trained to match a graph convolution over the class embeddings of the batch.

Z. Zhang, Y. Zhang, R. Feng, T. Zhang, W. Fan, "Zero-Shot Sketch-Based Image Retrieval via Graph Convolution Network",
AAAI 2020.

Two encoders map sketch and photo into one space. A graph network takes each pair of a batch with its class embedding
and mixes pairs of similar classes; its outputs are the regression targets of the encoders. A classifier keeps the space
discriminative, and a conditional autoencoder must generate the class embedding from either embedding. Retrieval uses
only the encoders: at test time neither pairs nor classes are known, and an embedding must not depend on its batch.

Neither the full paper nor code was available, so this is our reconstruction. Sources: "abstract" is the paper's, with
the caption of its figure; "survey" a survey's account of it; "ZSIH" the released code of its predecessor (Shen et al.,
CVPR 2018), which has the same architecture; "ours" a decision of this project. The sizes are ours. Extracted features
replace the paper's VGG-16 with attention.

Shapes: B batch, F feature, D embedding, S class embedding, Z latent, G rows of all ranks.
"""

import logging
from collections.abc import Mapping
from typing import Annotated, Final, Literal, cast

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from zsr.batch import Batch
from zsr.models.layers import gather_over_ranks, rank
from zsr.models.losses import gaussian_kl, reparameterise, squared_distances, warm_up
from zsr.models.protocol import Group, Inputs, Model, ModelConfig, Optimizer, Phase, Shared, Terms

logger = logging.getLogger("zsr")

Fraction = Annotated[float, Field(ge=0, lt=1)]

MODALITIES: Final = ("sketch", "photo")


class Config(ModelConfig):
    """Options.

    Attributes:
        dim: D, width of an embedding. 300 in later papers' tables.
        hidden: width of the hidden layer of encoders and graph network.
        start: same: both encoders start with the same weights, if the features of both modalities have the same width;
            apart: with different ones. Ours.
        latent, latent_hidden: Z and the hidden width of the conditional autoencoder.
        dropout: dropout in the hidden layers of encoders and graph network.
        words: class embeddings at unit length, or as given: in the graph, in its nodes and in the autoencoder. The
            temperature depends on it: class embeddings as given, with squared distances around 9, have no affinity.
        temperature: t of the affinity exp(-|s_i - s_j|^2 / t). ZSIH has 0.1, at which, with unit vectors, only pairs of
            the same class are mixed; at 1 all classes are. The default mixes similar classes (ours).
        node_semantics: whether a node has the class embedding in addition to both embeddings. Otherwise the class is
            used only in the graph. Which of these the paper has is not known.
        detach_target: stop the gradient through the graph's outputs in the feature loss, as ZSIH does.
        feature_weight, classification_weight, semantic_weight: weights of the three losses. The paper's are not known.
            The feature loss is a sum over D: at a weight of 1, classification does not improve until it has decreased.
        beta, beta_epochs: weight of the Kullback-Leibler loss within the semantic loss, and its warm-up.
        lr: of Adam.
    """

    dim: Annotated[int, Field(ge=2)] = 300
    hidden: PositiveInt = 1024
    start: Literal["same", "apart"] = "same"
    latent: PositiveInt = 64
    latent_hidden: PositiveInt = 512
    dropout: Fraction = 0.5
    words: Literal["unit", "given"] = "unit"
    temperature: PositiveFloat = 0.3
    node_semantics: bool = True
    detach_target: bool = False
    feature_weight: NonNegativeFloat = 0.01
    classification_weight: NonNegativeFloat = 1.0
    semantic_weight: NonNegativeFloat = 1.0
    beta: NonNegativeFloat = 1.0
    beta_epochs: NonNegativeFloat = 5.0
    lr: PositiveFloat = 1e-3


# ZSIH's temperature, constant target and learning rate
ZSIH: Final = Config(temperature=0.1, detach_target=True, feature_weight=1.0, lr=5e-4)
PRESETS: Final[Mapping[str, Config]] = {"zsih": ZSIH}
SMALL: Final = {"dim": 6, "hidden": 8, "latent": 4, "latent_hidden": 8}

# -- graph -----------------------------------------------------------------------------------------------------------


def affinity(word_GS: Tensor, temperature: float) -> Tensor:
    """a_ij = exp(-|s_i - s_j|^2 / t), (G, G); 1 within a class and on the diagonal (self-loops). Survey."""
    return torch.exp(squared_distances(word_GS, word_GS) / -temperature)


def normalised(affinity_GG: Tensor) -> Tensor:
    """D^-1/2 A D^-1/2 with D_ii = sum_j a_ij + 1e-8. ZSIH."""
    scale_G = torch.rsqrt(affinity_GG.sum(1) + 1e-8)
    return scale_G[:, None] * affinity_GG * scale_G[None, :]


# -- parts -----------------------------------------------------------------------------------------------------------


def encoder(inputs: int, hidden: int, outputs: int, dropout: float) -> nn.Sequential:
    """Features (B, F) -> embeddings (B, D)."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, outputs))


class GraphNetwork(nn.Module):
    """Two graph convolutions H' = sigma(A (H W + b)) over nodes (G, .) -> (G, D), the second one linear.

    The bias is added before propagation, as in ZSIH's released code.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, hidden)
        self.second = nn.Linear(hidden, outputs)
        self.dropout = nn.Dropout(dropout)

    def forward(self, node: Tensor, graph_GG: Tensor) -> Tensor:
        hidden = self.dropout(functional.relu(graph_GG @ self.first(node)))
        return cast(Tensor, graph_GG @ self.second(hidden))


class Generator(nn.Module):
    """Conditional variational autoencoder of class embeddings (B, S), given an embedding (B, D) of sketch or photo."""

    def __init__(self, words: int, condition: int, hidden: int, latent: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(words + condition, hidden)
        self.mean = nn.Linear(hidden, latent)
        self.log_var = nn.Linear(hidden, latent)
        self.decoder = nn.Sequential(nn.Linear(latent + condition, hidden), nn.ReLU(), nn.Linear(hidden, words))

    def encode(self, word_BS: Tensor, embedding_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance (B, Z) of q(z | s, v)."""
        hidden = functional.relu(self.hidden(torch.cat([word_BS, embedding_BD], 1)))
        return self.mean(hidden), self.log_var(hidden)

    def decode(self, latent_BZ: Tensor, embedding_BD: Tensor) -> Tensor:
        """The mean class embedding (B, S) of p(s | z, v)."""
        return cast(Tensor, self.decoder(torch.cat([latent_BZ, embedding_BD], 1)))


# -- losses ----------------------------------------------------------------------------------------------------------


def squared_error(made: Tensor, target: Tensor) -> Tensor:
    """|made - target|^2 of rows (B, .): summed over a row, averaged over B."""
    return (made - target).square().sum(1).mean()


# -- model -----------------------------------------------------------------------------------------------------------


class SketchGcn(Model):
    """SketchGCN on extracted features; embeddings are (B, 1, D), the outputs of the encoders.

    The graph has the rows of all ranks, so all losses that use it are batch-dependent; except for dropout and latent
    noise, which each rank samples itself, 2 ranks with B rows each are equivalent to 1 rank with 2B rows.
    """

    def __init__(self, config: Config, inputs: Inputs) -> None:
        super().__init__(inputs)
        self.config = config
        c, words = config, inputs.semantic_dim
        widths = {"sketch": inputs.sketch_dim, "photo": inputs.photo_dim}
        self.encoders = nn.ModuleDict({m: encoder(width, c.hidden, c.dim, c.dropout) for m, width in widths.items()})
        if c.start == "same" and inputs.sketch_dim == inputs.photo_dim:
            self.encoders["photo"].load_state_dict(self.encoders["sketch"].state_dict())
        node = 2 * c.dim + (words if c.node_semantics else 0)
        self.graph = GraphNetwork(node, c.hidden, c.dim, c.dropout)
        self.classifier = nn.Linear(c.dim, len(inputs.classes))
        self.generator = Generator(words, c.dim, c.latent_hidden, c.latent)

    @property
    def dim(self) -> int:
        return self.config.dim

    @property
    def groups(self) -> Mapping[str, Group]:
        """One optimizer and a joint step (ours)."""
        parts = nn.ModuleList([self.encoders, self.graph, self.classifier, self.generator])
        return {"all": Group(parts, Optimizer("adam", self.config.lr))}

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase("all", "all", self.terms),)

    def words(self, word_BS: Tensor) -> Tensor:
        """Class embeddings (B, S) as used in the graph, its nodes and the autoencoder."""
        return functional.normalize(word_BS) if self.config.words == "unit" else word_BS

    def begin(self, word: Tensor) -> None:
        """Log the fraction of a node's graph weights on other classes, for one pair per class; 0 is no mixing."""
        graph_NN = normalised(affinity(self.words(word), self.config.temperature))
        other_N = 1.0 - graph_NN.diagonal() / graph_NN.sum(1)
        logger.info("graph with one pair per class: fraction of weights on other classes %.3f", float(other_N.mean()))

    def terms(self, batch: Batch, _: Shared) -> Terms:
        """feature_weight L_feat + classification_weight L_cls + semantic_weight L_sem (three losses: abstract)."""
        word_BS = self.words(batch.word)
        embedded = {m: self.encoders[m](x) for m, x in (("sketch", batch.sketch), ("photo", batch.photo))}
        related_BD = self.relate(embedded, word_BS)
        return {
            "feature": self.config.feature_weight * self.feature_loss(embedded, related_BD),
            **self.classification(embedded | {"graph": related_BD}, batch.label),
            **self.semantics(embedded, word_BS, batch.epoch),
        }

    def relate(self, embedded: Mapping[str, Tensor], word_BS: Tensor) -> Tensor:
        """The graph network's outputs (B, D) for this rank's pairs, in the graph of all ranks' pairs."""
        parts = [embedded[m] for m in MODALITIES] + ([word_BS] if self.config.node_semantics else [])
        node = gather_over_ranks(torch.cat(parts, 1))
        graph_GG = normalised(affinity(gather_over_ranks(word_BS), self.config.temperature))
        first = rank() * len(word_BS)
        return cast(Tensor, self.graph(node, graph_GG))[first : first + len(word_BS)]

    def feature_loss(self, embedded: Mapping[str, Tensor], related_BD: Tensor) -> Tensor:
        """|e_sketch - g|^2 + |e_photo - g|^2, with g the graph network's outputs. The form is ours, modeled on ZSIH."""
        target_BD = related_BD.detach() if self.config.detach_target else related_BD
        return squared_error(embedded["sketch"], target_BD) + squared_error(embedded["photo"], target_BD)

    def classification(self, embedded: Mapping[str, Tensor], label_B: Tensor) -> Terms:
        """Cross entropy of one classifier on both embeddings and on the graph's outputs."""
        weight = self.config.classification_weight
        return {
            f"classification_{name}": weight * functional.cross_entropy(self.classifier(values), label_B)
            for name, values in embedded.items()
        }

    def semantics(self, embedded: Mapping[str, Tensor], word_BS: Tensor, epoch: float) -> Terms:
        """|s - p(s | z, v)|^2 + beta KL(q(z | s, v) || N(0, 1)), summed over both embeddings v."""
        c = self.config
        beta = c.beta * warm_up(epoch, 0.0, c.beta_epochs)
        error, divergence = word_BS.new_zeros(()), word_BS.new_zeros(())
        for embedding_BD in embedded.values():
            mean_BZ, log_var_BZ = self.generator.encode(word_BS, embedding_BD)
            made_BS = self.generator.decode(reparameterise(mean_BZ, log_var_BZ), embedding_BD)
            error = error + squared_error(made_BS, word_BS)
            divergence = divergence + gaussian_kl(mean_BZ, log_var_BZ)
        return {"reconstruction": c.semantic_weight * error, "divergence": c.semantic_weight * beta * divergence}

    def embed(self, modality: str, features: Tensor) -> Tensor:
        """The output of the modality's encoder, one vector per item."""
        return cast(Tensor, self.encoders[modality](features)).unsqueeze(1)
