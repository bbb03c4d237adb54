"""Features of DATA's pictures by a backbone, and of its texts by a sentence encoder: DATA -> FEATURES."""

from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch

from zsr import fault
from zsr.artifact import Artifact, Plan, Staging, Store, canonical
from zsr.cluster import own_device
from zsr.data.decode import VERSION, BadImage
from zsr.data.features import feature_table, seal_features
from zsr.data.semantics.sentences import encoder_digest, encoder_folder
from zsr.embedding.encode import BackboneSettings, featurizer, tower_of
from zsr.embedding.shards import MADE_FROM, Clocks, Tally, compute, fingerprint, quarantine_name
from zsr.embedding.text import TextExtractor
from zsr.errors import ConfigError
from zsr.models import backbones
from zsr.worker import keep_freed_memory

TEXT: Final = "modality=text/"


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
        made = settings.architecture(weights)
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
    actors: int,
) -> tuple[Artifact, Tally]:
    """Compute FEATURES of every picture in `data` and publish them; see `shards.compute` for what is computed.

    Args:
        weights: see `plan`.
        batch: pictures in one forward pass; None takes `backbones.PICTURES`.
        actors: Ray actors that hold the model.

    Raises:
        ConfigError: see `plan`; or data without pictures.
    """
    work = plan(data, settings, weights)
    names = shards(data, settings)
    if done := output.made(work):
        return done, Tally(found=len(names))
    staging = output.staging(work)
    if not names:
        raise ConfigError(f"data {data.digest[:12]} has no rows that --backbone or --texts make features of")
    shared = {
        "data": data,
        "settings": settings,
        "weights": weights,
        "sha256": work.config["weights"],
        "texts": work.config.get("texts", ""),
        "batch": batch,
    }
    wanted = {name: fingerprint(work, data.entry(name)) for name in names}
    tally = compute("features", Extractor, wanted, output, staging, shared, actors)
    about = {"backbone": settings.backbone, "size": work.config["size"]}
    return seal_features(staging, output, names, about), tally


def shards(data: Artifact, settings: BackboneSettings) -> list[str]:
    """Names of the shards that get features, in order."""
    texts = settings.texts != "none"
    return [e.path for e in data.shards() if int(e.facts["rows"]) and (texts or not e.path.startswith(TEXT))]


class Extractor:
    """A Ray actor that holds the backbone and turns one DATA shard after the other into a feature shard."""

    def __init__(
        self,
        data: Artifact,
        settings: BackboneSettings,
        weights: Path | Artifact,
        sha256: str,
        texts: str,
        staging: Staging,
        batch: int | None,
    ) -> None:
        keep_freed_memory()
        torch.set_num_threads(1)  # one thread an actor: the same bits whatever the number of cores, and no contention
        self.data, self.staging = data, staging
        self.device = own_device()
        self.batch = batch or backbones.pictures_at_once(self.device)
        self.featurizer = featurizer(settings, weights, sha256).to(self.device)
        self.texts = TextExtractor(encoder_folder(None), texts, self.device) if texts else None

    def __call__(self, piece: dict[str, Any]) -> dict[str, Any]:
        name, clocks = piece["name"], Clocks()
        side = name.partition("/")[0].removeprefix("modality=")
        with clocks.stage("read"):
            column = "text" if side == "text" else "image"
            table = self.data.read_table(name, columns=["id", "key", column])
        if self.texts is not None and side == "text":
            with clocks.stage("model"):
                ids, features, bad = self.texts(name, table)
            dim = self.texts.dim
        else:
            ids, features, bad = self._pictures(name, side, table, clocks)
            dim = self.featurizer.backbones[side].dim
        with clocks.stage("write"):
            self._stage(piece, ids, features, bad, dim)
        return {"name": name, "rows": len(ids), "bytes": self.data.entry(name).bytes, "seconds": clocks.seconds}

    def _pictures(
        self, name: str, side: str, table: pa.Table, clocks: Clocks
    ) -> tuple[list[int], list[np.ndarray], list[dict[str, Any]]]:
        """Ids and features of the pictures that decode, and what is wrong with the others."""
        ids: list[int] = []
        bad: list[dict[str, Any]] = []
        pixels: list[np.ndarray] = []
        features: list[np.ndarray] = []
        for row in table.to_pylist():
            try:
                with clocks.stage("decode"):
                    pixels.append(self.featurizer.pixels(side, row["image"]))
                ids.append(row["id"])
            except BadImage as error:
                about = {"shard": name, "id": row["id"], "key": row["key"]}
                bad.append({**about, "kind": error.kind, "message": str(error)})
            if len(pixels) == self.batch:  # full batches whatever is left out: sums in another order are other bits
                with clocks.stage("model"):
                    features.append(self.featurizer.features(side, np.stack(pixels)))
                pixels = []
        with clocks.stage("model"):
            features += [self.featurizer.features(side, np.stack(pixels))] if pixels else []
        return ids, features, bad

    def _stage(
        self, piece: dict[str, Any], ids: list[int], features: list[np.ndarray], bad: list[dict[str, Any]], dim: int
    ) -> None:
        name = piece["name"]
        matrix = np.concatenate(features) if features else np.zeros((0, dim), np.float16)
        if bad:
            self.staging.write(quarantine_name(name), b"".join(canonical(line) + b"\n" for line in bad))
        fault.here("features.shard")
        counts = {"rows": len(ids), "quarantined": len(bad), "dim": int(matrix.shape[1])}
        self.staging.write_table(name, feature_table(ids, matrix), facts={**counts, MADE_FROM: piece[MADE_FROM]})
