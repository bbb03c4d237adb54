"""Evaluation report: report.json with all numbers, and report.html, a page that shows them.

The page is rendered only from the JSON values, so the two cannot differ. It is self-contained: style, plots (SVG in the
page's colors) and thumbnails are inlined; there is no script and no external resource.

    exact = evaluate("contrastive", query, gallery)
    write(output, Report("Sketch to photo", "sketchy-21", (Row(exact), Row(ridge, "floor"))), pictures)
"""

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, Final, Literal

import jinja2
import numpy as np
from PIL import Image, ImageOps

from zsr.artifact import write_atomically
from zsr.data.decode import BadImage, Limits, upright
from zsr.errors import ConfigError
from zsr.evaluation import plots
from zsr.evaluation.protocol import Evaluation
from zsr.evaluation.scatter import Scatter
from zsr.metrics import interval

THUMBNAIL: Final = 88  # pixels; shown at 64 to 80

Kind = Literal["model", "floor", "peak"]
Pictures = Callable[[str, int], bytes | None]
Json = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One row of the main table.

    Attributes:
        evaluation: its scores; if `evaluation.search` is set, they are those of an index.
        kind: model; floor: a baseline (raw features, ridge); or peak: the oracle, which is the best of all checkpoints
            by test score and is marked as not selectable.
        note: a few words below the name.
        exact: for an index, the scores of exact search with the same embeddings.
    """

    evaluation: Evaluation
    kind: Kind = "model"
    note: str = ""
    exact: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RecallPoint:
    """recall@k against exact search (0 to 1) at one nprobe, and the mean number of vectors compared per query."""

    nprobe: int
    candidates: float
    recall: float


@dataclass(frozen=True)
class RecallCurve:
    """Recall against cost of one index for one kind of query, such as "sketch queries" or "gallery queries"."""

    queries: str
    index_key: str
    k: int
    points: tuple[RecallPoint, ...]


@dataclass(frozen=True)
class Seeds:
    """mAP@all of one model trained from several seeds."""

    model: str
    scores: Mapping[int, float]


@dataclass(frozen=True)
class Validation:
    """mAP on the validation classes while one model trained: (step, mAP) pairs."""

    model: str
    points: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class SplitScores:
    """mAP@all of one model or baseline by class split."""

    model: str
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Splits:
    """Scores on several class splits; `chance` is the chance level of each."""

    chance: Mapping[str, float]
    models: tuple[SplitScores, ...]


@dataclass(frozen=True)
class Backbone:
    """The backbone and its training classes.

    Attributes:
        name: of the backbone; "imported" if features were not computed here.
        trained_on: ImageNet-1k, nothing or unknown.
        matches: for each unseen class, the backbone's training classes that equal it or are below it; empty if unknown.
    """

    name: str
    trained_on: str
    matches: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Published:
    """Results of a paper on the same split; `scores` has the metric names of `Evaluation.scores`."""

    name: str
    source: str
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Report:
    """Contents of the page.

    Attributes:
        title: of the page.
        data_set: name of the data set and its split.
        rows: models and baselines, in the order of the table.
        query_modality, gallery_modality: such as sketch and photo; also the arguments of `pictures`.
        protocol: such as zero-shot.
        notes: sentences on the protocol.
        unseen: the evaluated classes.
        reference: name of the baseline that differences are computed against; ignored if there is no such row.
        shown: name of the row whose examples are shown; None is the best model.
        curves, seeds, splits, validation, published, backbone, scatter: sections, omitted if empty.
        configuration: of the models, JSON values.
        digests: artifact name to digest.
        attribution: of the images.
    """

    title: str
    data_set: str
    rows: tuple[Row, ...]
    query_modality: str = "sketch"
    gallery_modality: str = "photo"
    protocol: str = "zero-shot"
    notes: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    reference: str = "ridge"
    shown: str | None = None
    curves: tuple[RecallCurve, ...] = ()
    seeds: tuple[Seeds, ...] = ()
    splits: Splits | None = None
    validation: tuple[Validation, ...] = ()
    published: tuple[Published, ...] = ()
    backbone: Backbone | None = None
    scatter: Scatter | None = None
    configuration: Mapping[str, Any] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    attribution: str = ""


def write(output: Path, report: Report, pictures: Pictures) -> None:
    """Write `output`/report.json and `output`/report.html.

    Args:
        pictures: (modality, id) to the bytes of an encoded image, or None for a tile with key and class instead.

    Raises:
        ConfigError: no row, or `shown` is not a row.
        StorageError, DiskFull: no partial file is left.
    """
    values = as_json(report)
    text = json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_atomically(output / "report.json", text.encode())
    write_atomically(output / "report.html", render(values, pictures).encode())


def as_json(report: Report) -> Json:
    """All numbers of the report, including those derived for the page.

    Raises:
        ConfigError: no row, or `shown` is not a row.
    """
    exact = {row.evaluation.name: row for row in report.rows if row.evaluation.search is None}
    shown = report.shown or best(report.rows)
    if shown not in exact:
        raise ConfigError(f"the report has no exact row {shown!r} to show; it has {sorted(exact)}")
    values = asdict(replace(report, rows=(), shown=shown))
    reference = exact.get(report.reference)
    values["rows"] = [_row_json(row, reference) for row in report.rows]
    values["seeds"] = [_seeds_json(seeds, reference) for seeds in report.seeds]
    values["splits"] = None if report.splits is None else _splits_json(report.splits, report.reference)
    return values


def best(rows: Sequence[Row]) -> str:
    """Name of the best selectable model, or of the best row if there are only baselines.

    Raises:
        ConfigError: no row of exact search.
    """
    exact = [row for row in rows if row.evaluation.search is None]
    models = [row for row in exact if row.kind == "model"] or exact
    if not models:
        raise ConfigError("a report needs at least one row of exact search")
    return max(models, key=lambda row: row.evaluation.scores["mAP@all"]).evaluation.name


def _row_json(row: Row, reference: Row | None) -> Json:
    bare = asdict(replace(row.evaluation, replicates=np.zeros(0)))
    del bare["replicates"]
    beside = {"kind": row.kind, "note": row.note, "exact": dict(row.exact)}
    return {**beside, **bare, "difference": _difference(row, reference)}


def _difference(row: Row, reference: Row | None) -> Json | None:
    """mAP@all minus the reference's, with a paired 95 % interval; None if their queries differ."""
    if reference is None or row.evaluation.name == reference.evaluation.name:
        return None
    mine, other = row.evaluation, reference.evaluation
    same = [(c.label, c.queries) for c in mine.per_class] == [(c.label, c.queries) for c in other.per_class]
    if not same or mine.replicates.shape != other.replicates.shape:
        return None
    score = mine.scores["mAP@all"] - other.scores["mAP@all"]
    return {"to": other.name, "score": score, "interval": interval(mine.replicates - other.replicates)}


