"""All stages as one job: its configuration, its timeline, where it goes on, and what it ends with."""

import json
from pathlib import Path

import pytest
import yaml

from tests import toy
from tests.pipeline import job, ok
from zsr.commands import demo, pipeline
from zsr.commands.base import Results, parse
from zsr.devices import DeviceSettings
from zsr.errors import ConfigError

STAGES = ["prepare", "semantics", "train seed 0", "embed photo", "embed sketch", "index", "evaluate"]


def written(root: Path, **sections: object) -> Path:
    """A configuration file for a feature-only set below `root`."""
    raw = root / "raw"
    if not raw.exists():
        toy.write_features(raw)
    settings = {
        "output": str(root / "run"),
        "features_from": "source",
        "prepare": {"source": "parquet", "input": str(raw), "rows_per_shard": 50},
        "train": {"model": "ridge", "split": "random:3:0", "validation_classes": 2, "num_workers": 1},
    }
    file = root / "pipeline.yaml"
    file.write_text(yaml.safe_dump(settings | sections))
    return file


def test_a_section_knows_the_flags_of_its_job_and_no_others(tmp_path: Path) -> None:
    refused: dict[str, dict[str, object]] = {
        "unknown key 'train.epoch'": {"train": {"model": "ridge", "split": "random:3:0", "epoch": 1}},
        "unknown key 'train.data'": {"train": {"model": "ridge", "split": "random:3:0", "data": "elsewhere"}},
        "unknown key 'trains'": {"trains": {}},
    }
    for message, sections in refused.items():
        file = written(tmp_path, **sections)
        results = job("pipeline", "--config", file)
        assert results["exit_code"] == 2
        assert message in results["error"]


def test_the_model_that_the_file_names_types_its_options(tmp_path: Path) -> None:
    train = {"model": "sem-pcyc", "split": "random:3:0", "options": {"generator_lr": 0.5}}
    words = ["--config", str(written(tmp_path, train=train)), "--seeds", "3", "4"]
    config = parse(pipeline.config_for(words), words, "zsr pipeline")
    assert config.train.options.generator_lr == 0.5
    assert [s.name for s in pipeline.Layout(config).stages()][2:4] == ["train seed 3", "train seed 4"]
    words += ["--train.model", "ridge"]
    with pytest.raises(ConfigError, match=r"train.options.generator_lr"):
        parse(pipeline.config_for(words), words, "zsr pipeline")


def test_the_device_of_the_pipeline_is_that_of_stages_which_name_none(tmp_path: Path) -> None:
    train = {"model": "contrastive", "split": "random:3:0", "device": "cpu", "gpus_per_worker": 2}
    words = ["--config", str(written(tmp_path, train=train, features_from="backbone")), "--device", "cuda"]
    stages = pipeline.Layout(parse(pipeline.config_for(words), words, "zsr pipeline")).stages()
    configs: list[tuple[str, object]] = [(stage.name, stage.config) for stage in stages]
    found = {name: config.device for name, config in configs if isinstance(config, DeviceSettings)}
    embedding = {f"embed {modality}": "cuda" for modality in ("photo", "sketch")}
    assert found == {"features": "cuda", "train seed 0": "cpu", **embedding, "evaluate": "cuda"}


def test_a_tower_needs_no_features_and_a_text_query_embeds_texts(tmp_path: Path) -> None:
    train = {"model": "doodle2search", "split": "random:3:0", "tower": "tiny", "query_modality": "text"}
    words = ["--config", str(written(tmp_path, train=train, features_from="tower"))]
    stages = {
        s.name: s.config for s in pipeline.Layout(parse(pipeline.config_for(words), words, "zsr pipeline")).stages()
    }
    assert "features" not in stages
    assert stages["train seed 0"].model_dump()["features"] is None
    assert stages["embed text"].model_dump()["output"] == tmp_path / "run" / "embeddings-text"
    assert stages["evaluate"].model_dump()["query_modality"] == "text"


def test_an_object_store_keeps_artifacts_and_no_report(tmp_path: Path) -> None:
    config = demo.composed(demo.Config(output=Path("s3://bucket/demo")))
    with pytest.raises(ConfigError, match=r"s3://bucket/demo is an object store; give --report"):
        list(pipeline.Layout(config).stages())
    stages = list(pipeline.Layout(config.model_copy(update={"report": tmp_path})).stages())
    assert stages[-1].config.model_dump()["output"] == tmp_path


def test_the_demo_is_a_pipeline() -> None:
    config = demo.composed(demo.Config(seeds=(0, 1), size=64))
    names = [stage.name for stage in pipeline.Layout(config).stages()]
    trained = ["train seed 0", "train seed 1"]
    assert names == ["prepare", "semantics", "features", *trained, "embed photo", "embed sketch", "index", "evaluate"]
    assert config.features.size == 64


@pytest.mark.usefixtures("ray_cluster")
def test_it_fails_with_the_stages_exit_code_and_goes_on_from_there(tmp_path: Path) -> None:
    index = {"recall_target": 0.9, "max_index_memory_usage": "1KB"}
    failed = job("pipeline", "--config", written(tmp_path, index=index))
    assert (failed["exit_code"], failed["failed_stage"]) == (2, "index")
    assert "index" in failed["error"] or "memory" in failed["error"]
    assert [lap["exit_code"] for lap in failed["timeline"]] == [0, 0, 0, 0, 0, 2]
    resumed = ok("pipeline", "--config", written(tmp_path))
    assert [lap["stage"] for lap in resumed["timeline"]] == STAGES
    assert {stage: resumed["digests"][stage] for stage in STAGES[:5]} == failed["digests"]
    assert sum(lap["seconds"] for lap in resumed["timeline"][:5]) < sum(lap["seconds"] for lap in failed["timeline"])
    assert made_once(tmp_path / "run")
    places = ("data", "semantics", "checkpoint-0", "embeddings-photo", "embeddings-sketch", "index")
    digests = dict(zip(STAGES, places, strict=False))
    assert set(resumed["digests"]) == set(STAGES)
    for stage, place in digests.items():
        assert resumed["digests"][stage] == made_at(tmp_path / "run" / place)
    assert json.loads((tmp_path / "run" / "report" / "timeline.json").read_text()) == resumed["timeline"]
    assert (tmp_path / "run" / "report" / "report.html").exists()
    planned = ok("pipeline", "--config", written(tmp_path), "--dry-run")
    assert planned_of(planned, "embed photo")["dim"] == planned_of(planned, "embed sketch")["dim"]


def test_a_dry_run_measures_nothing(tmp_path: Path) -> None:
    config = demo.composed(demo.Config(output=tmp_path, dry_run=True))
    (built,) = (stage.config for stage in pipeline.Layout(config).stages() if stage.name == "index")
    assert built.dry_run


def made_once(root: Path) -> bool:
    """Whether every stage published one version."""
    return all([path.name for path in folder.iterdir()] == ["1"] for folder in root.glob("*/versions"))


def made_at(root: Path) -> str:
    """The digest of the one object at `root`."""
    (folder,) = (root / "objects").iterdir()
    return folder.name


def planned_of(results: Results, stage: str) -> Results:
    found: Results = next(entry["plan"] for entry in results["stages"] if entry["stage"] == stage)
    return found
