"""Similarities in a WordNet of eight nouns, in WordNet's own file format.

entity -> animal -> dog, cat, bat        entity -> plant -> rose        entity -> club, hot-air_balloon
"""

import json
import math
from pathlib import Path

import pytest

from zsr.artifact import Artifact, Store
from zsr.data.semantics import build, class_vectors
from zsr.data.semantics.settings import Settings
from zsr.errors import ConfigError, DamagedArtifact

pytest.importorskip("nltk", reason="the extra 'text' is not installed")

# synset: (lemmas, the synset above); a lemma's senses are numbered in this order
NOUNS = {
    "entity": (["entity"], None),
    "animal": (["animal"], "entity"),
    "bat": (["bat"], "animal"),
    "cat": (["cat"], "animal"),
    "club": (["club", "bat"], "entity"),
    "dog": (["dog"], "animal"),
    "hot-air_balloon": (["hot-air_balloon"], "entity"),
    "plant": (["plant"], "entity"),
    "rose": (["rose"], "plant"),
}
HEADER = "  1 as WordNet's own files begin with their licence\n"
COUNTS = {"entity": 8, "animal": 4, "dog": 2, "cat": 2, "plant": 2, "rose": 1}


def synset_line(name: str, offsets: dict[str, int]) -> str:
    lemmas, above = NOUNS[name]
    words = " ".join(f"{lemma} 0" for lemma in lemmas)
    pointers = f"001 @ {offsets[above]:08d} n 0000" if above else "000"
    return f"{offsets[name]:08d} 03 n {len(lemmas):02x} {words} {pointers} | {name}  \n"


def write_wordnet(folder: Path) -> dict[str, int]:
    """The database files, without the one that Debian leaves out; returns the synsets' offsets."""
    folder.mkdir()
    offsets = dict.fromkeys(NOUNS, 0)
    place = len(HEADER)
    for name in NOUNS:
        offsets[name] = place
        place += len(synset_line(name, offsets))
    (folder / "data.noun").write_text(HEADER + "".join(synset_line(name, offsets) for name in NOUNS))
    senses: dict[str, list[str]] = {}
    for name, (lemmas, _) in NOUNS.items():
        for lemma in lemmas:
            senses.setdefault(lemma, []).append(f"{offsets[name]:08d}")
    lines = [f"{lemma} n {len(at)} 1 @ {len(at)} 0 {' '.join(at)}  \n" for lemma, at in sorted(senses.items())]
    (folder / "index.noun").write_text("".join(lines))
    for part in ("verb", "adj", "adv"):
        (folder / f"index.{part}").write_text("")
        (folder / f"data.{part}").write_text("")
    for part in ("noun", "verb", "adj", "adv"):
        (folder / f"{part}.exc").write_text("")
    return offsets


def write_content(file: Path, offsets: dict[str, int]) -> Path:
    lines = [f"{offsets[name]}n {count}{' ROOT' if name == 'entity' else ''}\n" for name, count in COUNTS.items()]
    file.write_text("wnver::ours\n" + "".join(lines))
    return file


def made(folder: Path, kind: str, *labels: str, **settings: object) -> Artifact:
    return build(labels, [kind], Store.at(folder / "out"), Settings(wordnet=folder / "wordnet", **settings))


@pytest.mark.parametrize(
    ("measure", "dog"),
    [
        # nodes:     animal, cat, dog, entity
        ("path", [1 / 2, 1 / 3, 1, 1 / 3]),
        ("lch", [-math.log(2 / 4), -math.log(3 / 4), -math.log(1 / 4), -math.log(3 / 4)]),
        ("wup", [4 / 5, 4 / 6, 1, 2 / 4]),
        ("jcn", [1, 1 / (2 * math.log(2)), 1, 0]),  # 1 / log 2 and infinity are clipped
        ("lin", [2 * math.log(2) / math.log(8), 1 / 2, 1, 0]),
    ],
)
def test_a_class_is_its_similarities_to_all_nodes_in_alphabetical_order(
    tmp_path: Path, measure: str, dog: list[float]
) -> None:
    kind, offsets = f"wordnet-{measure}", write_wordnet(tmp_path / "wordnet")
    content = {kind: write_content(tmp_path / "ic.dat", offsets)} if measure in ("jcn", "lin") else {}
    semantics = made(tmp_path, kind, "dog", "cat", information_content=content)
    assert class_vectors(semantics, ["dog"])[0] == pytest.approx(dog, abs=1e-6)
    assert json.loads(semantics.read(f"{kind}.json")) == {
        "nodes": ["animal.n.01", "cat.n.01", "dog.n.01", "entity.n.01"],
        "senses": {"cat": "cat.n.01", "dog": "dog.n.01"},
    }


def test_senses_are_the_first_or_the_named_one(tmp_path: Path) -> None:
    write_wordnet(tmp_path / "wordnet")
    first = made(tmp_path, "wordnet-path", "bat", "hot_air_balloon")
    named = made(tmp_path, "wordnet-path", "bat", "hot_air_balloon", senses={"bat": "bat.n.02"})
    assert json.loads(first.read("wordnet-path.json"))["senses"] == {
        "bat": "bat.n.01",
        "hot_air_balloon": "hot-air_balloon.n.01",
    }
    assert json.loads(named.read("wordnet-path.json"))["senses"]["bat"] == "club.n.01"
    assert class_vectors(first, ["bat"]).tolist() != class_vectors(named, ["bat"]).tolist()


@pytest.mark.parametrize(
    ("label", "senses", "message"),
    [
        ("quagga", {}, "no noun 'quagga'"),
        ("dog", {"dog": "dog.n.07"}, "dog.n.07"),
        ("dog", {"dog": "?"}, "not a synset"),
    ],
)
def test_a_class_without_a_synset_is_an_error(tmp_path: Path, label: str, senses: dict[str, str], message: str) -> None:
    write_wordnet(tmp_path / "wordnet")
    with pytest.raises(ConfigError, match=message):
        made(tmp_path, "wordnet-path", label, senses=senses)


def test_information_contents_of_another_wordnet_are_refused(tmp_path: Path) -> None:
    offsets = write_wordnet(tmp_path / "wordnet")
    file = write_content(tmp_path / "ic.dat", {name: offset + 7 for name, offset in offsets.items()})
    with pytest.raises(ConfigError, match="another WordNet version"):
        made(tmp_path, "wordnet-lin", "dog", information_content={"wordnet-lin": file})
    with pytest.raises(ConfigError, match="--information-content wordnet-jcn=FILE"):
        made(tmp_path, "wordnet-jcn", "dog")


def test_a_damaged_wordnet_is_refused(tmp_path: Path) -> None:
    write_wordnet(tmp_path / "wordnet")
    (tmp_path / "wordnet" / "index.noun").write_text("dog n one\n")
    with pytest.raises(DamagedArtifact, match="WordNet"):
        made(tmp_path, "wordnet-path", "dog")
