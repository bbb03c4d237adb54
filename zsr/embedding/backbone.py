"""Features of DATA's pictures by a backbone, and of its texts by a sentence encoder: DATA -> FEATURES."""

from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from ray.data import ActorPoolStrategy

from zsr import fault
from zsr.artifact import Artifact, Plan, Staging, Store, canonical
from zsr.cluster import gpus, map_pieces, own_device
from zsr.data.decode import VERSION, BadImage
from zsr.data.features import feature_table, seal_features
from zsr.data.semantics.sentences import encoder_digest, encoder_folder
from zsr.embedding.encode import BackboneSettings, featurizer, tower_of
from zsr.embedding.text import TextExtractor
from zsr.errors import ConfigError
from zsr.models import backbones

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
    data: Artifact, settings: BackboneSettings, weights: Path | Artifact, output: Store, *, batch: int, actors: int
) -> Artifact:
    """Compute FEATURES of every picture in `data` and publish them; finished shards of a killed run are kept.

    Args:
        weights: see `plan`.
        batch: pictures in one forward pass.
        actors: Ray actors that hold the model.

    Raises:
        ConfigError: see `plan`; or data without pictures.
    """
    work = plan(data, settings, weights)
    if done := output.made(work):
        return done
    staging = output.staging(work)
    names = shards(data, settings)
    if not names:
        raise ConfigError(f"data {data.digest[:12]} has no rows that --backbone or --texts make features of")
    todo = [{"name": name} for name in names if staging.finished(name) is None]
    options = {
        "data": data,
        "settings": settings,
        "weights": weights,
        "sha256": work.config["weights"],
        "texts": work.config.get("texts", ""),
    }
    map_pieces(
        "features",
        Extractor,
        todo,
        fn_constructor_kwargs={**options, "staging": staging, "batch": batch},
        **pool(actors, len(todo)),
    )
    return seal_features(staging, output, names, {"backbone": settings.backbone, "size": work.config["size"]})


def shards(data: Artifact, settings: BackboneSettings) -> list[str]:
    """Names of the shards that get features, in order."""
    texts = settings.texts != "none"
    return [e.path for e in data.shards() if int(e.facts["rows"]) and (texts or not e.path.startswith(TEXT))]


def pool(actors: int, pieces: int) -> dict[str, Any]:
    """Options of an actor pool: a GPU each where the cluster has some, and never more actors than GPUs or pieces."""
    have = gpus()
    size = max(1, min(actors, pieces, have or actors))
    return {"compute": ActorPoolStrategy(size=size), "num_cpus": 1, "num_gpus": 1 if have else 0}


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
        batch: int,
    ) -> None:
        torch.set_num_threads(1)  # one thread an actor: the same bits whatever the number of cores, and no contention
        self.data, self.staging, self.batch = data, staging, batch
        self.device = own_device()
        self.featurizer = featurizer(settings, weights, sha256).to(self.device)
        self.texts = TextExtractor(encoder_folder(None), texts, self.device, batch) if texts else None

    def __call__(self, piece: dict[str, Any]) -> dict[str, Any]:
        name = piece["name"]
        if self.texts is not None and name.startswith(TEXT):
            table = self.data.read_table(name, columns=["id", "key", "text"])
            return self._stage(name, *self.texts(name, table), self.texts.dim)
        side = "sketch" if name.startswith("modality=sketch/") else "photo"
        table = self.data.read_table(name, columns=["id", "key", "image"])
        ids: list[int] = []
        bad: list[dict[str, Any]] = []
        pixels: list[np.ndarray] = []
        features: list[np.ndarray] = []
        for row in table.to_pylist():
            try:
                pixels.append(self.featurizer.pixels(side, row["image"]))
                ids.append(row["id"])
            except BadImage as error:
                bad.append(
                    {"shard": name, "id": row["id"], "key": row["key"], "kind": error.kind, "message": str(error)}
                )
            if len(pixels) == self.batch:
                features.append(self.featurizer.features(side, np.stack(pixels)))
                pixels = []
        features += [self.featurizer.features(side, np.stack(pixels))] if pixels else []
        return self._stage(name, ids, features, bad, self.featurizer.backbones[side].dim)

    def _stage(
        self, name: str, ids: list[int], features: list[np.ndarray], bad: list[dict[str, Any]], dim: int
    ) -> dict[str, Any]:
        matrix = np.concatenate(features) if features else np.zeros((0, dim), np.float16)
        if bad:
            self.staging.write(f"_quarantine/{name}.jsonl", b"".join(canonical(line) + b"\n" for line in bad))
        fault.here("features.shard")
        facts = {"rows": len(ids), "quarantined": len(bad), "dim": int(matrix.shape[1])}
        self.staging.write_table(name, feature_table(ids, matrix), facts=facts)
        return {"name": name, "rows": len(ids)}
