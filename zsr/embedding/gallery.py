"""Embed a modality with a checkpoint, shard by shard: DATA / FEATURES -> EMB.

EMB: `id int64, part int16, key string, label string nullable, embedding fixed_size_list<float32>[D]`. `part` numbers
the vectors of one item in multi-vector models. For the cosine metric, embeddings are normalized to unit length, so that
the inner product ranks them.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from zsr import faults, progress
from zsr.artifact import Artifact, FileEntry, Plan, Staging, Store
from zsr.checkpoint import open_model
from zsr.data.decode import COMPATIBLE, VERSION
from zsr.data.finite import require_finite
from zsr.data.shards import Source, encoded_rows, featured_rows, pictured
from zsr.devices import AUTO, DeviceSettings, choose, own_device
from zsr.embedding.encode import ready, vectors_of
from zsr.embedding.prefetch import NOBODY, Decoders
from zsr.embedding.settings import Classes, Prices
from zsr.embedding.shards import MADE_FROM, Clocks, Tally, compute, fingerprint, forecast
from zsr.errors import ConfigError
from zsr.executor import IMAGES, VECTORS, in_this_process
from zsr.models.protocol import Inputs
from zsr.preprocessing import pictures_of
from zsr.process import keep_freed_memory


def chosen_classes(checkpoint: Artifact, classes: Classes) -> tuple[str, ...] | None:
    """The class names of a part of the checkpoint's split; None for all rows, labeled or not."""
    return None if classes == "all" else tuple(checkpoint.config["split"][classes])


def plan(data: Artifact, source: Source, checkpoint: Artifact, modality: str, classes: Classes) -> Plan:
    """The plan of EMB: rows, checkpoint, and features or the version of image decoding."""
    config: dict[str, Any] = {"modality": modality, "classes": classes}
    parents = {"data": data.digest, "checkpoint": checkpoint.digest}
    if isinstance(source, Artifact):
        parents["features"] = source.digest
    else:
        config["decode"] = VERSION
    return Plan("embeddings", config, parents)


def embed(
    data: Artifact,
    features: Artifact | None,
    checkpoint: Artifact,
    modality: str,
    output: Store,
    *,
    classes: Classes = "all",
    actors: int | None = None,
    decoders: int | None = None,
    device: DeviceSettings = AUTO,
) -> tuple[Artifact, Tally]:
    """Embed every row of `modality` and publish EMB; finished shards are reused, see `shards.compute`.

    Args:
        features: FEATURES, or None for a checkpoint with an image tower, which reads the images of `data`.
        actors, device: see `shards.compute`.
        decoders: max decoding tasks per actor, see `shards.room_to_decode`.

    Raises:
        ConfigError: see `source_of`.
        Infeasible: more decoders than there are CPUs for; see `devices.choose`.
    """
    source = source_of(data, features, checkpoint, modality)
    work = plan(data, source, checkpoint, modality, classes)
    there = {entry.path: entry for entry in (features or data).files}
    names = [e.path for e in data.shards(modality) if e.path in there]
    if done := output.made(work):
        progress.up_to_date(f"embed {modality}", output, output.versions())
        return done, Tally(found=len(names))
    staging = output.staging(work)
    wanted = {name: fingerprint(work, data.entry(name), there[name]) for name in names}
    shared = {"data": data, "source": source, "checkpoint": checkpoint, "classes": classes}
    ahead = 0 if features else decoders
    rows = {name: _rows(data.entry(name), chosen_classes(checkpoint, classes)) for name in names}
    few = VECTORS if features else IMAGES
    tally = compute("embed", ShardEmbedder, wanted, output, staging, shared, actors, ahead, device, rows, few)
    return _seal(staging, output, checkpoint, modality, names), tally


def _rows(entry: FileEntry, classes: tuple[str, ...] | None) -> int:
    """Number of rows of a DATA shard with a class in `classes`; all rows for None."""
    if classes is None:
        return int(entry.facts["rows"])
    return sum(int(entry.facts["classes"].get(name, 0)) for name in classes)


