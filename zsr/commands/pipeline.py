"""Run all stages as one job: prepare -> semantics -> features -> train -> embed -> index -> evaluate.

    zsr pipeline --config FILE.yaml

The file has one section per stage, with the flags of the command of that name; the paths that connect the stages are
filled in. Run again, the job resumes after the last finished stage, and within a stage after the last finished work
item, since every stage reuses the output of an identical earlier run. It fails with the exit code of the failed stage.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, create_model

from zsr.artifact import write_atomically
from zsr.commands import embed, evaluate, features, index, prepare, semantics, train
from zsr.commands.base import JobConfig, Results, attach, file_values, main, ours, peek, without_file
from zsr.errors import ConfigError, StorageError
from zsr.storage import url_of

FILLED_IN: Final = {  # flags that the pipeline sets; they are not allowed in a stage's section
    "prepare": ("output", "features_output", "inspect", "sheet", "sheet_rows"),
    "semantics": ("output", "data"),
    "features": ("output", "data"),
    "train": ("output", "data", "features", "semantics", "seed"),
    "embed": ("output", "data", "features", "checkpoint", "modality"),
    "index": ("embeddings", "queries", "index_dir"),
    "evaluate": ("output", "data", "features", "semantics", "checkpoint", "index_dir", "query_modality"),
}


class Config(JobConfig):
    """Run all stages from one YAML file, with one section per stage.

    Attributes:
        output: directory or object store prefix for all artifacts.
        report: directory of the report and timeline.json; by default OUTPUT/report, required if OUTPUT is an object
            store.
        seeds: one training run per seed; gallery and index use the first.
        features_from: the backbone of zsr features; the data source itself (parquet, wikipedia); or the image tower of
            zsr train, fine-tuned end to end.
        device: device of the stages whose section sets none: cuda requests GPUs, which the autoscaler starts if none is
            up; cpu requests none; auto is cuda if the cluster has GPUs or can start some.
    """

    output: Path
    report: Path | None = None
    seeds: tuple[int, ...] = (0,)
    features_from: Literal["backbone", "source", "tower"] = "backbone"
    device: Literal["auto", "cpu", "cuda"] = "auto"


def section(stage: str, config: type[BaseModel], **defaults: Any) -> type[BaseModel]:
    """The flags of a stage's command without those that the pipeline sets; unknown ones are rejected."""
    fields: dict[str, Any] = {
        name: (about.annotation, defaults.get(name, about))
        for name, about in config.model_fields.items()
        if name not in ("dry_run", "measure", *FILLED_IN[stage])
    }
    return create_model(
        stage.capitalize(),
        __config__=ConfigDict(frozen=True, extra="forbid"),
        __doc__=config.__doc__,
        __module__=__name__,
        **fields,
    )


def config_of(model: str, preset: str | None = None) -> type[Any]:
    """The configuration class with the options of `model`. Raises ConfigError if there is no such model or preset."""
    return _with_train(section("train", train.config_of(model, preset), model=model, preset=preset))


def _with_train(kind: type[BaseModel]) -> type[Any]:
    """The configuration class with `kind` as its section `train`."""
    types = {
        "prepare": section("prepare", prepare.Config),
        "semantics": section("semantics", semantics.Config),
        "features": section("features", features.Config),
        "train": kind,
        # the report is on unseen classes; to embed a gallery of all rows, run zsr embed with this checkpoint
        "embed": section("embed", embed.Config, classes="unseen"),
        "index": section("index", index.Build),
        "evaluate": section("evaluate", evaluate.Config),
    }
    fields: dict[str, Any] = {stage: (kind, ... if _wants(kind) else kind()) for stage, kind in types.items()}
    return create_model("Config", __base__=Config, __module__=__name__, __doc__=Config.__doc__, **fields)


def _wants(kind: type[BaseModel]) -> bool:
    return any(about.is_required() for about in kind.model_fields.values())


def config_for(argv: Sequence[str]) -> type[Any]:
    """The configuration class, with `train.options` of the model in `--train.model` or in the file."""
    flags, path = without_file(argv)
    content = None if path is None else file_values(path).get("train")
    found: dict[str, Any] = dict(content) if isinstance(content, Mapping) else {}
    given = peek(flags, "train.model", "train.preset")
    model, preset = (given[f"train.{name}"] or found.get(name) for name in ("model", "preset"))
    if not model and not preset and {"-h", "--help"} & set(flags):  # importing a model takes seconds
        return _with_train(section("train", train.Config))
    return config_of(str(model or train.DEFAULT_MODEL), preset)


@dataclass(frozen=True)
class Stage:
    """One run of a stage's command."""

    name: str
    config: JobConfig
    plan: Callable[[Any], Results]
    work: Callable[[Any], Results]


