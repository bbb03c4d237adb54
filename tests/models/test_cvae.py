"""CVAE: its divergence, what each term is and moves, and retrieval by imagined photos."""

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.models.helpers import INPUTS, batch, optimizers, reached, step
from zsr.batch import Batch
from zsr.errors import ConfigError
from zsr.models import build, configure, cvae
from zsr.models.cvae import CVAE, Decoder, Encoder, Gaussian, centres, divergence, released_draw, squared_error
from zsr.models.losses import reparameterise

SMALL = {"latent": 6, "hidden": 8, "samples": 12}
# the published terms and scale of the features, in a small network
PUBLISHED = {**SMALL, "features": "raw", "sketch_weight": 10.0, "lr": 2e-4}
SKETCH = torch.randn(9, INPUTS.sketch_dim, generator=torch.Generator().manual_seed(1))


def model(**options: Any) -> CVAE:
    torch.manual_seed(0)
    return cast(CVAE, build("cvae", {**PUBLISHED, **options}, INPUTS).train())


def pairs(rows: int = 16, seed: int = 0) -> Batch:
    """Pairs of non-negative features, as after a ReLU."""
    data = batch(rows, seed)
    return data.map(sketch=data.sketch.relu(), photo=data.photo.relu())


def parts(of: nn.Module, term: Tensor) -> set[str]:
    return {name.split(".")[0] for name in reached(cast(CVAE, of), term)}


# -- divergence ------------------------------------------------------------------------------------------------------


def test_the_divergence_is_that_of_a_sample() -> None:
    torch.manual_seed(0)
    q, p = (Gaussian(torch.randn(1, 4), torch.randn(1, 4).tanh()) for _ in range(2))
    for prior in (p, Gaussian(torch.zeros(1, 4), torch.zeros(1, 4))):
        z = reparameterise(*(value.double().expand(200_000, 4) for value in q))
        densities = [torch.distributions.Normal(g.mean_BZ, torch.exp(0.5 * g.log_var_BZ)) for g in (q, prior)]
        estimate = (densities[0].log_prob(z) - densities[1].log_prob(z)).sum(1).mean()  # type: ignore[no-untyped-call]
        assert float(divergence(q, prior)) == pytest.approx(float(estimate), rel=0.01)


def test_the_divergence_is_summed_over_the_latent_and_averaged_over_rows() -> None:
    zero, one = torch.zeros(3, 5), torch.ones(3, 5)
    standard = Gaussian(zero, zero)
    assert float(divergence(standard, standard)) == 0.0
    assert float(divergence(Gaussian(one, zero), standard)) == pytest.approx(0.5 * 5)
    assert float(divergence(Gaussian(one, one), Gaussian(one, one))) == pytest.approx(0.0, abs=1e-6)
    assert float(divergence(Gaussian(zero, 0.1 * one), standard)) > 0.0


def test_heads_are_bounded_and_each_row_has_its_own_noise() -> None:
    torch.manual_seed(0)
    for values_BZ in Encoder(4, 8, 6, 0.3)(5 * torch.randn(32, 4)):
        assert float(values_BZ.detach().abs().max()) < 1.0
    draws = reparameterise(torch.zeros(20_000, 2), torch.zeros(20_000, 2))
    assert not draws[0].equal(draws[1])
    assert_close(draws.std(0), torch.ones(2), rtol=0.02, atol=0.0)


# -- terms -----------------------------------------------------------------------------------------------------------


def test_a_mean_over_features_does_not_see_their_number_and_a_sum_does() -> None:
    made, wanted = torch.randn(4, 5), torch.randn(4, 5)
    made_twice, wanted_twice = (torch.cat([values, values], 1) for values in (made, wanted))
    assert_close(squared_error(made_twice, wanted_twice, "mean"), squared_error(made, wanted, "mean"))
    assert_close(squared_error(made_twice, wanted_twice, "sum"), 2 * squared_error(made, wanted, "sum"))
    assert_close(squared_error(made, wanted, "sum"), (made - wanted).square().sum(1).mean())


def test_the_released_noise_is_one_draw_for_the_whole_batch() -> None:
    torch.manual_seed(0)
    draws = released_draw(torch.zeros(20_000, 2), torch.tensor([[0.0, 2.0]]).expand(20_000, 2))
    assert draws.equal(draws[:1].expand(20_000, 2))
    torch.manual_seed(5)
    released = model(noise="released", dropout=0.0).terms(pairs(), None)["photo"]
    torch.manual_seed(5)
    assert not released.allclose(model(dropout=0.0).terms(pairs(), None)["photo"])


