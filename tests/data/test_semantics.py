"""Class vectors: composed as documented, and never silently missing."""

import json
from pathlib import Path

import numpy as np
import pytest

from zsr.artifact import Store
from zsr.commands.semantics import Config
from zsr.data.semantics import build, class_vectors
from zsr.data.semantics.settings import Settings
from zsr.data.semantics.words import compose, layout, read_vectors
from zsr.errors import ConfigError, DamagedArtifact

LOOKUP = {word: np.full(2, value, np.float32) for value, word in enumerate(["hot", "air", "balloon", "hot-air", "ant"])}
TABLE = {"cat": [1.0, 0.5], "dog": [0.0, -2.0], "hot_dog": [3.0, 0.25], "Eiffel_Tower": [0.125, 4.0]}


@pytest.mark.parametrize(
    ("label", "value"), [("ant", 4.0), ("air_balloon", 1.5), ("hot_air_balloon", 2.5), ("ant_(hot)", 2.0)]
)
def test_names_are_means_over_their_longest_known_runs(label: str, value: float) -> None:
    assert compose(label, LOOKUP).tolist() == [value, value]


@pytest.mark.parametrize("label", ["zebra", "hot_zebra", "&"])
def test_a_word_without_a_vector_is_an_error(label: str) -> None:
    with pytest.raises(ConfigError, match="class"):
        compose(label, LOOKUP)


def test_unknown_words_count_as_zeros_when_asked_to_and_are_named() -> None:
    unknown: list[str] = []
    assert compose("air_zebra", LOOKUP, unknown=unknown).tolist() == [0.5, 0.5]
    assert unknown == ["zebra"]
    with pytest.raises(ConfigError, match="'quagga'"):
        compose("quagga", LOOKUP, unknown=unknown)


def test_vectors_come_back_in_the_order_asked_for(tmp_path: Path) -> None:
    semantics = build(["cat", "dog", "jack_o_lantern"], ["glove"], Store.at(tmp_path))
    both = class_vectors(semantics, ["dog", "cat"])
    assert both.shape == (2, 50)
    assert np.array_equal(both[::-1], class_vectors(semantics, ["cat", "dog"]))
    with pytest.raises(ConfigError, match="zebra"):
        class_vectors(semantics, ["cat", "zebra"])


