"""CAAE: a conditional adversarial autoencoder that imagines the photo of a sketch. Our reading.

S. K. Yelamarthi, S. K. Reddy, A. Mishra, A. Mittal, "A Zero-Shot Framework for Sketch-based Image Retrieval",
ECCV 2018 (arXiv:1807.11724), beside CVAE.

CVAE's decoder, its way back to the sketch and its retrieval, but the encoder is deterministic, and instead of a
Kullback-Leibler term a discriminator compares the codes of a batch with draws of the prior N(0, I).

Its code was never released. The objective is as others quote the paper; the discriminator, the weight of the
adversarial term, the optimizers and the order of the steps are ours. What CVAE has too is as CVAE has it: by default
with our sizes and scale of the features, by the preset "paper" with those released for CVAE.

Shapes: B batch, Y photo feature, Z latent.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Final, Literal, cast

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from zsr.batch import Batch
from zsr.models.cvae import RELEASED_OPTIONS, Options, SketchToPhoto, keras, trunk
from zsr.models.protocol import Group, Inputs, Phase, Terms


class Config(Options):
    """Options of CAAE: those that it shares with CVAE, and the adversarial half.

    Attributes:
        encoder_input: what is coded, the image (as written), or image and sketch as in CVAE.
        adversarial: the encoder minimises log(1 - D(code)) (as written), or -log D(code), whose gradient does not fade
            where the discriminator is sure (non-saturating).
        adversarial_weight: of that term. One Adam takes both of the encoder's steps, so the weight matters.
        judge: hidden widths of the discriminator.
    """

    encoder_input: Literal["image", "image+sketch"] = "image"
    adversarial: Literal["minimax", "non-saturating"] = "minimax"
    adversarial_weight: NonNegativeFloat = 0.1
    judge: tuple[PositiveInt, ...] = (512, 256)


# the objective as written, with the sizes and features that were released for CVAE
PAPER: Final = Config(**RELEASED_OPTIONS)
# what we would take: the encoder of CVAE, and an adversarial term that trains from the start
OURS: Final = Config(encoder_input="image+sketch", adversarial="non-saturating")
PRESETS: Final[Mapping[str, Config]] = {"paper": PAPER, "ours": OURS}
SMALL: Final = {"latent": 4, "hidden": 8, "samples": 6, "judge": (8, 4)}


def discriminator(latent: int, hidden: tuple[int, ...]) -> nn.Sequential:
    """Codes (B, Z) -> logits (B, 1) of being a draw of the prior. Not normalised, so that rows are judged alone."""
    widths = [latent, *hidden]
    layers = [layer for i, o in pairwise(widths) for layer in (nn.Linear(i, o), nn.LeakyReLU(0.2))]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 1))


class CAAE(SketchToPhoto):
    """CAAE on extracted features.

    All terms are means over the batch, and batch normalisation is over all ranks: but for the prior's draws and
    dropout, which each rank makes for itself, 2 ranks of B rows equal 1 of 2B.
    """

    config: Config

    def __init__(self, config: Config, inputs: Inputs) -> None:
        super().__init__(config, inputs)
        seen = inputs.photo_dim + (inputs.sketch_dim if config.encoder_input == "image+sketch" else 0)
        self.encoder = nn.Sequential(
            trunk(seen, config.hidden, config.dropout), nn.Linear(config.hidden, config.latent)
        )
        self.discriminator = discriminator(config.latent, config.judge)
        self.apply(keras)

    @property
    def groups(self) -> Mapping[str, Group]:
        return {
            "encoder": Group(self.encoder, self.adam()),
            "decoder": Group(nn.ModuleList([self.decoder, self.to_sketch]), self.adam()),
            "discriminator": Group(self.discriminator, self.adam()),
        }

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Reconstruction, in two phases that make one joint step; then regularisation, discriminator before encoder."""
        return (
            Phase("reconstruction", "encoder", self.encoder_terms),
            Phase("reconstruction_decoder", "decoder", self.decoder_terms),
            Phase("discriminator", "discriminator", self.discriminator_terms),
            Phase("regularisation", "encoder", self.regularisation_terms),
        )

    def code(self, batch: Batch) -> Tensor:
        """E(photo) or E(photo, sketch), (B, Z)."""
        both = self.config.encoder_input == "image+sketch"
        return cast(Tensor, self.encoder(torch.cat([batch.photo, batch.sketch], 1) if both else batch.photo))

    def shared(self, batch: Batch) -> Tensor:
        """Codes (B, Z), made before any network moved."""
        return self.code(batch)

    def encoder_terms(self, batch: Batch, code_BZ: Tensor) -> Terms:
        """Reconstruction from the codes. The decoder has not moved yet. Per sample."""
        return self.reconstruction(code_BZ, batch)

    def decoder_terms(self, batch: Batch, code_BZ: Tensor) -> Terms:
        """The same value again, from the codes as they were before the encoder moved, for the decoder's own gradient.

        The decoder has neither noise nor normalisation, so both phases are one joint step in two halves. Per sample.
        """
        return self.reconstruction(code_BZ.detach(), batch)

    def discriminator_terms(self, batch: Batch, code_BZ: Tensor) -> Terms:
        """-log D(z) for draws z of N(0, I), -log(1 - D(code)) for this batch's codes. Per sample."""
        code_BZ = code_BZ.detach()
        return {
            "real": functional.softplus(-self.discriminator(torch.randn_like(code_BZ))).mean(),
            "fake": functional.softplus(self.discriminator(code_BZ)).mean(),
        }

    def regularisation_terms(self, batch: Batch, _: Tensor) -> Terms:
        """adversarial_weight times log(1 - D(code)) or -log D(code), on codes of the encoder as it now is."""
        logit_B1 = self.discriminator(self.code(batch))
        minimax = self.config.adversarial == "minimax"
        loss = -functional.softplus(logit_B1) if minimax else functional.softplus(-logit_B1)
        return {"adversarial": self.config.adversarial_weight * loss.mean()}
