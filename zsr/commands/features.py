"""Compute backbone features of every image: DATA to FEATURES."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from zsr.artifact import Artifact, Store, open_artifact
from zsr.commands.base import JobConfig, Results, made, main
from zsr.devices import DeviceSettings
from zsr.embedding.settings import BackboneSettings, Finetune, Prices
from zsr.models.choices import Fit, PixelScaling


class Config(DeviceSettings, JobConfig):
    """Compute backbone features of every image.

    Attributes:
        data: DATA with images.
        output: ROOT of the FEATURES artifact.
        backbone: lite0, vgg16, vgg16-bn, vgg19, resnet, vit, dinov2 or clip.
        weights: a local file (safetensors, or torch's format read with weights_only), or for resnet, vit, dinov2 and
            clip a directory with config.json and model.safetensors; by default those of the package, which lite0 has.
        layer: output of the backbone: fc7, fc6, conv or logits for VGG, cls or pooled for ViT.
        size: side in pixels to which images are resized; by default the backbone's own.
        fit: resize the whole image, or take a center crop as the backbone's publishers do.
        scaling: normalize pixels as the backbone's publishers do, or only scale them to 0..1.
        invert_sketches: turn sketches into white strokes on black.
        jpegs: gpu decodes and resizes JPEGs on each worker's GPU; requires the extra `nvjpeg`.
        texts: sentence encoder for text rows, or none.
        finetune_on_seen: a split, as in zsr train --split; the backbone is first fine-tuned to classify its seen
            classes.
        finetune: settings of that fine-tuning.
        batch_size: images per forward pass; by default 32 on a CPU and 64 on a GPU.
        num_workers: processes that hold the backbone; by default as many as fit on nodes that are up or that the
            autoscaler can start.
        decoders: max Ray tasks (one CPU each) per worker that prefetch and decode images; by default as many as there
            are CPUs for on a cluster with GPUs, otherwise none. A probe of a few seconds finds how many are needed.
        cpu_price: price per CPU hour, in any currency; the results then include the cost per million rows.
        gpu_price: price per GPU hour.
        measure: with --dry-run: run for a few seconds to predict the total time and cost.
    """

    data: Path
    output: Path
    backbone: str = "lite0"
    weights: Path | None = None
    layer: str | None = None
    size: int | None = None
    fit: Fit = "stretch"
    scaling: PixelScaling = "published"
    invert_sketches: bool = False
    jpegs: Literal["cpu", "gpu"] = "cpu"
    texts: Literal["minilm", "none"] = "minilm"
    finetune_on_seen: str | None = None
    finetune: Finetune = Finetune()
    batch_size: int | None = None
    num_workers: int | None = Field(None, ge=1)
    decoders: int | None = None
    cpu_price: float = 0.0
    gpu_price: float = 0.0
    measure: bool = False

    def settings(self) -> BackboneSettings:
        return BackboneSettings(**{name: getattr(self, name) for name in BackboneSettings.model_fields})


def plan(config: Config) -> Results:
    from zsr.embedding.backbone import plan as plan_features
    from zsr.embedding.backbone import predict
    from zsr.models import backbones

    data = open_artifact(config.data, "data")
    weights = backbones.weights_path(config.backbone, config.weights)
    rows = {m: n for m, n in data.facts["rows"].items() if m != "text" or config.texts != "none"}
    digest = plan_features(data, config.settings(), weights).digest
    found: Results = {"plan": digest, "rows": rows, "weights": str(weights)}
    if not config.measure:
        return found
    cost = predict(
        data,
        config.settings(),
        weights,
        batch=config.batch_size,
        actors=config.num_workers,
        prices=Prices(config.cpu_price, config.gpu_price),
        device=config.devices,
    )
    return {**found, "cost": cost}


def work(config: Config) -> Results:
    from zsr.embedding.backbone import extract
    from zsr.embedding.finetune import finetune
    from zsr.models import backbones

    data = open_artifact(config.data, "data")
    settings = config.settings()
    published = backbones.weights_path(config.backbone, config.weights)
    weights: Path | Artifact = published
    if (split := config.finetune_on_seen) is not None:
        tuned = Store.at(config.output / "backbone")
        weights = finetune(data, settings, published, split, config.finetune, tuned, config.devices)
    store = Store.at(config.output)
    features, tally = extract(
        data,
        settings,
        weights,
        store,
        batch=config.batch_size,
        actors=config.num_workers,
        decoders=config.decoders,
        device=config.devices,
    )
    prices = Prices(config.cpu_price, config.gpu_price)
    return made(features, config.output, **features.facts, cost=tally.report(prices))


def run(argv: Sequence[str]) -> int:
    return main(Config, plan, work, argv, "zsr features")
