"""Ids, orders and names."""

import numpy as np
import pytest

from zsr.data.rows import canonical_label, home_rank, order_key, require_modality, row_id
from zsr.errors import ConfigError


def test_an_id_depends_on_modality_and_key_and_has_63_bits() -> None:
    assert row_id("photo", "a") == row_id("photo", "a")
    assert row_id("photo", "a") != row_id("sketch", "a")
    assert all(0 <= row_id("photo", str(i)) < 2**63 for i in range(1000))


def test_the_order_is_a_seeded_bijection() -> None:
    ids = np.arange(10_000)
    assert len(np.unique(order_key(ids, 0))) == len(ids)
    assert not np.array_equal(np.argsort(order_key(ids, 0)), np.argsort(order_key(ids, 1)))


def test_any_prefix_of_the_order_is_a_fair_sample_of_classes() -> None:
    labels = np.repeat(np.arange(10), 1000)
    ids = np.array([row_id("photo", str(i)) for i in range(10_000)])
    prefix = labels[np.argsort(order_key(ids, 0))[:1000]]
    counts = np.bincount(prefix, minlength=10)
    chi_square = float(((counts - 100) ** 2 / 100).sum())
    assert chi_square < 27.9  # 99.9 % quantile at 9 degrees of freedom


def test_home_ranks_are_even() -> None:
    ids = np.array([row_id("photo", str(i)) for i in range(8000)])
    assert all(1800 < n < 2200 for n in np.bincount(home_rank(ids, 4)))


@pytest.mark.parametrize(
    ("spelt", "canonical"),
    [
        ("hot-air_balloon", "hot_air_balloon"),
        ("palm tree", "palm_tree"),
        ("Car_(Sedan)", "car_(sedan)"),
        (" ant ", "ant"),
    ],
)
def test_names_have_one_spelling(spelt: str, canonical: str) -> None:
    assert canonical_label(spelt) == canonical


def test_an_unknown_modality_is_named() -> None:
    with pytest.raises(ConfigError, match="smell"):
        require_modality("smell")
