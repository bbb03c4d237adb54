"""ITQ: binary codes of embeddings, ranked by Hamming distance.

Y. Gong and S. Lazebnik, "Iterative Quantization: A Procrustean Approach to Learning Binary Codes", CVPR 2011; used for
the binary variants of SEM-PCYC (CVPR 2019).

Embeddings are centered, projected to their principal components, and rotated by the orthogonal matrix R that brings
them closest to the vertices of a hypercube; the signs are the code. R is found by alternating, with V the projected
rows,

    B = sign(V R)        B'V = U S W' (SVD)        R = W U'

neither of which increases |B - V R|^2.

There are two variants. `Coded` is inductive: it is fitted on seen rows only, encodes every row independently, and is
saved in the checkpoint. `transductive` follows SEM-PCYC's released code: it is fitted on the evaluated queries
themselves, and queries and gallery are each centered by their own mean, which removes a constant offset between
modalities, so that binary scores may exceed real-valued ones. Scores of the two variants are not comparable.

Shapes: N rows, B batch, P vectors per item, D embedding, K bits, C = K / 8 bytes.
"""

from collections.abc import Iterable
from typing import Final, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from zsr.errors import ConfigError
from zsr.models.protocol import Embedder, Metric, Rows, Scaling

Centre = Literal["own", "shared"]
LearnedOn = Literal["queries", "both"]

ROUNDS: Final = 50  # SEM-PCYC's released code, and the paper
PLACES: Final = tuple(2**place for place in reversed(range(8)))  # values of the bits in a byte, as in numpy.packbits


def principal(centred_ND: Tensor, bits: int) -> Tensor:
    """The first `bits` principal components (D, K) of centered rows: orthonormal columns, variance descending.

    The sign of a component is chosen so that the sum of the cubes of the projected rows is positive. Otherwise it would
    depend on the eigensolver, and with other signs the alternation gives another result.

    Raises:
        ConfigError: `bits` is not a multiple of 8, or is more than the embeddings' dimensions.
    """
    dim = centred_ND.shape[1]
    if bits < 1 or bits % 8 or bits > dim:
        raise ConfigError(f"{bits} bits of {dim}-d embeddings; use a multiple of 8, at most {dim}")
    _, vectors_DD = torch.linalg.eigh(centred_ND.T @ centred_ND)  # ascending
    components_DK: Tensor = vectors_DD.flip(1)[:, :bits]
    return torch.where((centred_ND @ components_DK).pow(3).sum(0) < 0, -components_DK, components_DK)


