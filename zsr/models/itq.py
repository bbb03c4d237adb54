"""ITQ: binary codes of embeddings, ranked by Hamming distance.

Y. Gong and S. Lazebnik, "Iterative Quantization: A Procrustean Approach to Learning Binary Codes", CVPR 2011; the
binary variants of SEM-PCYC (CVPR 2019) are made with it.

Embeddings are centred, turned onto their principal components, and then by the orthogonal matrix R that brings them
nearest to the corners of a cube; the signs are the code. R comes from alternation: with V the projected rows,

    B = sign(V R)        B'V = U S W' by singular values        R = W U'

each half of which lowers |B - V R|^2 or leaves it.

Two ways in. `Coded` is inductive: fitted on seen rows only, it codes any row alone, and lies in the checkpoint.
`transductive` is as SEM-PCYC's released code does it: the very queries that are evaluated are learned from, and queries
and gallery are centred each by its own mean, so that a constant offset between modalities vanishes and binary scores
may exceed real ones. Scores of the two do not compare.

Shapes: N rows, B batch, P parts, D embedding, K bits, C = K / 8 bytes.
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
PLACES: Final = tuple(2**place for place in reversed(range(8)))  # of the bits in a byte, as numpy.packbits has them


def principal(centred_ND: Tensor, bits: int) -> Tensor:
    """The first `bits` principal components (D, K) of centred rows: orthonormal columns, variance descending.

    A component points to where its rows reach further (the sum of their cubes is positive). Its sign would otherwise be
    up to the machine's eigensolver, and from other signs the alternation ends elsewhere.

    Raises:
        ConfigError: `bits` is no multiple of 8, or more than the embeddings have dimensions.
    """
    dim = centred_ND.shape[1]
    if bits < 1 or bits % 8 or bits > dim:
        raise ConfigError(f"{bits} bits of {dim}-d embeddings; take a multiple of 8 that is not above {dim}")
    _, vectors_DD = torch.linalg.eigh(centred_ND.T @ centred_ND)  # ascending
    components_DK: Tensor = vectors_DD.flip(1)[:, :bits]
    return torch.where((centred_ND @ components_DK).pow(3).sum(0) < 0, -components_DK, components_DK)


def rotation(projected_NK: Tensor, seed: int = 0, rounds: int = ROUNDS) -> Tensor:
    """The orthogonal R (K, K) after `rounds` alternations, from a seeded random one.

    The start is the left singular vectors of a Gaussian matrix (released by SEM-PCYC).
    """
    bits = projected_NK.shape[1]
    start_KK = torch.randn(bits, bits, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    turn_KK: Tensor = torch.linalg.svd(start_KK)[0].to(projected_NK)
    for _ in range(rounds):
        corner_NK = torch.where(projected_NK @ turn_KK > 0, 1.0, -1.0).to(projected_NK)
        u_KK, _, w_KK = torch.linalg.svd(corner_NK.T @ projected_NK)  # the latter is W' already
        turn_KK = w_KK.T @ u_KK.T
    return turn_KK


def learn(centred_ND: Tensor, bits: int, seed: int = 0) -> Tensor:
    """Components times rotation, (D, K) float64: the code of a centred row x is x @ this > 0.

    Raises:
        ConfigError: see `principal`.
    """
    wide_ND = centred_ND.double()
    components_DK = principal(wide_ND, bits)
    return components_DK @ rotation(wide_ND @ components_DK, seed)


def pack(bit: Tensor) -> Tensor:
    """Bits (.., K), boolean, as bytes (.., C) uint8, the first bit highest."""
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
    """Codes (N, C) uint8 of queries and gallery, learned from the rows that are to be evaluated.

    The defaults are SEM-PCYC's released code.

    Args:
        query_ND, gallery_ND: float rows; of unit length where the model compares by cosine.
        centre: each side by its own mean, or both by the mean of all their rows.
        learned_on: rows of which components and rotation are learned.

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

    Means and projection are buffers, fitted once on seen rows after training, and travel with the checkpoint; a code
    depends on nothing but its own row. An inductive ITQ is not in SEM-PCYC's released code; ours.

    Attributes:
        model: the model that it codes. Its embeddings are brought to unit length first if it compares by cosine.
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
            centre: both modalities by the mean of their two means, or either by the mean of its own seen rows.

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
        """What is coded: the model's embeddings (B, P, D)."""
        embedded = self.model.embed(side, features)
        return functional.normalize(embedded, dim=-1) if self.model.metric == "cosine" else embedded

    def embed(self, modality: str, features: Tensor) -> Tensor:
        centred = self.real(modality, features) - self.get_buffer(f"mean_{modality}")
        return pack(centred @ self.projection > 0)

    @torch.no_grad()
    def fit(self, rows: Iterable[Rows], seed: int = 0) -> None:
        """Learn means, and of all rows together components and rotation.

        Args:
            rows: seen ones of both modalities, in blocks of any size. All their embeddings are held at once, so a large
                set is to be sampled before.

        Raises:
            ConfigError: a modality without rows.
        """
        self.eval()
        blocks: dict[str, list[Tensor]] = {"sketch": [], "photo": []}
        for side, features, _ in rows:
            blocks[side].append(self.real(side, self.features(side, features)).flatten(0, 1).double())
        if empty := sorted(side for side, held in blocks.items() if not held):
            raise ConfigError(f"no seen row of {empty}: binary codes are fitted on both modalities")
        held = {side: torch.cat(found) for side, found in blocks.items()}
        mean = {side: values_ND.mean(0) for side, values_ND in held.items()}
        shared_D = (mean["sketch"] + mean["photo"]) / 2.0
        for side in held:
            centre_D = mean[side] if self.centre == "own" else shared_D
            self.get_buffer(f"mean_{side}").copy_(centre_D)
            held[side] = held[side] - centre_D
        self.projection.copy_(learn(torch.cat([held["sketch"], held["photo"]]), self.bits, seed))