def predict(
    data: Artifact,
    features: Artifact | None,
    checkpoint: Artifact,
    modality: str,
    *,
    classes: Classes,
    actors: int | None,
    prices: Prices,
    device: DeviceSettings = AUTO,
) -> dict[str, Any]:
    """Predict the cost of `embed`, see `shards.forecast`. Raises ConfigError, see `source_of` and `devices.choose`."""
    source = source_of(data, features, checkpoint, modality)
    shared = {"data": data, "source": source, "checkpoint": checkpoint, "classes": classes}
    rows = {data.shards(modality)[0].path: int((features or data).facts["rows"][modality])}
    return forecast(Encoder, rows, shared, actors, prices, choose(device))


def source_of(data: Artifact, features: Artifact | None, checkpoint: Artifact, modality: str) -> Source:
    """The input of a checkpoint for a modality: FEATURES, or preprocessed images if it has an image tower.

    Raises:
        ConfigError: the features are of other data, different from those of the training, missing or unused; or there
            is no row of this modality.
    """
    inputs = Inputs.model_validate(checkpoint.config["inputs"])
    if inputs.tower is not None:
        if features is not None:
            raise ConfigError(f"checkpoint {checkpoint.digest[:12]} embeds images; omit --features")
        if modality not in (inputs.query, "photo"):
            raise ConfigError(f"checkpoint {checkpoint.digest[:12]} embeds {inputs.query} and photo, not {modality}")
        return pictures_of(inputs.tower)
    if features is None:
        raise ConfigError(f"checkpoint {checkpoint.digest[:12]} was trained on features; give --features")
    check_features(data, features, checkpoint, modality, inputs)
    return features


def check_features(data: Artifact, features: Artifact, checkpoint: Artifact, modality: str, inputs: Inputs) -> None:
    """Raise ConfigError unless data, features and a checkpoint trained on features belong together."""
    if features.parents.get("data") != data.digest:
        raise ConfigError(
            f"features {features.digest[:12]} are not of data {data.digest[:12]}; run zsr features on this data"
        )
    dims = features.facts["dims"]
    wanted = {inputs.query: inputs.sketch_dim, "photo": inputs.photo_dim}
    if modality not in dims:
        raise ConfigError(f"features {features.digest[:12]} hold no {modality}; they hold {sorted(dims)}")
    if modality not in wanted:
        raise ConfigError(f"checkpoint {checkpoint.digest[:12]} embeds {sorted(wanted)}, not {modality}")
    if other := unlike(checkpoint.config["features"], features.config):
        raise ConfigError(
            f"checkpoint {checkpoint.digest[:12]} was trained on other features than {features.digest[:12]}: "
            f"{'; '.join(other)}; run zsr features with the same settings, or train again"
        )
    if dims[modality] != wanted[modality]:
        raise ConfigError(
            f"{modality} features are {dims[modality]}-d, checkpoint {checkpoint.digest[:12]} was trained on "
            f"{wanted[modality]}-d"
        )


def unlike(trained: Mapping[str, Any], these: Mapping[str, Any]) -> list[str]:
    """Differences between the features that a model was trained on and `these`, except compatible decoder versions."""
    both = sorted(trained.keys() | these.keys())
    other = {name: (trained.get(name), these.get(name)) for name in both if trained.get(name) != these.get(name)}
    if set(other.get("decode", ())) <= set(COMPATIBLE):
        other.pop("decode", None)
    return [f"{name} was {was!r}, here it is {now!r}" for name, (was, now) in other.items()]


