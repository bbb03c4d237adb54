"""The Wikipedia set's lists and features become rows, and what does not fit is named."""

from pathlib import Path

import numpy as np
import pytest

from tests.data.sources.helpers import SHARED, rows
from zsr.data.sources.wikipedia import Wikipedia
from zsr.errors import ConfigError, DamagedArtifact


def wikipedia(folder: Path) -> Path:
    io = pytest.importorskip("scipy.io")
    (folder / "categories.list").write_text("art\nbiology\n")
    (folder / "trainset_txt_img_cat.list").write_text("t1\ti1\t2\nt2\ti2\t1\n")
    (folder / "testset_txt_img_cat.list").write_text("t3\ti3\t1\n")
    matrices = {"I_tr": [[1.0, 2], [3, 4]], "T_tr": [[5.0], [6]], "I_te": [[7.0, 8]], "T_te": [[9.0]]}
    io.savemat(folder / "raw_features.mat", matrices)
    return folder


def test_wikipedia_pairs_have_features_and_no_bytes(tmp_path: Path) -> None:
    source = Wikipedia(wikipedia(tmp_path))
    found = rows(source)
    assert {(*at, item.label, item.pair, tuple(source.feature(item))) for at, item in found.items()} == {
        ("photo", "train/i1", "biology", None, (1.0, 2.0)),
        ("photo", "train/i2", "art", None, (3.0, 4.0)),
        ("photo", "test/i3", "art", None, (7.0, 8.0)),
        ("text", "train/t1", "biology", "train/i1", (5.0,)),
        ("text", "train/t2", "art", "train/i2", (6.0,)),
        ("text", "test/t3", "art", "test/i3", (9.0,)),
    }
    assert {source.load(item) for item in found.values()} == {b""}
    assert {item.text for item in found.values()} == {None}


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("testset_txt_img_cat.list", "t3\ti3\t1\nt4\ti4\t1\n", ConfigError),
        ("testset_txt_img_cat.list", "t3\ti3\t3\n", ConfigError),
        ("raw_features.mat", "once upon a time", DamagedArtifact),
    ],
)
def test_lists_and_features_that_do_not_fit_are_refused(
    tmp_path: Path, name: str, content: str, error: type[Exception]
) -> None:
    (wikipedia(tmp_path) / name).write_text(content)
    with pytest.raises(error, match=name):
        list(Wikipedia(tmp_path).items())


@pytest.mark.skipif(not (SHARED / "wikipedia").is_dir(), reason="the Wikipedia set is not beside this checkout")
def test_the_published_wikipedia_set() -> None:
    source = Wikipedia(SHARED / "wikipedia")
    items = list(source.items())
    tests = [item for item in items if item.key.startswith("test/") and item.modality == "text"]
    assert (len(items), len(tests)) == (2 * 2866, 693)
    assert sum(item.label == "art" for item in tests) == 34
    assert {len(source.feature(item)) for item in tests} == {10}
    assert np.isfinite(source.feature(items[0])).all()
