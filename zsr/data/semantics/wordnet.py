"""WordNet class embeddings: the similarities of a class to every node of the classes' hierarchy.

As in the first published preprocessing of SEM-PCYC (Dutta and Akata, CVPR 2019): a class is a noun synset, the nodes
are these synsets and all their hypernyms, in alphabetical order, and an entry is the similarity of class and node.
With d the length of the shortest path, IC the information content and c the lowest common ancestor of a and b:

    wordnet-path   1 / (d + 1)
    wordnet-lch    -log((d + 1) / (2 * depth of the hierarchy))
    wordnet-wup    2 depth(c) / (depth(a) + depth(b))
    wordnet-jcn    min(1, 1 / (IC(a) + IC(b) - 2 IC(c)))      Brown's information content there
    wordnet-lin    2 IC(c) / (IC(a) + IC(b))                  SemCor's information content there

NLTK computes them from WordNet's database files and the information contents of WordNet::Similarity, both given by the
user. The senses of the classes and the order of the nodes are stored in the artifact.
"""

import hashlib
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np

from zsr.data.semantics.settings import Kind, Made, Settings, existing
from zsr.data.semantics.words import words_of
from zsr.errors import ConfigError, DamagedArtifact

FILES: Final = ("index.noun", "data.noun", "noun.exc")  # the files that noun similarities are computed from
LEXICOGRAPHER_FILES: Final = 45  # in WordNet since 1.6; their names have no effect

# Made by hand for WordNet 3.0: Sketchy's classes whose first sense is not the object drawn, such as the proverb for a
# saw. SEM-PCYC used a similar table, which was not released.
SENSES: Final = {
    "banana": "banana.n.02",
    "blimp": "blimp.n.02",
    "cabin": "cabin.n.02",
    "car_(sedan)": "sedan.n.01",
    "castle": "castle.n.02",
    "chicken": "chicken.n.02",
    "church": "church.n.02",
    "dolphin": "dolphin.n.02",
    "hammer": "hammer.n.02",
    "hedgehog": "hedgehog.n.02",
    "hotdog": "hotdog.n.02",
    "jack_o_lantern": "jack-o'-lantern.n.02",
    "jellyfish": "jellyfish.n.02",
    "lobster": "lobster.n.02",
    "pineapple": "pineapple.n.02",
    "raccoon": "raccoon.n.02",
    "racket": "racket.n.04",
    "ray": "ray.n.07",
    "saw": "saw.n.02",
    "scorpion": "scorpion.n.03",
    "seal": "seal.n.09",
    "table": "table.n.02",
    "tiger": "tiger.n.02",
    "turtle": "turtle.n.02",
    "volcano": "volcano.n.02",
}

Content = Mapping[str, Mapping[int, float]]
Synset = Any  # NLTK has no types
Measure = Callable[[Synset, Synset, Content | None], float | None]

MEASURES: Final[dict[str, tuple[Measure, bool]]] = {  # and whether it requires information contents
    "path": (lambda a, b, _: a.path_similarity(b), False),
    "lch": (lambda a, b, _: a.lch_similarity(b), False),
    "wup": (lambda a, b, _: a.wup_similarity(b), False),
    "jcn": (lambda a, b, content: min(1.0, a.jcn_similarity(b, content)), True),
    "lin": (lambda a, b, content: a.lin_similarity(b, content), True),
}


def _folder(measure: str, settings: Settings) -> Path:
    if settings.wordnet is None:
        raise ConfigError(
            f"kind 'wordnet-{measure}' requires WordNet's database files: --wordnet DIR, such as /usr/share/wordnet of "
            "Debian's wordnet-base, or nltk_data/corpora/wordnet"
        )
    for name in FILES:
        existing(settings.wordnet / name, "--wordnet")
    return settings.wordnet


def _content_file(measure: str, settings: Settings) -> Path | None:
    if not MEASURES[measure][1]:
        return None
    kind = f"wordnet-{measure}"
    if kind not in settings.information_content:
        raise ConfigError(
            f"kind {kind!r} requires information contents in the format of WordNet::Similarity: --information-content "
            f"{kind}=FILE, such as ic-brown.dat"
        )
    return existing(settings.information_content[kind], f"--information-content {kind}")


def _inputs(measure: str, settings: Settings) -> Any:
    folder, content = _folder(measure, settings), _content_file(measure, settings)
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (folder / name for name in FILES)}
    if content is not None:
        digests["information content"] = hashlib.sha256(content.read_bytes()).hexdigest()
    return {"files": digests, "senses": {**SENSES, **settings.senses}, "nltk": _nltk_version()}


