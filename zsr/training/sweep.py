"""Many runs of one model, packed onto the cluster by Ray Tune: sweeps over configuration fields, and several seeds.

A trial is one Ray actor that trains alone (see `train_model`), with a fraction of a GPU where there are some: one small
model cannot fill it. Trials are chosen between by their validation score, and unseen classes take no part.

Ray Tune's own experiment files are pickles and are thrown away. A sweep is restarted by starting it again: settings are
drawn from a seed, equal settings give equal plans, finished trials are found and unfinished ones go on.
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
FAILED: Final = -1.0  # below any score: what a trial reports that ended with an error of ours
RETRIES: Final = 3  # of a trial whose process or node was lost

Overrides = Mapping[str, Any]  # field of the configuration, dotted for the model's options -> value


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        overrides: what it differs in, `seed` included.
        score: of its validation classes; None where it failed.
        checkpoint: directory of its version.
    """

    overrides: dict[str, Any]
    score: float | None
    best_step: int | None = None
    checkpoint: str = ""
    error: str = ""


@dataclass(frozen=True)
class Sweep:
    """What is tried.

    Attributes:
        space: of `parse_space`.
        samples: settings that are drawn; a `grid` is tried whole for each.
        seeds: each setting is trained with every one of them; its score is the mean.
        searcher: `random` draws from the space; `optuna` (TPE) draws near what was good.
        device: of a trial.
        seed: of the drawing.
    """

    space: Mapping[str, Any]
    samples: int
    seeds: tuple[int, ...]
    searcher: SearcherName = "random"
    device: DeviceSettings = AUTO
    seed: int = 0


def parse_space(content: Mapping[str, Any]) -> dict[str, Any]:
    """Ray Tune's search space of `{FIELD: {KIND: VALUES}}`.

    Kinds: uniform: [low, high]; loguniform: [low, high]; randint: [low, high), choice: [values]; grid: [values].

    Raises:
        ConfigError: another kind, or values that it does not take.
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
        raise ConfigError(f"search space, {field}: {kind} wants a list, found {values!r}")
    if kind in lists:
        return lists[kind](values)
    try:
        low, high = values
        if kind != "randint":  # YAML reads 1e-4 as a word
            low, high = float(low), float(high)
        if not low < high or (kind == "loguniform" and low <= 0):
            raise ValueError("low must be less than high, and positive on a logarithmic scale")
        return ranges[kind](low, high)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"search space, {field}: {kind} wants [low, high], found {values!r}: {error}") from error


def run_sweep(make: Callable[[Overrides], Run], sweep: Sweep, output: Path) -> list[Trial]:
    """Train every trial and return them, best first, failed ones last.

    Args:
        make: the run that overrides stand for; called in the trial's process.
        output: trials' checkpoints lie below it, each in a ROOT named by its plan.

    Raises:
        ConfigError: the searcher is not installed, or cannot do with several seeds or a grid.
        Infeasible: a single CPU; see `devices.choose`.
        ZsrError: what the first trial raised, where every one failed.
    """
    connect()
    # trials stay in this directory, so that paths mean what they mean here; and no boxes around a job's own lines
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
        raise getattr(errors, kind, ZsrError)(f"no trial of {len(found)} ended well; the first: {said or kind}")
    return sorted(found, key=lambda trial: FAILED if trial.score is None else trial.score, reverse=True)


def _trial(config: dict[str, Any], make: Callable[[Overrides], Run], trials: Path) -> None:
    """One trial. An error is a result, too; only a trial whose process is lost is tried again by Ray Tune."""
    try:
        run = make(config)
        if not run.split.validation:
            raise ConfigError("trials are chosen between on validation classes; give some")
        store = Store.at(trials / run.plan().digest[:12])
        made = train_model(replace(run, output=store))
        score, step = made.facts["validation_map_all"], made.facts["best_step"]
        tune.report({SCORE: float(score), "best_step": int(step), "checkpoint": str(made.directory), "error": ""})
    except Exception as error:  # the other trials go on, and the table says what became of this one
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

    A setting of which a seed failed counts last.
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
    """The space with the seeds beside it."""
    return {**sweep.space, "seed": tune.grid_search(list(sweep.seeds)) if len(sweep.seeds) > 1 else sweep.seeds[0]}


def searcher_of(sweep: Sweep) -> Searcher | SearchAlgorithm:
    """What draws the settings. Raises ConfigError: see `run_sweep`."""
    if sweep.searcher == "random":
        # constant: every seed of a setting gets the same draw
        return BasicVariantGenerator(constant_grid_search=True, random_state=sweep.seed)
    if len(sweep.seeds) > 1 or any(isinstance(given, dict) for given in sweep.space.values()):
        raise ConfigError("optuna takes one seed and no grid; use --searcher random, or choice in place of grid")
    try:
        import optuna
        from ray.tune.search.optuna import OptunaSearch
    except ImportError:
        raise ConfigError("--searcher optuna wants optuna; install zsr with the extra 'optuna'") from None
    return OptunaSearch(sampler=optuna.samplers.TPESampler(seed=sweep.seed))


def _spare_cpus() -> int:
    """The CPUs that trials may take, on nodes that are up or can start: all but one, which reads their data.

    Raises:
        Infeasible: a single CPU.
    """
    cpus = capacity().cpus() - 1
    if cpus < 1:
        raise Infeasible("a sweep requires two CPUs: one trains, one reads its data; add a node")
    return cpus
