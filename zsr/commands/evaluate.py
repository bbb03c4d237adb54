"""Evaluate checkpoints (and indexes): report.json and report.html."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import Field

from zsr.artifact import Store, open_artifact
from zsr.commands.base import JobConfig, Results, main, wrote
from zsr.data.rows import Modality
from zsr.devices import DeviceSettings
from zsr.errors import ConfigError
from zsr.evaluation.settings import BackboneSaw, LearnedOn, Protocol
from zsr.storage import read_file

if TYPE_CHECKING:
    from zsr.evaluation.compare import Given, Settings
    from zsr.evaluation.report import Report

TITLES: Final[dict[Protocol, str]] = {
    "zero-shot": "Zero-shot retrieval",
    "generalised": "Generalised zero-shot retrieval",
    "generalised-sempcyc": "Generalised zero-shot retrieval",
    "few-shot": "Few-shot retrieval",
}


class Config(DeviceSettings, JobConfig):
    """Evaluate checkpoints and indexes on the unseen classes, and write a report.

    Attributes:
        data: DATA artifact.
        checkpoint: one or several. Checkpoints that differ only in the seed are grouped. The report is on the split of
            the first; those of other splits contribute to the variation over class splits.
        output: directory of report.json and report.html; models trained for the report (the ridge baseline) are kept
            below it.
        features: FEATURES of that data; omit if every checkpoint has an image tower.
        semantics: SEMANTICS, for the ridge baseline and for models that are retrained.
        index_dir: indexes of the unseen photos, each of one of the checkpoints; their results are shown next to exact
            search.
        query_modality: modality of the queries.
        gallery_modality: modality of the gallery.
        protocol: zero-shot; generalised (gallery of all classes); generalised-sempcyc (adds a fifth as many seen items
            to queries and gallery, as the released code does); few-shot (models are retrained with a few unseen items).
        as_released: test on the validation classes too, as SEM-PCYC's released code does.
        shots: items per unseen class and modality that few-shot models are trained on.
        splits: number of seeded random class splits on which every model is retrained, to report mean and std.
        bits: number of bits of binary codes (ITQ) to evaluate too.
        bits_learned_on: learn ITQ on seen items, or on the queries themselves, as SEM-PCYC's released code does.
        backbone_saw: data the backbone was trained on; auto derives it from the backbone's name (unknown for imported
            features).
        title: title of the report page.
        k: results per query requested from the index.
        ks: cut-offs of the metrics.
    """

    data: Path
    checkpoint: tuple[Path, ...]
    output: Path
    features: Path | None = None
    semantics: Path | None = None
    index_dir: tuple[Path, ...] = ()
    query_modality: Modality = "sketch"
    gallery_modality: Modality = "photo"
    protocol: Protocol = "zero-shot"
    as_released: bool = False
    shots: int = Field(5, ge=1)
    splits: int = Field(0, ge=0)
    bits: int | None = None
    bits_learned_on: LearnedOn = "seen"
    backbone_saw: BackboneSaw = "auto"
    title: str | None = None
    k: int = Field(1000, ge=1)
    ks: tuple[int, ...] = (100, 200)

    def given(self) -> "Given":
        """The opened inputs.

        Raises:
            The errors of `open_artifact`; ConfigError if the inputs do not belong together.
        """
        from zsr.evaluation.compare import Given, by_split
        from zsr.evaluation.eval_set import Task

        task = Task(
            query=self.query_modality,
            gallery=self.gallery_modality,
            protocol=self.protocol,
            as_released=self.as_released,
            shots=self.shots,
            backbone_saw=self.backbone_saw,
        )
        about = {
            "data": open_artifact(self.data, "data"),
            "features": None if self.features is None else open_artifact(self.features, "features"),
            "semantics": None if self.semantics is None else open_artifact(self.semantics, "semantics"),
            "task": task,
            "devices": self.devices,
        }
        bench, *others = by_split(about, [open_artifact(path, "checkpoint") for path in self.checkpoint])
        indexes = tuple(open_artifact(path, "index") for path in self.index_dir)
        known = {checkpoint.digest for checkpoint in bench.checkpoints}
        for path, index in zip(self.index_dir, indexes, strict=True):
            if index.facts["checkpoint"] not in known:
                raise ConfigError(
                    f"--index-dir {path} was built with checkpoint {index.facts['checkpoint'][:12]}, which must be one "
                    "of the --checkpoint of the first split"
                )
        return Given(bench, tuple(others), indexes)

    def settings(self) -> "Settings":
        """The settings of the report."""
        from zsr.evaluation.compare import Settings

        return Settings(
            title=self.title or f"{TITLES[self.protocol]}: {self.query_modality} to {self.gallery_modality}",
            k=self.k,
            ks=self.ks,
            splits=self.splits,
            bits=self.bits,
            bits_learned_on=self.bits_learned_on,
        )


def plan(config: Config) -> Results:
    given = config.given()
    bench = given.bench
    return {
        "checkpoints": [c.digest for b in (bench, *given.others) for c in b.checkpoints],
        "protocol": bench.task.protocol,
        "unseen": list(bench.tested),
        "indexes": [index.digest for index in given.indexes],
        "models_trained_again": len(bench.checkpoints) if config.protocol == "few-shot" else 0,
        "random_splits": config.splits,
        "output": str(config.output),
    }


def work(config: Config) -> Results:
    from zsr.evaluation.compare import compare
    from zsr.evaluation.pictures import pictures_of
    from zsr.evaluation.report import write

    given = config.given()
    report = compare(given, Store.at(config.output / "floors"), config.settings())
    write(config.output, report, pictures_of(given.bench.data, report))
    return headline(report, config.output)


def headline(report: "Report", output: Path) -> Results:
    """The main numbers of a report, for the JSON line."""
    from zsr.evaluation.report import as_json

    values = as_json(report)
    exact = {row["name"]: row for row in values["rows"] if row["search"] is None}
    through = [row for row in values["rows"] if row["search"] is not None]
    shown = exact[values["shown"]]
    medians = {seeds["model"]: seeds["median"] for seeds in values["seeds"]}
    results: dict[str, Any] = {
        "model": shown["name"],
        "map_all_unseen": medians.get(shown["name"], shown["scores"]["mAP@all"]),
        "map_all_unseen_index": through[0]["scores"]["mAP@all"] if through else None,
        "chance": shown["chance"]["mAP@all"],
    }
    floors = {f"floor_{name}": exact[name]["scores"]["mAP@all"] for name in ("raw", "ridge") if name in exact}
    more = {
        "peaks": {n: row["scores"]["mAP@all"] for n, row in exact.items() if row["kind"] == "peak"},
        "seeds": {seeds["model"]: seeds["scores"] for seeds in values["seeds"]},
        "harmonic": {n: row["generalised"]["harmonic"]["mAP@all"] for n, row in exact.items() if row["generalised"]},
        "splits": {m["model"]: m["mean"] for m in (values["splits"] or {"models": []})["models"]},
    }
    about = {**results, **floors, **{name: found for name, found in more.items() if found}}
    return wrote(output / "report.html", "report", read_file(output / "report.json"), **about)


def run(argv: Sequence[str]) -> int:
    return main(Config, plan, work, argv, "zsr evaluate")
