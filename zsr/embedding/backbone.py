"""Features of DATA's pictures by a backbone, and of its texts by a sentence encoder: DATA -> FEATURES."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, cast

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from ray.data import ActorPoolStrategy

from zsr import fault
from zsr.artifact import Artifact, Plan, Staging, Store, canonical
from zsr.cluster import gpus, map_pieces, own_device
from zsr.data.decode import VERSION, BadImage, Limits, Resize, decode
from zsr.data.features import feature_table, seal_features
from zsr.data.semantics.sentences import encoder_digest, encoder_folder
from zsr.embedding.text import TextExtractor
from zsr.errors import ConfigError
from zsr.models import backbones
from zsr.models.protocol import Inputs, Tower
from zsr.training.checkpoint import open_model
from zsr.training.source import pictures_of, resize_of

TEXT: Final = "modality=text/"


class BackboneSettings(BaseModel):
    """What shapes FEATURES.

    Attributes:
        backbone: name in `backbones.BACKBONES`.
        layer: which of its outputs; None takes the first.
        size: side in pixels that pictures are resized to; None takes the backbone's own.
        fit: `stretch` keeps the whole picture and not its aspect, as the papers of this field do; `published` cuts out
            the middle as the backbone's publishers do.
        scaling: of pixels: as published with the backbone, or `unit`, pixels / 255 and nothing else.
        invert_sketches: white strokes on black, as SEM-PCYC's backbones were tuned on.
        texts: what text rows go through, if there are any; `none` leaves them without features.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    backbone: str = "lite0"
    layer: str | None = None
    size: int | None = None
    fit: backbones.Fit = "stretch"
    scaling: backbones.Scaling = "published"
    invert_sketches: bool = False
    texts: Literal["minilm", "none"] = "minilm"

    def architecture(self, weights: Path) -> dict[str, Any]:
        """See `backbones.architecture`."""
        return backbones.architecture(self.backbone, weights, layer=self.layer, scaling=self.scaling)


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


def tower_of(checkpoint: Artifact) -> Tower:
    """The image tower that a checkpoint was trained with. Raises ConfigError if it has none."""
    tower = Inputs.model_validate(checkpoint.config["inputs"]).tower
    if tower is None:
        raise ConfigError(f"checkpoint {checkpoint.digest[:12]} has no image tower to make features with")
    return tower


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


def _network(
    settings: BackboneSettings, weights: Path | Artifact, sha256: str
) -> tuple[Mapping[str, backbones.Backbone], Resize]:
    """What makes features of each modality's pictures, and what becomes of the pictures before."""
    if isinstance(weights, Artifact):
        model = open_model(weights)
        towers = {side: cast(backbones.Backbone, model.tower(side)) for side in ("sketch", "photo")}
        return towers, pictures_of(tower_of(weights)).resize
    loaded = backbones.load(settings.backbone, weights, sha256, layer=settings.layer, scaling=settings.scaling)
    made = settings.architecture(weights)
    return dict.fromkeys(("sketch", "photo"), loaded), resize_of(
        made, backbones.side(made, settings.size), settings.fit
    )


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
        self.data, self.settings, self.staging, self.batch = data, settings, staging, batch
        self.device = own_device()
        found, self.resize = _network(settings, weights, sha256)
        self.backbones = {side: backbone.to(self.device) for side, backbone in found.items()}
        self.texts = TextExtractor(encoder_folder(None), texts, self.device, batch) if texts else None

    def __call__(self, piece: dict[str, Any]) -> dict[str, Any]:
        name = piece["name"]
        if self.texts is not None and name.startswith(TEXT):
            table = self.data.read_table(name, columns=["id", "key", "text"])
            return self._stage(name, *self.texts(name, table), self.texts.dim)
        backbone = self.backbones["sketch" if name.startswith("modality=sketch/") else "photo"]
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
                features.append(self._forward(backbone, pixels))
                pixels = []
        features += [self._forward(backbone, pixels)] if pixels else []
        return self._stage(name, ids, features, bad, backbone.dim)

    def _pixels(self, name: str, image: bytes | None) -> np.ndarray:
        if image is None:
            raise BadImage("empty", "the row has no picture")
        decoded = decode(image, self.resize, Limits())
        inverted = self.settings.invert_sketches and name.startswith("modality=sketch/")
        return 255 - decoded if inverted else decoded

    @torch.inference_mode()
    def _forward(self, backbone: backbones.Backbone, pixels: list[np.ndarray]) -> np.ndarray:
        batch = torch.from_numpy(np.stack(pixels)).to(self.device)
        return np.asarray(backbone(batch).half().cpu().numpy())

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
