"""Contrastive: targets and loss by hand, the start at the backbone's space, what each term reaches, and learning."""

import math
from typing import cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from tests.models.helpers import INPUTS, batch, optimizers, reached, step
from zsr.batch import Batch
from zsr.models import build
from zsr.models.contrastive import Contrastive, class_targets, contrast, starts
from zsr.models.protocol import Inputs

SQUARE = Inputs(sketch_dim=4, photo_dim=4, semantic_dim=2, classes=("a", "b"))
WORD = torch.tensor([[2.0, 0.0], [0.6, 0.8], [2.0, 0.0]])
LABEL = torch.tensor([0, 1, 0])


def contrastive(inputs: Inputs = INPUTS, seed: int = 0, **options: object) -> Contrastive:
    torch.manual_seed(seed)
    return cast(Contrastive, build("contrastive", options, inputs).train())


def two_pairs() -> Batch:
    """One pair of either class. Photos point along their class's axis, sketches halfway to the other class's."""
    plain = torch.sinh(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]))
    drawn = torch.sinh(torch.tensor([[0.8, 0.6, 0.0, 0.0], [0.6, 0.8, 0.0, 0.0]]))
    return Batch(sketch=drawn, photo=plain, label=torch.tensor([0, 1]), word=torch.eye(2))


# -- targets and loss ------------------------------------------------------------------------------------------------


def test_targets_are_one_within_a_class_and_fall_with_the_cosine_of_class_vectors() -> None:
    near = math.exp((0.6 - 1.0) / 0.5)
    expected = torch.tensor([[1.0, near, 1.0], [near, 1.0, near], [1.0, near, 1.0]])
    assert_close(class_targets(LABEL, WORD, 0.5), expected)


def test_hard_targets_are_the_rows_of_the_same_class() -> None:
    expected = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    assert class_targets(LABEL, WORD, 0.0).equal(expected)


def test_classes_of_one_vector_are_as_good_as_one_class() -> None:
    assert_close(class_targets(torch.tensor([0, 1]), WORD[:1].expand(2, -1), 0.1), torch.ones(2, 2))


def test_contrast_by_hand() -> None:
    # row 0 chooses between logits ln 1 and ln 3, with targets 1/4 and 3/4; row 1 between two equal ones
    logits = torch.tensor([[9.0, 0.0, math.log(3.0)], [5.0, 9.0, 5.0], [0.0, 0.0, 9.0]])
    target = torch.tensor([[7.0, 0.5, 1.5], [2.0, 7.0, 0.0], [0.0, 0.0, 7.0]])
    among = ~torch.eye(3, dtype=torch.bool)
    first = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert float(contrast(logits, target, among)) == pytest.approx((first + math.log(2.0) + 0.0) / 3)


def test_contrast_is_blind_to_rows_that_are_not_among() -> None:
    torch.manual_seed(0)
    logits, target, among = torch.randn(4, 4), torch.rand(4, 4), ~torch.eye(4, dtype=torch.bool)
    assert_close(contrast(logits + 50 * torch.eye(4), target + torch.eye(4), among), contrast(logits, target, among))


def test_a_row_that_has_no_row_to_compare_with_counts_as_nothing() -> None:
    logits = torch.zeros(1, 1, requires_grad=True)
    loss = contrast(logits, torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.bool))
    torch.autograd.backward(loss)
    assert loss.item() == 0
    assert logits.grad is not None
    assert logits.grad.equal(torch.zeros(1, 1))


def test_both_terms_of_two_pairs_by_hand() -> None:
    terms = contrastive(SQUARE, temperature=0.5, softness=0.0, across_weight=2.0, within_weight=3.0).terms(
        two_pairs(), None
    )
    # every sketch has cosine .8 with the photo of its class and .6 with the other, and so has every photo
    assert float(terms["across"].detach()) == pytest.approx(2.0 * math.log(1 + math.exp((0.6 - 0.8) / 0.5)))
    # within a modality the only other row is of another class: no target
    assert float(terms["within"].detach()) == 0


