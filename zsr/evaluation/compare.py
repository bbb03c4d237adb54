"""Compare checkpoints on one data set in a report: models, seeds, baselines, codes, indexes and class splits.

Everything is embedded here, from FEATURES or images, so that each row has the same queries and gallery.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median_low
from typing import Any, Final

import numpy as np
import torch

from zsr import faults, metrics, progress
from zsr.artifact import Artifact, Store
from zsr.checkpoint import open_model
from zsr.errors import ConfigError
from zsr.evaluation import protocol, published, retrain
from zsr.evaluation.eval_set import Bench
from zsr.evaluation.protocol import Search, evaluate_hits
from zsr.evaluation.report import (
    Backbone,
    Kind,
    RecallCurve,
    RecallPoint,
    Report,
    Row,
    Seeds,
    Splits,
    SplitScores,
    Validation,
    best,
)
from zsr.evaluation.scatter import Scatter, scatter
from zsr.evaluation.settings import LearnedOn
from zsr.index.searching.searcher import Searcher
from zsr.models import build, itq
from zsr.models.protocol import Embedder, Inputs
from zsr.models.protocol import Rows as FitRows

FLOORS: Final = ("raw", "ridge")
CODED_FROM: Final = 20_000  # seen items per modality to learn binary codes from


@dataclass(frozen=True)
class Settings:
    """Contents of the report.

    Attributes:
        title: of the page.
        k: results per query requested from the index.
        ks: cut-offs of the metrics.
        splits: number of random class splits on which every model is retrained; 0 for none.
        bits: length of binary codes to evaluate in addition to the embeddings; None for none.
        bits_learned_on: seen items, or the evaluated queries themselves, as in SEM-PCYC's released code.
    """

    title: str
    k: int = 1000
    ks: tuple[int, ...] = (100, 200)
    splits: int = 0
    bits: int | None = None
    bits_learned_on: LearnedOn = "seen"


@dataclass(frozen=True)
class Group:
    """Checkpoints of one configuration that differ in their seed.

    Attributes:
        name: of the model, with the options that distinguish it from other configurations of the same model.
        scores: mAP@all by seed.
        middle: the checkpoint of the median seed, which represents the model in the table.
    """

    name: str
    checkpoints: tuple[Artifact, ...]
    scores: Mapping[int, float]
    middle: Artifact

    @property
    def note(self) -> str:
        if len(self.checkpoints) == 1:
            return ""
        return f"median of {len(self.checkpoints)} seeds (seed {_seed(self.middle)})"


@dataclass(frozen=True)
class Work:
    """Context of one report while it is computed.

    Attributes:
        store: of models trained for the report.
        shots: training data of few-shot models; None in the other settings.
    """

    bench: Bench
    settings: Settings
    store: Store
    shots: retrain.Shots | None = None

    def row(self, name: str, model: Embedder, saw: Iterable[str]) -> protocol.Evaluation:
        faults.here("evaluate.row")
        return self.bench.measure(name, model, saw, self.settings.ks)

    def of(self, checkpoint: Artifact) -> Artifact:
        """The checkpoint to evaluate: in the few-shot setting, the one retrained with the shots."""
        return checkpoint if self.shots is None else retrain.again(self.bench, checkpoint, self.store, shots=self.shots)


@dataclass(frozen=True)
class Given:
    """Inputs of a report.

    Attributes:
        bench: checkpoints of one split.
        others: evaluation sets of other splits, for the spread over splits.
        indexes: each holds the photo embeddings of one of the checkpoints.
    """

    bench: Bench
    others: tuple[Bench, ...] = ()
    indexes: tuple[Artifact, ...] = ()


def by_split(bench: Mapping[str, Any], checkpoints: Sequence[Artifact]) -> tuple[Bench, ...]:
    """One evaluation set per split that the checkpoints were trained for, in order of first appearance.

    Args:
        bench: the other arguments of `Bench`.

    Raises:
        ConfigError: see `Bench`.
    """
    groups: dict[tuple[str, ...], list[Artifact]] = {}
    for checkpoint in checkpoints:
        groups.setdefault(tuple(checkpoint.config["split"]["unseen"]), []).append(checkpoint)
    if not groups:
        raise ConfigError("nothing to evaluate; give at least one --checkpoint")
    return tuple(Bench(checkpoints=tuple(group), **bench) for group in groups.values())


def compare(given: Given, store: Store, settings: Settings) -> Report:
    """Evaluate every checkpoint, the baselines and the indexes, and assemble the report.

    Args:
        store: of the ridge baseline and other models trained here; they are reused.

    Raises:
        Leakage, ConfigError: see `Bench`, `protocol.zero_shot` and `retrain`.
    """
    _refuse(given, settings)
    bench = given.bench
    shots = retrain.few_shot(bench, store) if bench.task.protocol == "few-shot" else None
    if shots is not None:
        bench = replace(bench, support=shots.support)
    work = Work(bench, settings, store, shots)
    groups = _groups(work)
    rows = [row for group in groups for row in _rows(work, group, given.indexes)]
    rows += _floors(work, {group.name for group in groups})
    shown = next((group for group in groups if group.name == best(rows)), groups[0])
    return Report(
        title=settings.title,
        data_set=_describe(bench),
        rows=tuple(rows),
        query_modality=bench.task.query,
        gallery_modality=bench.task.gallery,
        protocol=bench.task.protocol,
        notes=(*_notes(bench, rows, shots), *_without_codes(groups, settings.bits)),
        unseen=bench.tested,
        curves=tuple(curve for index in given.indexes for curve in _curves(index, bench.task.query)),
        seeds=tuple(Seeds(group.name, group.scores) for group in groups if len(group.checkpoints) > 1),
        splits=_splits(work, groups, given.others),
        validation=tuple(found for group in groups if len((found := _history(group)).points) > 1),
        published=published.figures(bench.tested, bench.task.protocol),
        backbone=_backbone(bench),
        scatter=_scatter(work, shown),
        configuration={group.name: dict(group.middle.config) for group in groups},
        digests=_digests(bench, groups, given.indexes),
        attribution=str(bench.data.config["source"].get("attribution", "")),
    )


def _refuse(given: Given, settings: Settings) -> None:
    """Raise ConfigError for unsupported combinations, before anything is evaluated."""
    several = bool(given.others) or settings.splits > 0
    if several and given.bench.task.protocol == "few-shot":
        raise ConfigError("several class splits are supported in the zero-shot and generalised settings only")
    widest = max(int(checkpoint.facts["dim"]) for checkpoint in given.bench.checkpoints)
    if settings.bits is not None and settings.bits > widest:
        raise ConfigError(f"--bits {settings.bits}: exceeds the dimension of every model; the largest is {widest}")


# ---- models ----------------------------------------------------------------------------------------------------------


def _seed(checkpoint: Artifact) -> int:
    return int(checkpoint.config["settings"]["seed"])


def _groups(work: Work) -> list[Group]:
    found = []
    for name, members in named(work.bench.checkpoints).items():
        measured = [(work.of(checkpoint), checkpoint) for checkpoint in members]
        with progress.stage(f"evaluate {name}: mAP", unit="queries"):
            scores = {_seed(given): work.bench.map_all(open_model(made)) for made, given in measured}
        wanted = median_low(scores.values())
        middle = next(made for made, given in measured if scores[_seed(given)] == wanted)
        found.append(Group(name, tuple(made for made, _ in measured), scores, middle))
    return found


def named(checkpoints: Sequence[Artifact]) -> dict[str, list[Artifact]]:
    """Group checkpoints by configuration, ignoring the seed and whatever depends on it.

    If there are several configurations of one model, the group name includes the options and settings that differ.

    Raises:
        ConfigError: two checkpoints with the same configuration and seed.
    """
    shapes = {checkpoint.digest: _shape(checkpoint) for checkpoint in checkpoints}
    groups: dict[str, list[Artifact]] = {}
    for checkpoint in checkpoints:
        alike = [shapes[c.digest] for c in checkpoints if c.config["model"] == checkpoint.config["model"]]
        mine = shapes[checkpoint.digest]
        differ = sorted(key for key in mine if any(other.get(key) != mine[key] for other in alike))
        detail = ", ".join(f"{key} {mine[key]}" for key in differ)
        name = str(checkpoint.config["model"]) + (f" ({detail})" if detail else "")
        groups.setdefault(name, []).append(checkpoint)
    for name, members in groups.items():
        if len({_seed(member) for member in members}) < len(members):
            raise ConfigError(f"two checkpoints of {name} have one seed; seeds are grouped by number, give each once")
    return groups


def _shape(checkpoint: Artifact) -> dict[str, Any]:
    """Everything in which configurations differ, by name: options, settings except the seed, and model inputs."""
    config = checkpoint.config
    settings = {key: value for key, value in config["settings"].items() if key not in ("seed", "keep_checkpoints")}
    inputs = Inputs.model_validate(config["inputs"])
    tower = inputs.tower.architecture["name"] if inputs.tower else None
    # the last stage of a --refit run has its first stage as a parent
    more = {"refit": "chosen" in checkpoint.parents, "tower": tower, "query": inputs.query}
    chosen = checkpoint.facts["chosen_options"]  # chosen on the validation classes, so they depend on the seed
    return {**{key: value for key, value in config["options"].items() if key not in chosen}, **settings, **more}


def _rows(work: Work, group: Group, indexes: Sequence[Artifact]) -> list[Row]:
    """Rows of the model itself, its oracle checkpoint, its binary codes, and its indexes."""
    model, saw = open_model(group.middle), group.middle.facts["saw"]
    kind: Kind = "floor" if group.name in FLOORS else "model"
    rows = [Row(work.row(group.name, model, saw), kind, group.note), *_peak(work, group)]
    if work.settings.bits is not None and _wide_enough(group, work.settings.bits):
        rows.append(_coded(work, group, model, work.settings.bits))
    mine = {checkpoint.digest: checkpoint for checkpoint in group.checkpoints}
    for index in indexes:
        if index.facts["checkpoint"] in mine:
            rows.append(_through(work, group.name, mine[index.facts["checkpoint"]], index))
    return rows


def _peak(work: Work, group: Group) -> list[Row]:
    """Oracle: the best kept checkpoint by test score, marked as not selectable; empty if no checkpoints were kept."""
    found = [
        (work.bench.map_all(open_model(checkpoint, entry.path)), checkpoint, entry.path)
        for checkpoint in group.checkpoints
        for entry in checkpoint.files
        if entry.path.startswith("steps/")
    ]
    if not found:
        return []
    _, checkpoint, path = max(found, key=lambda entry: entry[0])
    step = int(path.removeprefix("steps/").removesuffix(".safetensors"))
    measured = work.row(f"{group.name} (peak)", open_model(checkpoint, path), checkpoint.facts["saw"])
    note = f"best of {len(found)} checkpoints by test mAP: seed {_seed(checkpoint)}, step {step}"
    return [Row(measured, "peak", note)]


def _wide_enough(group: Group, bits: int) -> bool:
    """Whether ITQ can produce `bits` bits: at most one per dimension."""
    return bits <= int(group.middle.facts["dim"])


def _coded(work: Work, group: Group, model: Embedder, bits: int) -> Row:
    """Binary codes of the model's embeddings by ITQ, ranked by Hamming distance."""
    bench, saw, name = work.bench, group.middle.facts["saw"], f"{group.name}, {bits} bits"
    if work.settings.bits_learned_on == "seen":
        coded = itq.Coded(model, bits)
        coded.fit(_seen_rows(bench, model))
        return Row(work.row(name, coded, saw), note="ITQ learned on seen items")
    query, gallery = bench.sides(model)
    bench.guard(query, gallery, saw)
    codes = itq.transductive(torch.from_numpy(query.embeddings), torch.from_numpy(gallery.embeddings), bits)
    sides = [replace(side, embeddings=code.numpy()) for side, code in zip((query, gallery), codes, strict=True)]
    measured = protocol.evaluate(
        name, sides[0], sides[1], metric="hamming", ks=work.settings.ks, sampling=bench.sampling
    )
    return Row(
        measured, note="ITQ learned on the test queries, each side centered separately (as SEM-PCYC's released code)"
    )