def test_the_loss_is_photo_plus_divergence_plus_ten_sketch() -> None:
    trained, data = model(dropout=0.0), pairs()
    torch.manual_seed(5)
    terms = trained.terms(data, None)
    torch.manual_seed(5)
    mean, log_var = trained.encoder(torch.cat([data.photo, data.sketch], 1))
    photo = trained.decoder(mean + torch.exp(log_var / 2) * torch.randn_like(mean), data.sketch)
    kl = 0.5 * (log_var.exp() + mean.square() - 1 - log_var).sum(1).mean()
    sketch = (trained.to_sketch(photo) - data.sketch).square().mean()
    expected = (photo - data.photo).square().mean() + kl + 10 * sketch
    assert_close(torch.stack(list(terms.values())).sum(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("term", "prior", "moved"),
    [
        ("photo", "standard", {"encoder", "decoder"}),
        ("sketch", "standard", {"encoder", "decoder", "to_sketch"}),
        ("kl", "standard", {"encoder"}),
        ("kl", "conditional", {"encoder", "prior"}),
        ("photo", "conditional", {"encoder", "decoder"}),
    ],
)
def test_a_term_reaches_the_networks_in_its_equation(term: str, prior: str, moved: set[str]) -> None:
    trained = model(prior=prior)
    assert parts(trained, trained.terms(pairs(), None)[term]) == moved


@pytest.mark.parametrize("prior", ["standard", "conditional"])
def test_one_group_holds_every_parameter(prior: str) -> None:
    trained = model(prior=prior)
    (group,) = trained.groups.values()
    assert {id(p) for p in group.module.parameters()} == {id(p) for p in trained.parameters()}


def test_steps_lower_the_reconstruction() -> None:
    trained = model(hidden=32, dropout=0.0, sketch_weight=1.0, lr=1e-2)
    steppers = optimizers(trained)
    seen = [step(trained, steppers, pairs(), seed=number)["autoencoder"] for number in range(20)]
    for term in ("photo", "sketch"):
        assert float(seen[-1][term].detach()) < float(seen[0][term].detach())


def test_without_a_prior_it_learns_its_pairs_by_heart() -> None:
    trained = model(hidden=64, latent=16, dropout=0.0, kl_weight=0.0, sketch_weight=1.0, lr=2e-3)
    steppers, data = optimizers(trained), pairs(256)
    first = step(trained, steppers, data)["autoencoder"]["photo"]
    for number in range(300):
        last = step(trained, steppers, data, seed=number)["autoencoder"]["photo"]
    assert float(last.detach()) < 0.1 * float(first.detach())


def test_the_released_scaling_makes_latents_idle_and_a_light_prior_does_not() -> None:
    def trained(weight: float) -> float:
        made = model(hidden=32, latent=8, kl_weight=weight, lr=3e-3)
        steppers = optimizers(made)
        for number in range(150):
            terms = step(made, steppers, pairs(64, seed=number), seed=number)["autoencoder"]
        return float(terms["kl"].detach()) / weight

    heavy = trained(1.0)
    assert heavy < 1.0
    assert trained(1 / 2048) > 4 * heavy


# -- parts -----------------------------------------------------------------------------------------------------------


def test_published_sizes() -> None:
    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    with torch.device("meta"):
        assert count(Encoder(8192, 2048, 1024, 0.3)) == 46_157_824
        assert count(Decoder(1024, 4096, 2048, 4096, "raw")) == 18_880_512


def test_initial_weights_and_normalisation_are_those_of_keras() -> None:
    trained = model()
    first = trained.decoder.first
    assert not first.bias.any()
    bound = (6 / sum(first.weight.shape)) ** 0.5
    assert 0.9 * bound < float(first.weight.detach().abs().max()) <= bound
    norms = [module for module in trained.modules() if isinstance(module, nn.BatchNorm1d)]
    assert [(norm.eps, norm.momentum) for norm in norms] == [(1e-3, 0.01)] * 2


def test_raw_features_are_made_without_negatives_and_standardised_ones_with() -> None:
    raw, standardised = model(), model(features="standardised")
    assert raw.scaling == "none"
    assert standardised.scaling == "standard"
    assert float(raw.encode("sketch", SKETCH).min()) >= 0.0
    assert float(standardised.encode("sketch", SKETCH).min()) < 0.0


def test_the_decoder_sees_the_sketch() -> None:
    trained, latent, sketch = model(), torch.randn(4, 6), torch.randn(4, INPUTS.sketch_dim)
    assert not torch.allclose(trained.decoder(latent, sketch), trained.decoder(latent, sketch.flip(0)))


def test_the_split_first_layer_is_the_joint_one() -> None:
    decoder = Decoder(6, 5, 8, 7, "raw")
    latent, sketch = torch.randn(3, 4, 6), torch.randn(3, 5)
    joint = torch.stack([decoder(latent[:, p], sketch) for p in range(4)], 1)
    assert_close(decoder.many(latent, sketch), joint, rtol=0, atol=1e-5)
    shared = torch.stack([decoder(latent[:1, p].expand(3, 6), sketch) for p in range(4)], 1)
    assert_close(decoder.many(latent[:1], sketch), shared, rtol=0, atol=1e-5)


# -- retrieval -------------------------------------------------------------------------------------------------------


def test_photos_are_their_own_embedding() -> None:
    photo = torch.rand(5, INPUTS.photo_dim)
    assert_close(model().encode("photo", photo), photo.unsqueeze(1))


@pytest.mark.parametrize("features", ["raw", "standardised"])
@pytest.mark.parametrize("prior", ["standard", "conditional"])
def test_parts_of_a_sketch(prior: str, features: str) -> None:
    def imagined(retrieval: str, **options: int) -> Tensor:
        made = model(prior=prior, features=features, retrieval=retrieval, **options)
        return made.encode("sketch", SKETCH)

    width = INPUTS.photo_dim
    assert imagined("mean").shape == (9, 1, width)
    assert imagined("min").shape == (9, 12, width)
    assert imagined("kmeans", clusters=3).shape == (9, 3, width)
    assert_close(imagined("min").mean(1, keepdim=True), imagined("mean"))
    assert_close(imagined("kmeans", clusters=1), imagined("mean"))
    assert_close(imagined("min", samples=1), imagined("mean", samples=1))


@pytest.mark.parametrize("retrieval", ["mean", "min", "kmeans"])
def test_blocks_of_sketches_are_one_shot(retrieval: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = model(prior="conditional", retrieval=retrieval)
    whole = made.encode("sketch", SKETCH)
    monkeypatch.setattr(cvae, "BLOCK", 1)
    assert_close(made.encode("sketch", SKETCH), whole, rtol=0, atol=1e-5)
    assert_close(made.encode("sketch", SKETCH[4:5]), whole[4:5], rtol=0, atol=1e-5)


def test_the_seed_fixes_the_samples() -> None:
    made = model()
    before = made.encode("sketch", SKETCH)
    torch.manual_seed(123)
    assert made.encode("sketch", SKETCH).equal(before)
    other = build("cvae", {**PUBLISHED, "seed": 1}, INPUTS)
    other.load_state_dict(made.state_dict())
    assert not torch.allclose(other.encode("sketch", SKETCH), before)
    assert "noise" not in made.state_dict()


def test_retrieval_uses_neither_the_encoder_nor_the_way_back() -> None:
    made = model()
    before = made.encode("sketch", SKETCH)
    for parameter in [*made.encoder.parameters(), *made.to_sketch.parameters()]:
        nn.init.constant_(parameter, float("nan"))
    assert made.encode("sketch", SKETCH).equal(before)


def test_a_conditional_prior_is_sampled_about_its_own_mean() -> None:
    made = model(prior="conditional").eval()
    mean, log_var = made.prior_of(SKETCH)
    assert_close(made.latents(SKETCH)[2, 7], mean[2] + torch.exp(log_var[2] / 2) * made.noise[7])


def test_centres_are_found_and_a_lost_cluster_keeps_its_own() -> None:
    near = torch.tensor([[0.0, 0.0], [0.2, 0.0], [9.0, 9.0], [9.2, 9.0]])
    assert_close(centres(near[None], 2), torch.tensor([[[0.1, 0.0], [9.1, 9.0]]]))
    same = torch.ones(1, 4, 2)
    assert centres(same, 3).equal(torch.ones(1, 3, 2))


def test_more_clusters_than_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match="5 clusters of 3 samples"):
        configure("cvae", {"retrieval": "kmeans", "samples": 3})
