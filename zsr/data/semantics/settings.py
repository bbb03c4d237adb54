"""Settings of SEMANTICS, and the interface of one kind of class embeddings."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from zsr.errors import ConfigError


class Settings(BaseModel):
    """Files and options of all kinds.

    Attributes:
        vectors: file of word vectors by kind (word2vec, glove, fasttext), or the folder of a sentence encoder (minilm).
        names: class -> the words to embed instead of its name, if that is not in the vocabulary.
        unknown_words: treat a word without a vector as an error, or as zeros in the mean over the words of its class,
            as in SEM-PCYC's released preprocessing.
        prompt: template of the sentence that the sentence encoder embeds, with `{}` for the class name.
        wordnet: folder of WordNet's database files (index.noun, data.noun, ...).
        information_content: file of information contents by kind (wordnet-jcn, wordnet-lin), in the format of
            WordNet::Similarity.
        senses: class -> noun synset, such as {"bat": "bat.n.05"}; by default the first sense of the class name.
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
        """The words to embed for class `label`: those of `names`, or its own name without underscores."""
        return self.names.get(label, label.replace("_", " "))


@dataclass(frozen=True, slots=True)
class Made:
    """Vectors (S,) float32 by class, and metadata about them for the artifact."""

    vectors: dict[str, np.ndarray]
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of class embeddings.

    Attributes:
        inputs: function that returns what determines the vectors besides the class names, as JSON: digests of files,
            versions, options. Raises ConfigError if something is missing.
        make: function from the sorted classes to their vectors. Raises ConfigError for a class that has none.
    """

    inputs: Callable[[Settings], Any]
    make: Callable[[Sequence[str], Settings], Made]


def existing(path: Path, flag: str) -> Path:
    """`path`, if it is a file; otherwise raises ConfigError with the flag."""
    if not path.is_file():
        raise ConfigError(f"{flag} {path}: no such file")
    return path