def _seen_rows(bench: Bench, model: Embedder) -> list[FitRows]:
    """A seeded sample of training rows per side, as input of `fit`."""
    found = []
    for side, modality in (("sketch", bench.query_kind), ("photo", "photo")):
        pool = bench.pool(bench.source(model), modality, bench.split.training)
        rows = np.sort(np.random.default_rng(bench.task.seed).permutation(len(pool.ids))[:CODED_FROM])
        features = torch.from_numpy(pool.features[rows]).to(bench.device or "cpu")
        label = np.searchsorted(bench.split.training, pool.labels[rows])
        found.append(FitRows(side, features, torch.from_numpy(label)))
    return found


def _through(work: Work, name: str, checkpoint: Artifact, index: Artifact) -> Row:
    """Evaluate the same queries through an index at its published operating point.

    Raises:
        ConfigError: the items of the index are not those of the gallery.
    """
    bench, settings = work.bench, work.settings
    model = open_model(checkpoint)
    query, gallery = bench.sides(model)
    bench.guard(query, gallery, checkpoint.facts["saw"])
    items, q = query.merged()
    others, _ = gallery.merged()
    searcher = Searcher.of(index)
    if set(searcher.live_ids.tolist()) != set(others.ids.tolist()):
        raise ConfigError(
            f"index {index.digest[:12]} holds {len(searcher.live_ids)} items and the {bench.task.protocol} "
            f"gallery {len(others)}, and they differ; build it from this gallery, or leave --index-dir out"
        )
    k = min(settings.k, len(others))
    hits = searcher.search(np.ascontiguousarray(q, dtype=np.float32), k)
    point = index.facts["operating_point"]
    size = sum(entry.bytes for entry in index.files)
    search = Search(index.facts["index_key"], int(point["nprobe"]), k, float(point["recall_sketch"]), size)
    measured = evaluate_hits(
        name, items, others, hits.ids, search, metric=model.metric, ks=settings.ks, sampling=bench.sampling
    )
    exact = work.row(name, model, checkpoint.facts["saw"]).scores
    note = f"seed {_seed(checkpoint)}, {point['refine_factor']} k candidates re-ranked"
    return Row(measured, note=note, exact=exact)


