"""Train a model: DATA, FEATURES, SEMANTICS and a split to a checkpoint."""

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import Field, create_model

from zsr.artifact import Artifact, Store, open_artifact
from zsr.commands.base import JobConfig, Results, file_values, made, main, peek, without_file
from zsr.data import splits
from zsr.devices import DeviceSettings
from zsr.errors import ConfigError
from zsr.models import MODELS, configure
from zsr.models.choices import Fit, PixelScaling, Query
from zsr.training.config import Precision, Stage, TrackerName, TrainSettings

if TYPE_CHECKING:
    from zsr.models.protocol import ModelConfig
    from zsr.training.run import Run, TowerStart

DEFAULT_MODEL: Final = "contrastive"  # the best in docs/results.md


class Config(TrainSettings, DeviceSettings, JobConfig):
    """Train a model on the seen classes.

    Attributes:
        data: DATA artifact.
        features: FEATURES of that data; omit with --tower.
        tower: backbone to fine-tune end to end on the images, instead of precomputed --features.
        weights: file or directory of the tower's initial weights; by default those of its package.
        random_weights: initialize the tower at random; only the architecture is then read from --weights.
        layer: output of the tower to use; by default its first.
        scaling: normalize pixels as published with the tower, or only divide them by 255, as the released Doodle2Search
            does.
        fit: resize the whole image, or take a center crop as the tower's publishers do.
        attention: add Doodle2Search's spatial attention to a VGG tower.
        prompts: number of learned prompt tokens per image, in ViT, DINOv2 or CLIP.
        size: side in pixels to which images are resized; by default the size the tower was trained at.
        towers: one tower shared by both modalities, or one per modality.
        tower_rate: the tower's learning rate as a multiple of the model's; 0 keeps it frozen.
        tower_tune: tower parameters to train: all, norms (and prompts), or a regular expression on their names.
        invert_sketches: turn sketches into white strokes on black.
        query_modality: modality of the queries; the gallery holds photos.
        semantics: SEMANTICS with an embedding for every class; required unless the model does not use them.
        split: a published split by name, random:UNSEEN:SEED, or a JSON file.
        output: ROOT of the checkpoint artifact.
        model: name of the model; `zsr train --model NAME --help` lists its options.
        preset: a named set of the model's options, such as the paper's; single options override it.
        track: experiment trackers in addition to the JSONL log: tensorboard (event files next to it), mlflow, wandb.
        log_every: steps between two log entries.
        zero_stage: ZeRO stage, what DeepSpeed shards over workers: 0 nothing, 1 optimizer states, 2 also gradients, 3
            also weights; by default that of zsr/training/deepspeed.yaml, or of the file $ZSR_DEEPSPEED.
        precision: precision of forward passes; weights stay in fp32. fp16 on GPUs only. Default as for zero_stage.
        recompute: activation checkpointing in image towers: less memory, about a third more time, the same bits.
        resume: latest resumes a killed run of the same plan; never starts it from scratch.
    """

    data: Path
    split: str
    output: Path
    semantics: Path | None = None
    features: Path | None = None
    tower: str | None = None
    weights: Path | None = None
    random_weights: bool = False
    layer: str | None = None
    scaling: PixelScaling = "published"
    fit: Fit = "stretch"
    attention: bool = False
    prompts: int = 0
    size: int | None = None
    towers: Literal["shared", "separate"] = "shared"
    tower_rate: float = 0.1
    tower_tune: str = "all"
    invert_sketches: bool = False
    query_modality: Query = "sketch"
    model: str = DEFAULT_MODEL
    preset: str | None = None
    track: tuple[TrackerName, ...] = ()
    log_every: int = Field(10, ge=1)
    zero_stage: Stage | None = None
    precision: Precision | None = None
    recompute: bool = False
    resume: Literal["latest", "never"] = "latest"

    def inputs(self) -> "Artifact | TowerStart":
        """The model's inputs. Raises ConfigError unless exactly one of features and tower is given."""
        if (self.features is None) == (self.tower is None):
            raise ConfigError("give either --features, or a --tower that is trained on the images")
        if self.features is not None:
            return open_artifact(self.features, "features")
        from zsr.models import backbones
        from zsr.models.protocol import Tower
        from zsr.training.run import TowerStart

        name = str(self.tower)
        path = None if self.random_weights else backbones.weights_path(name, self.weights)
        architecture = backbones.architecture(
            name,
            path or self.weights,
            layer=self.layer,
            scaling=self.scaling,
            attention=self.attention,
            prompts=self.prompts,
        )
        tower = Tower(
            architecture=architecture,
            size=backbones.side(architecture, self.size),
            fit=self.fit,
            invert_sketches=self.invert_sketches,
            shared=self.towers == "shared",
            rate=self.tower_rate,
            tune=self.tower_tune,
            weights="" if path is None else backbones.digest(path),
        )
        return TowerStart(tower, path)


