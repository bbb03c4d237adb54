"""CFSA: its worked examples, what each phase moves and each term reaches, and the order of a step."""

import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from tests.models.helpers import INPUTS, batch, optimizers, reached, step, total
from zsr.batch import Batch
from zsr.models import build, configure
from zsr.models.cfsa import (
    MODALITIES,
    Cfsa,
    Config,
    Critic,
    align,
    cmpm,
    coral,
    coral_log,
    entropy,
    gradient_penalty,
    log_matrix,
    reversal,
)
from zsr.models.losses import mmd
from zsr.models.protocol import Inputs

SMALL = {"hidden": 24, "noise": 5}
C = {"critics.photo", "critics.sketch"}
G = {"generators.photo", "generators.sketch"}
R = {"regressors.photo", "regressors.sketch"}


def cfsa(seed: int = 0, **options: Any) -> Cfsa:
    """A CFSA with 24 hidden units in training mode."""
    torch.manual_seed(seed)
    return cast(Cfsa, build("cfsa", {**SMALL, **options}, INPUTS).train())


def confused(**options: Any) -> Cfsa:
    """One with a modality classifier."""
    return cfsa(modality_weight=0.5, **options)


def parts(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """First part of the name of each parameter that is no longer what it was."""
    return {name.split(".")[0] for name, value in model.named_parameters() if not value.equal(before[name])}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


# -- gradient penalty ------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """D(x, c) = w x + v c."""

    def __init__(self, weight: Tensor, condition: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.condition = nn.Parameter(condition)

    def forward(self, features: Tensor, word: Tensor) -> Tensor:
        return (features @ self.weight + word @ self.condition)[:, None]


@pytest.mark.parametrize("length", [0.2, 1.0, 3.0])
def test_the_penalty_of_a_linear_critic_is_that_of_its_weight_alone(length: float) -> None:
    torch.manual_seed(0)
    weight = length * functional.normalize(torch.randn(6), dim=0)
    true, fake, word = torch.randn(9, 6), torch.randn(9, 6), torch.randn(9, 4)
    for condition in (torch.zeros(4), torch.full((4,), 7.0)):
        penalty = gradient_penalty(Linear(weight, condition), true, fake, word)
        assert float(penalty.detach()) == pytest.approx((length - 1) ** 2, abs=1e-6)


def test_the_penaltys_gradient_is_the_closed_form_and_that_of_finite_differences() -> None:
    torch.manual_seed(0)
    critic = Linear(torch.randn(6).double(), torch.randn(4).double())
    true, fake, word = torch.randn(9, 6).double(), torch.randn(9, 6).double(), torch.randn(9, 4).double()
    torch.autograd.backward(10 * gradient_penalty(critic, true, fake, word))
    weight = critic.weight.detach()
    assert critic.weight.grad is not None
    assert_close(critic.weight.grad, 20 * (weight.norm() - 1) * weight / weight.norm())

    def at(moved: Tensor) -> Tensor:
        return 10 * gradient_penalty(Linear(moved, critic.condition), true, fake, word).detach()

    unit = torch.eye(6, dtype=torch.float64)
    differences = torch.stack([(at(weight + 1e-6 * e) - at(weight - 1e-6 * e)) / 2e-6 for e in unit])
    assert_close(critic.weight.grad, differences, atol=1e-6, rtol=0)


def test_the_penalty_reaches_a_deep_critic_by_finite_differences() -> None:
    torch.manual_seed(0)
    critic = Critic(6, 4, 8).double()
    true, fake, word = torch.randn(9, 6).double(), torch.randn(9, 6).double(), torch.randn(9, 4).double()

    def penalty() -> Tensor:
        torch.manual_seed(1)
        return gradient_penalty(critic, true, fake, word)

    first = critic.layers.get_parameter("0.weight")
    (gradient,) = torch.autograd.grad(penalty(), first)
    for row, column in ((0, 0), (3, 5), (7, 2)):
        values = []
        for move in (1e-6, -2e-6):
            first.data[row, column] += move
            values.append(penalty().detach())
        first.data[row, column] += 1e-6
        assert float(gradient[row, column]) == pytest.approx(float(values[0] - values[1]) / 2e-6, abs=1e-6)


def test_interpolation_has_one_share_a_row_and_leaves_the_class_alone() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def critic(features: Tensor, word: Tensor) -> Tensor:
        seen.append((features.detach(), word))
        return features.square().sum(1, keepdim=True)

    word = torch.randn(50, 4)
    gradient_penalty(critic, torch.ones(50, 3), torch.zeros(50, 3), word)
    (share, given) = seen[0]
    assert given is word
    assert_close(share, share[:, :1].expand(50, 3))
    assert len(set(share[:, 0].tolist())) == 50
    assert float(share.min()) >= 0
    assert float(share.max()) <= 1


# -- alignments ------------------------------------------------------------------------------------------------------


def looped_cmpm(photo: Tensor, sketch: Tensor, label: Tensor) -> float:
    """The equation, entry by entry."""

    def one_way(a: Tensor, b: Tensor) -> float:
        total = 0.0
        for i in range(len(a)):
            scores = [math.exp(float(a[i] @ b[j] / b[j].norm())) for j in range(len(b))]
            same = [float(label[i] == label[j]) for j in range(len(b))]
            for j in range(len(b)):
                p, q = scores[j] / sum(scores), same[j] / sum(same)
                total += p * math.log(p / (q + 1e-8) + 1e-8)
        return total / len(a)

    return one_way(photo, sketch) + one_way(sketch, photo)


def test_cmpm_is_its_equation_written_as_loops() -> None:
    torch.manual_seed(0)
    photo, sketch = torch.randn(7, 4), torch.randn(7, 4)
    label = torch.tensor([0, 1, 1, 2, 0, 2, 2])
    assert float(cmpm(photo, sketch, label)) == pytest.approx(looped_cmpm(photo, sketch, label), rel=1e-5)


def test_cmpm_vanishes_where_projections_match_the_classes_and_punishes_wrong_ones() -> None:
    label = torch.tensor([0, 1, 2, 0, 1, 2])
    code = 50 * torch.eye(3)[label]
    assert float(cmpm(code, code, label)) == pytest.approx(0, abs=1e-4)
    assert float(cmpm(code, code, torch.tensor([0, 1, 2, 1, 2, 0]))) > 1
    uniform = torch.zeros(6, 3)
    assert float(cmpm(uniform, uniform, torch.zeros(6))) == pytest.approx(0, abs=1e-5)


def test_cmpm_knows_labels_by_equality_only() -> None:
    torch.manual_seed(0)
    photo, sketch, label = torch.randn(6, 4), torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    assert cmpm(photo, sketch, label).equal(cmpm(photo, sketch, (label + 1) % 3))


def test_coral_ignores_the_mean_and_compares_covariances() -> None:
    torch.manual_seed(0)
    rows = torch.randn(40, 5)
    assert float(coral(rows, rows + 3)) == pytest.approx(0, abs=1e-9)
    assert_close(coral(rows, 2 * rows), (3 * torch.cov(rows.T)).square().mean())


def test_log_coral_compares_logarithms_of_covariances() -> None:
    # covariances of 2 I and 8 I: their logarithms lie log((8 + 1e-3) / (2 + 1e-3)) apart, on the diagonal alone
    rows = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]).double() * math.sqrt(1.5)
    apart = math.log(8.001 / 2.001)
    assert float(coral_log(rows, 2 * rows)) == pytest.approx(apart**2 / 2)
    assert float(coral_log(rows, rows + 3)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("rows", [3, 9])
def test_the_matrix_logarithm_has_the_gradient_of_finite_differences_with_equal_eigenvalues_too(rows: int) -> None:
    torch.manual_seed(0)
    values, mix = torch.randn(rows, 5).double(), torch.randn(5, 5).double()

    def loss(shift: Tensor) -> Tensor:
        return (log_matrix(torch.cov((values + shift).T)) * (mix + mix.T)).sum()

    # 3 rows leave 3 of 5 eigenvalues at 0, where the gradient of an eigendecomposition is not finite
    zero = torch.zeros_like(values, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(zero), zero)
    for row, column in ((0, 0), (1, 3), (2, 4)):
        step = torch.zeros_like(values)
        step[row, column] = 1e-6
        difference = float(loss(step) - loss(-step)) / 2e-6
        assert float(gradient[row, column]) == pytest.approx(difference, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("kind", ["cmpm", "coral", "coral-log", "mmd"])
def test_each_alignment_is_the_one_asked_for_and_reaches_both_modalities(kind: str) -> None:
    torch.manual_seed(0)
    code = {m: torch.randn(8, 5, requires_grad=True) for m in MODALITIES}
    label = torch.arange(8) % 3
    value = align(kind, code, label)
    photo, sketch = code["photo"], code["sketch"]
    expected = {"cmpm": cmpm(photo, sketch, label), "coral": coral(photo, sketch), "mmd": mmd(photo, sketch)}
    expected["coral-log"] = coral_log(photo, sketch)
    assert_close(value, expected[kind])
    assert all(bool(g.any()) for g in torch.autograd.grad(value, list(code.values())))


# -- gradients: phases -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phase", "moved"),
    [("critics", "critics"), ("generators", "generators"), ("regressors", "regressors"), ("modality", "modality")],
)
def test_a_phase_alone_moves_its_group_and_nothing_else(phase: str, moved: str) -> None:
    model = confused()
    before = state(model)
    only = next(p for p in model.phases if p.name == phase)
    stepper = model.groups[only.moves].optimizer.build(model.parameters())
    data = batch().map(epoch=100)
    shared = model.shared(data)
    for name, group in model.groups.items():
        group.module.requires_grad_(name == only.moves)
    torch.autograd.backward(total(only.terms(data, shared)))
    stepper.step()
    assert parts(model, before) == {moved}
    still = {name for name, p in model.named_parameters() if name.startswith(moved) and p.equal(before[name])}
    # a constant added to every score is in neither the gap nor the slope
    assert still == ({f"critics.{m}.layers.2.bias" for m in MODALITIES} if phase == "critics" else set())


@pytest.mark.parametrize(
    ("phase", "term", "reach"),
    [
        ("critics", "wasserstein_photo", {"critics.photo"}),
        ("critics", "penalty_sketch", {"critics.sketch"}),
        ("generators", "adversarial_photo", {"generators.photo", "critics.photo"}),
        ("generators", "adversarial_sketch", {"generators.sketch", "critics.sketch"}),
        ("generators", "cycle", G | R),
        ("generators", "confusion", G | R | {"modality.0", "modality.1", "modality.2"}),
        ("regressors", "cycle_true", R),
        ("regressors", "alignment_true", R),
        ("regressors", "confusion_true", R | {"modality.0", "modality.1", "modality.2"}),
        ("regressors", "cycle_synthetic", R),
        ("regressors", "alignment_synthetic", R),
        ("modality", "true", {"modality.0", "modality.1", "modality.2"}),
        ("modality", "synthetic", {"modality.0", "modality.1", "modality.2"}),
    ],
)
def test_a_term_reaches_only_the_networks_in_its_equation(phase: str, term: str, reach: set[str]) -> None:
    model = confused()
    data = batch().map(epoch=100)
    chosen = next(p for p in model.phases if p.name == phase)
    assert reached(model, chosen.terms(data, model.shared(data))[term]) == reach


def test_groups_are_disjoint_and_hold_every_parameter() -> None:
    for model in (cfsa(), confused()):
        grouped = [id(p) for group in model.groups.values() for p in group.module.parameters()]
        assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert set(cfsa().groups) == {"critics", "generators", "regressors"}


# -- order of a step -------------------------------------------------------------------------------------------------


def counted(model: Cfsa, data: Batch, **kwargs: Any) -> tuple[dict[str, int], list[tuple[Tensor, Tensor]]]:
    """Optimizer steps by group, and the (photo, first noise) of each critic step, in one outer step."""
    steps = dict.fromkeys(model.groups, 0)
    steppers = optimizers(model)
    for name, stepper in steppers.items():

        def count(*_: Any, name: str = name) -> None:
            steps[name] += 1

        stepper.register_step_post_hook(count)
    seen: list[tuple[Tensor, Tensor]] = []
    made = model.shared

    def shared(batch: Batch) -> Any:
        draws = made(batch)
        seen.append((batch.photo, draws.noise["photo"]))
        return draws

    model.shared = shared  # type: ignore[method-assign]
    step(model, steppers, data, **kwargs)
    return steps, seen


def test_a_step_is_five_critic_steps_on_fresh_batches_and_noise_and_one_of_each_other() -> None:
    steps, seen = counted(confused(), batch(), draw=lambda repetition: batch(seed=repetition))
    assert steps == {"critics": 5, "generators": 1, "regressors": 1, "modality": 1}
    for number, (photo, noise) in enumerate(seen):
        assert photo.equal(batch(seed=number).photo)
        assert not any(noise.equal(other) for _, other in seen[:number])


def test_the_released_critic_sees_one_batch_and_one_noise_in_a_step_and_another_in_the_next() -> None:
    model = cfsa(critic_batches="same")
    _, seen = counted(model, batch(), draw=lambda repetition: batch(seed=repetition))
    assert len(seen) == 5
    assert all(photo.equal(seen[0][0]) and noise.equal(seen[0][1]) for photo, noise in seen)
    for later in (batch().map(index=1), batch().map(epoch=1)):
        assert not model.draw_noise(later)["photo"].equal(seen[0][1])
    torch.manual_seed(1)
    assert not model.draw_noise(batch())["photo"].equal(seen[0][1])


@pytest.mark.parametrize("options", [{}, {"critic_batches": "same"}, {"alignment": "coral"}, {"alignment": "mmd"}])
def test_phases_in_turn_are_all_updates_at_once(options: dict[str, Any]) -> None:
    data = batch().map(epoch=100)

    def moved(at_once: bool) -> dict[str, Tensor]:
        model = confused(critic_steps=1, **options)
        steppers = optimizers(model)
        torch.manual_seed(3)
        draws = model.shared(data)
        gradients = {}
        for phase in model.phases[1:]:
            group = model.groups[phase.moves].module
            gradients[phase.moves] = torch.autograd.grad(total(phase.terms(data, draws)), list(group.parameters()))
            if not at_once:
                apply(model, steppers, phase.moves, gradients.pop(phase.moves))
        for name, gradient in gradients.items():
            apply(model, steppers, name, gradient)
        return state(model)

    together, in_turn = moved(True), moved(False)
    for name, value in together.items():
        assert value.equal(in_turn[name]), name


def apply(model: Cfsa, steppers: dict[str, torch.optim.Optimizer], name: str, gradients: tuple[Tensor, ...]) -> None:
    for parameter, gradient in zip(model.groups[name].module.parameters(), gradients, strict=True):
        parameter.grad = gradient
    steppers[name].step()


# -- losses ----------------------------------------------------------------------------------------------------------


def test_terms_are_their_equations_with_the_weights_of_jfse() -> None:
    model, data = confused(), batch().map(epoch=250)
    draws = model.shared(data)
    fake = draws.fake
    mse = functional.mse_loss

    def cycle(values: Any) -> Tensor:
        return mse(model.regressors["photo"](values["photo"]), data.word) + mse(
            model.regressors["sketch"](values["sketch"]), data.word
        )

    def code(values: Any) -> dict[str, Tensor]:
        return {m: model.regressors[m](values[m]) for m in MODALITIES}

    true = {"photo": data.photo, "sketch": data.sketch}
    judge = cast(nn.Module, model.modality)
    generators, regressors = model.generator_terms(data, draws), model.regressor_terms(data, draws)
    assert_close(generators["adversarial_photo"], -model.critics["photo"](fake["photo"], data.word).mean())
    assert_close(generators["cycle"], 0.1 * cycle(fake))
    assert_close(generators["confusion"], -0.1 * 0.5 * reversal(0.5) * entropy(judge, code(fake)))
    assert_close(regressors["cycle_true"], cycle(true))
    assert_close(regressors["cycle_synthetic"], 0.01 * cycle(fake))
    assert_close(regressors["alignment_true"], 1e-4 * align("cmpm", code(true), data.label))
    assert_close(regressors["alignment_synthetic"], 1e-6 * align("cmpm", code(fake), data.label))
    assert_close(regressors["confusion_true"], -0.5 * reversal(0.5) * entropy(judge, code(true)))
    assert_close(regressors["confusion_synthetic"], -0.01 * 0.5 * reversal(0.5) * entropy(judge, code(fake)))
    critics = model.critic_terms(data, draws)
    gap = model.critics["sketch"](fake["sketch"], data.word) - model.critics["sketch"](data.sketch, data.word)
    assert_close(critics["wasserstein_sketch"], gap.mean())


def test_the_cycle_vanishes_for_a_regressor_that_knows_the_class() -> None:
    model, data = cfsa(), batch()
    assert float(model.cycle({m: data.word for m in MODALITIES}, data.word)) == 0


def test_the_reversal_turns_the_classifiers_gradient_and_grows_from_zero() -> None:
    assert reversal(0) == 0
    assert reversal(0.5) == pytest.approx(0.98661, abs=1e-5)
    assert reversal(1) == pytest.approx(0.99991, abs=1e-5)
    model, data = confused(), batch().map(epoch=250)
    code = {m: torch.randn(4, INPUTS.semantic_dim, requires_grad=True) for m in MODALITIES}
    judge = cast(nn.Module, model.modality)
    plain = torch.autograd.grad(entropy(judge, code), list(code.values()))
    turned = torch.autograd.grad(model.confusion(judge, data, code), list(code.values()))
    for one, other in zip(plain, turned, strict=True):
        assert_close(other, -0.5 * reversal(0.5) * one)


def test_the_released_preset_has_the_widths_of_jfse() -> None:
    wide = Inputs(sketch_dim=300, photo_dim=4096, semantic_dim=300, classes=INPUTS.classes)
    with torch.device("meta"):
        model = build("cfsa", configure("cfsa", {}, "released").model_dump(), wide)
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters() if value.ndim == 2}
    assert shapes == {
        "generators.photo.0.weight": (4096, 600),
        "generators.photo.2.weight": (4096, 4096),
        "generators.sketch.0.weight": (4096, 600),
        "generators.sketch.2.weight": (300, 4096),
        "critics.photo.layers.0.weight": (4096, 4396),
        "critics.photo.layers.2.weight": (1, 4096),
        "critics.sketch.layers.0.weight": (4096, 600),
        "critics.sketch.layers.2.weight": (1, 4096),
        "regressors.photo.0.weight": (4096, 4096),
        "regressors.photo.2.weight": (300, 4096),
        "regressors.sketch.0.weight": (4096, 300),
        "regressors.sketch.2.weight": (300, 4096),
        "modality.0.weight": (150, 300),
        "modality.1.weight": (75, 150),
        "modality.2.weight": (2, 75),
    }


