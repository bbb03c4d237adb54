"""SEM-PCYC: what each term moves, what each term is, and what a step leaves alone."""

import math
from dataclasses import fields, replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.models.helpers import INPUTS, ROWS, batch, optimizers, reached, sem_pcyc, step, total
from zsr.models import build, configure
from zsr.models.sem_pcyc import (
    PAPER,
    RELEASED,
    Autoencoder,
    Passes,
    SemPcyc,
    column_sparsity,
    discriminator,
    generator,
    least_squares,
    logistic,
    soft_label,
)

G = {"to_code.sketch", "to_code.photo"}
F = {"to_feature.sketch", "to_feature.photo"}
FROZEN = {"classifiers.semantic", "classifiers.sketch", "classifiers.photo"}


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """First part of the name of each parameter that is no longer bit-identical."""
    return {name.split(".")[0] for name, value in model.named_parameters() if not value.equal(before[name])}


# -- gradients: phases -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phase", "moved"),
    [
        ("autoencoder", {"autoencoder"}),
        ("generators", {"to_code", "to_feature"}),
        ("discriminators", {"discriminators"}),
    ],
)
def test_a_phase_alone_moves_its_group_and_nothing_else(phase: str, moved: set[str]) -> None:
    model = sem_pcyc()
    before = values(model)
    only = next(p for p in model.phases if p.name == phase)
    stepper = model.groups[only.moves].optimizer.build(model.parameters())
    data = batch()
    shared = model.shared(data)
    for name, group in model.groups.items():
        group.module.requires_grad_(name == only.moves)
    torch.autograd.backward(total(only.terms(data, shared)))
    stepper.step()
    assert changed(model, before) == moved


def test_every_parameter_of_a_group_moves_in_a_step_and_frozen_classifiers_never_do() -> None:
    model = sem_pcyc()
    steppers, before = optimizers(model), values(model)
    for number in range(10):
        step(model, steppers, batch(seed=number), seed=number)
    still = {name for name, value in model.named_parameters() if value.equal(before[name])}
    # A bias in front of batch normalisation has no gradient; only Adam, which scales rounding errors up, moves it.
    cancelled = {name for name in still if name.startswith("discriminators") and name.endswith((".1.bias", ".4.bias"))}
    assert still - cancelled == {f"{part}.weight" for part in FROZEN}


def test_groups_are_disjoint_and_leave_out_only_frozen_classifiers() -> None:
    model = sem_pcyc()
    grouped = [id(p) for group in model.groups.values() for p in group.module.parameters()]
    assert len(grouped) == len(set(grouped))
    left = {name.rsplit(".", 1)[0] for name, p in model.named_parameters() if id(p) not in grouped}
    assert left == FROZEN
    assert not any(p.requires_grad for p in model.classifiers.parameters())


def test_trained_classifiers_move_with_the_generators() -> None:
    model = sem_pcyc(classifiers="trained")
    steppers, before = optimizers(model), values(model)
    step(model, steppers, batch())
    assert "classifiers" in changed(model, before)
    assert {id(p) for p in model.classifiers.parameters()} <= {
        id(p) for p in model.groups["generators"].module.parameters()
    }


# -- gradients: terms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("term", "parts"),
    [
        ("adversarial_semantic", G),
        ("adversarial_sketch", {"to_feature.sketch"}),
        ("adversarial_photo", {"to_feature.photo"}),
        ("cycle_sketch", {"to_code.sketch", "to_feature.sketch"}),
        ("cycle_photo", {"to_code.photo", "to_feature.photo"}),
        ("cycle_semantic", G | F),
        ("classification_semantic", G),
        ("classification_sketch", {"to_feature.sketch"}),
        ("classification_photo", {"to_feature.photo"}),
        ("regression_semantic", G),
        ("regression_sketch", {"to_feature.sketch"}),
        ("regression_photo", {"to_feature.photo"}),
    ],
)
def test_a_generator_term_reaches_only_the_generators_in_its_equation(term: str, parts: set[str]) -> None:
    model = sem_pcyc()
    model.discriminators.requires_grad_(False)
    model.classifiers.requires_grad_(False)
    data = batch()
    loss = model.generator_terms(data, model.shared(data))[term]
    assert reached(model, loss) == parts


@pytest.mark.parametrize("space", ["semantic", "sketch", "photo"])
def test_a_discriminator_term_reaches_its_discriminator_only(space: str) -> None:
    model = sem_pcyc()
    data = batch()
    assert reached(model, model.discriminator_terms(data, model.shared(data))[space]) == {f"discriminators.{space}"}