class Encoder:
    """Embed shards with a loaded model."""

    def __init__(
        self, data: Artifact, source: Source, checkpoint: Artifact, classes: Classes, decoders: int = 0
    ) -> None:
        if not in_this_process():  # an actor's process has nothing else to do
            keep_freed_memory()
        torch.set_num_threads(1)  # the same bits on any number of cores
        self.data, self.source = data, source
        self.classes = chosen_classes(checkpoint, classes)
        self.device = own_device()
        self.model = ready(open_model(checkpoint), self.device)
        self.decoders = None if isinstance(source, Artifact) else Decoders(source, decoders)

    def made(self, name: str, clocks: Clocks) -> Iterator[tuple[int, pa.Table]]:
        """Embed shard `name` in parts: yield the number of input rows and the `embedding_table` of each part."""
        modality = name.partition("/")[0].partition("=")[2]
        last = dict(clocks.seconds)
        for rows, items in self._parts(name, modality, clocks):
            with clocks.stage("model"):
                table = embedding_table(rows, vectors_of(self.model, modality, items, self.device))
            if self.decoders is not None:
                self.decoders.note(len(rows), *(clocks.seconds[s] - last[s] for s in ("decode", "model")))
                last = dict(clocks.seconds)
            yield len(rows), table

    def _parts(self, name: str, modality: str, clocks: Clocks) -> Iterator[tuple[pa.Table, np.ndarray]]:
        """Rows of a shard and their model inputs (features or pixels), in parts."""
        if isinstance(self.source, Artifact):
            with clocks.stage("read"):
                part = featured_rows(self.data, self.source, name, self.classes)
            yield part
        elif self.decoders is not None:
            held: deque[pa.Table] = deque()

            def images() -> Iterator[list[bytes | None]]:
                for rows in encoded_rows(self.data, name, self.classes):
                    held.append(rows)
                    yield rows.column("image").to_pylist()

            for found in clocks.each("decode", self.decoders.blocks(modality, images())):
                yield pictured(held.popleft(), found, name)


class ShardEmbedder:
    """A Ray actor that computes and writes the embeddings of one shard per call."""

    def __init__(self, staging: Staging, **shared: Any) -> None:
        self.maker, self.staging = Encoder(**shared), staging

    def __call__(self, piece: dict[str, Any]) -> dict[str, Any]:
        name, clocks = piece["name"], Clocks()
        tables = [table for _, table in self.maker.made(name, clocks)]
        with clocks.stage("write"):
            table = pa.concat_tables(tables)
            faults.here("embed.shard")
            self.staging.write_table(name, table, facts={"rows": len(table), MADE_FROM: piece[MADE_FROM]})
        source = self.maker.source if isinstance(self.maker.source, Artifact) else self.maker.data
        told = self.maker.decoders.as_json() if self.maker.decoders is not None else NOBODY
        found = {"name": name, "rows": len(table), "bytes": source.entry(name).bytes}
        return {**found, "seconds": clocks.seconds, "decoders": told}


def embedding_table(rows: pa.Table, embeddings: np.ndarray) -> pa.Table:
    """EMB rows of N items with embeddings (N, P, D): P consecutive rows per item.

    Raises:
        ConfigError: an embedding that is not finite, or too large for float32 distances; names its key.
    """
    count, parts, dim = embeddings.shape
    items = np.repeat(np.arange(count), parts)
    repeated = rows.take(pa.array(items))
    matrix = np.ascontiguousarray(embeddings, dtype=np.float32).reshape(-1, dim)
    fix = "Check its features or image, and that the training of the checkpoint converged"
    require_finite(matrix, repeated.column("key"), "embedding", fix)
    flat = pa.array(matrix.reshape(-1))
    return pa.table(
        {
            "id": repeated.column("id"),
            "part": pa.array(np.tile(np.arange(parts, dtype=np.int16), count)),
            "key": repeated.column("key"),
            "label": repeated.column("label"),
            "embedding": pa.FixedSizeListArray.from_arrays(flat, dim),
        }
    )


def _seal(staging: Staging, output: Store, checkpoint: Artifact, modality: str, names: list[str]) -> Artifact:
    entries = staging.all_finished(names)
    metric = checkpoint.facts["metric"]
    facts = {
        "dim": checkpoint.facts["dim"],
        "metric": "ip" if metric == "cosine" else metric,
        "normalised": metric == "cosine",
        "checkpoint": checkpoint.digest,
        "modality": modality,
        "rows": sum(int(entry.facts["rows"]) for entry in entries),
    }
    artifact = staging.seal(facts=facts)
    output.publish(artifact)
    return artifact