# ---- baselines -------------------------------------------------------------------------------------------------------


def _floors(work: Work, given: Collection[str] = ()) -> list[Row]:
    """Rows of the baselines: raw features if both modalities share a space, and ridge tuned on validation classes.

    Args:
        given: names of models that are evaluated anyway.
    """
    rows = []
    raw = _raw(work.bench)
    if raw is not None and "raw" not in given:
        rows.append(Row(work.row("raw", raw, ()), "floor", "backbone features, cosine"))
    if work.bench.features is not None and work.bench.semantics is not None and "ridge" not in given:
        ridge = retrain.ridge_floor(work.bench, work.store, work.shots)
        note = "features regressed onto class embeddings in closed form"
        rows.append(Row(work.row("ridge", open_model(ridge), ridge.facts["saw"]), "floor", note))
    return rows


def _raw(bench: Bench) -> Embedder | None:
    """The raw-features baseline, or None if there are no features or their widths differ."""
    if bench.features is None:
        return None
    dims = bench.features.facts["dims"]
    query, gallery = dims[bench.task.query], dims[bench.task.gallery]
    if query != gallery:
        return None
    return build("raw", {}, Inputs(sketch_dim=query, photo_dim=gallery, semantic_dim=0, classes=()))


# ---- class splits ----------------------------------------------------------------------------------------------------


