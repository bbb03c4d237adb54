"""Compute class embeddings from class names: SEMANTICS."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from zsr.artifact import Store, open_artifact
from zsr.commands.base import JobConfig, Results, made, main
from zsr.data.rows import canonical_label
from zsr.errors import ConfigError
from zsr.storage import local_path, read_text

if TYPE_CHECKING:
    from zsr.data.semantics.settings import Settings


class Config(JobConfig):
    """Compute one embedding per class from word vectors, sentences or WordNet.

    Attributes:
        output: ROOT of the SEMANTICS artifact.
        data: DATA whose classes to embed.
        labels: class names, instead of or in addition to those of the data.
        kinds: kinds of class embeddings, concatenated in sorted order: glove, word2vec, fasttext, minilm, wordnet-path,
            wordnet-lch, wordnet-wup, wordnet-jcn, wordnet-lin.
        vectors: KIND=PATH of word2vec, glove and fasttext files (binary or text, also .gz), or of minilm's folder.
        names: JSON file {class: words} with the words to embed instead of the class name.
        unknown_words: treat a word without a vector as an error, or as zeros.
        prompt: template of the sentence that minilm embeds, with {} for the class name.
        wordnet: folder of WordNet's database files.
        information_content: KIND=FILE for wordnet-jcn and wordnet-lin.
        senses: JSON file {class: synset}; by default the first noun sense of the class name.
    """

    output: Path
    data: Path | None = None
    labels: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ("glove",)
    vectors: tuple[str, ...] = ()
    names: Path | None = None
    unknown_words: Literal["error", "zero"] = "error"
    prompt: str = "a photo of a {}"
    wordnet: Path | None = None
    information_content: tuple[str, ...] = ()
    senses: Path | None = None

    def classes(self) -> tuple[str, ...]:
        """Class names from --data and --labels. Raises ConfigError if there is none."""
        named = {canonical_label(label) for label in self.labels}
        if self.data is not None:
            named |= set(open_artifact(self.data, "data").facts["classes"])
        if not named:
            raise ConfigError("no class names; give --data or --labels")
        return tuple(sorted(named))

    def settings(self) -> "Settings":
        """Read the files and check the flags. Raises ConfigError for a malformed one."""
        from zsr.data.semantics.settings import Settings

        return Settings(
            vectors=_paths("--vectors", self.vectors),
            names=_table("--names", self.names),
            unknown_words=self.unknown_words,
            prompt=self.prompt,
            wordnet=self.wordnet,
            information_content=_paths("--information-content", self.information_content),
            senses=_table("--senses", self.senses),
        )


def _paths(flag: str, values: Sequence[str]) -> dict[str, Path]:
    pairs = [value.partition("=") for value in values]
    if wrong := [value for value, (kind, _, path) in zip(values, pairs, strict=True) if not kind or not path]:
        raise ConfigError(f"{flag} {wrong[0]!r}: expected KIND=PATH, such as word2vec=GoogleNews-vectors.bin.gz")
    return {kind: local_path(path) for kind, _, path in pairs}


def _table(flag: str, file: Path | None) -> dict[str, str]:
    if file is None:
        return {}
    try:
        content = json.loads(read_text(file, flag))
    except ValueError as error:
        raise ConfigError(f"{flag} {file}: {error}; expected a JSON object of class names to strings") from error
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise ConfigError(f"{flag} {file}: expected a JSON object of class names to strings")
    return {canonical_label(label): value for label, value in content.items()}


def plan(config: Config) -> Results:
    from zsr.data import semantics

    classes = config.classes()
    work = semantics.plan(classes, config.kinds, config.settings())
    return {"plan": work.digest, "classes": len(classes), "kinds": sorted(config.kinds), "output": str(config.output)}


def work(config: Config) -> Results:
    from zsr.data import semantics

    artifact = semantics.build(config.classes(), config.kinds, Store.at(config.output), config.settings())
    return made(artifact, config.output, **artifact.facts)


def run(argv: Sequence[str]) -> int:
    return main(Config, plan, work, argv, "zsr semantics")