def test_autoencoder_terms_reach_the_encoder_and_only_reconstruction_the_decoder() -> None:
    model = sem_pcyc()
    data = batch()
    shared = model.shared(data)
    terms = model.autoencoder_terms(data, shared)
    assert reached(model, terms["sparsity"]) == {"autoencoder.encoder"}
    assert reached(model, terms["reconstruction"]) == {"autoencoder.encoder", "autoencoder.decoder"}


def test_attached_fakes_with_their_stray_gradients_dropped_make_the_same_discriminators() -> None:
    def discriminators(attached: bool) -> dict[str, Tensor]:
        model = sem_pcyc()
        data = batch()
        shared = model.shared(data)
        if not attached:
            shared = replace(shared, **{field.name: getattr(shared, field.name).detach() for field in fields(shared)})
        torch.manual_seed(3)
        d = model.discriminators
        terms = [
            0.25 * 2 * least_squares(d["semantic"](shared.code_BM), True)
            + 0.25 * least_squares(d["semantic"](shared.photo_code_BM), False)
            + 0.25 * least_squares(d["semantic"](shared.sketch_code_BM), False),
            0.5 * least_squares(d["sketch"](shared.sketch_BX), True),
            0.5 * least_squares(d["photo"](shared.photo_BY), True),
            0.5 * least_squares(d["sketch"](shared.fake_sketch_BX), False),
            0.5 * least_squares(d["photo"](shared.fake_photo_BY), False),
        ]
        stepper = model.groups["discriminators"].optimizer.build(d.parameters())
        torch.autograd.backward(torch.stack(terms).sum())
        stepper.step()
        return values(d)

    def ours() -> dict[str, Tensor]:
        model = sem_pcyc()
        data = batch()
        shared = model.shared(data)
        torch.manual_seed(3)
        terms = model.discriminator_terms(data, shared)
        stepper = model.groups["discriminators"].optimizer.build(model.discriminators.parameters())
        torch.autograd.backward(total(terms))
        stepper.step()
        return values(model.discriminators)

    attached, detached, mine = discriminators(True), discriminators(False), ours()
    for name, value in attached.items():
        assert value.equal(detached[name])
        assert_close(mine[name], value)


# -- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("real", "low", "high"), [(True, 0.7, 1.0), (False, 0.0, 0.3)])
def test_soft_labels_fill_their_range_and_are_drawn_anew(real: bool, low: float, high: float) -> None:
    torch.manual_seed(0)
    first, second = soft_label(torch.zeros(4000, 1), real), soft_label(torch.zeros(4000, 1), real)
    assert low <= float(first.min()) < low + 0.01
    assert high - 0.01 < float(first.max()) <= high
    assert not first.equal(second)


def test_least_squares_on_a_perfect_logit_is_the_variance_of_its_labels() -> None:
    torch.manual_seed(0)
    assert_close(least_squares(torch.full((200_000, 1), 0.85), True), torch.tensor(0.09 / 12), atol=1e-4, rtol=0)


def test_logistic_is_minus_the_log_likelihood() -> None:
    logit = torch.tensor([[0.5], [-2.0]])
    assert_close(logistic(logit, True), -logit.sigmoid().log().mean())
    assert_close(logistic(logit, False), -(1 - logit.sigmoid()).log().mean())


def test_column_sparsity_sums_the_norms_of_columns_over_the_batch() -> None:
    weight = torch.tensor([[3.0, 0.0, 1.0], [4.0, 0.0, 0.0]])
    assert float(column_sparsity(weight, 2)) == pytest.approx((5 + 0 + 1) / 2)


def test_a_high_sparsity_weight_shrinks_noise_columns_below_informative_ones() -> None:
    torch.manual_seed(0)
    centres = torch.rand(6, 7) * 3
    model = sem_pcyc(l21_weight=1.0, autoencoder_lr=3e-2)
    steppers = optimizers(model)
    for number in range(200):
        data = batch(rows=32, seed=number)
        word = centres[data.label]
        word[:, 4:] = 0.3 * torch.randn(32, 3)
        step(model, steppers, data.map(word=word), seed=number)
    norm = model.autoencoder.encoder.weight.norm(dim=0)
    assert norm[4:].max().item() < norm[:4].min().item()


def exact(sketch: Tensor, code: Tensor) -> Passes:
    """Passes whose generators are perfect inverses of each other and perfect everywhere."""
    return Passes(sketch, sketch, code, code, code, sketch, sketch, sketch, sketch, code, code)


def test_cycle_and_regression_vanish_for_exact_inverses() -> None:
    model = sem_pcyc()
    passes = exact(torch.randn(4, 10), torch.randn(4, 6))
    assert all(float(term) == 0 for term in model.cycle(passes).values())
    assert all(float(term) == 0 for term in model.regression(passes).values())