def prepare_run(config: Config, options: "ModelConfig") -> "Run":
    """Open the inputs and resolve the split. Raises the errors of `open_artifact` and `splits.choose`."""
    from zsr.training import trackers
    from zsr.training.engines import deepspeed_config
    from zsr.training.run import Run

    data = open_artifact(config.data, "data")
    split = splits.choose(config.split, data.facts["classes"], config.validation_classes, config.seed)
    return Run(
        data=data,
        features=config.inputs(),
        semantics=None if config.semantics is None else open_artifact(config.semantics, "semantics"),
        split=split,
        model=config.model,
        options=options.model_dump(mode="json"),
        settings=TrainSettings(**{name: getattr(config, name) for name in TrainSettings.model_fields}),
        output=Store.at(config.output),
        query=config.query_modality,
        deepspeed=deepspeed_config(config.zero_stage, config.precision),
        recompute=config.recompute,
        device=config.devices,
        tracking=trackers.Tracking(config.track, config.log_every),
    )


def plan(config: Any) -> Results:
    from zsr.training.run import describe

    return describe(prepare_run(config, config.options))


def work(config: Any) -> Results:
    from zsr.training import metrics
    from zsr.training.run import metrics_path, train_model

    run = prepare_run(config, config.options)
    checkpoint = train_model(run, fresh=config.resume == "never")
    facts = checkpoint.facts
    return made(
        checkpoint,
        config.output,
        model=config.model,
        best_step=facts["best_step"],
        steps=facts["steps"],
        validation_map_all=facts["validation_map_all"],
        **{metrics.WAIT: metrics.waited_share(metrics_path(run, checkpoint.plan))},
    )


def config_for(argv: Sequence[str]) -> type[Any]:
    """The configuration class for the model in `--model` or in the file, which defines `--options.*` and the defaults
    of epochs and the like. --help without a model omits its options, since importing one takes seconds.

    Raises:
        ConfigError: no such model or preset.
    """
    flags, path = without_file(argv)
    values = {} if path is None else file_values(path)
    named = {name: given or values.get(name) for name, given in peek(flags, "model", "preset").items()}
    if not any(named.values()) and {"-h", "--help"} & set(flags):
        return Config
    return config_of(*named.values())


def config_of(model: object = None, preset: object = None) -> type[Any]:
    """The configuration class for a model and one of its presets, see `config_for`."""
    name = str(model or DEFAULT_MODEL)
    options = configure(name, {}, None if preset is None else str(preset))
    fields: dict[str, Any] = {"options": (type(options), options)}
    for flag, value in MODELS[name].schedule.items():
        about = copy(Config.model_fields[flag])
        about.default = value
        fields[flag] = (about.annotation, about)
    return create_model("Config", __base__=Config, __module__=__name__, __doc__=Config.__doc__, **fields)


def run(argv: Sequence[str]) -> int:
    return main(config_for, plan, work, argv, "zsr train")
