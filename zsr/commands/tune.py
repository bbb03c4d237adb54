"""Hyperparameter search: run zsr train over a search space or several seeds, and keep the best by validation score."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml
from pydantic import Field, ValidationError, create_model

from zsr.artifact import write_atomically
from zsr.commands import train
from zsr.commands.base import Results, file_values, main, refusals
from zsr.devices import DeviceSettings
from zsr.errors import ConfigError
from zsr.training.config import SearcherName

if TYPE_CHECKING:
    from zsr.training.run import Run
    from zsr.training.sweep import Overrides, Sweep, Trial

# flags that would make the scores of two trials incomparable, or that are not hyperparameters
FIXED: Final = (
    *(
        "data",
        "split",
        "query_modality",
        "model",
        "preset",
        "validation_classes",
        "num_workers",
        "output",
        "dry_run",
        "resume",
    ),
    *("seed", "track", "log_every", "device", "gpus_per_worker"),
)
OWN: Final = ("search_space", "trials", "seeds", "searcher", "trials_per_gpu", "search_seed")


class Config(train.Config):
    """Search for a model's best hyperparameters. All other flags are those of zsr train, shared by every trial.

    Attributes:
        search_space: YAML file of `FIELD: {KIND: VALUES}`, such as `options.lr: {loguniform: [1e-5, 1e-3]}`; kinds are
            uniform, loguniform, randint, choice and grid. Without it only the seeds vary.
        trials: number of configurations to sample; each is trained with every seed.
        seeds: seeds of the training runs; a configuration's score is the mean over them.
        searcher: random, or optuna (extra `optuna`).
        trials_per_gpu: trials that share the GPUs of --gpus-per-worker; a small model cannot use a whole GPU.
        search_seed: seed of the sampling.
    """

    search_space: Path | None = None
    trials: int = Field(8, ge=1)
    seeds: tuple[int, ...] = (0,)
    searcher: SearcherName = "random"
    trials_per_gpu: int = Field(1, ge=1)
    search_seed: int = 0


def base(config: Any) -> dict[str, Any]:
    """The flags of zsr train shared by all trials, as plain values; paths are absolute, as trials run on any node."""
    values = {name: getattr(config, name) for name in type(config).model_fields if name not in OWN}
    return {**values, "options": config.options.model_dump(mode="json"), "num_workers": 0}


def trial_config(values: Mapping[str, Any], overrides: "Overrides") -> Any:
    """The configuration of zsr train for one trial.

    Raises:
        ConfigError: no such field, a field that must be the same in all trials, or an invalid value.
    """
    changed = {**values, "options": dict(values["options"])}
    for name, value in overrides.items():
        field, _, option = name.partition(".")
        field = field.replace("-", "_")
        if field not in changed or (field in FIXED and name != "seed") or (field == "options") != bool(option):
            known = sorted(set(changed) - {*FIXED, "options"}) + [f"options.{o}" for o in values["options"]]
            raise ConfigError(f"search space: {name!r} cannot be tuned; choose from {known}")
        if option and option not in changed["options"]:
            raise ConfigError(f"search space: no option {option!r}; known are {sorted(values['options'])}")
        if option:
            changed["options"][option] = value
        else:
            changed[field] = value
    kind = train.config_of(changed["model"])
    try:
        return kind(**changed)
    except ValidationError as error:
        raise ConfigError(f"trial {dict(overrides)}: {refusals(error, kind)}") from error


def make(values: Mapping[str, Any], overrides: "Overrides") -> "Run":
    """The run of one trial."""
    config = trial_config(values, overrides)
    return train.prepare_run(config, config.options)


def sweep_of(config: Any) -> "Sweep":
    """The sweep to run.

    Raises:
        ConfigError: see `parse_space` and `trial_config`.
    """
    from zsr.training.sweep import Sweep, parse_space

    content = {} if config.search_space is None else file_values(config.search_space, "--search-space")
    values = base(config)
    space = parse_space(content)
    if "seed" in space:
        raise ConfigError("search space: the seed cannot be tuned; use --seeds")
    for name, given in content.items():
        ((kind, listed),) = given.items()
        for value in listed if kind in ("choice", "grid") else ():
            trial_config(values, {name: value})  # fail early on an invalid value
    known = {name.partition(".")[0] for name in space}
    trial_config(values, {name: values.get(name, values["options"].get(name.partition(".")[2])) for name in space})
    return Sweep(
        space=space,
        samples=config.trials if known else 1,
        seeds=config.seeds,
        searcher=config.searcher,
        device=DeviceSettings(device=config.device, gpus_per_worker=config.gpus_per_worker / config.trials_per_gpu),
        seed=config.search_seed,
    )


def plan(config: Any) -> Results:
    from zsr.training.run import describe

    sweep = sweep_of(config)
    first = describe(make(base(config), {"seed": sweep.seeds[0]}))
    return {"settings": sweep.samples, "seeds": list(sweep.seeds), "space": sorted(sweep.space), "each": first}


def work(config: Any) -> Results:
    from zsr.training.sweep import best_setting, run_sweep

    values = base(config)
    trials = run_sweep(partial(make, values), sweep_of(config), config.output)
    setting, score = best_setting(trials)
    best = config.output / "best.yaml"
    write_atomically(best, yaml.safe_dump(flags(trial_config(values, setting))).encode())
    write_atomically(config.output / "trials.json", json.dumps([asdict(t) for t in trials], indent=1).encode())
    print(table(trials), file=sys.stderr)
    about = {
        "trials": len(trials),
        "failed": sum(trial.score is None for trial in trials),
        "best": setting,
        "validation_map_all": score,
        "best_config": str(best),
    }
    return {"artifact": trials[0].checkpoint, "digest": trials[0].digest, "kind": "checkpoint", **about}


def flags(config: Any) -> dict[str, Any]:
    """The configuration file for `zsr train --config`, without --output."""
    values = config.model_dump(
        mode="json", exclude={"output", "dry_run", "resume", "track", "log_every", *DeviceSettings.model_fields}
    )
    values["options"] = {name: value for name, value in values["options"].items() if value is not None}
    values["num_workers"] = values["num_workers"] or 1  # trials train in their own actors, a job trains in a worker
    return {name: value for name, value in values.items() if value is not None}


def table(trials: Sequence["Trial"]) -> str:
    """One line per trial, best first."""
    lines = ["validation mAP  step  setting"]
    for trial in trials:
        score = "        failed" if trial.score is None else f"{trial.score:14.4f}"
        said = ", ".join(f"{name}={value}" for name, value in trial.overrides.items())
        lines.append(
            f"{score}  {'' if trial.best_step is None else trial.best_step:>4}  {said}  {trial.error}".rstrip()
        )
    return "\n".join(lines)


def config_for(argv: Sequence[str]) -> type[Any]:
    """The configuration class, see `train.config_for`."""
    options = train.config_for(argv).model_fields.get("options")
    typed: dict[str, Any] = {} if options is None else {"options": (options.annotation, options.default)}
    return create_model("Config", __base__=Config, __module__=__name__, __doc__=Config.__doc__, **typed)


def run(argv: Sequence[str]) -> int:
    return main(config_for, plan, work, argv, "zsr tune")