@dataclass(frozen=True)
class Layout:
    """Paths of the artifacts of one pipeline, and the configurations of its stages."""

    config: Any

    def at(self, name: str) -> Path:
        return Path(self.config.output / name)

    @property
    def report(self) -> Path:
        """Directory of the report. Raises ConfigError for an object store: it is viewed in a browser."""
        if self.config.report is not None:
            return Path(self.config.report)
        if (url := url_of(self.config.output)) is not None:
            raise ConfigError(f"--output {url} is an object store; give --report DIRECTORY for report and timeline")
        return self.at("report")

    @property
    def checkpoints(self) -> tuple[Path, ...]:
        return tuple(self.at(f"checkpoint-{seed}") for seed in self.config.seeds)

    @property
    def inputs(self) -> dict[str, Any]:
        """Inputs of training, embedding and evaluation."""
        features = None if self.config.features_from == "tower" else self.at("features")
        return {"data": self.at("data"), "features": features}

    def stage(self, name: str, job: Any, kind: type[JobConfig] | None = None, **filled_in: Any) -> Stage:
        """The stage `name`, whose first word is its section, with the flags `filled_in`."""
        section = name.partition(" ")[0]
        given = getattr(self.config, section)
        # no model_dump: it would turn nested models into plain mappings
        values = {field: getattr(given, field) for field in type(given).model_fields}
        if values.get("device") == "auto":
            values["device"] = self.config.device
        return Stage(name, (kind or job.Config)(**values, **filled_in), job.plan, job.work)

    def stages(self) -> Iterator[Stage]:
        """All stages in order."""
        imported = self.at("features") if self.config.features_from == "source" else None
        yield self.stage("prepare", prepare, output=self.at("data"), features_output=imported)
        yield self.stage("semantics", semantics, data=self.at("data"), output=self.at("semantics"))
        if self.config.features_from == "backbone":
            yield self.stage("features", features, data=self.at("data"), output=self.at("features"))
        yield from self._trained()
        yield from self._embedded()
        yield self._indexed()
        # an index of all rows cannot be compared with a test on unseen ones
        indexes = (self.at("index"),) if self.config.embed.classes == "unseen" else ()
        report: dict[str, Any] = {
            "semantics": self.at("semantics"),
            "checkpoint": self.checkpoints,
            "index_dir": indexes,
        }
        query = self.config.train.query_modality
        yield self.stage("evaluate", evaluate, **self.inputs, **report, query_modality=query, output=self.report)

    def _trained(self) -> Iterator[Stage]:
        kind = train.config_of(self.config.train.model)
        for seed, output in zip(self.config.seeds, self.checkpoints, strict=True):
            about: dict[str, Any] = {"semantics": self.at("semantics"), "seed": seed, "output": output}
            yield self.stage(f"train seed {seed}", train, kind, **self.inputs, **about)

    def _embedded(self) -> Iterator[Stage]:
        for modality in dict.fromkeys(("photo", self.config.train.query_modality)):
            output = self.at(f"embeddings-{modality}")
            about: dict[str, Any] = {"checkpoint": self.checkpoints[0], "modality": modality, "output": output}
            yield self.stage(f"embed {modality}", embed, **self.inputs, **about)

    def _indexed(self) -> Stage:
        given = self.config.index
        values = {field: getattr(given, field) for field in type(given).model_fields}
        build = index.Build(
            **values,
            dry_run=self.config.dry_run,
            embeddings=self.at("embeddings-photo"),
            queries=self.at(f"embeddings-{self.config.train.query_modality}"),
            index_dir=self.at("index"),
        )
        return Stage("index", build, index.plan_build, index.do_build)


@dataclass(frozen=True)
class Lap:
    """One line of the timeline.

    Attributes:
        stage: its name.
        seconds: wall-clock time of the driver.
        cpu_seconds: CPU time of the driver and of the tasks, actors and workers that report theirs.
        task_cpu_seconds: CPU time of tasks, actors and workers, by the stage name given to `map_pieces`.
        exit_code: 0, or that of the failure that ended the pipeline here.
        digest: digest of the output artifact, if there is one.
    """

    stage: str
    seconds: float
    cpu_seconds: float
    task_cpu_seconds: Mapping[str, float]
    exit_code: int
    digest: str | None = None


class Timeline:
    """Run stages and record the time of each, also in a file, which is complete at any time.

    Attributes:
        laps: those of this run; for a stage that an earlier run finished, the time it took to find that out.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.laps: list[Lap] = []

    def run(self, stage: Stage) -> Results:
        """Run the stage and return its results. Its errors are recorded and raised with the timeline attached."""
        began, cpu = time.monotonic(), time.process_time()
        try:
            results = stage.work(stage.config)
        except BaseException as error:
            known = ours(error)
            self._note(stage.name, began, cpu, 1 if known is None else known.exit_code, None)
            attach(error, {"failed_stage": stage.name, **self.as_results()})
            raise
        self._note(stage.name, began, cpu, 0, results["digest"])
        return results

    def _note(self, stage: str, began: float, cpu: float, code: int, digest: str | None) -> None:
        seconds, own = time.monotonic() - began, time.process_time() - cpu
        from zsr import telemetry

        telemetry.stage_took(stage, seconds)
        spent = telemetry.spent()
        tasks = {what: round(value, 2) for what, value in sorted(spent.items())}
        lap = Lap(stage, round(seconds, 1), round(own + spent.total(), 1), tasks, code, digest)
        self.laps.append(lap)
        write_atomically(self.file, (json.dumps([asdict(one) for one in self.laps], indent=1) + "\n").encode())
        print(f"{stage}: {lap.seconds} s, {lap.cpu_seconds} CPU s, exit {code}", file=sys.stderr, flush=True)

    def as_results(self) -> Results:
        """The timeline for the command's JSON line."""
        return {
            "timeline": [asdict(lap) for lap in self.laps],
            "digests": {lap.stage: lap.digest for lap in self.laps if lap.digest is not None},
        }


def plan(config: Any) -> Results:
    """What each stage would do, if its inputs exist already."""
    planned: list[Results] = []
    for stage in Layout(config).stages():
        try:
            what: Results | str = stage.plan(stage.config)
        except StorageError:
            what = "can be planned when the stages before it have finished"
        planned.append({"stage": stage.name, "plan": what})
    return {"stages": planned, "output": str(config.output)}


def work(config: Any) -> Results:
    results: Results = {}
    layout = Layout(config)
    timeline = Timeline(layout.report / "timeline.json")
    for stage in list(layout.stages()):  # `list` first: an invalid section fails before anything runs
        results = timeline.run(stage)
    return {**results, **timeline.as_results()}


def run(argv: Sequence[str]) -> int:
    return main(config_for, plan, work, argv, "zsr pipeline")
