"""DATA, FEATURES, SEMANTICS and a split to a checkpoint."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import create_model

from jobs._job import JobConfig, Results, file_values, main
from zsr.artifact import Store, open_artifact
from zsr.data import splits
from zsr.errors import ConfigError
from zsr.evaluation.metrics import mean_average_precision
from zsr.models import MODELS, configure
from zsr.models.protocol import ModelConfig
from zsr.training.config import TrainSettings
from zsr.training.run import Run, describe, train_model


class Config(TrainSettings, JobConfig):
    """Flags of jobs.train, those of the run included.

    Attributes:
        data: DATA.
        features: FEATURES of that data.
        semantics: SEMANTICS with a vector for every class.
        split: a published split by name, random:UNSEEN:SEED, or a JSON file.
        output: ROOT of the checkpoint artifact.
        model: which model.
        preset: a named set of the model's options, such as the paper's own; single options go on top.
        resume: latest continues a killed run of the same plan; never starts it again.
    """

    data: Path
    features: Path
    semantics: Path
    split: str
    output: Path
    model: str = "sem-pcyc"
    preset: str | None = None
    resume: Literal["latest", "never"] = "latest"


def prepare_run(config: Config, options: ModelConfig) -> Run:
    """Open the inputs and resolve the split. Raises what opening and resolving raise."""
    data = open_artifact(config.data, "data")
    split = splits.choose(config.split, data.facts["classes"], config.validation_classes, config.seed)
    return Run(
        data=data,
        features=open_artifact(config.features, "features"),
        semantics=open_artifact(config.semantics, "semantics"),
        split=split,
        model=config.model,
        options=options.model_dump(mode="json"),
        settings=TrainSettings(**{name: getattr(config, name) for name in TrainSettings.model_fields}),
        output=Store.at(config.output),
        score=mean_average_precision,
    )


def plan(config: Any) -> Results:
    return describe(prepare_run(config, config.options))


def work(config: Any) -> Results:
    run = prepare_run(config, config.options)
    if config.resume == "never":
        run.output.discard(run.plan())
    checkpoint = train_model(run)
    facts = checkpoint.facts
    best = dict(map(tuple, facts["history"]))[facts["best_step"]]
    return {
        "checkpoint": checkpoint.digest,
        "best_step": facts["best_step"],
        "steps": facts["steps"],
        "validation_map_all": best,
        "model": config.model,
    }


def config_for(argv: Sequence[str]) -> type[Any]:
    """The flags of this model: `--options.NAME` is typed by the model that `--model` (or the file) names.

    Raises:
        ConfigError: no such model or preset.
    """
    name = str(peek(argv, "model", "sem-pcyc"))
    preset = peek(argv, "preset", None)
    if name not in MODELS:
        raise ConfigError(f"no model {name!r}; known are {sorted(MODELS)}")
    options = configure(name, {}, None if preset is None else str(preset))
    return create_model("Config", __base__=Config, __module__=__name__, options=(type(options), options))


def peek(argv: Sequence[str], name: str, default: str | None) -> str | None:
    """The value of one flag before the flags can be parsed, from the command line or else from --config's file."""
    found = default
    flags = list(argv)
    if "--config" in flags and flags.index("--config") + 1 < len(flags):
        found = file_values(Path(flags[flags.index("--config") + 1])).get(name, default)
    for at, flag in enumerate(flags):
        if flag == f"--{name}" and at + 1 < len(flags):
            found = flags[at + 1]
        if flag.startswith(f"--{name}="):
            found = flag.partition("=")[2]
    return found


def run(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    return main(config_for, plan, work, arguments)


if __name__ == "__main__":
    sys.exit(run())
