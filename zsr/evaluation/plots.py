"""Plots of the report as inline SVG in the page's colors: one plot for light and dark mode.

Curves are drawn by matplotlib. The confusion matrix and the scatter plot are written as SVG directly, since those of
matplotlib would be many times as large.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Json = dict[str, Any]

CURVES: Final = 6  # max distinguishable lines per plot

# Matplotlib draws in these colors, which are then replaced by the page's CSS variables, for light and dark mode.
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


def all_of(values: Json, exact: Mapping[str, Json], shown: Json) -> dict[str, Markup]:
    """Plot name to inline SVG; plots without points are omitted.

    Args:
        values: of the report. exact: rows of exact search by name. shown: the row of the confusion matrix.
    """
    plots = {"precision-recall": _svg("precision-recall", lambda axes: _draw_curves(axes, _told_apart(exact, shown)))}
    plots["confusion"] = _confusion(shown["confusion"])
    if values["scatter"]:
        plots["scatter"] = _scatter(values["scatter"])
    if values["curves"]:
        plots["recall"] = _svg("recall", lambda axes: _draw_recall(axes, values["curves"]))
    if values["validation"]:
        plots["validation"] = _svg("validation", lambda axes: _draw_validation(axes, values["validation"]))
    return plots


def _svg(name: str, draw: Callable[[Axes], None]) -> Markup:
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # the browser renders the text, so glyphs missing in matplotlib's font do not matter
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=(5.4, 3.7), layout="constrained")
        draw(figure.subplots())
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = drawn.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[a-z]+\d*_\d+"', "", text)  # these would not be unique over several plots
    # a style sheet inside an SVG would apply to the whole page
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    text = text.replace("<svg", '<svg style="stroke-linejoin:round;stroke-linecap:butt"', 1)
    text = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    for colour, variable in THEME.items():
        text = text.replace(colour, variable)
    return Markup(text)


def _plain(name: str) -> str:
    """Escape `name` for matplotlib: a dollar starts math mode, a leading underscore hides a legend entry."""
    return name.replace("$", r"\$").lstrip("_") or name


def _told_apart(exact: Mapping[str, Json], shown: Json) -> list[Json]:
    """Select at most CURVES rows: first `shown`, then baselines, models, and oracles last. Their order is kept."""
    first = sorted(exact.values(), key=lambda row: (row is not shown, row["kind"] != "floor", row["kind"] == "peak"))
    kept = {row["name"] for row in first[:CURVES]}
    return [row for name, row in exact.items() if name in kept]


def _draw_curves(axes: Axes, rows: Sequence[Json]) -> None:
    levels = np.linspace(0, 1, len(rows[0]["curve"]))
    for row, colour, dash in zip(rows, SERIES, DASHES, strict=False):
        axes.plot(levels, row["curve"], color=colour, linestyle=dash, label=_plain(row["name"]))
    axes.set(xlabel="recall", ylabel="precision, interpolated", xlim=(0, 1), ylim=(0, None))
    axes.legend(loc="upper right")


def _draw_recall(axes: Axes, curves: Sequence[Json]) -> None:
    several = len({curve["index_key"] for curve in curves}) > 1
    for curve, colour, dash in zip(curves, SERIES, DASHES, strict=False):
        name = f"{curve['queries']}, {curve['index_key']}" if several else curve["queries"]
        points = sorted(curve["points"], key=lambda point: point["candidates"])
        x, y = [p["candidates"] for p in points], [p["recall"] for p in points]
        axes.plot(x, y, color=colour, linestyle=dash, marker="o", markersize=4, label=_plain(name))
        for p in points:
            at = (p["candidates"], p["recall"])
            axes.annotate(str(p["nprobe"]), at, (0, -12), textcoords="offset points", color=MUTED, ha="center", size=8)
    axes.set(xscale="log", xlabel="vectors compared per query", ylabel=f"recall@{curves[0]['k']} of exact search")
    axes.set_ylim(0, 1.04)
    axes.legend(loc="lower right")


def _draw_validation(axes: Axes, curves: Sequence[Json]) -> None:
    for curve, colour, dash in zip(curves, SERIES, DASHES, strict=False):
        steps, scores = zip(*curve["points"], strict=True)
        axes.plot(steps, scores, color=colour, linestyle=dash, label=_plain(curve["model"]))
        best = int(np.argmax(scores))
        axes.plot(steps[best], scores[best], marker="o", color=colour, clip_on=False)
    axes.set(xlabel="step", ylabel="mAP@all, validation classes", ylim=(0, None))
    axes.legend(loc="lower right")


# ---- plain SVG--------------------------------------------------------------------------------------------------------

CELL: Final = 24  # side of a cell of the matrix
LETTER: Final = 6.3  # approximate width of a character
FAINT: Final = 0.005  # fractions below this are not drawn
NUMBERS: Final = 14  # max classes for which cells show their percentage


def _confusion(values: Json) -> Markup:
    """Rows are classes of queries, columns classes of results; darker is more, correct ones in the page's green."""
    names = [*values["labels"], "others"]
    columns = names if any(row[-1] for row in values["share"]) else names[:-1]
    margin = round(14 + LETTER * max(len(_short(name)) for name in columns))
    width, height = CELL * len(columns), CELL * len(values["labels"])
    cells = [
        _cell(row, column, share, numbers=len(columns) <= NUMBERS)
        for row, shares in enumerate(values["share"])
        for column, share in enumerate(shares)
        if share >= FAINT
    ]
    frame = f'<path d="M0 0h{width}v{height}h-{width}z" fill="none" stroke="var(--line)"/>'
    moved = f'<g transform="translate({margin} {margin})">{frame}{_matrix_names(values["labels"], columns)}'
    return _drawing(width + margin + 1, height + margin + 1, [moved, *cells, "</g>"])