def test_soft_targets_make_the_only_other_row_the_target() -> None:
    terms = contrastive(SQUARE, softness=0.5).terms(two_pairs(), None)
    assert float(terms["within"].detach()) == pytest.approx(0.0, abs=1e-6)
    other = math.exp(-1 / 0.5)
    margin = (0.8 - 0.6) / 0.1
    share = other / (1 + other)
    expected = (1 - share) * math.log(1 + math.exp(-margin)) + share * math.log(1 + math.exp(margin))
    assert float(terms["across"].detach()) == pytest.approx(expected, rel=1e-5)


def test_the_length_of_class_vectors_does_not_matter() -> None:
    data = batch()
    model = contrastive()
    plain, longer = model.terms(data, None), model.terms(data.map(word=5 * data.word), None)
    assert_close(longer, plain)


@pytest.mark.parametrize("term", ["across", "within"])
def test_either_term_moves_both_heads(term: str) -> None:
    model = contrastive()
    assert reached(model, model.terms(batch(), None)[term]) == {"heads.sketch", "heads.photo"}


def test_within_has_no_gradient_from_one_modality_to_the_other() -> None:
    model, data = contrastive(), batch()
    photo = data.photo.clone().requires_grad_(True)
    before = model.terms(data, None)["within"]
    shuffled = model.terms(data.map(sketch=data.sketch.flip(0), photo=photo), None)["within"]
    (with_other_sketches,) = torch.autograd.grad(shuffled, photo)
    again = data.photo.clone().requires_grad_(True)
    (plain,) = torch.autograd.grad(model.terms(data.map(photo=again), None)["within"], again)
    assert_close(with_other_sketches, plain)
    assert not before.allclose(shuffled)


# -- start and embedding ---------------------------------------------------------------------------------------------


def test_it_starts_as_the_features_compressed_and_at_unit_length() -> None:
    features = torch.randn(5, 4)
    model = contrastive(SQUARE)
    for modality in ("sketch", "photo"):
        assert_close(model.embed(modality, features)[:, 0], functional.normalize(features.asinh()))


def test_a_narrow_start_is_one_rotation_for_both_modalities() -> None:
    first = starts({"sketch": 6, "photo": 6}, 3)
    assert first["sketch"].equal(first["photo"])
    assert_close(first["photo"] @ first["photo"].T, torch.eye(3))


def test_modalities_of_different_width_start_apart() -> None:
    first = starts({"sketch": 6, "photo": 4}, 4)
    assert {m: tuple(w.shape) for m, w in first.items()} == {"sketch": (4, 6), "photo": (4, 4)}
    assert_close(first["sketch"] @ first["sketch"].T, torch.eye(4))
    assert not first["photo"].equal(torch.eye(4))


def test_the_width_is_the_photos_or_as_asked() -> None:
    assert contrastive().dim == INPUTS.photo_dim
    assert contrastive(dim=5).encode("sketch", torch.randn(3, 10)).shape == (3, 1, 5)


def matched(model: Contrastive, data: Batch) -> float:
    """Share of sketches whose nearest photo is of their class."""
    sketch, photo = (model.encode(m, x)[:, 0] for m, x in (("sketch", data.sketch), ("photo", data.photo)))
    nearest: Tensor = (sketch @ photo.T).argmax(1)
    return float((data.label[nearest] == data.label).float().mean())


def test_training_brings_a_class_together_across_modalities() -> None:
    model = contrastive(lr=1e-2)
    held = batch(rows=128, seed=999)
    before = matched(model, held)
    steppers = optimizers(model)
    seen = [step(model, steppers, batch(rows=32, seed=n), n)["heads"] for n in range(40)]
    for term in ("across", "within"):
        assert seen[-1][term].item() < seen[0][term].item()
    assert matched(model, held) > max(0.9, before)
