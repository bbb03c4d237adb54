"""A sweep is chosen by validation classes alone, never reads an unseen row, and can be started again."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.tune.experiment import Experiment
from ray.tune.search import BasicVariantGenerator, Searcher

from tests import toy
from tests.pipeline import features_only, job, ok
from zsr.artifact import open_artifact
from zsr.commands import tune as job_tune
from zsr.data.splits import choose
from zsr.errors import ConfigError
from zsr.training.sweep import SCORE, Sweep, Trial, best_setting, parse_space, searcher_of, space_of

SPLIT = ("--split", "random:3:0", "--validation-classes", 2)
SHORT = ("--epochs", 1, "--steps-per-epoch", 4, "--batch-size", 8, "--model", "contrastive")


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Artifacts, as flags, in which every feature of the unseen classes is NaN."""
    root = tmp_path_factory.mktemp("poisoned")
    unseen = choose("random:3:0", list(toy.CLASSES), 2, 0).unseen
    return features_only(root, toy.write_features(root / "raw", poison=unseen))


def space(path: Path, **fields: Any) -> Path:
    path.write_text(yaml.safe_dump({name.replace("__", "."): given for name, given in fields.items()}))
    return path


@pytest.mark.usefixtures("ray_cluster")
def test_the_best_of_two_trials_is_the_one_of_the_higher_validation_score(
    tmp_path: Path, poisoned: list[object]
) -> None:
    at = space(tmp_path / "space.yaml", options__lr={"grid": [1e-3, 1e-9]})
    flags = (*poisoned, *SPLIT, *SHORT, "--output", tmp_path / "out", "--search-space", at, "--trials", 1)
    made = ok("tune", *flags)
    assert (made["trials"], made["failed"]) == (2, 0)
    trials = json.loads((tmp_path / "out" / "trials.json").read_text())
    scores = {trial["overrides"]["options.lr"]: trial["score"] for trial in trials}
    assert set(scores) == {1e-3, 1e-9}
    assert all(0 < score <= 1 for score in scores.values())  # a NaN of an unseen row would show
    assert scores[1e-3] != scores[1e-9]
    assert made["best"] == {"options.lr": max(scores, key=lambda rate: scores[rate])}
    assert made["validation_map_all"] == max(scores.values())
    best = open_artifact(Path(made["artifact"]), "checkpoint")
    assert best.facts["validation_map_all"] == max(scores.values())
    again = ok("train", "--config", made["best_config"], "--output", tmp_path / "again")
    assert again["digest"] == best.digest  # bit for bit, by a Ray Train worker
    written = Path(made["artifact"]).joinpath("manifest.json").stat().st_mtime_ns
    assert ok("tune", *flags)["validation_map_all"] == made["validation_map_all"]
    assert Path(made["artifact"]).joinpath("manifest.json").stat().st_mtime_ns == written  # found, not made again


def drawn(sweep: Sweep) -> list[dict[str, Any]]:
    """The settings of a sweep's trials, in order."""
    search = searcher_of(sweep)
    assert isinstance(search, BasicVariantGenerator)
    search.add_configurations(Experiment("any", run=print, config=space_of(sweep), num_samples=sweep.samples))
    trials = iter(search.next_trial, None)
    return [dict(trial.config) for trial in trials]


def test_every_seed_gets_the_same_settings_and_a_restarted_sweep_draws_them_again() -> None:
    space = parse_space({"lr": {"loguniform": ["1e-5", 1e-3]}, "dim": {"choice": [1, 2, 3]}})
    found = drawn(Sweep(space, samples=3, seeds=(0, 1)))
    assert [trial.pop("seed") for trial in found] == [0, 1] * 3
    assert found[::2] == found[1::2]
    assert len({trial["lr"] for trial in found}) == 3
    assert all(1e-5 <= trial["lr"] <= 1e-3 for trial in found)
    again = drawn(Sweep(space, samples=3, seeds=(0,)))
    assert [{**trial, "seed": 0} for trial in found[::2]] == again
    assert drawn(Sweep(space, samples=3, seeds=(0,), seed=1)) != again


def test_optuna_draws_from_the_same_space_and_takes_no_grid() -> None:
    space = parse_space({"lr": {"loguniform": [1e-5, 1e-3]}})
    for wrong in (Sweep(space, 1, (0, 1), "optuna"), Sweep(parse_space({"a": {"grid": [1]}}), 1, (0,), "optuna")):
        with pytest.raises(ConfigError, match="random"):
            searcher_of(wrong)
    pytest.importorskip("optuna", reason="the extra 'optuna' is not installed")
    search = searcher_of(Sweep(space, 1, (0,), "optuna"))
    assert isinstance(search, Searcher)
    search.set_search_properties(SCORE, "max", dict(space_of(Sweep(space, 1, (0,)))))
    suggested = search.suggest("first")
    assert suggested is not None
    assert 1e-5 <= suggested["lr"] <= 1e-3


def test_the_best_setting_has_the_highest_mean_over_its_seeds() -> None:
    trials = [
        Trial({"lr": 1, "seed": 0}, 0.9),
        Trial({"lr": 1, "seed": 1}, 0.1),
        Trial({"lr": 2, "seed": 0}, 0.6),
        Trial({"lr": 2, "seed": 1}, 0.6),
        Trial({"lr": 3, "seed": 0}, 1.0),
        Trial({"lr": 3, "seed": 1}, None, error="NonFiniteLoss"),
    ]
    assert best_setting(trials) == ({"lr": 2}, 0.6)


@pytest.mark.parametrize(
    "given",
    [3, {"normal": [0, 1]}, {"uniform": [1, 0]}, {"loguniform": [0, 1]}, {"choice": []}, {"uniform": ["a", "b"]}],
)
def test_a_space_that_is_none_is_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"options\.lr"):
        parse_space({"options.lr": given})


def test_what_makes_trials_incomparable_is_refused(tmp_path: Path, poisoned: list[object]) -> None:
    flags = (*poisoned, *SPLIT, *SHORT, "--output", tmp_path / "out", "--dry-run", "--search-space")
    for field, given in (("split", {"choice": ["random:2:0"]}), ("options__none", {"choice": [1]}),
                         ("batch_size", {"choice": [0]}), ("seed", {"choice": [1]})):  # fmt: skip
        refused = job("tune", *flags, space(tmp_path / "space.yaml", **{field: given}))
        assert refused["exit_code"] == 2, field
    planned = ok("tune", *flags, space(tmp_path / "space.yaml", batch_size={"choice": [8, 16]}), "--seeds", 0, 1)
    assert (planned["settings"], planned["seeds"], planned["space"]) == (8, [0, 1], ["batch_size"])


def test_the_written_configuration_names_every_flag_that_is_set() -> None:
    argv = ["--data", "d", "--split", "s", "--output", "o", "--features", "f", "--model", "ridge"]
    config = job_tune.config_for(argv)(data="d", split="s", output="o", features="f", model="ridge")
    values = job_tune.flags(job_tune.trial_config(job_tune.base(config), {"epochs": 3}))
    assert (values["epochs"], values["num_workers"], values["model"]) == (3, 1, "ridge")
    assert "output" not in values
    assert None not in values.values()
