"""ITQ: the alternation, the codes, and what an offset between modalities does to either way in."""

from itertools import pairwise
from typing import Any, cast

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.testing import assert_close

from tests.models.helpers import INPUTS, batch, optimizers, sem_pcyc, step
from zsr.errors import ConfigError
from zsr.metrics import mean_average_precision
from zsr.models.itq import Centre, Coded, learn, pack, principal, rotation, transductive
from zsr.models.protocol import Rows
from zsr.models.sem_pcyc import SemPcyc

CLASSES, EACH, DIM, BITS = 12, 40, 96, 64


def clustered(seed: int = 0, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Centred rows (N, D) around one centre a class, in 24 of the dimensions more than in others; and their classes."""
    draw = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(99)
    label = torch.arange(CLASSES).repeat_interleave(EACH)
    centre = torch.randn(CLASSES, 24, generator=fixed) @ torch.randn(24, DIM, generator=fixed) / 24**0.5
    rows = centre[label] + spread * torch.randn(len(label), DIM, generator=draw)
    return rows - rows.mean(0), label


def bits(codes: Tensor) -> np.ndarray:
    return np.unpackbits(codes.numpy(), axis=-1).astype(bool)


def projected() -> Tensor:
    rows, _ = clustered()
    return rows.double() @ principal(rows.double(), BITS)


# -- the alternation ---------------------------------------------------------------------------------------------------


def test_components_are_orthonormal_with_descending_variance() -> None:
    rows, _ = clustered()
    components = principal(rows.double(), BITS)
    assert_close(components.T @ components, torch.eye(BITS, dtype=torch.float64), atol=1e-6, rtol=0)
    variance = (rows.double() @ components).var(0)
    assert bool((variance[:-1] >= variance[1:] - 1e-9).all())
    assert_close(
        variance.sum() + (rows.double() - rows.double() @ components @ components.T).var(0).sum(),
        rows.double().var(0).sum(),
    )


def test_the_rotation_is_orthogonal() -> None:
    turn = rotation(projected())
    assert_close(turn.T @ turn, torch.eye(BITS, dtype=torch.float64), atol=1e-6, rtol=0)


def test_fifty_alternations_never_raise_the_distance_to_the_corners() -> None:
    values = projected()[:, :16]

    def error(rounds: int) -> float:
        turned = values @ rotation(values, rounds=rounds)
        return float((torch.where(turned > 0, 1.0, -1.0) - turned).square().sum())

    errors = [error(rounds) for rounds in range(51)]
    assert all(after <= before + 1e-6 for before, after in pairwise(errors))
    assert errors[50] < 0.99 * errors[0]


def test_one_alternation_by_hand() -> None:
    # B = sign(V R0) for R0 = I up to the seed; of all orthogonal matrices none comes nearer to these corners than R
    values = torch.tensor([[2.0, 1.0], [-1.0, 2.0], [-2.0, -1.0], [1.0, -2.0]], dtype=torch.float64)
    start = rotation(values, rounds=0)
    corner = torch.where(values @ start > 0, 1.0, -1.0).double()
    best = min(
        float((corner - values @ torch.tensor(each, dtype=torch.float64)).square().sum())
        for angle in np.linspace(0, 2 * np.pi, 3601)
        for c, s in [(np.cos(angle), np.sin(angle))]
        for each in ([[c, -s], [s, c]], [[c, s], [s, -c]])
    )
    assert float((corner - values @ rotation(values, rounds=1)).square().sum()) == pytest.approx(best, abs=1e-4)


def test_the_seed_fixes_the_rotation() -> None:
    values = projected()
    assert rotation(values, seed=3).equal(rotation(values, seed=3))
    assert not rotation(values, seed=3).equal(rotation(values, seed=4))


# -- the codes ---------------------------------------------------------------------------------------------------------


def test_bits_are_packed_as_numpy_does() -> None:
    flags = torch.rand(5, 3, 24, generator=torch.Generator().manual_seed(0)) > 0.5
    assert pack(flags).dtype == torch.uint8
    assert np.array_equal(pack(flags).numpy(), np.packbits(flags.numpy(), axis=-1))


def test_ranking_packed_codes_is_ranking_boolean_distances() -> None:
    query, label = clustered(1)
    gallery, _ = clustered(2)
    q, g = transductive(query, gallery, BITS)
    assert q.shape == (len(query), 8)
    expected = mean_average_precision(bits(q).astype("f4"), bits(g).astype("f4"), label.numpy(), label.numpy(), "l2")
    assert mean_average_precision(q, g, label.numpy(), label.numpy(), "hamming") == pytest.approx(expected)


def test_bits_of_centred_data_are_balanced() -> None:
    query, _ = clustered(1)
    q, g = transductive(query, clustered(2)[0], BITS)
    for codes in (q, g):
        share = bits(codes).mean(0)
        assert share.min() > 0.35
        assert share.max() < 0.65


def test_rotation_helps_over_the_signs_of_principal_components() -> None:
    query, label = clustered(1)
    gallery, _ = clustered(2)
    components = principal(query.double(), BITS)
    plain = [pack(rows.double() @ components > 0) for rows in (query, gallery)]
    turned = transductive(query, gallery, BITS)
    scores = [mean_average_precision(q, g, label.numpy(), label.numpy(), "hamming") for q, g in (plain, turned)]
    assert scores[1] > scores[0]


def test_turning_the_input_leaves_distances_nearly_as_they_were() -> None:
    rows, _ = clustered()
    turn = torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(5)))[0]

    def distances(values: Tensor) -> np.ndarray:
        flags = bits(pack(values.double() @ learn(values, BITS) > 0))
        upper = np.triu_indices(len(flags), 1)
        return np.asarray((flags[:, None] != flags[None]).sum(2)[upper])

    assert float(spearmanr(distances(rows), distances(rows @ turn)).statistic) > 0.95


@pytest.mark.parametrize("wanted", [0, 12, 104])
def test_bits_that_do_not_pack_or_exceed_the_dimensions_are_refused(wanted: int) -> None:
    with pytest.raises(ConfigError, match=f"{wanted} bits of 96-d embeddings; use a multiple of 8"):
        learn(clustered()[0], wanted)


def test_sides_of_different_width_are_refused() -> None:
    with pytest.raises(ConfigError, match="differ in width"):
        transductive(torch.zeros(4, 16), torch.zeros(4, 24), 8)


# -- an offset between the modalities ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("centre", "kept"), [("own", True), ("shared", False)])
def test_a_constant_offset_hurts_real_scores_and_binary_ones_only_with_a_shared_mean(
    centre: Centre, kept: bool
) -> None:
    query, label = clustered(1)
    gallery, _ = clustered(2)
    names = label.numpy()
    moved = gallery + 3.0 * torch.randn(DIM, generator=torch.Generator().manual_seed(7))

    def binary(rows: Tensor) -> float:
        q, g = transductive(query, rows, BITS, centre=centre)
        return mean_average_precision(q, g, names, names, "hamming")

    def real(rows: Tensor) -> float:
        return mean_average_precision(query, rows, names, names, "l2")

    assert real(moved) < 0.8 * real(gallery)
    if kept:
        assert binary(moved) == pytest.approx(binary(gallery), abs=1e-6)
    else:
        assert binary(moved) < 0.8 * binary(gallery)


def test_what_the_codes_are_learned_on_is_an_option() -> None:
    query, _ = clustered(1)
    gallery = clustered(2)[0] * torch.linspace(0.1, 3, DIM)
    of_queries = transductive(query, gallery, BITS)
    of_both = transductive(query, gallery, BITS, learned_on="both")
    assert not of_queries[0].equal(of_both[0])
    assert of_queries[0].equal(transductive(query, 2 * gallery, BITS)[0])


# -- codes of a model --------------------------------------------------------------------------------------------------


def coded(centre: Centre = "own", **options: Any) -> Coded:
    """A SEM-PCYC of 16-d codes after a few steps, fitted to 8 bits."""
    model = sem_pcyc(dim=16, **options)
    steppers = optimizers(model)
    for number in range(5):
        step(model, steppers, batch(rows=32, seed=number), seed=number)
    codes = Coded(model, 8, centre)
    codes.fit(seen())
    return codes


def seen() -> list[Rows]:
    blocks = [batch(rows=32, seed=number) for number in range(8)]
    sides = ("sketch", "photo")
    return [Rows(side, getattr(block, side), block.label) for block in blocks for side in sides]


def test_a_coded_model_embeds_packed_bits_of_any_row_alone() -> None:
    codes = coded()
    assert (codes.metric, codes.dim) == ("hamming", 8)
    photo = batch(seed=9).photo
    whole = codes.encode("photo", photo)
    assert (whole.shape, whole.dtype) == ((len(photo), 1, 1), torch.uint8)
    assert torch.cat([codes.encode("photo", row[None]) for row in photo]).equal(whole)
    assert len(torch.unique(whole)) > 2


@pytest.mark.parametrize(("metric", "centre"), [("l2", "own"), ("l2", "shared"), ("cosine", "own")])
def test_a_code_is_the_sign_of_the_centred_and_turned_embedding(metric: str, centre: Centre) -> None:
    codes = coded(centre, metric=metric)
    model = cast(SemPcyc, codes.model)
    real = {}
    for side in ("sketch", "photo"):
        found = torch.cat([model.encode(side, row.features)[:, 0] for row in seen() if row.modality == side])
        real[side] = torch.nn.functional.normalize(found) if metric == "cosine" else found
    mean = real["sketch"].mean(0)
    if centre == "shared":
        mean = (mean + real["photo"].mean(0)) / 2
    assert_close(codes.mean_sketch, mean)
    assert_close(codes.projection.T @ codes.projection, torch.eye(8), atol=1e-5, rtol=0)
    expected = pack((real["sketch"] - mean) @ codes.projection > 0)
    features = torch.cat([row.features for row in seen() if row.modality == "sketch"])
    assert float((codes.encode("sketch", features)[:, 0] != expected).double().mean()) < 0.01


def test_codes_are_learned_from_rows_alone_and_travel_with_the_weights() -> None:
    first, photo = coded(), batch(seed=9).photo
    again = Coded(sem_pcyc(seed=1, dim=16), 8)
    assert not again.encode("photo", photo).equal(first.encode("photo", photo))
    again.load_state_dict(first.state_dict())
    assert again.encode("photo", photo).equal(first.encode("photo", photo))


def test_a_modality_without_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no seen row of \['photo'\]"):
        Coded(sem_pcyc(dim=16), 8).fit([row for row in seen() if row.modality == "sketch"])


def test_fitting_leaves_the_model_itself_alone() -> None:
    model = sem_pcyc(dim=16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Coded(model, 8).fit(seen())
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert Coded(model, 8).inputs == INPUTS