def test_cycle_is_ten_times_the_mean_absolute_error_of_each_side() -> None:
    model = sem_pcyc()
    sketch, code = torch.randn(4, 10), torch.randn(4, 6)
    passes = replace(exact(sketch, code), sketch_cycle_BX=sketch + 2.0, code_cycle_photo_BM=code - 0.5)
    terms = model.cycle(passes)
    assert_close(terms["sketch"], torch.tensor(20.0))
    assert_close(terms["semantic"], torch.tensor(5.0))
    assert float(terms["photo"]) == 0


def test_regression_counts_the_distance_of_the_two_codes_twice() -> None:
    model = sem_pcyc()
    sketch, code = torch.randn(4, 10), torch.randn(4, 6)
    passes = replace(exact(sketch, code), photo_code_BM=code + 0.5, fake_sketch_BX=sketch - 2.0)
    terms = model.regression(passes)
    assert_close(terms["semantic"], torch.tensor(10 * 2 * 0.25))
    assert_close(terms["sketch"], torch.tensor(40.0))


def test_classification_is_ten_times_the_cross_entropy_and_counts_both_codes() -> None:
    model = sem_pcyc()
    sketch, code, label = torch.randn(4, 10), torch.randn(4, 6), torch.tensor([0, 5, 2, 2])
    passes = replace(exact(sketch, code), fake_photo_BY=torch.randn(4, 14))
    terms = model.classification(passes, label)
    for space, count, values in (("semantic", 2, code), ("sketch", 1, sketch), ("photo", 1, passes.fake_photo_BY)):
        log_p = (values @ model.classifiers.get_parameter(f"{space}.weight").T).log_softmax(1)
        assert_close(terms[space], -10 * count * log_p[torch.arange(4), label].mean())


def test_generators_want_their_fakes_judged_real_and_both_codes_count() -> None:
    model = sem_pcyc(gan="logistic").eval()
    sketch, code = torch.randn(4, 10), torch.randn(4, 6)
    passes = replace(exact(sketch, code), fake_photo_BY=torch.randn(4, 14))
    terms = model.adversarial(passes)
    for space, count, values in (("semantic", 2, code), ("sketch", 1, sketch), ("photo", 1, passes.fake_photo_BY)):
        assert_close(terms[space], -count * model.discriminators[space](values).sigmoid().log().mean())


def test_generator_terms_carry_their_family_weights() -> None:
    weights = {"adversarial_weight": 2.0, "cycle_weight": 3.0, "classification_weight": 0.5, "regression_weight": 0.0}
    ones = dict.fromkeys(weights, 1.0)
    data = batch()

    def terms(chosen: dict[str, Any]) -> dict[str, Tensor]:
        model = sem_pcyc(**chosen)
        shared = model.shared(data)
        torch.manual_seed(1)
        return model.generator_terms(data, shared)

    plain, weighted = terms(ones), terms(weights)
    for name, value in weighted.items():
        assert_close(value, weights[f"{name.split('_')[0]}_weight"] * plain[name])


def test_discriminators_fall_to_the_floor_of_the_label_noise_and_not_below() -> None:
    # Weights 0.25 * 4 + 0.5 * 2 + 0.5 * 2 = 3, each times Var U(0, 0.3) = 0.0075. In evaluation mode there is no noise,
    # and batch normalisation, which sees real and fake apart, does not take away the shift that separates them.
    model = sem_pcyc()
    data = batch(rows=128)
    shared = model.shared(data)
    model.discriminators.eval()
    apart = {"photo_code_BM": 6.0, "sketch_code_BM": 6.0, "fake_sketch_BX": 6.0, "fake_photo_BY": 6.0}
    shared = replace(shared, **{name: getattr(shared, name).detach() + shift for name, shift in apart.items()})
    stepper = torch.optim.Adam(model.discriminators.parameters(), lr=1e-2)
    seen = []
    for _ in range(300):
        loss = total(model.discriminator_terms(data, shared))
        stepper.zero_grad()
        torch.autograd.backward(loss)
        stepper.step()
        seen.append(loss.item())
    assert 0.021 < sum(seen[-50:]) / 50 < 0.03


# -- parts -----------------------------------------------------------------------------------------------------------


