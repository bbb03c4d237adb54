"""What the kinds of semantics can be told, and what one kind makes of the class names."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from zsr.errors import ConfigError


class Settings(BaseModel):
    """Files and choices; a kind reads those that concern it.

    Attributes:
        vectors: file of word vectors by kind (word2vec, glove, fasttext), or the folder of a sentence encoder (minilm).
        names: class -> the words that stand for it, where its own name is in no vocabulary (a table of synonyms).
        unknown_words: what a word without a vector is: an error, or zeros in the mean over the words of its class, as
            SEM-PCYC's released preparation has it.
        prompt: the sentence in which the sentence encoder reads a class name, `{}` in its place.
        wordnet: folder of WordNet's database files (index.noun, data.noun, ...).
        information_content: file of information contents by kind (wordnet-jcn, wordnet-lin), in the format of
            WordNet::Similarity.
        senses: class -> noun synset, such as {"bat": "bat.n.05"}; the others take the first sense of their name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    vectors: Mapping[str, Path] = {}
    names: Mapping[str, str] = {}
    unknown_words: Literal["error", "zero"] = "error"
    prompt: str = "a photo of a {}"
    wordnet: Path | None = None
    information_content: Mapping[str, Path] = {}
    senses: Mapping[str, str] = {}

    def name(self, label: str) -> str:
        """The words that stand for class `label`: those of `names`, or else its own without underscores."""
        return self.names.get(label, label.replace("_", " "))


@dataclass(frozen=True, slots=True)
class Made:
    """Vectors (S,) float32 by class, and what the artifact keeps about them beside the numbers."""

    vectors: dict[str, np.ndarray]
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of semantics.

    Attributes:
        inputs: what shapes the vectors beside the class names, as JSON: digests of files, versions, choices. Raises
            ConfigError if something is missing.
        make: the vectors of the classes, which are sorted. Raises ConfigError for a class that has none.
    """

    inputs: Callable[[Settings], Any]
    make: Callable[[Sequence[str], Settings], Made]


def existing(path: Path, flag: str) -> Path:
    """`path`, if it is a file. Raises ConfigError naming the flag otherwise."""
    if not path.is_file():
        raise ConfigError(f"{flag} {path}: no such file")
    return path
