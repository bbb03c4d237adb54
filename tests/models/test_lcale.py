"""LCALE: its worked examples, its warm-ups, what each term reaches, and that it learns. And the terms in losses.py."""

import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.models.helpers import INPUTS, batch, optimizers, reached, step, total
from zsr.batch import Batch
from zsr.models import build, configure
from zsr.models.lcale import PAPER, Latent, Lcale, rebuilt, released_draw, wasserstein
from zsr.models.losses import gaussian_kl, mmd, reparameterise, squared_distances, warm_up
from zsr.models.protocol import Inputs

SPACES = ("photo", "sketch", "word")
ENCODERS = {f"encoders.{s}" for s in SPACES}
DECODERS = {f"decoders.{s}" for s in SPACES}
SMALL = {"dim": 5, "photo_hidden": (24, 24), "sketch_hidden": (24, 24), "word_hidden": (24, 24)}
LATE = 100  # every warm-up is over


def lcale(seed: int = 0, **options: Any) -> Lcale:
    """An LCALE of 5-d latents in training mode."""
    torch.manual_seed(seed)
    return cast(Lcale, build("lcale", {**SMALL, **options}, INPUTS).train())


def latent(mean: Tensor, log_var: Tensor) -> Latent:
    return Latent(mean, log_var, mean)


def terms(model: Lcale, data: Batch, seed: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return model.terms(data, None)


# -- 2-Wasserstein ---------------------------------------------------------------------------------------------------


def test_wasserstein_of_equal_gaussians_is_zero_with_a_finite_gradient() -> None:
    mean, log_var = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    distance = wasserstein(latent(mean, log_var), latent(mean, log_var))
    assert float(distance.detach()) == pytest.approx(1e-6)
    torch.autograd.backward(distance)
    assert mean.grad is not None
    assert log_var.grad is not None
    assert bool(torch.isfinite(mean.grad).all())
    assert bool(torch.isfinite(log_var.grad).all())


def test_wasserstein_of_diagonal_gaussians_is_the_matrix_form() -> None:
    torch.manual_seed(0)
    left, right = (latent(torch.randn(1, 5).double(), torch.randn(1, 5).double()) for _ in range(2))
    one, two = (torch.diag(g.log_var_BZ[0].exp()) for g in (left, right))
    root = torch.diag(one.diag().sqrt())
    eigenvalues = torch.linalg.eigvalsh(root @ two @ root)
    squared = (left.mean_BZ - right.mean_BZ).square().sum() + (one + two).trace() - 2 * eigenvalues.sqrt().sum()
    assert_close(wasserstein(left, right), squared.sqrt(), atol=1e-9, rtol=0)
    assert_close(wasserstein(left, right), wasserstein(right, left))


def test_wasserstein_to_a_shifted_gaussian_is_the_shift_and_obeys_the_triangle() -> None:
    shift, zero = torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)
    assert_close(wasserstein(latent(zero, zero), latent(shift, zero)), torch.tensor(5.0))
    torch.manual_seed(0)
    for _ in range(20):
        a, b, c = (latent(torch.randn(1, 3), torch.randn(1, 3)) for _ in range(3))
        assert float(wasserstein(a, c)) <= float(wasserstein(a, b) + wasserstein(b, c)) + 1e-6


# -- Kullback-Leibler, draws -----------------------------------------------------------------------------------------


def test_divergence_is_zero_for_the_prior_alone_and_summed_over_dimensions() -> None:
    zero = torch.zeros(3, 4)
    assert float(gaussian_kl(zero, zero)) == 0
    assert_close(gaussian_kl(zero + 1, zero), torch.tensor(2.0))
    assert_close(gaussian_kl(torch.tensor([[0.5, -1.0]]), torch.tensor([[0.2, -0.3]])), torch.tensor(0.656110))


def test_divergence_is_that_of_many_draws() -> None:
    torch.manual_seed(0)
    mean, log_var = torch.randn(1, 4), torch.randn(1, 4)
    normal = torch.distributions.Normal(mean, torch.exp(0.5 * log_var))
    draws = reparameterise(mean.expand(200_000, 4), log_var.expand(200_000, 4))
    prior = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    ratio = normal.log_prob(draws) - prior.log_prob(draws)  # type: ignore[no-untyped-call]
    assert_close(gaussian_kl(mean, log_var), ratio.sum(1).mean(), rtol=0.01, atol=0)


