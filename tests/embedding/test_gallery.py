"""The rows of EMB: what is published of a model's output, and what is refused."""

import numpy as np
import pyarrow as pa
import pytest

from zsr.data.decode import VERSION
from zsr.embedding.gallery import embedding_table, unlike
from zsr.errors import ConfigError

ROWS = pa.table({"id": [7, 8, 9], "key": ["a", "b", "c"], "label": ["x", None, "y"]})


def test_vectors_of_an_item_become_consecutive_rows() -> None:
    table = embedding_table(ROWS, np.arange(12, dtype=np.float32).reshape(3, 2, 2))
    assert table.column("key").to_pylist() == ["a", "a", "b", "b", "c", "c"]
    assert table.column("part").to_pylist() == [0, 1] * 3
    assert table.column("embedding").to_pylist()[3] == [6, 7]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e20])
def test_an_embedding_without_distances_is_refused_by_its_key(value: float) -> None:
    embeddings = np.ones((3, 2, 4), np.float32)
    embeddings[1, 1, 2] = value
    with pytest.raises(ConfigError, match="the vector of 'b'"):
        embedding_table(ROWS, embeddings)


def test_features_of_a_version_of_decoding_that_agrees_are_those_of_the_checkpoint() -> None:
    trained = {"backbone": "lite0", "size": 96, "decode": VERSION}
    assert unlike(trained, {**trained, "decode": VERSION - 1}) == []
    assert unlike({**trained, "decode": 1}, trained) == [f"decode was 1, here it is {VERSION}"]
    assert unlike(trained, {**trained, "size": 224, "decode": 2}) == ["size was 96, here it is 224"]
    assert unlike({"backbone": "imported"}, trained)[0] == "backbone was 'imported', here it is 'lite0'"