def rotation(projected_NK: Tensor, seed: int = 0, rounds: int = ROUNDS) -> Tensor:
    """The orthogonal R (K, K) after `rounds` alternations, from a seeded random initialization.

    The initialization is the left singular vectors of a Gaussian matrix (SEM-PCYC's released code).
    """
    bits = projected_NK.shape[1]
    start_KK = torch.randn(bits, bits, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    turn_KK: Tensor = torch.linalg.svd(start_KK)[0].to(projected_NK)
    for _ in range(rounds):
        corner_NK = torch.where(projected_NK @ turn_KK > 0, 1.0, -1.0).to(projected_NK)
        u_KK, _, w_KK = torch.linalg.svd(corner_NK.T @ projected_NK)  # w_KK is already transposed
        turn_KK = w_KK.T @ u_KK.T
    return turn_KK


def learn(centred_ND: Tensor, bits: int, seed: int = 0) -> Tensor:
    """Components times rotation, (D, K) float64: the code of a centered row x is x @ this > 0.

    Raises:
        ConfigError: see `principal`.
    """
    wide_ND = centred_ND.double()
    components_DK = principal(wide_ND, bits)
    return components_DK @ rotation(wide_ND @ components_DK, seed)


def pack(bit: Tensor) -> Tensor:
    """Pack boolean bits (.., K) into bytes (.., C) uint8, most significant bit first."""
    place = torch.tensor(PLACES, dtype=torch.uint8, device=bit.device)
    return (bit.reshape(*bit.shape[:-1], -1, 8) * place).sum(-1, dtype=torch.uint8)


def transductive(
    query_ND: Tensor,
    gallery_ND: Tensor,
    bits: int = 64,
    *,
    centre: Centre = "own",
    learned_on: LearnedOn = "queries",
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Codes (N, C) uint8 of queries and gallery, fitted on the evaluated rows themselves.

    The defaults are those of SEM-PCYC's released code.

    Args:
        query_ND, gallery_ND: float rows; of unit length if the model's metric is cosine.
        centre: center each side by its own mean, or both by the mean of all their rows.
        learned_on: rows that components and rotation are fitted on.

    Raises:
        ConfigError: see `principal`; or the two sides differ in width.
    """
    if query_ND.shape[1:] != gallery_ND.shape[1:]:
        raise ConfigError(f"queries {tuple(query_ND.shape)} and gallery {tuple(gallery_ND.shape)} differ in width")
    sides = [query_ND.double(), gallery_ND.double()]
    shared_D = torch.cat(sides).mean(0)
    query_ND, gallery_ND = (side - (side.mean(0) if centre == "own" else shared_D) for side in sides)
    projection_DK = learn(query_ND if learned_on == "queries" else torch.cat([query_ND, gallery_ND]), bits, seed)
    return pack(query_ND @ projection_DK > 0), pack(gallery_ND @ projection_DK > 0)


class Coded(Embedder):
    """A trained model whose embeddings are binary codes (B, P, C) uint8, compared by Hamming distance.

    Means and projection are buffers, fitted once on seen rows after training, and are saved in the checkpoint; a code
    depends only on its own row. SEM-PCYC's released code has no inductive ITQ: this one was designed in this project.

    Attributes:
        model: the model whose embeddings are encoded. They are scaled to unit length first if its metric is cosine.
    """

    metric: Metric = "hamming"
    scaling: Scaling = "none"  # the model inside has its own
    mean_sketch: Tensor
    mean_photo: Tensor
    projection: Tensor

    def __init__(self, model: Embedder, bits: int = 64, centre: Centre = "shared") -> None:
        """
        Args:
            bits: K.
            centre: center both modalities by the mean of their two means, or each by the mean of its own seen rows.

        Raises:
            ConfigError: see `principal`.
        """
        super().__init__(model.inputs.model_copy(update={"tower": None}))
        self.inputs, self.scale = model.inputs, nn.ModuleDict()
        self.model = model
        self.bits, self.centre = bits, centre
        self.register_buffer("mean_sketch", torch.zeros(model.dim))
        self.register_buffer("mean_photo", torch.zeros(model.dim))
        self.register_buffer("projection", principal(torch.eye(model.dim), bits))

    @property
    def dim(self) -> int:
        return self.bits

    def features(self, side: str, items: Tensor) -> Tensor:
        return self.model.features(side, items)

    def real(self, side: str, features: Tensor) -> Tensor:
        """The real-valued embeddings (B, P, D) of the model, which are then encoded."""
        embedded = self.model.embed(side, features)
        return functional.normalize(embedded, dim=-1) if self.model.metric == "cosine" else embedded

    def embed(self, modality: str, features: Tensor) -> Tensor:
        centred = self.real(modality, features) - self.get_buffer(f"mean_{modality}")
        return pack(centred @ self.projection > 0)

    @torch.no_grad()
    def fit(self, rows: Iterable[Rows], seed: int = 0) -> None:
        """Fit the mean of each modality, and components and rotation on all rows together.

        Args:
            rows: seen rows of both modalities, in blocks of any size. All their embeddings are held in memory, so
                sample large sets first.

        Raises:
            ConfigError: a modality without rows.
        """
        self.eval()
        blocks: dict[str, list[Tensor]] = {"sketch": [], "photo": []}
        for side, features, _ in rows:
            blocks[side].append(self.real(side, self.features(side, features)).flatten(0, 1).double())
        if empty := sorted(side for side, held in blocks.items() if not held):
            raise ConfigError(f"no seen row of {empty}; fitting binary codes requires both modalities")
        held = {side: torch.cat(found) for side, found in blocks.items()}
        mean = {side: values_ND.mean(0) for side, values_ND in held.items()}
        shared_D = (mean["sketch"] + mean["photo"]) / 2.0
        for side in held:
            centre_D = mean[side] if self.centre == "own" else shared_D
            self.get_buffer(f"mean_{side}").copy_(centre_D)
            held[side] = held[side] - centre_D
        self.projection.copy_(learn(torch.cat([held["sketch"], held["photo"]]), self.bits, seed))
