"""SketchGCN: the graph's worked examples and limits, what each term reaches, and that the encoders learn."""

import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from tests.models.helpers import INPUTS, batch, optimizers, reached, step
from zsr.batch import Batch
from zsr.models import build
from zsr.models.losses import gaussian_kl
from zsr.models.sketch_gcn import SketchGcn, affinity, normalised

SMALL = {"dim": 6, "hidden": 16, "latent": 3, "latent_hidden": 12}
ENCODERS = {"encoders.sketch", "encoders.photo"}
GRAPH = {"graph.first", "graph.second"}
POSTERIOR = {"generator.hidden", "generator.mean", "generator.log_var"}
WORD = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])


def gcn(seed: int = 0, **options: Any) -> SketchGcn:
    """A SketchGCN of 6-d embeddings in training mode, losses weighted alike, without dropout unless asked for."""
    torch.manual_seed(seed)
    return cast(
        SketchGcn, build("sketch-gcn", {**SMALL, "dropout": 0.0, "feature_weight": 1.0, **options}, INPUTS).train()
    )


def terms(model: SketchGcn, data: Batch, seed: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return model.terms(data, None)


def embedded(model: SketchGcn, data: Batch) -> dict[str, Tensor]:
    return {"sketch": model.encoders["sketch"](data.sketch), "photo": model.encoders["photo"](data.photo)}


# -- graph -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("temperature", "weights", "degrees", "rows", "eigenvalues"),
    [
        (
            0.1,
            (0.018316, 0.0, 0.000335),
            (1.018316, 1.018651, 1.000335),
            ((0.982014, 0.017983, 0.0), (0.017983, 0.981690, 0.000332)),
            (0.963867, 0.999502, 1.0),
        ),
        (
            1.0,
            (0.670320, 0.135335, 0.449329),
            (1.805655, 2.119649, 1.584664),
            ((0.553816, 0.342636, 0.080006), (0.342636, 0.471776, 0.245168)),
            (0.128653, 0.527987, 1.0),
        ),
    ],
)
def test_the_graph_of_three_classes(
    temperature: float,
    weights: tuple[float, ...],
    degrees: tuple[float, ...],
    rows: tuple[tuple[float, ...], ...],
    eigenvalues: tuple[float, ...],
) -> None:

    def equal(value: Tensor, expected: Any) -> None:
        assert_close(value, torch.tensor(expected), atol=1e-6, rtol=0)

    a = affinity(WORD, temperature)
    graph = normalised(a)
    equal(torch.stack([a[0, 1], a[0, 2], a[1, 2]]), weights)
    equal(a.sum(1), degrees)
    equal(graph[:2], rows)
    equal(torch.linalg.eigvalsh(graph), eigenvalues)


def test_the_graph_is_symmetric_with_its_degrees_as_first_eigenvector() -> None:
    torch.manual_seed(0)
    word = functional.normalize(torch.randn(9, 5))[torch.tensor([0, 1, 2, 3, 3, 4, 5, 6, 6])].double()
    a = affinity(word, 0.5)
    graph = normalised(a)
    assert_close(graph, graph.T)
    eigenvalues = torch.linalg.eigvalsh(graph)
    assert float(eigenvalues[0]) == pytest.approx(0, abs=1e-9)  # classes that appear twice
    assert float(eigenvalues[-1]) == pytest.approx(1)
    first = a.sum(1).sqrt()
    assert_close(graph @ first, first, atol=1e-6, rtol=0)


def test_affinities_never_exceed_one_and_are_one_within_a_class() -> None:
    torch.manual_seed(0)
    word = functional.normalize(torch.randn(40, 300)).repeat(2, 1)
    a = affinity(word, 0.01)
    assert float(a.max()) == 1
    assert bool((a.diagonal() == 1).all())
    assert bool((a.diagonal(40) == 1).all())


def test_pairs_of_one_class_all_get_the_same_output() -> None:
    model, data = gcn(), batch()
    graph = normalised(affinity(data.word[:1].expand(len(data), -1), 0.3))
    assert_close(graph, torch.full_like(graph, 1 / len(data)))
    output = model.graph(torch.randn(len(data), 2 * 6 + INPUTS.semantic_dim), graph)
    assert_close(output, output[:1].expand_as(output))


