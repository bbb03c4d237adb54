"""CAAE: a conditional adversarial autoencoder that generates photo features from a sketch.

S. K. Yelamarthi, S. K. Reddy, A. Mishra, A. Mittal, "A Zero-Shot Framework for Sketch-based Image Retrieval",
ECCV 2018 (arXiv:1807.11724), the same paper as CVAE.

Decoder, sketch reconstruction and retrieval are those of CVAE, but the encoder is deterministic, and instead of a
Kullback-Leibler loss a discriminator compares the codes of a batch with samples of the prior N(0, I).

Its code was never released, so this is a reconstruction. The objective is as others quote the paper; the
discriminator, the weight of the adversarial loss, the optimizers and the order of the steps were chosen in this
project. The parts shared with CVAE are as there: by default with this project's sizes and feature scaling, in the
preset "paper" with those released for CVAE.

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
    """Options of CAAE: those shared with CVAE, and those of the adversarial part.

    Attributes:
        encoder_input: input of the encoder: the photo ("image", as in the paper), or photo and sketch as in CVAE.
        adversarial: minimax: the encoder minimizes log(1 - D(code)) (as in the paper); non-saturating: it minimizes
            -log D(code), whose gradient does not vanish when the discriminator is confident.
        adversarial_weight: weight of that loss. The same Adam takes both of the encoder's steps, so it matters.
        judge: hidden widths of the discriminator.
    """

    encoder_input: Literal["image", "image+sketch"] = "image"
    adversarial: Literal["minimax", "non-saturating"] = "minimax"
    adversarial_weight: NonNegativeFloat = 0.1
    judge: tuple[PositiveInt, ...] = (512, 256)


# the objective as in the paper, with the sizes and features released for CVAE
PAPER: Final = Config(**RELEASED_OPTIONS)
# recommended: the encoder of CVAE, and an adversarial loss with a gradient from the start
OURS: Final = Config(encoder_input="image+sketch", adversarial="non-saturating")
PRESETS: Final[Mapping[str, Config]] = {"paper": PAPER, "ours": OURS}
SMALL: Final = {"latent": 4, "hidden": 8, "samples": 6, "judge": (8, 4)}


def discriminator(latent: int, hidden: tuple[int, ...]) -> nn.Sequential:
    """Codes (B, Z) -> logits (B, 1) for "sample of the prior". No batch norm, so that rows are independent."""
    widths = [latent, *hidden]
    layers = [layer for i, o in pairwise(widths) for layer in (nn.Linear(i, o), nn.LeakyReLU(0.2))]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 1))


class CAAE(SketchToPhoto):
    """CAAE on extracted features.

    All losses are means over the batch, and batch norm is synchronized over ranks: except for the prior's samples and
    dropout, which each rank samples itself, 2 ranks with B rows each are equivalent to 1 rank with 2B rows.
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
        """Reconstruction, in two phases that form one joint step; then regularization, discriminator before encoder."""
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
        """Codes (B, Z), computed before any network is updated."""
        return self.code(batch)

    def encoder_terms(self, batch: Batch, code_BZ: Tensor) -> Terms:
        """Reconstruction from the codes, before the decoder is updated. Per sample."""
        return self.reconstruction(code_BZ, batch)

    def decoder_terms(self, batch: Batch, code_BZ: Tensor) -> Terms:
        """The same loss, from the codes before the encoder was updated, for the decoder's gradient.

        The decoder has neither noise nor normalization, so the two phases are equivalent to one joint step. Per sample.
        """
        return self.reconstruction(code_BZ.detach(), batch)

    def discriminator_terms(self, batch: Batch, code_BZ: Tensor) -> Terms:
        """-log D(z) for samples z of N(0, I), -log(1 - D(code)) for this batch's codes. Per sample."""
        code_BZ = code_BZ.detach()
        return {
            "real": functional.softplus(-self.discriminator(torch.randn_like(code_BZ))).mean(),
            "fake": functional.softplus(self.discriminator(code_BZ)).mean(),
        }

    def regularisation_terms(self, batch: Batch, _: Tensor) -> Terms:
        """adversarial_weight times log(1 - D(code)) or -log D(code), on codes of the updated encoder."""
        logit_B1 = self.discriminator(self.code(batch))
        minimax = self.config.adversarial == "minimax"
        loss = -functional.softplus(logit_B1) if minimax else functional.softplus(-logit_B1)
        return {"adversarial": self.config.adversarial_weight * loss.mean()}