def _seeds_json(seeds: Seeds, reference: Row | None) -> Json:
    scores = list(seeds.scores.values())
    middle = median(scores)
    return {
        "model": seeds.model,
        "scores": {str(seed): score for seed, score in seeds.scores.items()},
        "median": middle,
        "lowest": min(scores),
        "highest": max(scores),
        "sentence": "" if reference is None else _stand(seeds.model, scores, reference.evaluation),
    }


def _splits_json(splits: Splits, reference: str) -> Json:
    floor = next((entry.scores for entry in splits.models if entry.model == reference), {})
    return {
        "chance": dict(splits.chance),
        "models": [_split_scores_json(entry, floor) for entry in splits.models],
    }


def _split_scores_json(entry: SplitScores, floor: Mapping[str, float]) -> Json:
    """Mean and std over splits; the difference to the baseline is computed per split."""
    scores = list(entry.scores.values())
    differences = [score - floor[split] for split, score in entry.scores.items() if split in floor]
    return {
        "model": entry.model,
        "scores": dict(entry.scores),
        "mean": mean(scores),
        "deviation": stdev(scores) if len(scores) > 1 else None,
        "lowest": min(scores),
        "highest": max(scores),
        "difference": mean(differences) if differences else None,
        "difference_deviation": stdev(differences) if len(differences) > 1 else None,
    }


def _stand(model: str, scores: Sequence[float], floor: Evaluation) -> str:
    level = floor.scores["mAP@all"]
    above = sum(score > level for score in scores)
    side = "above" if median(scores) > level else "not above"
    return (
        f"The median seed of {model} is {side} the {floor.name} baseline ({level:.3f}); "
        f"{above} of {len(scores)} seeds are above it."
    )


# ---- the page --------------------------------------------------------------------------------------------------------


def render(values: Json, pictures: Pictures) -> str:
    """Render the page from `as_json(report)`."""
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(loader=folder, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page.filters |= {"score": _score, "signed": _signed, "size": _size, "pretty": _pretty}
    exact = {row["name"]: row for row in values["rows"] if row["search"] is None}
    shown = exact[values["shown"]]
    return page.get_template("report.html.j2").render(
        report=values,
        shown=shown,
        reference=exact.get(values["reference"]),
        top=_axis_top(values["rows"]),
        through=[row for row in values["rows"] if row["search"] is not None],
        instances=[row for row in values["rows"] if "Acc@1" in row["scores"] and row["kind"] != "peak"],
        plots=plots.all_of(values, exact, shown),
        strips=[_strip(example, values, pictures) for example in shown["examples"]],
    )


def _score(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else f"{value:.3f}"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")


def _size(count: int) -> str:
    """Format a number of bytes."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "B" or size >= 100 else f"{size:.1f} {units[0]}"


def _pretty(value: object) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)


def _axis_top(rows: Sequence[Json]) -> float:
    """Right end of the bars: the next tenth above the highest interval."""
    highest = max(row["intervals"]["mAP@all"][1] for row in rows)
    return min(1.0, float(np.ceil(highest * 10 + 1e-9)) / 10)


def _strip(example: Json, values: Json, pictures: Pictures) -> Json:
    query = {**example, "picture": _thumbnail(pictures(values["query_modality"], example["id"]), whole=True)}
    hits = [
        {**hit, "picture": _thumbnail(pictures(values["gallery_modality"], hit["id"]), whole=False)}
        for hit in example["hits"]
    ]
    return {**query, "hits": hits}


def _thumbnail(data: bytes | None, *, whole: bool) -> str | None:
    """A small square WebP as a data URI; None if there is no image or it cannot be decoded.

    `whole` keeps everything except a white margin (a cropped sketch loses strokes); otherwise a center crop is taken.
    """
    if data is None:
        return None
    try:
        flat = Image.fromarray(upright(data, Limits()))  # the same orientation as embedded
    except BadImage:
        return None
    square = (THUMBNAIL, THUMBNAIL)
    small = ImageOps.pad(_without_margin(flat), square, color="white") if whole else ImageOps.fit(flat, square)
    encoded = io.BytesIO()
    small.save(encoded, "WEBP", quality=55, method=6)
    return "data:image/webp;base64," + base64.b64encode(encoded.getvalue()).decode()


def _without_margin(picture: Image.Image) -> Image.Image:
    """Crop `picture` to its non-white area, plus a small border."""
    ink = picture.convert("L").point(lambda level: 255 if level < 235 else 0).getbbox()
    if ink is None:
        return picture
    cut = picture.crop(ink)
    return ImageOps.expand(cut, border=max(cut.size) // 12, fill="white")
