"""The report of an evaluation: report.json holds every number, report.html is one page that shows them.

The page is rendered from the JSON values alone, so the two cannot differ. It is self-contained: style, plots (SVG that
takes the page's colours) and thumbnails are inlined; there is no script and nothing is fetched.

    exact = evaluate("contrastive", query, gallery)
    write(output, Report("Sketch to photo", "sketchy-21", (Row(exact), Row(ridge, "floor"))), pictures)
"""

import base64
import io
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Final, Literal

import jinja2
import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from zsr.artifact import write_atomically
from zsr.errors import ConfigError
from zsr.evaluation.metrics import interval
from zsr.evaluation.protocol import Evaluation

THUMBNAIL: Final = 88  # pixels; shown at 64 to 80
CURVES: Final = 6  # lines that a plot still tells apart

Kind = Literal["model", "floor", "peak"]
Pictures = Callable[[str, int], bytes | None]
Json = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One line of the headline table.

    Attributes:
        evaluation: its numbers; with `evaluation.search` set, the row stands beside the exact one of the same name.
        kind: model; floor (raw features, ridge); or peak: the best of all checkpoints by the test score itself, which
            nobody could have selected, and which is marked so.
        note: a few words under the name.
    """

    evaluation: Evaluation
    kind: Kind = "model"
    note: str = ""


@dataclass(frozen=True)
class RecallPoint:
    """Recall of the exact top k (0 to 1) at one setting, and the mean number of vectors compared with a query."""

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
class Published:
    """Figures of a paper on the same split; `scores` uses the names of `Evaluation.scores`, so that kinds never mix."""

    name: str
    source: str
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Report:
    """Everything on the page.

    Attributes:
        title: of the page.
        data_set: name of the data set and its split.
        rows: models and floors; the order of the table.
        query_modality, gallery_modality: such as sketch and photo; `pictures` is asked by them.
        unseen: the classes evaluated.
        reference: name of the floor that differences are taken from; ignored where no row has it.
        shown: name of the row whose examples are shown; None is the best model.
        curves, seeds, validation, published: sections, left out where empty.
        configuration: what shaped the result, JSON values.
        digests: artifact name to digest.
        attribution: of the pictures.
    """

    title: str
    data_set: str
    rows: tuple[Row, ...]
    query_modality: str = "sketch"
    gallery_modality: str = "photo"
    unseen: tuple[str, ...] = ()
    reference: str = "ridge"
    shown: str | None = None
    curves: tuple[RecallCurve, ...] = ()
    seeds: tuple[Seeds, ...] = ()
    validation: tuple[Validation, ...] = ()
    published: tuple[Published, ...] = ()
    configuration: Mapping[str, Any] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    attribution: str = ""


def write(output: Path, report: Report, pictures: Pictures) -> None:
    """Write `output`/report.json and `output`/report.html.

    Args:
        pictures: (modality, id) to the bytes of a JPEG, PNG or WebP, or None: a tile with key and class stands then.

    Raises:
        ConfigError: no row, or `shown` names none.
        StorageError, DiskFull: nothing half written is left.
    """
    values = as_json(report)
    text = json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_atomically(output / "report.json", text.encode())
    write_atomically(output / "report.html", render(values, pictures).encode())


def as_json(report: Report) -> Json:
    """Every number of the report, what the page derives included.

    Raises:
        ConfigError: no row, or `shown` names none.
    """
    exact = {row.evaluation.name: row for row in report.rows if row.evaluation.search is None}
    shown = report.shown or _best(report.rows)
    if shown not in exact:
        raise ConfigError(f"the report has no exact row {shown!r} to show; it has {sorted(exact)}")
    values = asdict(replace(report, rows=(), shown=shown))
    reference = exact.get(report.reference)
    values["rows"] = [_row_json(row, reference) for row in report.rows]
    values["seeds"] = [_seeds_json(seeds, reference) for seeds in report.seeds]
    return values


def _best(rows: Sequence[Row]) -> str:
    """Name of the best selectable model, or of the best row where there are only floors."""
    exact = [row for row in rows if row.evaluation.search is None]
    models = [row for row in exact if row.kind == "model"] or exact
    if not models:
        raise ConfigError("a report needs at least one row of exact search")
    return max(models, key=lambda row: row.evaluation.scores["mAP@all"]).evaluation.name


def _row_json(row: Row, reference: Row | None) -> Json:
    bare = asdict(replace(row.evaluation, replicates=np.zeros(0)))
    del bare["replicates"]
    return {"kind": row.kind, "note": row.note, **bare, "difference": _difference(row, reference)}


def _difference(row: Row, reference: Row | None) -> Json | None:
    """mAP@all less the reference's, with a paired 95 % interval; None where their queries differ."""
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


def _stand(model: str, scores: Sequence[float], floor: Evaluation) -> str:
    level = floor.scores["mAP@all"]
    above = sum(score > level for score in scores)
    side = "above" if median(scores) > level else "not above"
    return (
        f"The median seed of {model} is {side} the {floor.name} floor ({level:.3f}); "
        f"{above} of {len(scores)} seeds are above it."
    )


# ---- the page --------------------------------------------------------------------------------------------------------