def test_draws_have_the_moments_they_are_told_and_independent_entries() -> None:
    torch.manual_seed(0)
    mean, log_var = torch.tensor([1.0, -2.0]), torch.tensor([0.5, -1.0])
    draws = reparameterise(mean.expand(100_000, 2), log_var.expand(100_000, 2))
    assert_close(draws.mean(0), mean, atol=0.02, rtol=0)
    assert_close(draws.var(0), log_var.exp(), atol=0.02, rtol=0)
    assert abs(float(torch.corrcoef(draws.T)[0, 1])) < 0.02


def test_the_released_draw_squares_the_deviation_and_ties_the_entries_of_a_row() -> None:
    torch.manual_seed(0)
    log_var = torch.tensor([0.5, -1.0])
    draws = released_draw(torch.zeros(100_000, 2), log_var.expand(100_000, 2))
    assert_close(draws.std(0), log_var.exp(), atol=0.02, rtol=0)
    assert float(torch.corrcoef(draws.T)[0, 1]) == pytest.approx(1)


@pytest.mark.parametrize(("noise", "tied"), [("corrected", False), ("released", True)])
def test_the_option_noise_chooses_the_draw(noise: str, tied: bool) -> None:
    drawn = lcale(noise=noise).latent("photo", batch().photo)
    deviation = torch.exp((1.0 if tied else 0.5) * drawn.log_var_BZ)
    unit = (drawn.draw_BZ - drawn.mean_BZ) / deviation
    assert unit.allclose(unit[:, :1].expand_as(unit), atol=1e-4) is tied


def test_without_noise_a_draw_is_the_mean() -> None:
    drawn = lcale(noise="none").latent("photo", batch().photo)
    assert drawn.draw_BZ.equal(drawn.mean_BZ)


# -- maximum mean discrepancy ----------------------------------------------------------------------------------------


def test_distances_are_never_negative_and_zero_between_equal_rows() -> None:
    torch.manual_seed(0)
    rows = 100 + torch.rand(30, 7)
    distance = squared_distances(rows, rows)
    assert float(distance.min()) == 0
    assert not bool(distance.diagonal().any())
    assert_close(distance, (rows[:, None] - rows[None]).square().sum(2))


def test_discrepancy_of_equal_samples_is_zero_with_a_finite_gradient() -> None:
    rows = torch.randn(20, 8, requires_grad=True)
    value = mmd(rows, rows)
    torch.autograd.backward(value)
    assert rows.grad is not None
    assert float(value.detach()) == pytest.approx(0, abs=1e-5)
    assert float(rows.grad.abs().max()) < 1e-5


def test_discrepancy_of_independent_samples_is_that_of_the_pairs_of_a_row_with_itself() -> None:
    # E = 2/n (1 - E k) with E k = (s / (s + 2))^(d / 2): .0185 for n = 64, d = 8, s = 8
    torch.manual_seed(0)
    biased = torch.stack([mmd(torch.randn(64, 8), torch.randn(64, 8), (8.0,)) for _ in range(200)])
    assert_close(biased.mean(), torch.tensor(2 / 64 * (1 - (8 / 10) ** 4)), atol=1.5e-3, rtol=0)
    unbiased = []
    for _ in range(200):
        left, right = torch.randn(64, 8), torch.randn(64, 8)
        own = (torch.exp(-squared_distances(x, x) / 16).fill_diagonal_(0).sum() / (64 * 63) for x in (left, right))
        unbiased.append(torch.stack(list(own)).sum() - 2 * torch.exp(-squared_distances(left, right) / 16).mean())
    assert abs(float(torch.stack(unbiased).mean())) < 1.5e-3


def test_discrepancy_of_a_shift_is_the_closed_form() -> None:
    # 2 (s / (s + 2))^(d/2) (1 - exp(-|shift|^2 / (2 (s + 2)))) = .2701, and .2719 of a sample in the specification
    torch.manual_seed(0)
    closed = 2 * (8 / 10) ** 4 * (1 - math.exp(-8 / 20))
    assert closed == pytest.approx(0.2701, abs=5e-5)
    value = mmd(torch.randn(2000, 8), torch.randn(2000, 8) + 1, (8.0,))
    assert float(value) == pytest.approx(closed, abs=0.02)


def test_discrepancy_sums_its_kernels_and_keeps_its_floor() -> None:
    left, right = torch.randn(5, 3), torch.randn(6, 3)
    assert_close(mmd(left, right, (1.0, 5.0)), mmd(left, right, (1.0,)) + mmd(left, right, (5.0,)))
    assert float(mmd(left, left, floor=1e-4)) == pytest.approx(1e-4)