def test_swapping_classes_changes_generators_and_critics() -> None:
    model, data = cfsa(), batch()
    swapped = data.word.flip(0)
    noise = torch.randn(len(data), 5)
    assert not model.generate("photo", data.word, noise).allclose(model.generate("photo", swapped, noise))
    critic = model.critics["photo"]
    assert not critic(data.photo, data.word).allclose(critic(data.photo, swapped))


@pytest.mark.parametrize(("output", "signed"), [("linear", True), ("relu", False)])
def test_a_relu_output_cannot_be_negative(output: str, signed: bool) -> None:
    model, data = cfsa(output=output), batch(rows=64)
    fake = model.shared(data).fake["photo"]
    code = model.encode("photo", data.photo)
    assert (bool((fake < 0).any()), bool((code < 0).any())) == (signed, signed)


def test_unit_words_are_condition_and_target() -> None:
    model, data = cfsa(words="unit"), batch()
    assert_close(model.word(data).norm(dim=1), torch.ones(len(data)))
    assert cfsa(words="given").word(data).equal(data.word)


def test_words_in_minmax_lie_between_0_and_1_by_the_trained_classes() -> None:
    model = cfsa(words="minmax", scaling="unit", output="relu")
    model.begin(torch.tensor([[-1.0, 2.0, 0, 0, 0, 0, 0], [3.0, 6.0, 0, 0, 0, 0, 0]]))
    data = batch(rows=2).map(word=torch.tensor([[1.0, 6.0, 0, 0, 0, 0, 0], [7.0, 2.0, 0, 0, 0, 0, 0]]))
    expected = torch.tensor([[0.5, 1.0, 0, 0, 0, 0, 0], [2.0, 0.0, 0, 0, 0, 0, 0]])
    assert_close(model.word(data), expected, atol=1e-3, rtol=0)
    assert model.scaling == "unit"