def _cell(row: int, column: int, share: float, *, numbers: bool) -> str:
    x, y = CELL * column, CELL * row
    colour = "right" if row == column else "wrong"
    opacity = f"{0.08 + 0.92 * share:.2f}".lstrip("0")
    rect = f'<path d="M{x} {y}h{CELL}v{CELL}h-{CELL}z" fill="var(--{colour})" fill-opacity="{opacity}"/>'
    if not numbers or share < 0.045:
        return rect
    ink = "paper" if share > 0.55 else "ink"
    middle = f'x="{x + CELL / 2:g}" y="{y + 15.5:g}" text-anchor="middle"'
    return f'{rect}<text {middle} fill="var(--{ink})">{100 * share:.0f}</text>'


def _matrix_names(rows: Sequence[str], columns: Sequence[str]) -> str:
    left = "".join(
        f'<text x="-6" y="{CELL * at + 15.5:g}" text-anchor="end">{escape(_short(name))}</text>'
        for at, name in enumerate(rows)
    )
    above = "".join(
        f'<text transform="translate({CELL * at + 15.5:g} -6)rotate(-90)">{escape(_short(name))}</text>'
        for at, name in enumerate(columns)
    )
    return f'<g fill="var(--muted)">{left}{above}</g>'


def _short(name: str) -> str:
    return name if len(name) <= 18 else name[:17] + "\N{HORIZONTAL ELLIPSIS}"


WIDE: Final = 560
HIGH: Final = 430
EDGE: Final = 16


def _scatter(values: Json) -> Markup:
    """Gallery items as dots, queries as crosses, one color per class, its name at the median of its dots."""
    parts, names = [], []
    for label, name in enumerate(values["labels"]):
        colour = f"hsl({360 * label / len(values['labels']):.0f} 62% 52%)"
        dots = [_place(x, y) for x, y, of in values["gallery"] if of == label]
        crosses = [_place(x, y) for x, y, of in values["query"] if of == label]
        parts.append(f'<g stroke="{colour}">{_marks(dots, "h0", 5)}{_marks(crosses, "m-3-3l6 6m0-6l-6 6", 1.2)}</g>')
        if dots:
            x, y = np.median(dots, axis=0)
            half = LETTER * len(_short(name)) / 2
            x = np.clip(x, half, WIDE - half)  # keep the name inside the drawing
            names.append(f'<text x="{x:.0f}" y="{y:.0f}">{escape(_short(name))}</text>')
    halo = 'fill="var(--ink)" stroke="var(--paper)" stroke-width="3" paint-order="stroke" text-anchor="middle"'
    marks = f'<g fill="none" stroke-linecap="round">{"".join(parts)}</g>'
    return _drawing(WIDE, HIGH, [marks, f"<g {halo}>{''.join(names)}</g>"])


def _place(x: float, y: float) -> tuple[float, float]:
    return EDGE + x * (WIDE - 2 * EDGE), EDGE + y * (HIGH - 2 * EDGE)


def _marks(places: Sequence[tuple[float, float]], shape: str, width: float) -> str:
    path = "".join(f"M{x:.0f} {y:.0f}{shape}" for x, y in places)
    return f'<path d="{path}" stroke-width="{width:g}" stroke-opacity=".75"/>' if path else ""


def _drawing(width: int, height: int, parts: Iterable[str]) -> Markup:
    return Markup(f'<svg viewBox="0 0 {width} {height}" font-size="11">{"".join(parts)}</svg>')
