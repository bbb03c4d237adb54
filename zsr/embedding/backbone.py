"""Backbone features of DATA's pictures, shard by shard: DATA -> FEATURES."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from ray.data import ActorPoolStrategy

from zsr import fault
from zsr.artifact import Artifact, Plan, Staging, Store, canonical
from zsr.cluster import gpus, map_pieces, own_device
from zsr.data.decode import VERSION, BadImage, Limits, decode
from zsr.data.features import feature_table, seal_features
from zsr.errors import ConfigError
from zsr.models import backbones


class BackboneSettings(BaseModel):
    """What shapes FEATURES.

    Attributes:
        backbone: name in `backbones.BACKBONES`.
        size: side in pixels that pictures are resized to.
        invert_sketches: white strokes on black, as SEM-PCYC's backbones were tuned on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    backbone: str = "lite0"
    size: int = 224
    invert_sketches: bool = False


def plan(data: Artifact, settings: BackboneSettings, weights: Path) -> Plan:
    """Keyed by backbone, digest of the weights and preprocessing."""
    config = {**settings.model_dump(), "decode": VERSION, "weights": backbones.digest(weights)}
    return Plan("features", config, {"data": data.digest})


def extract(
    data: Artifact, settings: BackboneSettings, weights: Path | None, output: Store, *, batch: int, actors: int
) -> Artifact:
    """Compute FEATURES of every picture in `data` and publish them; finished shards of a killed run are kept.

    Args:
        weights: a local file, or None for the one that the backbone's package brings.
        batch: pictures in one forward pass.
        actors: Ray actors that hold the model.

    Raises:
        ConfigError: unknown backbone, missing weights, or data without pictures.
    """
    file = backbones.weights_path(settings.backbone, weights)
    work = plan(data, settings, file)
    if done := output.made(work):
        return done
    staging = output.staging(work)
    names = [e.path for e in data.shards() if not e.path.startswith("modality=text/") and int(e.facts["rows"])]
    if not names:
        raise ConfigError(f"data {data.digest[:12]} has no sketch and no photo; nothing to compute features of")
    todo = [{"name": name} for name in names if staging.finished(name) is None]
    options = {"data": data, "settings": settings, "weights": file, "sha256": work.config["weights"]}
    map_pieces(
        "features",
        Extractor,
        todo,
        fn_constructor_kwargs={**options, "staging": staging, "batch": batch},
        **pool(actors, len(todo)),
    )
    return seal_features(staging, output, names, {"backbone": settings.backbone, "size": settings.size})


def pool(actors: int, pieces: int) -> dict[str, Any]:
    """Options of an actor pool: a GPU each where the cluster has some, and never more actors than GPUs or pieces."""
    have = gpus()
    size = max(1, min(actors, pieces, have or actors))
    return {"compute": ActorPoolStrategy(size=size), "num_cpus": 1, "num_gpus": 1 if have else 0}


class Extractor:
    """A Ray actor that holds the backbone and turns one DATA shard after the other into a feature shard."""

    def __init__(
        self, data: Artifact, settings: BackboneSettings, weights: Path, sha256: str, staging: Staging, batch: int
    ) -> None:
        torch.set_num_threads(1)  # one thread an actor: the same bits whatever the number of cores, and no contention
        self.data, self.settings, self.staging, self.batch = data, settings, staging, batch
        self.device = own_device()
        self.backbone = backbones.load(settings.backbone, weights, sha256).to(self.device)

    def __call__(self, piece: dict[str, Any]) -> dict[str, Any]:
        name = piece["name"]
        table = self.data.read_table(name, columns=["id", "key", "image"])
        ids: list[int] = []
        bad: list[dict[str, Any]] = []
        pixels: list[np.ndarray] = []
        features: list[np.ndarray] = []
        for row in table.to_pylist():
            try:
                pixels.append(self._pixels(name, row["image"]))
                ids.append(row["id"])
            except BadImage as error:
                bad.append(
                    {"shard": name, "id": row["id"], "key": row["key"], "kind": error.kind, "message": str(error)}
                )
            if len(pixels) == self.batch:
                features.append(self._forward(pixels))
                pixels = []
        features += [self._forward(pixels)] if pixels else []
        return self._stage(name, ids, features, bad)

    def _pixels(self, name: str, image: bytes | None) -> np.ndarray:
        if image is None:
            raise BadImage("empty", "the row has no picture")
        decoded = decode(image, self.settings.size, Limits())
        inverted = self.settings.invert_sketches and name.startswith("modality=sketch/")
        return 255 - decoded if inverted else decoded

    @torch.inference_mode()
    def _forward(self, pixels: list[np.ndarray]) -> np.ndarray:
        batch = torch.from_numpy(np.stack(pixels)).to(self.device)
        return np.asarray(self.backbone(batch).half().cpu().numpy())

    def _stage(
        self, name: str, ids: list[int], features: list[np.ndarray], bad: list[dict[str, Any]]
    ) -> dict[str, Any]:
        matrix = np.concatenate(features) if features else np.zeros((0, self.backbone.dim), np.float16)
        if bad:
            self.staging.write(f"_quarantine/{name}.jsonl", b"".join(canonical(line) + b"\n" for line in bad))
        fault.here("features.shard")
        facts = {"rows": len(ids), "quarantined": len(bad), "dim": int(matrix.shape[1])}
        self.staging.write_table(name, feature_table(ids, matrix), facts=facts)
        return {"name": name, "rows": len(ids)}