def render(values: Json, pictures: Pictures) -> str:
    """The page of `as_json(report)`."""
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
        through=[(row, exact.get(row["name"])) for row in values["rows"] if row["search"] is not None],
        plots=_plots(values, exact),
        strips=[_strip(example, values, pictures) for example in shown["examples"]],
    )


def _score(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else f"{value:.3f}"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")


def _size(count: int) -> str:
    """Bytes as people write them."""
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
    """A small square WebP as a data URI, or None where there is no picture that decodes.

    `whole` keeps everything but a white margin (a cropped sketch loses strokes); else the middle square is cut out.
    """
    if data is None:
        return None
    try:
        flat = _decode(data)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None
    square = (THUMBNAIL, THUMBNAIL)
    small = ImageOps.pad(_without_margin(flat), square, color="white") if whole else ImageOps.fit(flat, square)
    encoded = io.BytesIO()
    small.save(encoded, "WEBP", quality=55, method=6)
    return "data:image/webp;base64," + base64.b64encode(encoded.getvalue()).decode()


def _decode(data: bytes) -> Image.Image:
    """The picture upright, on white where it is transparent."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGBA")
    paper = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(paper, picture).convert("RGB")


def _without_margin(picture: Image.Image) -> Image.Image:
    """`picture` cut to what is not white, and a little paper around it."""
    ink = picture.convert("L").point(lambda level: 255 if level < 235 else 0).getbbox()
    if ink is None:
        return picture
    cut = picture.crop(ink)
    return ImageOps.expand(cut, border=max(cut.size) // 12, fill="white")


# ---- plots -----------------------------------------------------------------------------------------------------------

# Matplotlib draws in these colours, and the page's own variables replace them: one SVG for light and dark.
INK: Final = "#010101"
MUTED: Final = "#020202"
LINE: Final = "#030303"
SERIES: Final = tuple(f"#0{i}0b0c" for i in range(1, CURVES + 1))
THEME: Final = {INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)"} | {
    colour: f"var(--series-{i + 1})" for i, colour in enumerate(SERIES)
}
DASHES: Final = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 2)))
STYLE: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "path.simplify_threshold": 1.0,
}


def _plots(values: Json, exact: Mapping[str, Json]) -> dict[str, Markup]:
    """Plot name to inline SVG; a plot without points is left out."""
    plots = {"precision-recall": _svg("precision-recall", lambda axes: _draw_curves(axes, list(exact.values())))}
    if values["curves"]:
        plots["recall"] = _svg("recall", lambda axes: _draw_recall(axes, values["curves"]))
    if values["validation"]:
        plots["validation"] = _svg("validation", lambda axes: _draw_validation(axes, values["validation"]))
    return plots


def _svg(name: str, draw: Callable[[Axes], None]) -> Markup:
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # the browser draws the text, so it does not matter which letters matplotlib's own font lacks
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=(5.4, 3.7), layout="constrained")
        draw(figure.subplots())
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = drawn.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[a-z]+\d*_\d+"', "", text)  # these would repeat from plot to plot
    text = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    for colour, variable in THEME.items():
        text = text.replace(colour, variable)
    return Markup(text)


def _plain(name: str) -> str:
    """`name` to be printed literally: a dollar would start mathematics, a leading underscore hides a legend entry."""
    return name.replace("$", r"\$").lstrip("_") or name


def _draw_curves(axes: Axes, rows: Sequence[Json]) -> None:
    levels = np.linspace(0, 1, len(rows[0]["curve"]))
    for row, colour, dash in zip(rows, SERIES, DASHES, strict=False):
        axes.plot(levels, row["curve"], color=colour, linestyle=dash, label=_plain(row["name"]))
    axes.set(xlabel="recall", ylabel="precision, interpolated", xlim=(0, 1), ylim=(0, None))
    axes.legend(loc="upper right")


def _draw_recall(axes: Axes, curves: Sequence[Json]) -> None:
    for curve, colour, dash in zip(curves, SERIES, DASHES, strict=False):
        points = sorted(curve["points"], key=lambda point: point["candidates"])
        x, y = [p["candidates"] for p in points], [p["recall"] for p in points]
        axes.plot(x, y, color=colour, linestyle=dash, marker="o", markersize=4, label=_plain(curve["queries"]))
        for p in points:
            at = (p["candidates"], p["recall"])
            axes.annotate(str(p["nprobe"]), at, (0, -12), textcoords="offset points", color=MUTED, ha="center", size=8)
    axes.set(xscale="log", xlabel="vectors compared a query", ylabel=f"recall@{curves[0]['k']} of exact search")
    axes.set_ylim(0, 1.04)
    axes.legend(loc="lower right")


def _draw_validation(axes: Axes, curves: Sequence[Json]) -> None:
    for curve, colour, dash in zip(curves, SERIES, DASHES, strict=False):
        steps, scores = zip(*curve["points"], strict=True)
        axes.plot(steps, scores, color=colour, linestyle=dash, label=_plain(curve["model"]))
        best = int(np.argmax(scores))
        axes.plot(steps[best], scores[best], marker="o", color=colour)
    axes.set(xlabel="step", ylabel="mAP@all, validation classes", ylim=(0, None))
    axes.legend(loc="lower right")
