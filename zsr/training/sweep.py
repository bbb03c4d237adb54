"""Hyperparameter sweeps with Ray Tune: search over configuration fields, and several seeds per setting.

A trial is one Ray actor that trains in its own process (see `train_model`), with a fraction of a GPU if there are GPUs,
since one small model does not saturate one. Trials are selected by validation score; unseen classes are not used.

Ray Tune's own experiment files are pickles and are deleted. To resume a sweep, start it again: settings are sampled
with a seed, equal settings give equal plans, finished trials are found and unfinished ones resumed.
"""

import logging
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, Final

from ray import tune
from ray.tune.search import BasicVariantGenerator, SearchAlgorithm, Searcher

from zsr import errors
from zsr.artifact import Store
from zsr.cluster import connect
from zsr.devices import AUTO, DeviceSettings, capacity, choose
from zsr.errors import ConfigError, Infeasible, ZsrError
from zsr.training.config import SearcherName
from zsr.training.run import Run, train_model

logger = logging.getLogger("zsr")

SCORE: Final = "validation_map_all"
FAILED: Final = -1.0  # below any score: reported by a trial that raised an error
RETRIES: Final = 3  # retries of a trial whose process or node was lost

Overrides = Mapping[str, Any]  # field of the configuration, dotted for the model's options -> value


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        overrides: its overridden configuration fields, `seed` included.
        score: on the validation classes; None if it failed.
        checkpoint: directory or URL of the checkpoint.
    """

    overrides: dict[str, Any]
    score: float | None
    best_step: int | None = None
    checkpoint: str = ""
    error: str = ""

    @property
    def digest(self) -> str:
        """Of the checkpoint."""
        return self.checkpoint.rpartition("/")[2]


@dataclass(frozen=True)
class Sweep:
    """Search space and search settings.

    Attributes:
        space: from `parse_space`.
        samples: number of settings to sample; every `grid` is searched in full for each.
        seeds: each setting is trained with every seed; its score is the mean.
        searcher: `random` samples from the space; `optuna` (TPE) samples near settings with good scores.
        device: of a trial.
        seed: of the sampling.
    """

    space: Mapping[str, Any]
    samples: int
    seeds: tuple[int, ...]
    searcher: SearcherName = "random"
    device: DeviceSettings = AUTO
    seed: int = 0


def parse_space(content: Mapping[str, Any]) -> dict[str, Any]:
    """Convert `{FIELD: {KIND: VALUES}}` to Ray Tune's search space.

    Kinds: uniform: [low, high]; loguniform: [low, high]; randint: [low, high), choice: [values]; grid: [values].

    Raises:
        ConfigError: an unknown kind, or values that are invalid for it.
    """
    return {field: _domain(field, given) for field, given in content.items()}


def _domain(field: str, given: Any) -> Any:
    ranges = {"uniform": tune.uniform, "loguniform": tune.loguniform, "randint": tune.randint}
    lists = {"choice": tune.choice, "grid": tune.grid_search}
    if not isinstance(given, Mapping) or len(given) != 1 or not set(given) & {*ranges, *lists}:
        raise ConfigError(
            f"search space, {field}: found {given!r}, expected one of {sorted((*ranges, *lists))}: values"
        )
    ((kind, values),) = given.items()
    if not isinstance(values, list) or not values:
        raise ConfigError(f"search space, {field}: {kind} requires a list, found {values!r}")
    if kind in lists:
        return lists[kind](values)
    try:
        low, high = values
        if kind != "randint":  # YAML reads 1e-4 as a string
            low, high = float(low), float(high)
        if not low < high or (kind == "loguniform" and low <= 0):
            raise ValueError("low must be less than high, and positive on a logarithmic scale")
        return ranges[kind](low, high)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"search space, {field}: {kind} requires [low, high], found {values!r}: {error}") from error


def run_sweep(make: Callable[[Overrides], Run], sweep: Sweep, output: Path) -> list[Trial]:
    """Train all trials and return them, best first, failed ones last.

    Args:
        make: creates the run of some overrides; called in the trial's process.
        output: folder of the trials' checkpoints, each in a ROOT named by its plan.

    Raises:
        ConfigError: the searcher is not installed, or does not support several seeds or a grid.
        Infeasible: a single CPU; see `devices.choose`.
        ZsrError: the error of the first trial, if all failed.
    """
    connect()
    # trials keep the working directory, so that relative paths stay valid; and no boxes around the job's own output
    os.environ |= {"RAY_CHDIR_TO_TRIAL_DIR": "0", "RAY_AIR_NEW_OUTPUT": "0"}
    devices = choose(sweep.device)
    together = min(devices.most, _spare_cpus())
    devices.say(together)
    share = {"cpu": 1, "gpu": devices.gpus}
    folder = output / "ray" / uuid.uuid4().hex
    trainable = tune.with_parameters(_trial, make=make, trials=output / "trials")
    tuner = tune.Tuner(
        tune.with_resources(trainable, share),
        param_space=space_of(sweep),
        tune_config=tune.TuneConfig(
            metric=SCORE,
            mode="max",
            search_alg=searcher_of(sweep),
            num_samples=sweep.samples,
            max_concurrent_trials=together,
        ),
        run_config=tune.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=RETRIES),
        ),
    )
    try:
        results = tuner.fit()
        found = [_trial_of(results[i]) for i in range(len(results))]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if all(trial.score is None for trial in found):
        kind, _, said = found[0].error.partition(": ")
        raise getattr(errors, kind, ZsrError)(f"all {len(found)} trials failed; the first with: {said or kind}")
    return sorted(found, key=lambda trial: FAILED if trial.score is None else trial.score, reverse=True)


def _trial(config: dict[str, Any], make: Callable[[Overrides], Run], trials: Path) -> None:
    """Run one trial. An error is reported as its result; Ray Tune retries a trial only if its process is lost."""
    try:
        run = make(config)
        if not run.split.validation:
            raise ConfigError("trials are compared on validation classes; set validation_classes to at least 2")
        store = Store.at(trials / run.plan().digest[:12])
        made = train_model(replace(run, output=store))
        score, step = made.facts["validation_map_all"], made.facts["best_step"]
        tune.report(
            {
                SCORE: float(score),
                "best_step": int(step),
                "checkpoint": f"{made.place}/objects/{made.digest}",
                "error": "",
            }
        )
    except Exception as error:  # the other trials continue, and the table shows this error
        if not isinstance(error, ZsrError):
            logger.exception("trial %s", config)
        tune.report({SCORE: FAILED, "best_step": -1, "checkpoint": "", "error": f"{type(error).__name__}: {error}"})


def _trial_of(result: Any) -> Trial:
    overrides = dict(result.config or {})
    metrics = result.metrics or {}
    if result.error is not None or not metrics.get("checkpoint"):
        return Trial(overrides, None, error=str(metrics.get("error") or result.error))
    return Trial(overrides, float(metrics[SCORE]), int(metrics["best_step"]), str(metrics["checkpoint"]))


def best_setting(trials: Sequence[Trial]) -> tuple[dict[str, Any], float]:
    """The overrides, without the seed, with the highest mean score over their seeds, and that score.

    A failed seed counts as a score of `FAILED`.
    """
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(repr(sorted(_setting(trial).items())), []).append(trial)
    scored = [
        (mean(FAILED if trial.score is None else trial.score for trial in group), _setting(group[0]))
        for group in groups.values()
    ]
    score, setting = max(scored, key=lambda pair: pair[0])
    return setting, score


def _setting(trial: Trial) -> dict[str, Any]:
    return {name: value for name, value in trial.overrides.items() if name != "seed"}


def space_of(sweep: Sweep) -> dict[str, Any]:
    """The search space, with the seeds added."""
    return {**sweep.space, "seed": tune.grid_search(list(sweep.seeds)) if len(sweep.seeds) > 1 else sweep.seeds[0]}


def searcher_of(sweep: Sweep) -> Searcher | SearchAlgorithm:
    """The search algorithm that samples the settings. Raises ConfigError: see `run_sweep`."""
    if sweep.searcher == "random":
        # constant: every seed of a setting gets the same sample
        return BasicVariantGenerator(constant_grid_search=True, random_state=sweep.seed)
    if len(sweep.seeds) > 1 or any(isinstance(given, dict) for given in sweep.space.values()):
        raise ConfigError("optuna supports one seed and no grid; use --searcher random, or choice instead of grid")
    try:
        import optuna
        from ray.tune.search.optuna import OptunaSearch
    except ImportError:
        raise ConfigError("--searcher optuna requires optuna; install zsr with the extra 'optuna'") from None
    return OptunaSearch(sampler=optuna.samplers.TPESampler(seed=sweep.seed))


def _spare_cpus() -> int:
    """The number of CPUs for trials, on nodes that are up or can start: all but one, which loads their data.

    Raises:
        Infeasible: a single CPU.
    """
    cpus = capacity().cpus() - 1
    if cpus < 1:
        raise Infeasible("a sweep requires at least 2 CPUs: one per trial, and one to load data; add a node")
    return cpus