def test_a_cold_graph_of_distinct_classes_is_a_plain_network_and_a_hot_one_a_mean() -> None:
    model = gcn()
    word = functional.normalize(torch.randn(5, 7))
    node = torch.randn(5, 2 * 6 + INPUTS.semantic_dim)
    plain = model.graph.second(functional.relu(model.graph.first(node)))
    assert_close(model.graph(node, normalised(affinity(word, 1e-3))), plain, atol=1e-6, rtol=0)
    hot = model.graph(node, normalised(affinity(word, 1e9)))
    assert_close(hot, hot[:1].expand_as(hot), atol=1e-5, rtol=0)


def test_permuting_a_batch_permutes_the_graphs_outputs() -> None:
    model, data = gcn(), batch()
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(3))
    moved = data.map(sketch=data.sketch[order], photo=data.photo[order], word=data.word[order], label=data.label[order])
    plain = model.relate(embedded(model, data), data.word)
    assert_close(model.relate(embedded(model, moved), moved.word), plain[order])


def test_nodes_without_semantics_feel_the_class_through_the_graph_alone() -> None:
    model, data = gcn(node_semantics=False, temperature=1e-3), batch(rows=6)
    assert model.graph.first.in_features == 2 * 6
    inside = embedded(model, data)
    distinct = functional.normalize(torch.randn(6, 7, generator=torch.Generator().manual_seed(0)))
    assert_close(model.relate(inside, distinct), model.relate(inside, distinct.flip(0)), atol=1e-6, rtol=0)
    with_words = gcn(temperature=1e-3)
    inside = embedded(with_words, data)
    assert not with_words.relate(inside, distinct).allclose(with_words.relate(inside, distinct.flip(0)), atol=1e-3)


