"""Features of DATA's pictures by a backbone, and of its texts by a sentence encoder: DATA -> FEATURES."""

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
from zsr.executor import IMAGES
from zsr.models import backbones
from zsr.process import keep_freed_memory

TEXT: Final = "modality=text/"
BATCHES: Final = (4, 16, 32, 64)  # pictures in a forward pass that a plan tries
TEXTS: Final = 256  # that are encoded before somebody looks at the clock; a multiple of a batch


def plan(data: Artifact, settings: BackboneSettings, weights: Path | Artifact) -> Plan:
    """Keyed by backbone, digest of the weights and preprocessing.

    Args:
        weights: of the backbone, or a checkpoint whose image towers are the backbone, fine-tuned.

    Raises:
        ConfigError: no such backbone, layer or size, or weights that do not say what the backbone is.
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
    """Compute FEATURES of every picture in `data` and publish them; see `shards.compute` for what is computed.

    Args:
        weights: see `plan`.
        batch: pictures in one forward pass; None takes `backbones.PICTURES`.
        actors, device: Ray actors that hold the model and what they run on, see `shards.compute`.
        decoders: tasks that decode ahead of each, see `shards.room_to_decode`.

    Raises:
        ConfigError: see `plan`; data without pictures; or JPEGs that a GPU shall decode, and no GPU.
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
        raise ConfigError(f"data {data.digest[:12]} has no rows that --backbone or --texts make features of")
    if not any(side == "text" or has_images(data, side) for side in sorted(set(map(side_of, names)))):
        raise ConfigError(
            f"data {data.digest[:12]} have no images to make features of; those that come with the data are imported "
            "by zsr prepare --features-output"
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
    """What `extract` would take, see `shards.forecast`, and rows a second of one actor by the number of pictures in a
    forward pass, where `batch` leaves that open. Raises ConfigError, see `plan` and `devices.choose`.

    The job itself takes no batch size from a measurement: sums in another order are other bits, so that two runs of one
    command could end with different digests.
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
    """Raise ConfigError if JPEGs are to be decoded by the actors' GPUs and the actors run on CPUs."""
    if settings.jpegs == "gpu" and not devices.gpus:
        raise ConfigError(f"--jpegs gpu, and {devices.why}; use --jpegs cpu")


def _shared(
    data: Artifact, settings: BackboneSettings, weights: Path | Artifact, work: Plan, batch: int | None
) -> dict[str, Any]:
    """What an Extractor is made with."""
    about = {"data": data, "settings": settings, "weights": weights, "batch": batch}
    return about | {"sha256": work.config["weights"], "texts": work.config.get("texts", "")}


def shards(data: Artifact, settings: BackboneSettings) -> list[str]:
    """Names of the shards that get features, in order."""
    texts = settings.texts != "none"
    return [e.path for e in data.shards() if int(e.facts["rows"]) and (texts or not e.path.startswith(TEXT))]


def side_of(shard: str) -> str:
    """Modality of a shard."""
    return shard.partition("/")[0].removeprefix("modality=")


@dataclass(frozen=True, slots=True)
class Made:
    """Some rows' ids and blocks of features, and what is wrong with the other rows."""

    ids: list[int]
    features: list[np.ndarray]
    bad: list[dict[str, Any]]


class Extractor:
    """Holds the backbone and makes features of one DATA shard after the other."""

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
        keep_freed_memory()
        torch.set_num_threads(1)  # one thread an actor: the same bits whatever the number of cores, and no contention
        self.data = data
        self.device = own_device()
        self.batch = batch or backbones.pictures_at_once(self.device)
        self.featurizer = featurizer(settings, weights, sha256).ready(self.device)
        self.texts = TextExtractor(encoder_folder(None), texts, self.device) if texts else None
        pictures = self.featurizer.pictures
        on_device = settings.jpegs == "gpu"
        self.decoders = DeviceDecoders(pictures, self.device) if on_device else Decoders(pictures, decoders)

    def made(self, name: str, clocks: Clocks) -> Iterator[tuple[int, Made]]:
        """See `shards.Maker`."""
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
        """A shard's pictures, some at a time; what waited for a full batch comes at the end."""
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
            # full batches, whatever was left out and however it was cut: sums in another order are other bits
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
    """What became of `rows` of shard `name`."""
    ids, keys = rows.column("id").to_pylist(), rows.column("key").to_pylist()
    bad = [
        {"shard": name, "id": ids[row], "key": keys[row], "kind": kind, "message": message}
        for row, kind, message in found.bad
    ]
    return Made([ids[row] for row in found.rows], features, bad)


class ShardExtractor:
    """A Ray actor that writes the features of one DATA shard after the other."""

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
        """The number of rows that have features."""
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
