"""Class vectors: composed as documented, and never silently missing."""

from pathlib import Path

import numpy as np
import pytest

from zsr.artifact import Store
from zsr.data.semantics import build, class_vectors, compose
from zsr.errors import ConfigError

LOOKUP = {word: np.full(2, value, np.float32) for value, word in enumerate(["hot", "air", "balloon", "hot-air", "ant"])}


@pytest.mark.parametrize(
    ("label", "value"), [("ant", 4.0), ("air_balloon", 1.5), ("hot_air_balloon", 2.5), ("ant_(hot)", 2.0)]
)
def test_names_are_means_over_their_longest_known_runs(label: str, value: float) -> None:
    assert compose(label, LOOKUP).tolist() == [value, value]


@pytest.mark.parametrize("label", ["zebra", "hot_zebra", "&"])
def test_a_word_without_a_vector_is_an_error(label: str) -> None:
    with pytest.raises(ConfigError, match="class"):
        compose(label, LOOKUP)


def test_vectors_come_back_in_the_order_asked_for(tmp_path: Path) -> None:
    semantics = build(["cat", "dog", "jack_o_lantern"], ["glove"], Store.at(tmp_path))
    both = class_vectors(semantics, ["dog", "cat"])
    assert both.shape == (2, 50)
    assert np.array_equal(both[::-1], class_vectors(semantics, ["cat", "dog"]))
    with pytest.raises(ConfigError, match="zebra"):
        class_vectors(semantics, ["cat", "zebra"])


@pytest.mark.parametrize(("labels", "kinds"), [([], ["glove"]), (["cat"], ["nonsense"])])
def test_what_cannot_be_built_is_explained(tmp_path: Path, labels: list[str], kinds: list[str]) -> None:
    with pytest.raises(ConfigError):
        build(labels, kinds, Store.at(tmp_path))
