"""CAAE: which network each phase moves, what its terms are, and where the adversarial game ends."""

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from tests.models.helpers import INPUTS, batch, optimizers, step, total
from zsr.batch import Batch
from zsr.models import build
from zsr.models.caae import CAAE, discriminator
from zsr.models.protocol import Inputs, Phase

SMALL = {"latent": 6, "hidden": 8, "samples": 12, "judge": (8, 4)}


def model(**options: Any) -> CAAE:
    torch.manual_seed(0)
    return cast(CAAE, build("caae", {**SMALL, **options}, INPUTS).train())


def values(of: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in of.named_parameters()}


def changed(of: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name.split(".")[0] for name, value in of.named_parameters() if not value.equal(before[name])}


def move(trained: CAAE, phase: Phase, data: Batch, stepper: torch.optim.Optimizer) -> None:
    """One step of one phase, with only its group open."""
    for name, group in trained.groups.items():
        group.module.requires_grad_(name == phase.moves)
    stepper.zero_grad()
    torch.autograd.backward(total(phase.terms(data, trained.shared(data))))
    stepper.step()


@pytest.mark.parametrize(
    ("name", "moved"),
    [
        ("reconstruction", {"encoder"}),
        ("reconstruction_decoder", {"decoder", "to_sketch"}),
        ("discriminator", {"discriminator"}),
        ("regularisation", {"encoder"}),
    ],
)
def test_a_phase_moves_its_networks_and_nothing_else(name: str, moved: set[str]) -> None:
    trained = model()
    before = values(trained)
    phase = next(phase for phase in trained.phases if phase.name == name)
    # an optimizer over everything: what does not move has no gradient
    move(trained, phase, batch(), trained.adam().build(trained.parameters()))
    assert changed(trained, before) == moved


def test_groups_are_disjoint_and_hold_every_parameter() -> None:
    trained = model()
    grouped = [id(p) for group in trained.groups.values() for p in group.module.parameters()]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in trained.parameters()}


@pytest.mark.parametrize("encoder_input", ["image", "image+sketch"])
def test_the_two_phases_of_reconstruction_are_one_joint_step(encoder_input: str) -> None:
    def jointly() -> dict[str, Tensor]:
        trained = model(encoder_input=encoder_input)
        networks = nn.ModuleList([trained.encoder, trained.decoder, trained.to_sketch])
        stepper = trained.adam().build(networks.parameters())
        for number in range(3):
            torch.manual_seed(number)
            data = batch(seed=number)
            stepper.zero_grad()
            torch.autograd.backward(total(trained.reconstruction(trained.code(data), data)))
            stepper.step()
        return values(trained)

    def in_phases() -> dict[str, Tensor]:
        trained = model(encoder_input=encoder_input)
        steppers = optimizers(trained)
        for number in range(3):
            torch.manual_seed(number)
            data = batch(seed=number)
            trained.requires_grad_(True)
            shared = trained.shared(data)
            for phase in trained.phases[:2]:
                for name, group in trained.groups.items():
                    group.module.requires_grad_(name == phase.moves)
                steppers[phase.moves].zero_grad()
                torch.autograd.backward(total(phase.terms(data, shared)))
                steppers[phase.moves].step()
        return values(trained)

    one, two = jointly(), in_phases()
    assert all(value.equal(two[name]) for name, value in one.items())


def test_both_halves_of_reconstruction_name_one_value_in_a_step() -> None:
    trained = model()
    seen = step(trained, optimizers(trained), batch())
    assert seen["reconstruction"]["photo"].equal(seen["reconstruction_decoder"]["photo"])
    assert seen["reconstruction"]["sketch"].equal(seen["reconstruction_decoder"]["sketch"])


def test_the_adversarial_terms_are_those_of_the_objective() -> None:
    data = batch()
    for adversarial in ("minimax", "non-saturating"):
        trained = model(adversarial=adversarial, adversarial_weight=0.3, dropout=0.0)
        believed = torch.sigmoid(trained.discriminator(trained.code(data)))
        wanted = torch.log(1 - believed) if adversarial == "minimax" else -torch.log(believed)
        found = trained.regularisation_terms(data, trained.shared(data))["adversarial"]
        assert_close(found, 0.3 * wanted.mean())


def test_the_discriminator_s_terms_are_cross_entropies() -> None:
    trained, data = model(), batch()
    code = trained.shared(data)
    torch.manual_seed(3)
    terms = trained.discriminator_terms(data, code)
    torch.manual_seed(3)
    real, fake = trained.discriminator(torch.randn_like(code)), trained.discriminator(code)
    entropy = functional.binary_cross_entropy_with_logits
    assert_close(terms["real"], entropy(real, torch.ones_like(real)))
    assert_close(terms["fake"], entropy(fake, torch.zeros_like(fake)))


def test_the_encoder_sees_the_sketch_only_if_it_is_to() -> None:
    data = batch()
    other = data.map(sketch=data.sketch.flip(0))
    for encoder_input, same in (("image", True), ("image+sketch", False)):
        trained = model(encoder_input=encoder_input).eval()
        assert trained.code(data).equal(trained.code(other)) == same


def test_the_discriminator_judges_a_row_alone() -> None:
    judge, code = discriminator(6, (8, 4)), torch.randn(5, 6)
    assert_close(judge(code)[2:3], judge(code[2:3]))


def test_steps_lower_the_reconstruction() -> None:
    trained = model(hidden=32, dropout=0.0, features="standardised", sketch_weight=1.0, lr=1e-2)
    steppers = optimizers(trained)
    seen = [step(trained, steppers, batch(), seed=number)["reconstruction"] for number in range(20)]
    for term in ("photo", "sketch"):
        assert float(seen[-1][term].detach()) < float(seen[0][term].detach())


def test_regularisation_brings_a_shifted_blob_of_codes_to_the_prior() -> None:
    """Codes in the plane, without reconstruction: in the end they are N(0, I) and the discriminator cannot tell.

    The game never stands still, so codes of its last 500 rounds are taken together.
    """
    torch.manual_seed(0)
    inputs = Inputs(sketch_dim=2, photo_dim=4, semantic_dim=2, classes=("a", "b"))
    options = {"latent": 2, "hidden": 16, "samples": 2, "judge": (32, 32), "dropout": 0.0, "lr": 1e-3}
    options |= {"adversarial": "non-saturating", "adversarial_weight": 1.0}
    trained = cast(CAAE, build("caae", options, inputs).train())
    nn.init.constant_(cast(Tensor, trained.encoder[1].bias), 3.0)

    def draw(rows: int) -> Batch:
        label = torch.zeros(rows, dtype=torch.int64)
        return Batch(torch.zeros(rows, 2), torch.randn(rows, 4), label, torch.zeros(rows, 2))

    shifted = trained.code(draw(500)).detach().mean(0)
    steppers, (judging, fooling) = optimizers(trained), trained.phases[2:]
    late = []
    for number in range(1500):
        data = draw(128)
        move(trained, judging, data, steppers["discriminator"])
        move(trained, fooling, data, steppers["encoder"])
        if number >= 1000:
            late.append(trained.code(data).detach())
    code = torch.cat(late)
    right = torch.cat([trained.discriminator(code) < 0, trained.discriminator(torch.randn(code.shape)) > 0])
    assert float(shifted.min()) > 2.0
    assert float(code.mean(0).abs().max()) < 0.2
    assert float((code.T.cov() - torch.eye(2)).abs().max()) < 0.3
    assert 0.4 < float(right.float().mean()) < 0.75