def test_the_released_preset_asks_for_what_its_relu_can_reach() -> None:
    config = cast(Config, configure("cfsa", {}, "released"))
    assert (config.output, config.scaling, config.words) == ("relu", "unit", "minmax")


# -- behaviour -------------------------------------------------------------------------------------------------------


def test_a_trained_critic_measures_the_shift_of_two_gaussians() -> None:
    # in more than one dimension: on a line, the penalty keeps a critic that starts with the wrong sign from turning
    torch.manual_seed(0)
    critic = Critic(3, 1, 32)
    stepper = torch.optim.Adam(critic.parameters(), 1e-2, betas=(0.5, 0.9))
    word, shift = torch.zeros(256, 1), torch.tensor([2.0, 0.0, 0.0])
    seen = []
    for _ in range(200):
        true, fake = torch.randn(256, 3) + shift, torch.randn(256, 3)
        gap = critic(true, word).mean() - critic(fake, word).mean()
        stepper.zero_grad()
        torch.autograd.backward(10 * gradient_penalty(critic, true, fake, word) - gap)
        stepper.step()
        seen.append(float(gap.detach()))
    assert sum(seen[-50:]) / 50 == pytest.approx(2, abs=0.3)


def test_training_brings_synthetic_features_to_their_class_and_regressions_to_the_class_vector() -> None:
    model = cfsa(lr=5e-3)
    steppers = optimizers(model)
    seen = []
    for number in range(100):

        def draw(repetition: int, number: int = number) -> Batch:
            return batch(rows=32, seed=10 * number + repetition)

        seen.append(step(model, steppers, draw(0), number, draw)["regressors"]["cycle_true"].item())
    assert seen[-1] < 0.2 * seen[0]
    held = batch(rows=256, seed=9999)
    fake = model.shared(held).fake["photo"]
    centres = torch.stack([held.photo[held.label == label].mean(0) for label in range(len(INPUTS.classes))])
    nearest = torch.cdist(fake, centres).argmin(1)
    assert float((nearest == held.label).float().mean()) > 0.7