def _splits(work: Work, groups: Sequence[Group], others: Sequence[Bench]) -> Splits | None:
    """mAP@all of every model and baseline on several class splits: those of the checkpoints, and random ones.

    For the random splits, every model is retrained with the same configuration.
    """
    if not others and not work.settings.splits:
        return None
    found = [_on_split(work, bench, named(bench.checkpoints)) for bench in (work.bench, *others)]
    for number in range(work.settings.splits):
        split = retrain.random_split(work.bench, number)
        made = {group.name: [retrain.again(work.bench, group.middle, work.store, split)] for group in groups}
        bench = replace(work.bench, checkpoints=tuple(checkpoint for (checkpoint,) in made.values()))
        found.append(_on_split(work, bench, made))
    models = list(dict.fromkeys(name for _, scores, _ in found for name in scores))
    return Splits(
        chance={source: level for source, _, level in found},
        models=tuple(
            SplitScores(name, {source: scores[name] for source, scores, _ in found if name in scores})
            for name in models
        ),
    )


def _on_split(
    work: Work, bench: Bench, members: Mapping[str, Sequence[Artifact]]
) -> tuple[str, dict[str, float], float]:
    """The split's name, mAP@all of each model (median over seeds) and baseline on it, and the chance level."""
    here = replace(work, bench=bench)
    scores: dict[str, float] = {}
    for name, checkpoints in members.items():
        for checkpoint in checkpoints:
            bench.guard(*bench.sides(open_model(checkpoint)), checkpoint.facts["saw"])
        scores[name] = median_low(bench.map_all(open_model(checkpoint)) for checkpoint in checkpoints)
    floors = _floors(here, scores)
    scores |= {row.evaluation.name: row.evaluation.scores["mAP@all"] for row in floors}
    asked = bench.asked(bench.source(open_model(bench.checkpoints[0])))
    relevant = metrics.count_relevant(asked.query.labels, asked.gallery.labels)
    return bench.split.source, scores, metrics.chance(relevant, len(asked.gallery.ids))["mAP@all"]


