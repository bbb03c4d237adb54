"""Several checkpoints on one data set: floors, models, seeds, the peak over checkpoints, and search through an index.

Everything is embedded here from FEATURES, so that each row of the report is measured on the same queries and gallery.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median_low
from typing import Any

import numpy as np

from zsr.artifact import Artifact, Store
from zsr.data.shards import Rows, collect
from zsr.data.splits import Split
from zsr.embedding.gallery import source_of, vectors_of
from zsr.errors import ConfigError
from zsr.evaluation import metrics
from zsr.evaluation.protocol import Evaluation, Search, Side, evaluate, evaluate_hits, zero_shot
from zsr.evaluation.report import RecallCurve, RecallPoint, Report, Row, Seeds, Validation
from zsr.index.search import Searcher
from zsr.models import build
from zsr.models.protocol import Embedder
from zsr.training.checkpoint import open_model
from zsr.training.config import TrainSettings
from zsr.training.run import Run, train_model


@dataclass(frozen=True)
class Bench:
    """The unseen rows that every model is measured on.

    Attributes:
        checkpoints: of one split; their unseen classes must agree.
    """

    data: Artifact
    features: Artifact
    semantics: Artifact
    checkpoints: tuple[Artifact, ...]

    def __post_init__(self) -> None:
        if not self.checkpoints:
            raise ConfigError("nothing to evaluate; give at least one --checkpoint")
        for checkpoint in self.checkpoints:
            for modality in ("sketch", "photo"):
                source_of(self.data, self.features, checkpoint, modality)
        runs = [(str(c.config["model"]), int(c.config["settings"]["seed"])) for c in self.checkpoints]
        if twice := sorted({run for run in runs if runs.count(run) > 1}):
            raise ConfigError(
                f"two checkpoints of {twice[0]}: a model's seeds are grouped by number; compare these apart"
            )
        splits = {tuple(c.config["split"]["unseen"]) for c in self.checkpoints}
        if len(splits) > 1:
            raise ConfigError(f"the checkpoints were trained for {len(splits)} different splits; compare those of one")

    @property
    def split(self) -> Split:
        """The split that the checkpoints carry."""
        found = self.checkpoints[0].config["split"]
        roles = {role: tuple(found[role]) for role in ("unseen", "validation", "training")}
        return Split(source=str(found["source"]), **roles)

    @cached_property
    def query(self) -> Rows:
        """Sketches of the unseen classes."""
        return collect(self.data, self.features, "sketch", self.split.unseen)

    @cached_property
    def gallery(self) -> Rows:
        """Photos of the unseen classes."""
        return collect(self.data, self.features, "photo", self.split.unseen)

    def sides(self, model: Embedder) -> tuple[Side, Side]:
        """Queries and gallery embedded by `model`, several parts of an item on consecutive rows."""
        return self._side(model, "sketch", self.query), self._side(model, "photo", self.gallery)

    def _side(self, model: Embedder, modality: str, rows: Rows) -> Side:
        embedded = vectors_of(model, modality, rows.features, "cpu")
        count, parts, dim = embedded.shape
        repeat = np.repeat(np.arange(count), parts)
        labels = np.array(self.split.unseen)[rows.labels]
        return Side(
            ids=rows.ids[repeat],
            keys=np.array(rows.keys)[repeat],
            labels=labels[repeat],
            embeddings=embedded.reshape(-1, dim),
            part=np.tile(np.arange(parts), count) if parts > 1 else None,
        )

    def measure(self, name: str, model: Embedder, saw: Iterable[str], ks: Sequence[int]) -> Evaluation:
        """One model, exactly. Raises Leakage if it was trained on a class that the split evaluates."""
        query, gallery = self.sides(model)
        zero_shot(query, gallery, unseen=self.split.unseen, trained=tuple(saw))
        return evaluate(name, query, gallery, metric=model.metric, ks=ks)

    def map_all(self, model: Embedder) -> float:
        """mAP@all alone, for the many checkpoints of one run."""
        query, gallery = self.sides(model)
        items, q = query.merged()
        others, g = gallery.merged()
        return metrics.mean_average_precision(q, g, items.labels, others.labels, model.metric)


@dataclass(frozen=True)
class Settings:
    """What the report shows.

    Attributes:
        title: of the page.
        k: results asked of the index a query.
        ks: cut-offs of the metrics.
    """

    title: str
    k: int = 1000
    ks: tuple[int, ...] = (100, 200)


def compare(bench: Bench, index: Artifact | None, floors: Store, settings: Settings) -> Report:
    """Measure every checkpoint, the floors, and the index, and lay them out as a report.

    Args:
        index: built from the photo embeddings of one of the checkpoints, or None.
        floors: where the ridge floor is kept; it is solved on this bench's split if it is not there.

    Raises:
        Leakage, ConfigError: see `Bench` and `protocol.zero_shot`.
    """
    by_model: dict[str, list[Artifact]] = {}
    for checkpoint in bench.checkpoints:
        by_model.setdefault(str(checkpoint.config["model"]), []).append(checkpoint)
    rows: list[Row] = []
    seeds: list[Seeds] = []
    for name, group in by_model.items():
        scores = {int(c.config["settings"]["seed"]): bench.map_all(open_model(c)) for c in group}
        middle = _middle(group, scores)
        rows.append(Row(_measure(bench, name, middle, settings), note=_note(group, middle)))
        rows += _peak(bench, name, group, settings)
        if len(group) > 1:
            seeds.append(Seeds(name, scores))
        if index is not None and _built_from(index, group):
            rows.append(_through(bench, name, index, settings))
    return Report(
        title=settings.title,
        data_set=_describe(bench),
        rows=(*rows, *_floors(bench, floors, settings)),
        unseen=bench.split.unseen,
        curves=() if index is None else _curves(index),
        seeds=tuple(seeds),
        validation=tuple(
            Validation(name, tuple((int(s), float(v)) for s, v in group[0].facts["history"]))
            for name, group in by_model.items()
            if len(group[0].facts["history"]) > 1
        ),
        configuration={name: dict(group[0].config) for name, group in by_model.items()},
        digests=_digests(bench, index),
        attribution=str(bench.data.config["source"].get("attribution", "")),
    )


def _middle(group: Sequence[Artifact], scores: Mapping[int, float]) -> Artifact:
    """The checkpoint of the median seed: it stands for its model in the table."""
    wanted = median_low(scores.values())
    return next(c for c in group if scores[int(c.config["settings"]["seed"])] == wanted)


def _measure(bench: Bench, name: str, checkpoint: Artifact, settings: Settings) -> Evaluation:
    return bench.measure(name, open_model(checkpoint), checkpoint.facts["saw"], settings.ks)


def _note(group: Sequence[Artifact], middle: Artifact) -> str:
    if len(group) == 1:
        return ""
    return f"median of {len(group)} seeds (seed {middle.config['settings']['seed']})"


def _peak(bench: Bench, name: str, group: Sequence[Artifact], settings: Settings) -> list[Row]:
    """The best of all kept checkpoints by the test score itself, marked as not selectable; none if none were kept."""
    found = [
        (bench.map_all(open_model(checkpoint, entry.path)), checkpoint, entry.path)
        for checkpoint in group
        for entry in checkpoint.files
        if entry.path.startswith("steps/")
    ]
    if not found:
        return []
    _, checkpoint, path = max(found, key=lambda entry: entry[0])
    step = int(path.removeprefix("steps/").removesuffix(".safetensors"))
    seed = checkpoint.config["settings"]["seed"]
    model = open_model(checkpoint, path)
    measured = bench.measure(f"{name} (peak)", model, checkpoint.facts["saw"], settings.ks)
    return [Row(measured, "peak", f"best of {len(found)} checkpoints by the test itself: seed {seed}, step {step}")]


def _built_from(index: Artifact, group: Sequence[Artifact]) -> bool:
    return index.facts["checkpoint"] in {c.digest for c in group}


def _through(bench: Bench, name: str, index: Artifact, settings: Settings) -> Row:
    """The same queries answered by the index at its published operating point."""
    checkpoint = next(c for c in bench.checkpoints if c.digest == index.facts["checkpoint"])
    model = open_model(checkpoint)
    query, gallery = bench.sides(model)
    zero_shot(query, gallery, unseen=bench.split.unseen, trained=checkpoint.facts["saw"])
    items, q = query.merged()
    others, _ = gallery.merged()
    searcher = Searcher.of(index)
    k = min(settings.k, len(others))
    hits = searcher.search(np.ascontiguousarray(q, dtype=np.float32), k)
    point = index.facts["operating_point"]
    size = sum(entry.bytes for entry in index.files)
    search = Search(index.facts["index_key"], int(point["nprobe"]), k, float(point["recall_sketch"]), size)
    measured = evaluate_hits(name, items, others, hits.ids, search, metric=model.metric, ks=settings.ks)
    seed = checkpoint.config["settings"]["seed"]
    return Row(measured, note=f"seed {seed}, codes re-ranked {point['refine_factor']} k deep")


def _floors(bench: Bench, store: Store, settings: Settings) -> list[Row]:
    """Raw features where both modalities share a space, and ridge with its penalty chosen on the validation classes."""
    inputs = bench.checkpoints[0].config["inputs"]
    rows = []
    if inputs["sketch_dim"] == inputs["photo_dim"]:
        raw = build("raw", {}, _inputs(bench))
        rows.append(Row(bench.measure("raw", raw, (), settings.ks), "floor", "backbone features, cosine"))
    ridge = ridge_floor(bench, store)
    note = "features regressed onto class vectors in closed form"
    rows.append(Row(bench.measure("ridge", open_model(ridge), ridge.facts["saw"], settings.ks), "floor", note))
    return rows


def _inputs(bench: Bench) -> Any:
    return open_model(bench.checkpoints[0]).inputs


def ridge_floor(bench: Bench, store: Store) -> Artifact:
    """The ridge checkpoint of this bench's split, solved now unless it lies in `store` already."""
    run = Run(
        data=bench.data,
        features=bench.features,
        semantics=bench.semantics,
        split=bench.split,
        model="ridge",
        options={},
        settings=TrainSettings(num_workers=1),
        output=store,
        score=metrics.mean_average_precision,
    )
    return train_model(run)


def _curves(index: Artifact) -> tuple[RecallCurve, ...]:
    """Recall against vectors compared, at the operating point's depth of re-ranking, for both kinds of query."""
    facts = index.facts
    depth = facts["operating_point"]["refine_factor"]
    points = [p for p in facts["curve"] if p["refine_factor"] == depth]
    return tuple(
        RecallCurve(
            queries,
            facts["index_key"],
            int(facts["golden_k"]),
            tuple(RecallPoint(int(p["nprobe"]), float(p["scanned"]), float(p[column])) for p in points),
        )
        for queries, column in (("sketch queries", "recall_sketch"), ("gallery queries", "recall_self"))
    )


def _describe(bench: Bench) -> str:
    return f"{bench.data.config['source']['name']}, split {bench.split.source}"


def _digests(bench: Bench, index: Artifact | None) -> dict[str, str]:
    named = {"data": bench.data, "features": bench.features, "semantics": bench.semantics}
    digests = {name: artifact.digest for name, artifact in named.items()}
    for checkpoint in bench.checkpoints:
        digests[f"{checkpoint.config['model']} seed {checkpoint.config['settings']['seed']}"] = checkpoint.digest
    return digests if index is None else {**digests, "index": index.digest}