# -- warm-ups --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("term", "epoch", "weight"),
    [
        ("divergence", 0, 0.0),
        ("divergence", 93, 0.25),
        ("cross", 21, 0.0),
        ("cross", 48, 1.185),
        ("cross", 75, 2.37),
        ("class_cycle", 48, 1.185),
        ("modality_cycle", 99, 2.37),
        ("wasserstein", 6, 0.0),
        ("wasserstein", 14, 4.065),
        ("wasserstein", 22, 8.13),
        ("wasserstein", 50, 8.13),
    ],
)
def test_warm_ups_follow_their_table(term: str, epoch: int, weight: float) -> None:
    schedule = {name: getattr(PAPER, name) for name in ("beta_epochs", "gamma_epochs", "delta_epochs")}
    model = lcale(**schedule)
    ones = lcale(beta=1.0, gamma=1.0, delta=1.0)
    plain = terms(ones, batch().map(epoch=LATE))[term]
    assert_close(terms(model, batch().map(epoch=epoch))[term], weight * plain)


def test_the_discrepancy_has_a_warm_up_where_one_is_asked_for() -> None:
    data = batch().map(epoch=14)
    whole, half = terms(lcale(), data), terms(lcale(mmd_epochs=[6, 22]), data)
    assert_close(half["discrepancy"], 0.5 * whole["discrepancy"])


def test_a_warm_up_without_length_is_a_switch() -> None:
    assert [warm_up(epoch, 2, 2) for epoch in (0, 1, 2, 3)] == [0, 0, 1, 1]


# -- terms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("term", "parts"),
    [
        ("reconstruction", ENCODERS | DECODERS),
        ("divergence", ENCODERS),
        ("cross", ENCODERS | DECODERS),
        ("class_cycle", ENCODERS | DECODERS),
        ("modality_cycle", {"encoders.photo", "encoders.sketch", "decoders.photo", "decoders.sketch"}),
        ("wasserstein", ENCODERS),
        ("discrepancy", {"encoders.photo", "encoders.sketch"}),
    ],
)
def test_a_term_reaches_only_the_networks_in_its_equation(term: str, parts: set[str]) -> None:
    model = lcale()
    assert reached(model, terms(model, batch().map(epoch=LATE))[term]) == parts


def test_a_single_cross_pair_reaches_its_encoder_and_its_decoder() -> None:
    model = lcale(cross=[["sketch", "word"]])
    assert reached(model, terms(model, batch().map(epoch=LATE))["cross"]) == {"encoders.sketch", "decoders.word"}


@pytest.mark.parametrize(("kind", "value"), [("l1", 9.0), ("l2", 27.0)])
def test_reconstruction_is_summed_over_dimensions_and_averaged_over_rows(kind: str, value: float) -> None:
    assert_close(rebuilt(torch.zeros(4, 3), torch.full((4, 3), 3.0), kind), torch.tensor(value))


def test_cross_reconstruction_is_the_sum_over_its_pairs() -> None:
    pairs = [["photo", "word"], ["word", "sketch"]]
    together = terms(lcale(cross=pairs), batch().map(epoch=LATE))["cross"]
    apart = [terms(lcale(cross=[pair]), batch().map(epoch=LATE))["cross"] for pair in pairs]
    assert_close(together, apart[0] + apart[1])


def test_the_class_cycle_goes_out_with_noise_and_comes_back_by_means() -> None:
    model = lcale()
    x = model.targets(batch())
    latents = {space: model.latent(cast(Any, space), values) for space, values in x.items()}
    draw = latents["word"].draw_BZ
    back = [model.decoders["word"](model.encoders[m](model.decoders[m](draw))[0]) for m in ("photo", "sketch")]
    expected = torch.stack([(made - x["word"]).abs().sum(1).mean() for made in back]).sum()
    assert_close(model.class_cycle(x, model.decoded(latents)), expected)


def test_weights_scale_their_terms() -> None:
    weights = {"cross": "cross_weight", "class_cycle": "class_cycle_weight", "modality_cycle": "modality_cycle_weight"}
    weights |= {"discrepancy": "mmd_weight", "divergence": "beta", "wasserstein": "delta"}
    data = batch().map(epoch=LATE)

    def weighted(weight: float) -> dict[str, Tensor]:
        options: dict[str, Any] = dict.fromkeys(weights.values(), weight)
        return terms(lcale(**options), data)

    ones, twos = weighted(1.0), weighted(2.0)
    for term in weights:
        assert_close(twos[term], 2 * ones[term])
    assert_close(twos["reconstruction"], ones["reconstruction"])


