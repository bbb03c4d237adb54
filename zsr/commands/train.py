"""DATA, FEATURES, SEMANTICS and a split to a checkpoint."""

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

DEFAULT_MODEL: Final = "contrastive"  # the best of docs/results.md


class Config(TrainSettings, DeviceSettings, JobConfig):
    """Flags of zsr train, those of the run included.

    Attributes:
        data: DATA.
        features: FEATURES of that data; or leave it out and give a tower.
        tower: a backbone that is trained along, on the pictures themselves.
        weights: a local file or directory of the tower's first weights; none takes those that its package brings.
        random_weights: begin at random weights instead; --weights then tells sizes alone.
        layer: which of the tower's outputs; by default its first.
        scaling: of pixels: the tower's published one, or pixels / 255 alone as the released Doodle2Search does.
        fit: resize the whole picture, or cut out the middle as the tower's publishers do.
        attention: Doodle2Search's attention over positions, in a VGG.
        prompts: learned tokens that join those of a picture, in ViT, DINOv2 or CLIP.
        size: side in pixels that pictures are resized to; by default what the tower was trained at.
        towers: one tower for both modalities, or one each.
        tower_rate: the tower's learning rate as a multiple of the model's; 0 keeps it frozen.
        tower_tune: which of its parameters train: all, norms (and prompts), or a regular expression of their names.
        invert_sketches: white strokes on black.
        query_modality: of the queries; the gallery holds photos.
        semantics: SEMANTICS with a vector for every class; only models that learn from none can do without.
        split: a published split by name, random:UNSEEN:SEED, or a JSON file.
        output: ROOT of the checkpoint artifact.
        model: which model; `zsr train --model NAME --help` lists its options.
        preset: a named set of the model's options, such as the paper's own; single options go on top.
        track: TensorBoard's event files (beside the metrics), mlflow or wandb, in addition to the JSONL.
        log_every: steps from one line of metrics to the next.
        zero_stage: what DeepSpeed shards over workers: 0 nothing, 1 optimizer states, 2 and gradients, 3 and weights;
            by default as zsr/training/deepspeed.yaml, or the file $ZSR_DEEPSPEED, says.
        precision: of the forward passes, of weights that stay in 32 bits; fp16 on GPUs only. Default as above.
        recompute: an image tower forgets its activations and makes them again for the backward pass: less memory, about
            a third more time, the same bits.
        resume: latest continues a killed run of the same plan; never starts it again.
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
        """What the model eats. Raises ConfigError unless it is either features or a tower."""
        if (self.features is None) == (self.tower is None):
            raise ConfigError("give either --features, or a --tower that makes them of the pictures")
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
    """Open the inputs and resolve the split. Raises what opening and resolving raise."""
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
    """The flags of the model that `--model` or the file names: `--options.NAME` is typed by it, and it has its own
    defaults of the run's length. For help, only those of a model that is named: loading one takes seconds.

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
    """`config_for` a model and one of its presets."""
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
