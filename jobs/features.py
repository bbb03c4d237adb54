"""DATA to FEATURES: backbone features of every picture."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs._job import JobConfig, Results, main
from zsr.artifact import Store, open_artifact
from zsr.embedding.backbone import BackboneSettings, extract
from zsr.embedding.backbone import plan as plan_features
from zsr.models import backbones


class Config(JobConfig):
    """Flags of jobs.features.

    Attributes:
        data: DATA with pictures.
        output: ROOT of the FEATURES artifact.
        backbone: name of the backbone.
        weights: a local weights file (safetensors, or torch's format read with weights_only); none takes the package's.
        size: side in pixels that pictures are resized to.
        invert_sketches: white strokes on black.
        batch_size: pictures in one forward pass.
        actors: processes that hold the backbone.
    """

    data: Path
    output: Path
    backbone: str = "lite0"
    weights: Path | None = None
    size: int = 224
    invert_sketches: bool = False
    batch_size: int = 32
    actors: int = max(1, os.cpu_count() or 1)

    def settings(self) -> BackboneSettings:
        return BackboneSettings(backbone=self.backbone, size=self.size, invert_sketches=self.invert_sketches)


def plan(config: Config) -> Results:
    data = open_artifact(config.data, "data")
    weights = backbones.weights_path(config.backbone, config.weights)
    rows = {m: n for m, n in data.facts["rows"].items() if m != "text"}
    digest = plan_features(data, config.settings(), weights).digest
    return {"plan": digest, "pictures": rows, "actors": config.actors, "weights": str(weights)}


def work(config: Config) -> Results:
    data = open_artifact(config.data, "data")
    store = Store.at(config.output)
    features = extract(data, config.settings(), config.weights, store, batch=config.batch_size, actors=config.actors)
    return {"features": features.digest, **features.facts}


def run(argv: Sequence[str] | None = None) -> int:
    return main(Config, plan, work, argv)


if __name__ == "__main__":
    sys.exit(run())