def test_networks_have_the_released_widths() -> None:
    model = sem_pcyc()
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters() if value.ndim == 2}
    assert shapes["to_code.photo.0.weight"] == ((14 + 6) // 2, 14)
    assert shapes["to_code.photo.8.weight"] == (6, (14 + 6) // 2)
    assert shapes["to_feature.sketch.8.weight"] == (10, (10 + 6) // 2)
    assert shapes["discriminators.photo.1.weight"] == (14 // 2, 14)
    assert shapes["classifiers.semantic.weight"] == (6, 6)
    assert "classifiers.semantic.bias" not in dict(model.named_parameters())


def test_the_presets_have_the_numbers_of_code_and_paper_and_train() -> None:
    assert (RELEASED.dim, RELEASED.generator_lr, RELEASED.metric, RELEASED.regression_weight) == (64, 1e-4, "l2", 0.1)
    changed = {name for name, value in PAPER.model_dump().items() if value != getattr(RELEASED, name)}
    assert changed == {"gan", "regression_weight", "generator_betas"}
    model = cast(SemPcyc, build("sem-pcyc", configure("sem-pcyc", {}, "paper").model_dump(), INPUTS).train())
    terms = step(model, optimizers(model), batch())["generators"]
    assert all(bool(value.isfinite()) for value in terms.values())
    assert float(terms["regression_semantic"].detach()) == 0
    assert float(terms["adversarial_semantic"].detach()) == pytest.approx(2 * math.log(2), abs=0.5)


def test_published_sizes() -> None:
    """512-d features and 64-d codes: G and F of 288 hidden units, discriminators of half their inputs."""

    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    with torch.device("meta"):
        layers = (512 + 1) * 288 + 2 * 288 + (288 + 1) * 288 + 2 * 288
        assert count(generator(512, 64, 0.5)) == layers + (288 + 1) * 64
        assert count(discriminator(512, 0.3)) == (512 + 1) * 256 + 512 + (256 + 1) * 256 + 512 + 257
        assert count(Autoencoder(654, 64, "relu")) == (654 + 1) * 64 + (64 + 1) * 654


def test_discriminators_are_noisy_in_training_only_and_have_no_bound() -> None:
    model = sem_pcyc()
    judge = model.discriminators["photo"].requires_grad_(False).eval()
    photo = torch.randn(8, INPUTS.photo_dim)
    assert judge(photo).equal(judge(photo))
    assert float(judge(1e4 * photo).abs().max()) > 1
    judge.train()
    assert not judge(photo).equal(judge(photo))


def test_unit_words_make_codes_blind_to_the_length_of_class_vectors() -> None:
    data = batch()
    longer = data.map(word=3 * data.word)
    for words, same in (("unit", True), ("given", False)):
        model = sem_pcyc(words=words)
        assert model.shared(data).code_BM.allclose(model.shared(longer).code_BM) is same


def test_only_a_linear_decoder_reaches_negative_entries() -> None:
    code = torch.randn(64, 6)
    assert sem_pcyc(decoder="relu").autoencoder.decode(code).min().item() == 0
    assert sem_pcyc(decoder="linear").autoencoder.decode(code).min().item() < 0


def test_feature_dropout_is_drawn_once_and_used_as_the_cycles_target() -> None:
    model = sem_pcyc(feature_dropout=0.5)
    data = batch()
    shared = model.shared(data)
    assert 0.2 < float((shared.sketch_BX == 0).float().mean()) < 0.8
    kept = shared.sketch_BX != 0
    assert_close(shared.sketch_BX[kept], 2 * data.sketch[kept])
    assert model.eval().shared(data).sketch_BX.equal(data.sketch)


# -- behaviour -------------------------------------------------------------------------------------------------------


def test_an_embedding_does_not_depend_on_its_batch_mates() -> None:
    model = sem_pcyc()
    steppers = optimizers(model)
    for number in range(3):
        step(model, steppers, batch(seed=number), seed=number)
    photo = batch(seed=9).photo
    whole = model.encode("photo", photo)
    assert whole.shape == (ROWS, 1, 6)
    assert_close(whole[:1], model.encode("photo", photo[:1]))


def test_twenty_steps_lower_the_reconstruction() -> None:
    model = sem_pcyc(autoencoder_lr=0.1)
    steppers = optimizers(model)
    seen = [step(model, steppers, batch(), seed=n)["autoencoder"]["reconstruction"].item() for n in range(20)]
    assert seen[-1] < 0.7 * seen[0]


@pytest.mark.parametrize("options", [{}, {"gan": "logistic", "classifiers": "trained", "words": "unit"}])
def test_sixty_steps_lower_the_generators_loss(options: dict[str, Any]) -> None:
    model = sem_pcyc(generator_lr=1e-2, dropout=0.0, **options)
    steppers = optimizers(model)
    seen = [total(step(model, steppers, batch(rows=64, seed=n), seed=n)["generators"]).item() for n in range(60)]
    assert sum(seen[-10:]) < 0.8 * sum(seen[:10])