def test_class_vectors_are_taken_as_given_at_unit_length_or_scaled_by_the_trained_classes() -> None:
    data = batch()
    given, unit, standard, scaled = (lcale(words=kind) for kind in ("given", "unit", "standard", "minmax"))
    for model in (standard, scaled):
        model.begin(data.word)
    assert given.targets(data)["word"].equal(data.word)
    assert_close(unit.targets(data)["word"].norm(dim=1), torch.ones(len(data)))
    centred = data.word - data.word.mean(0)
    assert_close(standard.targets(data)["word"], centred / centred.square().mean().sqrt())
    word = scaled.targets(data)["word"]
    assert_close(word.amin(0), torch.zeros(word.shape[1]))
    assert_close(word.amax(0), torch.ones(word.shape[1]), atol=0.01, rtol=0)


def test_a_summed_batch_is_its_mean_times_its_rows_but_for_the_discrepancy() -> None:
    data = batch().map(epoch=LATE)
    mean, summed = terms(lcale(), data), terms(lcale(reduction="sum"), data)
    for name, value in mean.items():
        assert_close(summed[name], value if name == "discrepancy" else len(data) * value)


def test_the_discrepancy_of_means_has_no_noise() -> None:
    model, data = lcale(mmd_on="means"), batch()
    assert terms(model, data, seed=1)["discrepancy"].equal(terms(model, data, seed=2)["discrepancy"])
    model = lcale()
    assert not terms(model, data, seed=1)["discrepancy"].equal(terms(model, data, seed=2)["discrepancy"])


def test_networks_start_as_cada_vae_does() -> None:
    model = lcale()
    assert not any(bool(p.any()) for name, p in model.named_parameters() if name.endswith("bias"))
    weight = model.decoders.get_parameter("photo.2.weight")
    bound = 0.5 * math.sqrt(6 / sum(weight.shape))
    assert 0.9 * bound < float(weight.detach().abs().max()) <= bound


def test_networks_have_the_widths_of_cada_vae() -> None:
    wide = Inputs(sketch_dim=300, photo_dim=4096, semantic_dim=300, classes=INPUTS.classes)
    with torch.device("meta"):
        model = build("lcale", configure("lcale", {}, "paper").model_dump(), wide)
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters() if value.ndim == 2}
    hidden = {"photo": (4096, 1560, 1660), "sketch": (300, 1450, 665), "word": (300, 1450, 665)}
    assert shapes == {
        f"{name}.weight": shape
        for space, (width, encoder, decoder) in hidden.items()
        for name, shape in (
            (f"encoders.{space}.hidden", (encoder, width)),
            (f"encoders.{space}.mean", (64, encoder)),
            (f"encoders.{space}.log_var", (64, encoder)),
            (f"decoders.{space}.0", (decoder, 64)),
            (f"decoders.{space}.2", (width, decoder)),
        )
    }


# -- behaviour -------------------------------------------------------------------------------------------------------


def test_an_embedding_is_the_mean_of_the_latent() -> None:
    model, photo = lcale(), batch().photo
    mean, _ = model.encoders["photo"](photo)
    assert_close(model.encode("photo", photo)[:, 0], mean.detach())


@pytest.mark.parametrize("options", [{}, {"reconstruction": "l2", "noise": "released", "words": "unit"}])
def test_training_lowers_reconstruction_and_distance_to_the_class(options: dict[str, Any]) -> None:
    model = lcale(lr=1e-2, **options)
    steppers = optimizers(model)
    seen = [step(model, steppers, batch(rows=64).map(epoch=LATE), n)["autoencoders"] for n in range(40)]
    for name in ("reconstruction", "cross", "wasserstein"):
        assert seen[-1][name].item() < 0.8 * seen[0][name].item()
    assert total(seen[-1]).item() < 0.8 * total(seen[0]).item()


def test_without_alignment_the_modalities_stay_further_apart() -> None:
    def gap(**options: Any) -> float:
        model = lcale(lr=1e-2, **options)
        steppers = optimizers(model)
        for number in range(30):
            step(model, steppers, batch(rows=64, seed=number).map(epoch=LATE), number)
        held = batch(rows=64, seed=999)
        photo, sketch = model.encode("photo", held.photo), model.encode("sketch", held.sketch)
        return float(torch.nn.functional.cosine_similarity(photo, sketch, dim=-1).mean())

    assert gap() > gap(delta=0.0, gamma=0.0, mmd_weight=0.0) + 0.2
