"""Compute features of images by a backbone and of texts by a sentence encoder: DATA -> FEATURES."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch

from zsr import faults, progress
from zsr.artifact import Artifact, Plan, Staging, Store, canonical
from zsr.data.decode import VERSION
from zsr.data.features import feature_table, seal_features
from zsr.data.pictures import Decoded, has_images
from zsr.data.semantics.sentences import encoder_digest, encoder_folder
from zsr.devices import AUTO, Devices, DeviceSettings, choose, own_device
from zsr.embedding.encode import architecture_of, featurizer, tower_of
from zsr.embedding.nvjpeg import DeviceDecoders
from zsr.embedding.prefetch import Decoders
from zsr.embedding.settings import BackboneSettings, Prices
from zsr.embedding.shards import (
    MADE_FROM,
    Clocks,
    Tally,
    compute,
    fingerprint,
    forecast,
    quarantine_name,
    rates_of,
)
from zsr.embedding.text import TextExtractor
from zsr.errors import ConfigError
from zsr.executor import IMAGES, in_this_process
from zsr.models import backbones
from zsr.process import keep_freed_memory

TEXT: Final = "modality=text/"
BATCHES: Final = (4, 16, 32, 64)  # batch sizes that `predict` measures
TEXTS: Final = 256  # texts encoded between two readings of the clock; a multiple of a batch


def plan(data: Artifact, settings: BackboneSettings, weights: Path | Artifact) -> Plan:
    """The plan of FEATURES: backbone, digest of the weights, and preprocessing.

    Args:
        weights: weights of the backbone, or a checkpoint whose image towers are the fine-tuned backbone.

    Raises:
        ConfigError: no such backbone, layer or size, or weights that do not determine the architecture.
    """
    config = {**settings.model_dump(exclude={"texts"}), "decode": VERSION}
    parents = {"data": data.digest}
    if isinstance(weights, Artifact):
        tower = tower_of(weights)
        config |= {"layer": tower.architecture["layer"], "size": tower.size, "weights": weights.digest}
        config |= {role: weights.facts[role] for role in ("saw", "trained")}
        parents["checkpoint"] = weights.digest
    else:
        made = architecture_of(settings, weights)
        config |= {"layer": made["layer"], "size": backbones.side(made, settings.size)}
        config["weights"] = backbones.digest(weights)
    if any(name.startswith(TEXT) for name in shards(data, settings)):
        config["texts"] = encoder_digest(encoder_folder(None))
    return Plan("features", config, parents)


def extract(
    data: Artifact,
    settings: BackboneSettings,
    weights: Path | Artifact,
    output: Store,
    *,
    batch: int | None,
    actors: int | None,
    decoders: int | None = None,
    device: DeviceSettings = AUTO,
) -> tuple[Artifact, Tally]:
    """Compute FEATURES of every image in `data` and publish them; finished shards are reused, see `shards.compute`.

    Args:
        weights: see `plan`.
        batch: images per forward pass; None for `backbones.PICTURES`.
        actors, device: number and device of the Ray actors that hold the model, see `shards.compute`.
        decoders: max decoding tasks per actor, see `shards.room_to_decode`.

    Raises:
        ConfigError: see `plan`; data without images; or decoding of JPEGs on GPUs without a GPU.
        Infeasible: more decoders than there are CPUs for; see `devices.choose`.
    """
    work = plan(data, settings, weights)
    names = shards(data, settings)
    if done := output.made(work):
        progress.up_to_date("features", output, output.versions())
        return done, Tally(found=len(names))
    require_gpus(settings, choose(device))
    staging = output.staging(work)
    if not names:
        raise ConfigError(f"data {data.digest[:12]} has no rows to compute features of; see --backbone and --texts")
    if not any(side == "text" or has_images(data, side) for side in sorted(set(map(side_of, names)))):
        raise ConfigError(
            f"data {data.digest[:12]} has no images to compute features of; import features of the source with "
            "zsr prepare --features-output"
        )
    shared = _shared(data, settings, weights, work, batch)
    wanted = {name: fingerprint(work, data.entry(name)) for name in names}
    decoders = 0 if settings.jpegs == "gpu" else decoders
    rows = {name: int(data.entry(name).facts["rows"]) for name in names}
    tally = compute("features", ShardExtractor, wanted, output, staging, shared, actors, decoders, device, rows, IMAGES)
    about = {"backbone": settings.backbone, "size": work.config["size"]}
    return seal_features(staging, output, names, about), tally


def predict(
    data: Artifact,
    settings: BackboneSettings,
    weights: Path | Artifact,
    *,
    batch: int | None,
    actors: int | None,
    prices: Prices,
    device: DeviceSettings = AUTO,
) -> dict[str, Any]:
    """Predict the cost of `extract`, see `shards.forecast`; without `batch`, also rows per second of one actor for each
    of several batch sizes. Raises ConfigError, see `plan` and `devices.choose`.

    The job itself does not choose its batch size by a measurement: another summation order gives other bits, so that
    two runs of the same command could have different digests.
    """
    require_gpus(settings, devices := choose(device))
    work, rows = plan(data, settings, weights), dict[str, int]()
    first = {side_of(name): name for name in reversed(shards(data, settings))}
    for side, name in first.items():
        rows[name] = int(data.facts["rows"][side])
    shared = _shared(data, settings, weights, work, batch)
    found = forecast(Extractor, rows, shared, actors, prices, devices)
    pictured = next((name for side, name in first.items() if side != "text"), None)
    if batch is not None or pictured is None:
        return found
    trials = {size: rates_of(Extractor, shared | {"batch": size}, [pictured], devices)[pictured] for size in BATCHES}
    return found | {"rows_a_second_by_batch_size": {s: round(1 / sum(r.values()), 1) for s, r in trials.items()}}


def require_gpus(settings: BackboneSettings, devices: Devices) -> None:
    """Raise ConfigError if JPEGs are to be decoded on GPUs, but the actors run on CPUs."""
    if settings.jpegs == "gpu" and not devices.gpus:
        raise ConfigError(f"--jpegs gpu requires a GPU, but {devices.why}; use --jpegs cpu")


def _shared(
    data: Artifact, settings: BackboneSettings, weights: Path | Artifact, work: Plan, batch: int | None
) -> dict[str, Any]:
    """Arguments of an Extractor."""
    about = {"data": data, "settings": settings, "weights": weights, "batch": batch}
    return about | {"sha256": work.config["weights"], "texts": work.config.get("texts", "")}


def shards(data: Artifact, settings: BackboneSettings) -> list[str]:
    """Names of the shards to compute features of, in order."""
    texts = settings.texts != "none"
    return [e.path for e in data.shards() if int(e.facts["rows"]) and (texts or not e.path.startswith(TEXT))]


def side_of(shard: str) -> str:
    """Modality of a shard."""
    return shard.partition("/")[0].removeprefix("modality=")


@dataclass(frozen=True, slots=True)
class Made:
    """Ids and feature blocks of rows, and quarantine entries of bad rows."""

    ids: list[int]
    features: list[np.ndarray]
    bad: list[dict[str, Any]]


class Extractor:
    """Compute the features of DATA shards with a loaded backbone."""

    def __init__(
        self,
        data: Artifact,
        settings: BackboneSettings,
        weights: Path | Artifact,
        sha256: str,
        texts: str,
        batch: int | None,
        decoders: int = 0,
    ) -> None:
        if not in_this_process():  # an actor's process has nothing else to do
            keep_freed_memory()
        torch.set_num_threads(1)  # one thread per actor: the same bits on any number of cores, and no contention
        self.data = data
        self.device = own_device()
        self.batch = batch or backbones.pictures_at_once(self.device)
        self.featurizer = featurizer(settings, weights, sha256).ready(self.device)
        self.texts = TextExtractor(encoder_folder(None), texts, self.device) if texts else None
        pictures = self.featurizer.pictures
        on_device = settings.jpegs == "gpu"
        self.decoders = DeviceDecoders(pictures, self.device) if on_device else Decoders(pictures, decoders)

    def made(self, name: str, clocks: Clocks) -> Iterator[tuple[int, Made]]:
        """Compute the features of shard `name` in parts: yield the number of input rows and the result of each part."""
        side = side_of(name)
        with clocks.stage("read"):
            table = self.data.read_table(name, columns=["id", "key", "text" if side == "text" else "image"])
        if self.texts is not None and side == "text":
            for start in range(0, len(table), TEXTS):
                rows = table[start : start + TEXTS]
                with clocks.stage("model"):
                    made = Made(*self.texts(name, rows))
                yield len(rows), made
        else:
            yield from self._pictures(name, side, table, clocks)

    def dim(self, side: str) -> int:
        """Width of the features of a modality."""
        return self.texts.dim if self.texts is not None and side == "text" else self.featurizer.backbones[side].dim

    def _pictures(self, name: str, side: str, table: pa.Table, clocks: Clocks) -> Iterator[tuple[int, Made]]:
        """Features of a shard's images in blocks; the last, incomplete batch comes at the end."""
        size = self.decoders.at_once(self.batch)
        held: deque[pa.Table] = deque()
        pixels = np.zeros((0, *[self.featurizer.pictures.resize.size] * 2, 3), np.uint8)

        def images() -> Iterator[list[bytes | None]]:
            for start in range(0, len(table), size):
                held.append(table[start : start + size])
                yield held[-1].column("image").to_pylist()

        last = dict(clocks.seconds)
        for found in clocks.each("decode", self.decoders.blocks(side, images())):
            rows = held.popleft()
            pixels = np.concatenate([pixels, found.pixels]) if len(pixels) else found.pixels
            # only full batches, independent of bad rows and block sizes: another summation order gives other bits
            whole = len(pixels) // self.batch * self.batch
            with clocks.stage("model"):
                features = [self.featurizer.features(side, one) for one in _batches(pixels[:whole], self.batch)]
            pixels = pixels[whole:]
            self.decoders.note(len(rows), *(clocks.seconds[stage] - last[stage] for stage in ("decode", "model")))
            last = dict(clocks.seconds)
            yield len(rows), _made(name, rows, found, features)
        if len(pixels):
            with clocks.stage("model"):
                features = [self.featurizer.features(side, pixels)]
            yield 0, Made([], features, [])