def _nltk_version() -> str:
    try:
        return metadata.version("nltk")
    except metadata.PackageNotFoundError:
        raise ConfigError("WordNet's similarities are computed by nltk; install zsr with the extra 'text'") from None


def _admit(folder: Path) -> None:
    """Add `folder` to NLTK's search path, the only place from which it reads files."""
    from nltk import data

    if str(folder.resolve()) not in data.path:
        data.path.append(str(folder.resolve()))


def open_wordnet(folder: Path) -> Any:
    """NLTK's reader of WordNet's database files.

    Raises:
        DamagedArtifact: the files are not WordNet's.
    """
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    class Reader(WordNetCorpusReader):  # type: ignore[misc]
        """Reader without the files that English nouns do not need and that some distributions of WordNet lack."""

        def open(self, file: str) -> Any:
            if file == "lexnames" and not (folder / file).exists():
                return io.StringIO(
                    "".join(f"{number:02d}\tfile.{number}\t1\n" for number in range(LEXICOGRAPHER_FILES))
                )
            return super().open(file)

        def map_wn(self, version: str = "wordnet") -> None:
            """Do nothing: a map between versions is only needed for other languages."""

    _admit(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the warning that other languages are missing
            return Reader(str(folder), omw_reader=None)
    except Exception as error:  # on a malformed line the parser may raise anything
        raise DamagedArtifact(f"{folder}: not readable as WordNet: {error}; expected its database files") from error


def open_content(file: Path, wordnet: Any) -> Content:
    """Information contents as counts by part of speech and offset.

    Raises:
        DamagedArtifact: not a file of information contents.
        ConfigError: it is of another version of WordNet, with other synset offsets.
    """
    from nltk.corpus.reader.wordnet import WordNetICCorpusReader

    _admit(file.parent)
    try:
        content: Content = WordNetICCorpusReader(str(file.parent), [file.name]).ic(file.name)
    except Exception as error:  # on a malformed line the parser may raise anything
        raise DamagedArtifact(f"{file}: not readable as information contents: {error}") from error
    roots = [synset.offset() for synset in _roots(wordnet)]
    if not any(content["n"].get(offset) for offset in roots):
        raise ConfigError(
            f"{file}: no count for WordNet's root noun at offset {roots}; it is for another WordNet version"
        )
    return content


def _roots(wordnet: Any) -> list[Synset]:
    return sorted({root for synset in wordnet.synsets("entity", "n") for root in synset.root_hypernyms()})


def sense(label: str, wordnet: Any, settings: Settings) -> Synset:
    """The noun synset of a class: from `settings.senses` or `SENSES`, or the first sense of its name, with every
    combination of underscores and hyphens between its words.

    Raises:
        ConfigError: no such synset, or the name is not a noun of WordNet.
    """
    if given := {**SENSES, **settings.senses}.get(label):
        try:
            return wordnet.synset(given)
        except Exception as error:  # NLTK raises different errors for a bad name, a bad number and an unknown lemma
            raise ConfigError(
                f"class {label!r}: {given!r} is not a synset of this WordNet ({error}); give another in --senses"
            ) from error
    words = words_of(settings.name(label))
    for joints in product("_-", repeat=max(0, len(words) - 1)):
        text = "".join(word + joint for word, joint in zip(words, (*joints, ""), strict=True))
        if found := wordnet.synsets(text, "n"):
            return found[0]
    raise ConfigError(
        f"class {label!r}: WordNet has no noun {'_'.join(words)!r}; give its synset in --senses, such as "
        f'{{"{label}": "{words[-1] if words else label}.n.01"}}'
    )


def hierarchy(senses: Sequence[Synset]) -> list[Synset]:
    """The senses and all their hypernyms, in the alphabetical order of their names."""
    nodes = {node for synset in senses for path in synset.hypernym_paths() for node in path}
    return sorted(nodes, key=lambda node: str(node.name()))


def _make(measure: str, labels: Sequence[str], settings: Settings) -> Made:
    wordnet, file = open_wordnet(_folder(measure, settings)), _content_file(measure, settings)
    content = None if file is None else open_content(file, wordnet)
    senses = {label: sense(label, wordnet, settings) for label in labels}
    nodes = hierarchy(list(senses.values()))
    similarity, _ = MEASURES[measure]
    vectors = {
        label: np.array([similarity(synset, node, content) for node in nodes], dtype=np.float32)
        for label, synset in senses.items()
    }
    names = {label: synset.name() for label, synset in senses.items()}
    return Made(vectors, {"senses": names, "nodes": [node.name() for node in nodes]})


KINDS: Final = {
    f"wordnet-{measure}": Kind(partial(_inputs, measure), partial(_make, measure)) for measure in sorted(MEASURES)
}