@pytest.mark.parametrize(
    ("labels", "kinds", "message"),
    [
        ([], ["glove"], "no class names"),
        (["cat"], ["nonsense"], "nonsense"),
        (["cat"], ["word2vec"], "--vectors word2vec=PATH"),
        (["cat"], ["wordnet-path"], "--wordnet"),
    ],
)
def test_what_cannot_be_built_is_explained(tmp_path: Path, labels: list[str], kinds: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(labels, kinds, Store.at(tmp_path))


def test_flags_become_settings(tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text(json.dumps({"Table Lamp": "lamp"}))
    flags = Config(output=tmp_path, vectors=("glove=a=b.txt",), names=tmp_path / "names.json")
    assert flags.settings() == Settings(vectors={"glove": Path("a=b.txt").absolute()}, names={"table_lamp": "lamp"})
    with pytest.raises(ConfigError, match="KIND=PATH"):
        Config(output=tmp_path, vectors=("glove.txt",)).settings()


def text_file(path: Path, *, header: bool) -> Path:
    lines = [f"{word} {' '.join(map(str, numbers))}" for word, numbers in TABLE.items()]
    path.write_text("\n".join([f"{len(TABLE)} 2", *lines] if header else lines) + "\n")
    return path


def binary_file(path: Path) -> Path:
    models = pytest.importorskip("gensim.models", reason="the extra 'text' is not installed")
    vectors = models.KeyedVectors(2)
    vectors.add_vectors(list(TABLE), np.array(list(TABLE.values()), np.float32))
    vectors.save_word2vec_format(str(path), binary=True)
    return path


def test_layouts_are_told_by_content_and_hold_the_same_vectors(tmp_path: Path) -> None:
    files = {
        "binary": binary_file(tmp_path / "v.gz"),  # as gensim's own archive names it
        "text": text_file(tmp_path / "v.bin", header=True),
        "glove": text_file(tmp_path / "v.txt", header=False),
    }
    for name, file in files.items():
        assert layout(file) == name
        found = read_vectors(file, {"dog", "hot_dog", "zebra"})
        assert {word: vector.tolist() for word, vector in found.items()} == {w: TABLE[w] for w in ("dog", "hot_dog")}


def test_a_class_is_found_under_its_underscored_or_other_name(tmp_path: Path) -> None:
    settings = Settings(vectors={"word2vec": binary_file(tmp_path / "v")}, names={"tower": "Eiffel Tower"})
    semantics = build(["cat", "hot_dog", "tower"], ["word2vec"], Store.at(tmp_path / "out"), settings)
    assert class_vectors(semantics, ["tower", "hot_dog"]).tolist() == [TABLE["Eiffel_Tower"], TABLE["hot_dog"]]


def test_kinds_stand_side_by_side_in_sorted_order(tmp_path: Path) -> None:
    settings = Settings(vectors={"word2vec": binary_file(tmp_path / "v")})
    both = class_vectors(build(["cat", "dog"], ["word2vec", "glove"], Store.at(tmp_path / "out"), settings), ["dog"])
    assert both.shape == (1, 52)
    assert both[0, 50:].tolist() == TABLE["dog"]


def test_another_file_makes_another_artifact_and_an_idle_one_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("gensim", reason="the extra 'text' is not installed")
    file, store = text_file(tmp_path / "v", header=True), Store.at(tmp_path / "out")
    before = build(["cat"], ["word2vec"], store, Settings(vectors={"word2vec": file}))
    file.write_text(file.read_text().replace("0.5", "0.75"))
    after = build(["cat"], ["word2vec"], store, Settings(vectors={"word2vec": file}))
    assert class_vectors(before, ["cat"]).tolist() == [[1.0, 0.5]]
    assert class_vectors(after, ["cat"]).tolist() == [[1.0, 0.75]]
    with pytest.raises(ConfigError, match=r"\['word2vec'\]"):
        build(["cat"], ["glove"], store, Settings(vectors={"word2vec": file}))


def test_files_that_are_no_vectors_are_explained(tmp_path: Path) -> None:
    short = binary_file(tmp_path / "v")
    short.write_bytes(short.read_bytes()[:-5])
    with pytest.raises(DamagedArtifact, match="binary"):
        read_vectors(short, {"cat"})
    short.write_text("once upon a time\n")
    with pytest.raises(ConfigError, match="neither"):
        read_vectors(short, {"cat"})


@pytest.mark.parametrize("number", ["nan", "inf", "1e400", "1e39"])
def test_vectors_that_are_not_finite_are_refused_by_their_word(tmp_path: Path, number: str) -> None:
    file = tmp_path / "vectors.txt"
    file.write_text(f"cat 1 2 3\nnan 1 2 3\ndog 1 {number} 3\n")
    assert read_vectors(file, {"cat", "nan"})["nan"].tolist() == [1, 2, 3]
    with pytest.raises(DamagedArtifact, match=r"vectors.txt: the vectors of \['dog'\] hold NaN"):
        build(["cat", "dog"], ["glove"], Store.at(tmp_path / "out"), Settings(vectors={"glove": file}))
    assert not (tmp_path / "out" / "versions").exists()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "latin-1", "utf-16"])
def test_tables_of_names_are_utf8(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "names.json").write_text('{"k\u00e4tzchen": "kitten"}', encoding=encoding)
    flags = Config(output=tmp_path, names=tmp_path / "names.json")
    if encoding == "utf-8-sig":
        assert flags.settings().names == {"k\u00e4tzchen": "kitten"}
        return
    with pytest.raises(ConfigError, match=r"--names .*names.json: line .* is not UTF-8"):
        flags.settings()


def test_fasttext_makes_a_word_that_it_never_saw_of_its_n_grams(tmp_path: Path) -> None:
    fasttext = pytest.importorskip("gensim.models.fasttext", reason="the extra 'text' is not installed")
    model = fasttext.FastText([["cat", "dog", "cats"]] * 5, vector_size=4, min_count=1, bucket=50, epochs=1, seed=0)
    file = tmp_path / "tiny.bin"
    fasttext.save_facebook_model(model, str(file))
    found = read_vectors(file, {"cat", "catz", "cat-dog"})
    assert found["cat"] == pytest.approx(model.wv["cat"], abs=1e-6)
    assert found["catz"] == pytest.approx(model.wv["catz"], abs=1e-6)
    assert "cat-dog" not in found  # a run of words is looked up whole, or not at all