@pytest.mark.parametrize(("temperature", "share"), [(1e-3, "0.000"), (1e9, "0.667")])
def test_training_begins_by_saying_how_far_the_graph_mixes_classes(
    temperature: float, share: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Three classes of which none, or all alike, are neighbours."""
    with caplog.at_level("INFO", logger="zsr"):
        gcn(temperature=temperature).begin(WORD)
    assert f"fraction of weights on other classes {share}" in caplog.text


def test_unit_words_make_the_terms_blind_to_the_length_of_class_vectors() -> None:
    data = batch()
    longer = data.map(word=3 * data.word)
    for words, same in (("unit", True), ("given", False)):
        short, long = (terms(gcn(words=words), d) for d in (data, longer))
        assert all(short[name].allclose(long[name]) for name in ("feature", "reconstruction")) is same


# -- terms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("term", "parts"),
    [
        ("feature", ENCODERS | GRAPH),
        ("classification_sketch", {"encoders.sketch", "classifier.weight", "classifier.bias"}),
        ("classification_photo", {"encoders.photo", "classifier.weight", "classifier.bias"}),
        ("classification_graph", ENCODERS | GRAPH | {"classifier.weight", "classifier.bias"}),
        ("reconstruction", ENCODERS | POSTERIOR | {"generator.decoder"}),
        ("divergence", ENCODERS | POSTERIOR),
    ],
)
def test_a_term_reaches_only_the_networks_in_its_equation(term: str, parts: set[str]) -> None:
    model = gcn()
    assert reached(model, terms(model, batch().map(epoch=10))[term]) == parts


def test_a_detached_target_leaves_the_graph_to_the_classifier() -> None:
    model = gcn(detach_target=True)
    assert reached(model, terms(model, batch())["feature"]) == ENCODERS
    assert reached(model, terms(model, batch())["classification_graph"]) >= GRAPH
    assert_close(terms(model, batch())["feature"], terms(gcn(), batch())["feature"])


def test_the_feature_loss_is_the_squared_distance_of_both_embeddings_to_the_graph() -> None:
    model = gcn()
    near = {"sketch": torch.full((4, 6), 2.0), "photo": torch.full((4, 6), -1.0)}
    assert_close(model.feature_loss(near, torch.zeros(4, 6)), torch.tensor(6 * 4.0 + 6 * 1.0))


def test_classification_starts_at_the_logarithm_of_the_classes() -> None:
    losses = terms(gcn(), batch(rows=64))
    for name in ("sketch", "photo", "graph"):
        assert float(losses[f"classification_{name}"].detach()) == pytest.approx(math.log(6), abs=0.35)


def test_the_divergence_warms_up_over_five_epochs_and_is_the_closed_form() -> None:
    model, data = gcn(), batch()
    word = functional.normalize(data.word)
    full = torch.stack([gaussian_kl(*model.generator.encode(word, v)) for v in embedded(model, data).values()]).sum()
    for epoch, share in ((0, 0.0), (2, 0.4), (5, 1.0), (30, 1.0)):
        assert_close(terms(model, data.map(epoch=epoch))["divergence"], share * full)


def test_reconstruction_is_the_squared_error_of_the_generated_class_vectors() -> None:
    model, data = gcn(), batch()
    with torch.no_grad():
        # a posterior without spread generates the decoding of its mean
        model.generator.log_var.weight.zero_()
        model.generator.log_var.bias.fill_(-80)
    word = functional.normalize(data.word)
    expected = torch.zeros(())
    for values in embedded(model, data).values():
        made = model.generator.decode(model.generator.encode(word, values)[0], values)
        expected = expected + (made - word).square().sum(1).mean()
    assert_close(terms(model, data)["reconstruction"], expected)


def test_weights_scale_their_losses() -> None:
    data = batch().map(epoch=10)
    threes: dict[str, Any] = {"feature_weight": 3.0, "classification_weight": 3.0, "semantic_weight": 3.0}
    plain, scaled = terms(gcn(), data), terms(gcn(**threes), data)
    for name, value in plain.items():
        assert_close(scaled[name], 3 * value)
    assert_close(terms(gcn(beta=2.0), data)["divergence"], 2 * plain["divergence"])


def test_dropout_acts_in_training_only() -> None:
    model, data = gcn(dropout=0.5), batch()
    assert not terms(model, data, 1)["feature"].equal(terms(model, data, 2)["feature"])
    model.eval()
    assert terms(model, data, 1)["feature"].equal(terms(model, data, 2)["feature"])


# -- behaviour -------------------------------------------------------------------------------------------------------


def test_an_embedding_is_the_encoders_and_does_not_depend_on_its_batch_mates() -> None:
    model, photo = gcn(dropout=0.5), batch(rows=64).photo
    whole = model.encode("photo", photo)
    assert whole.shape == (64, 1, 6)
    assert_close(whole[:1], model.encode("photo", photo[:1]))
    assert_close(whole[:, 0], model.eval().encoders["photo"](photo).detach())


def test_training_classifies_either_embedding_and_draws_both_to_the_graph() -> None:
    model = gcn(lr=2e-2)
    steppers = optimizers(model)
    seen = [step(model, steppers, batch(rows=64, seed=n), n)["all"] for n in range(60)]
    for name in ("feature", "classification_sketch", "classification_photo", "reconstruction"):
        assert seen[-1][name].item() < 0.6 * seen[0][name].item()
    held = batch(rows=128, seed=999)
    for values in embedded(model, held).values():
        assert float((model.classifier(values).argmax(1) == held.label).float().mean()) > 0.9


def test_one_batch_without_divergence_is_reconstructed_and_generated_classes_vary() -> None:
    model = gcn(lr=2e-2, beta=0.0, feature_weight=0.0, classification_weight=0.0)
    steppers = optimizers(model)
    seen = [step(model, steppers, batch(), n)["all"]["reconstruction"].item() for n in range(150)]
    assert seen[-1] < 0.05 * seen[0]
    values = embedded(model, batch())["photo"][:1].expand(50, -1)
    assert float(model.generator.decode(torch.randn(50, 3), values).detach().var(0).sum()) > 0