def _batches(pixels: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(pixels), size):
        yield pixels[start : start + size]


def _made(name: str, rows: pa.Table, found: Decoded, features: list[np.ndarray]) -> Made:
    """The result for `rows` of shard `name`."""
    ids, keys = rows.column("id").to_pylist(), rows.column("key").to_pylist()
    bad = [
        {"shard": name, "id": ids[row], "key": keys[row], "kind": kind, "message": message}
        for row, kind, message in found.bad
    ]
    return Made([ids[row] for row in found.rows], features, bad)


class ShardExtractor:
    """A Ray actor that computes and writes the features of one DATA shard per call."""

    def __init__(self, staging: Staging, **shared: Any) -> None:
        self.maker, self.staging = Extractor(**shared), staging

    def __call__(self, piece: dict[str, Any]) -> dict[str, Any]:
        name, clocks = piece["name"], Clocks()
        parts = [made for _, made in progress.counted(self.maker.made(name, clocks))]
        with clocks.stage("write"):
            rows = self._stage(piece, parts)
        read, told = self.maker.data.entry(name).bytes, self.maker.decoders.as_json()
        return {"name": name, "rows": rows, "bytes": read, "seconds": clocks.seconds, "decoders": told}

    def _stage(self, piece: dict[str, Any], parts: list[Made]) -> int:
        """Write the features and the quarantine of a shard; returns the number of rows with features."""
        name = piece["name"]
        ids = [identity for part in parts for identity in part.ids]
        features = [block for part in parts for block in part.features]
        bad = [line for part in parts for line in part.bad]
        empty = np.zeros((0, self.maker.dim(side_of(name))), np.float16)
        matrix = np.concatenate(features) if features else empty
        if bad:
            self.staging.write(quarantine_name(name), b"".join(canonical(line) + b"\n" for line in bad))
        faults.here("features.shard")
        counts = {"rows": len(ids), "quarantined": len(bad), "dim": int(matrix.shape[1])}
        self.staging.write_table(name, feature_table(ids, matrix), facts={**counts, MADE_FROM: piece[MADE_FROM]})
        return len(ids)
