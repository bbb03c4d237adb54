"""Build report: cost per stage and search speed. Stored beside the versions, since timings are not reproducible.

ROOT/reports/DIGEST/build.json, curve.png
"""

import io
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from zsr.artifact import Artifact, Store, write_atomically
from zsr.clock import Clock
from zsr.index.building.plan import IndexPlan
from zsr.index.building.tune import Point, timed
from zsr.index.ground_truth import GroundTruth
from zsr.index.searching.searcher import Searcher

logger = logging.getLogger("zsr")


def note(line: str, *values: object) -> None:
    """Write a progress line of an index job to standard error."""
    logger.warning(f"index: {line}", *values)  # as `zsr.cluster.track` does: this level is shown without logging setup


class BuildReport:
    """Cost of every build stage."""

    def __init__(self) -> None:
        self.stages: dict[str, dict[str, float]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure this process during a stage; `tasks` adds the cost of its Ray tasks."""
        clock = Clock()
        yield
        self.stages[name] = {**self.stages.get(name, {}), **clock.spent()}

    def tasks(self, name: str, results: Sequence[dict[str, Any]]) -> None:
        """Record the cost of a stage's Ray tasks."""
        found = self.stages.setdefault(name, {})
        found["tasks_cpu"] = round(sum(r["cpu"] for r in results), 3)
        found["tasks_rss"] = max((r["rss"] for r in results), default=0)


@dataclass(frozen=True)
class Tuning:
    """The recall curve with search speed.

    Attributes:
        rows: one per point, with `queries_per_second` on one thread in one batch. target: of recall.
    """

    rows: list[dict[str, Any]]
    point: Point
    target: float

    @classmethod
    def of(cls, searcher: Searcher, sketches: GroundTruth, point: Point, curve: Sequence[Point]) -> "Tuning":
        rows = timed(searcher, curve, point, sketches)
        return cls(rows, point, float(searcher.facts["recall_target"]))

    def picture(self) -> bytes:
        """Plot recall against queries per second for sketches and gallery vectors, as PNG."""
        import matplotlib

        matplotlib.use("Agg")  # imported here: jobs that build no index need no plots
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(7, 4.5), dpi=110)
        speed = [row["queries_per_second"] for row in self.rows]
        for column, name, colour in (("recall_self", "gallery vectors", "#999"), ("recall_sketch", "sketches", "#05a")):
            axes.plot(speed, [row[column] for row in self.rows], "o-", color=colour, label=name)
        for row in self.rows:
            chosen = row["nprobe"] == self.point.nprobe
            axes.annotate(
                f"nprobe {row['nprobe']}" + (" (chosen)" if chosen else ""),
                (row["queries_per_second"], row["recall_sketch"]),
                (4, -12),
                textcoords="offset points",
                size=8,
                weight="bold" if chosen else "normal",
            )
        axes.axhline(self.target, color="#c33", linewidth=0.8, linestyle="--", label=f"target {self.target}")
        axes.set(xscale="log", xlabel="queries per second, one thread, one batch", ylabel="recall@10")
        axes.set_title(f"refine factor {self.point.refine_factor}", size=10)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower left")
        figure.tight_layout()
        out = io.BytesIO()
        figure.savefig(out, format="png")
        pyplot.close(figure)
        return out.getvalue()


def write(store: Store, artifact: Artifact, ledger: BuildReport, plan: IndexPlan, tuning: Tuning) -> None:
    """Write the build report of `artifact`: stage costs, the benchmark of the plan, and the recall curve."""
    place = store.place / "reports" / artifact.digest
    report = {"stages": ledger.stages, "plan": plan.as_json(), "curve": tuning.rows}
    write_atomically(place / "build.json", json.dumps(report, indent=1).encode())
    write_atomically(place / "curve.png", tuning.picture())