# ---- provenance, curves and notes ----------------------------------------------------------------------------------


def _curves(index: Artifact, query: str) -> tuple[RecallCurve, ...]:
    """Recall against vectors compared, at the operating point's refine factor, for both kinds of query."""
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
        for queries, column in ((f"{query} queries", "recall_sketch"), ("gallery queries", "recall_self"))
    )


PROTOCOLS: Final = {
    "zero-shot": "Zero-shot: no model was trained on the classes of queries and gallery.",
    "generalised": (
        "Generalised, gallery of all classes (Yelamarthi et al.): queries are of unseen classes, the gallery has "
        "seen classes too. Seen items are training items."
    ),
    "generalised-sempcyc": (
        "Generalised as in SEM-PCYC's released code: random seen items, a fifth as many as unseen ones, are added to "
        "queries and gallery. They are training items."
    ),
    "few-shot": (
        "Few-shot: models were trained on {shots} items of each unseen class and modality, which are left out here."
    ),
}


def _notes(bench: Bench, rows: Sequence[Row], shots: retrain.Shots | None) -> tuple[str, ...]:
    """Sentences on the protocol, and on the published sizes of the split."""
    task, first = bench.task, rows[0].evaluation
    notes = [PROTOCOLS[task.protocol].format(shots=task.shots)]
    if task.as_released:
        notes.append(
            f"As released by SEM-PCYC: the {len(bench.split.validation)} validation classes, which selected the "
            "checkpoints, are part of the test."
        )
    if shots is None and task.query != "photo":
        notes.append(published.compare_counts(bench.tested, first.queries, first.gallery))
    return tuple(note for note in notes if note)


def _without_codes(groups: Sequence[Group], bits: int | None) -> tuple[str, ...]:
    """Sentences on models whose embeddings have too few dimensions for the codes."""
    narrow = [group for group in groups if bits is not None and not _wide_enough(group, bits)]
    return tuple(f"No {bits}-bit codes of {g.name}: it embeds in {g.middle.facts['dim']} dimensions." for g in narrow)


def _backbone(bench: Bench) -> Backbone:
    matches = bench.matches
    trained_on = "unknown" if matches is None else "nothing" if bench.backbone == "random weights" else "ImageNet-1k"
    return Backbone(bench.backbone, trained_on, {} if matches is None else matches)


def _scatter(work: Work, group: Group) -> Scatter | None:
    model = open_model(group.middle)
    query, gallery = work.bench.sides(model)
    return scatter(group.name, query, gallery.only(work.bench.tested), model.metric)


def _history(group: Group) -> Validation:
    """Validation scores by step; empty without validation classes."""
    scored = ((step, score) for step, score in group.middle.facts["history"] if score is not None)
    return Validation(group.name, tuple((int(step), float(score)) for step, score in scored))


def _describe(bench: Bench) -> str:
    return f"{bench.data.config['source']['name']}, split {bench.split.source}"


def _digests(bench: Bench, groups: Sequence[Group], indexes: Sequence[Artifact]) -> dict[str, str]:
    artifacts = {"data": bench.data, "features": bench.features, "semantics": bench.semantics}
    digests = {name: artifact.digest for name, artifact in artifacts.items() if artifact is not None}
    for group in groups:
        digests |= {f"{group.name} seed {_seed(checkpoint)}": checkpoint.digest for checkpoint in group.checkpoints}
    return digests | {f"index {number}": index.digest for number, index in enumerate(indexes, 1)}
