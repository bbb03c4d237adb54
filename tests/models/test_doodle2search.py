"""Doodle2Search: reversed gradients and their clocks, the worked examples, the choice of negatives, and routing."""

import math
from typing import Any, Literal, cast

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.models.helpers import CLASSES, INPUTS, batch, optimizers, step, triplets
from zsr.metrics import mean_average_precision
from zsr.models import build
from zsr.models.doodle2search import (
    RELEASED,
    Doodle2Search,
    cosine_loss,
    domain_classifier,
    head,
    reverse,
    semantic_decoder,
    triplet,
)

PHI, PSI = "encoder.photo", "encoder.sketch"


def model(**options: Any) -> Doodle2Search:
    torch.manual_seed(0)
    return cast(Doodle2Search, build("doodle2search", {"dim": 6, "layers": 2, "hidden": 16, **options}, INPUTS).train())


def gradients(of: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradient of every parameter that `loss` reaches."""
    names, parameters = zip(*of.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return {name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}


def nonzero(found: dict[str, Tensor]) -> set[str]:
    """Parts with a gradient other than zero: `encoder.photo`, `encoder.sketch`, `domain`, `semantic`."""
    names = [name for name, gradient in found.items() if gradient.any()]
    return {".".join(name.split(".")[:2]) if name.startswith("encoder") else name.split(".")[0] for name in names}


# -- parts -----------------------------------------------------------------------------------------------------------


def test_reversal_is_the_identity_forward_and_minus_its_strength_backward() -> None:
    for strength in (0.0, 0.5, 1.0):
        values = torch.randn(3, 4, requires_grad=True)
        same = reverse(values, strength)
        assert same.equal(values)
        (gradient,) = torch.autograd.grad(same.sum(), values)
        assert gradient.equal(torch.full((3, 4), -strength))


def test_published_sizes() -> None:
    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(domain_classifier(256, 0.5)) == 20_673
    assert count(semantic_decoder(256, 300, 0.5)) == 167_400
    with torch.device("meta"):
        # the published encoder less the convolutions of VGG-16 with batch norm, whose 512 maps of 7 x 7 the head takes
        assert count(head(512 * 7 * 7, 2, 4096, 256, 0.5)) == 135_317_824 - 14_723_136


def test_without_hidden_layers_an_encoder_is_linear() -> None:
    encoder = model(layers=0).eval().encoder["sketch"]
    one, other = torch.randn(2, 3, INPUTS.sketch_dim)
    offset = encoder(torch.zeros(1, INPUTS.sketch_dim))
    assert_close(encoder(one + other) + offset, encoder(one) + encoder(other))


@pytest.mark.parametrize("start", ["same", "apart"])
def test_encoders_of_equal_width_begin_alike_if_they_are_to(start: str) -> None:
    square = INPUTS.model_copy(update={"sketch_dim": INPUTS.photo_dim})
    made = build("doodle2search", {"dim": 6, "start": start}, square)
    features = torch.randn(4, INPUTS.photo_dim)
    assert made.encode("sketch", features).equal(made.encode("photo", features)) == (start == "same")


@pytest.mark.parametrize(
    ("clock", "at"), [("epoch", lambda k: {"epoch": k, "index": 99}), ("batch", lambda k: {"epoch": 99, "index": k})]
)
def test_the_schedule_of_the_reversal_on_either_clock(clock: Literal["epoch", "batch"], at: Any) -> None:
    trained = model(clock=clock)
    found = [trained.reversal(batch().map(**at(k))) for k in (0, 4, 5, 15, 25, 26, 500)]
    assert found == [0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0]


def test_the_released_preset_has_the_released_numbers() -> None:
    assert (RELEASED.dim, RELEASED.layers, RELEASED.dropout, RELEASED.start) == (256, 0, 0.5, "apart")
    assert (RELEASED.margin, RELEASED.semantic_reversal, RELEASED.metric) == (1.0, 0.5, "l2")
    assert (RELEASED.triplet_weight, RELEASED.domain_weight, RELEASED.semantic_weight) == (1.0, 1.0, 1.0)
    optimizer = model(lr=RELEASED.lr).groups["all"].optimizer
    assert (optimizer.name, optimizer.lr, optimizer.momentum, optimizer.nesterov) == ("sgd", 1e-4, 0.9, True)
    assert optimizer.weight_decay == 5e-4


# -- terms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "loss"),
    [((1, 2, 2), 0.0555556), ((100, 200, 200), 0.0555556), ((2, 1, 2), 0.0), ((-2, -1, -2), 1.0)],
)
def test_cosine_loss(made: tuple[int, int, int], loss: float) -> None:
    found = cosine_loss(torch.tensor([made]).float(), torch.tensor([[2.0, 1.0, 2.0]]))
    assert float(found) == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize(
    ("positive", "negative", "loss"), [((3, 4), (6, 8), 0.0), ((3, 4), (5.5, 0), 0.5), ((0, 0), (0, 0), 1.0)]
)
def test_triplet(positive: tuple[float, float], negative: tuple[float, float], loss: float) -> None:
    points = [torch.tensor([point]).float() for point in ((0, 0), positive, negative)]
    assert float(triplet(points[0], points[1], points[2], margin=1.0)) == pytest.approx(loss, abs=1e-5)


def test_terms_begin_where_chance_is() -> None:
    terms = {name: float(value.detach()) for name, value in model(dim=32, hidden=64).terms(triplets(256), None).items()}
    assert terms["triplet"] == pytest.approx(1.0, abs=0.3)
    assert terms["domain"] == pytest.approx(math.log(2), abs=0.05)
    assert terms["semantic"] == pytest.approx(1.0, abs=0.5)
    assert terms["semantic_negative"] == pytest.approx(0.5, abs=0.25)


@pytest.mark.parametrize(
    ("term", "epoch", "moved"),
    [
        ("triplet", 30, {PSI, PHI}),
        ("domain", 0, {"domain"}),
        ("domain", 30, {PSI, PHI, "domain"}),
        ("semantic", 30, {PSI, PHI, "semantic"}),
        ("semantic_negative", 30, {PHI, "semantic"}),
    ],
)
def test_a_term_reaches_the_networks_in_its_equation(term: str, epoch: int, moved: set[str]) -> None:
    trained = model()
    assert nonzero(gradients(trained, trained.terms(triplets().map(epoch=epoch), None)[term])) == moved


def test_the_domain_s_gradient_turns_its_sign_at_the_encoders_only() -> None:
    trained, data = model(dropout=0.0), triplets()
    assert data.negative is not None
    sketch, photo = trained.encoder["sketch"](data.sketch), trained.encoder["photo"](data.photo)
    photos = (photo, trained.encoder["photo"](data.negative))
    reversed_ = gradients(trained, trained.domain_loss(sketch, photos, 0.25))
    straight = gradients(trained, trained.domain_loss(sketch, photos, -1.0))
    for name, gradient in straight.items():
        assert_close(reversed_[name], gradient if name.startswith("domain") else -0.25 * gradient)


def test_the_domain_loss_counts_photos_twice() -> None:
    trained, data = model(dropout=0.0), triplets()
    sketch, photo = trained.encoder["sketch"](data.sketch), trained.encoder["photo"](data.photo)
    believed = [torch.sigmoid(trained.domain(values)) for values in (sketch, photo)]
    wanted = (-torch.log(1 - believed[0]).mean() - 2 * torch.log(believed[1]).mean()) / 3
    assert_close(trained.domain_loss(sketch, (photo, photo), 1.0), wanted)


def test_the_photo_encoder_unlearns_half_of_the_negative_s_semantics() -> None:
    trained, data = model(dropout=0.0), triplets()
    assert data.negative is not None
    found = gradients(trained, trained.terms(data, None)["semantic_negative"])
    plain = gradients(trained, trained.semantic_loss(trained.encoder["photo"](data.negative), data.word))
    for name, gradient in plain.items():
        assert_close(found[name], gradient if name.startswith("semantic") else -0.5 * gradient)


def test_weights_scale_their_terms() -> None:
    plain = model(dropout=0.0).terms(triplets(), None)
    heavy = model(dropout=0.0, triplet_weight=2, domain_weight=3, semantic_weight=5).terms(triplets(), None)
    factors = {"triplet": 2, "domain": 3, "semantic": 5, "semantic_negative": 5}
    for name, factor in factors.items():
        assert_close(heavy[name], factor * plain[name])


def test_a_batch_without_negatives_is_refused() -> None:
    with pytest.raises(ValueError, match="requires triplets"):
        model().terms(batch(), None)


# -- negatives -------------------------------------------------------------------------------------------------------


def test_negatives_are_weighted_by_the_distance_of_class_vectors() -> None:
    word = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 2.0]])
    given, unit = model(words="given").negatives(word), model(words="unit").negatives(word)
    assert float(given[0, 1]) == pytest.approx(math.exp(-(0.4**2 + 0.8**2) / 0.1), rel=1e-5)
    assert float(unit[1, 2]) == pytest.approx(math.exp(-(0.6**2 + 0.2**2) / 0.1), rel=1e-5)
    assert given.equal(given.T)


def test_only_unit_vectors_forget_their_length() -> None:
    word = torch.randn(len(CLASSES), 50)
    assert_close(model().negatives(9 * word), model().negatives(word))
    # as given, vectors as long as GloVe's leave a class without any negative; the sampler refuses that
    weights = model(words="given").negatives(9 * word).fill_diagonal_(0.0)
    assert float(weights.sum(1).min()) == 0.0


# -- training --------------------------------------------------------------------------------------------------------


def test_triplets_alone_learn_a_few_classes_by_heart() -> None:
    trained = model(dim=16, hidden=32, dropout=0.0, lr=0.05, domain_weight=0, semantic_weight=0)
    steppers = optimizers(trained)
    seen = [step(trained, steppers, triplets(100, seed=n), seed=n)["all"]["triplet"] for n in range(100)]
    assert float(seen[20].detach()) < float(seen[0].detach())
    data = batch(100)
    sketch, photo = trained.encode("sketch", data.sketch), trained.encode("photo", data.photo)
    assert mean_average_precision(sketch, photo, data.label, data.label, trained.metric) > 0.95


@pytest.mark.parametrize("adversarial", [False, True])
def test_the_domain_classifier_wins_without_reversal_and_is_fooled_by_it(adversarial: bool) -> None:
    """Two of three inputs are photos: a fooled classifier is right for 2/3 of them."""
    options = {"dim": 16, "hidden": 32, "dropout": 0.0, "lr": 0.003, "triplet_weight": 0, "semantic_weight": 0}
    trained = model(**options)
    steppers = optimizers(trained)
    shares = []
    for number in range(600):
        epoch = 5 + number // 20 if adversarial else 0
        step(trained, steppers, triplets(64, seed=number).map(epoch=epoch), seed=number)
        if number >= 550:
            data = batch(64, seed=10_000 + number)
            sketch = trained.domain(trained.encoder["sketch"](data.sketch)) < 0
            photo = trained.domain(trained.encoder["photo"](data.photo)) > 0
            shares.append((sketch.float().mean() + 2 * photo.float().mean()) / 3)
    share = float(torch.stack(shares).mean())
    assert abs(share - 2 / 3) < 0.05 if adversarial else share > 0.95
