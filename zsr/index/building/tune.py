"""Tune nprobe and refine_factor: recall@10 against exact search, and the cheapest operating point at the target.

Sketches are far from photos in the embedding space, so recall with gallery vectors as queries is too optimistic: both
are measured, and the target applies to the sketches.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from zsr import faults, progress
from zsr.errors import QualityGateFailed
from zsr.index import faiss_backend
from zsr.index.ground_truth import GroundTruth, K
from zsr.index.searching.searcher import Searcher

QUERIES: Final = 1000  # of each kind: recall@10 of 0.9 is then known to about 0.01
EXACT_QUERIES: Final = 200  # for exact search: enough to check that recall is 1 up to rounding
ROUNDING: Final = 1e-3  # recall that exact search may lose where faiss rounds two different distances to one
REFINE_FACTORS: Final = (1, 2, 4, 8, 16, 32)
MOST_SCANNED: Final = 250_000  # vectors per query; beyond it, scanning codes is no better than exact search
BEYOND: Final = 2  # further doublings of nprobe after the target is met
FLAT: Final = 0.0005  # stop when doubling nprobe gains less recall than this


@dataclass(frozen=True, slots=True)
class Point:
    """One setting with its recall and cost.

    Attributes:
        recall_sketch, recall_self: recall@10 of real queries and of gallery vectors.
        scanned: mean number of vectors whose codes are compared with a query.
        read: mean bytes of codes, ids and refine codes read per query; the cost that is minimized.
    """

    nprobe: int
    refine_factor: int
    recall_sketch: float
    recall_self: float
    scanned: float
    read: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def queries_of(key: str) -> int:
    """Number of queries of each kind used to measure the recall of an index of `key`."""
    return EXACT_QUERIES if faiss_backend.is_exact(key) else QUERIES


def tune(searcher: Searcher, sketches: GroundTruth, own: GroundTruth, target: float) -> tuple[Point, tuple[Point, ...]]:
    """Return the point that meets `target` on the sketches with the fewest bytes read per query, and the curve.

    Raises:
        QualityGateFailed: no point does; the message names the best.
    """
    faults.here("index.tune")
    if faiss_backend.is_exact(str(searcher.facts["index_key"])):
        target = min(target, 1 - ROUNDING)
    curve = tuple(measure(searcher, sketches, own, target))
    for point in sorted(curve, key=lambda p: (p.read, p.nprobe, p.refine_factor)):
        if point.recall_sketch >= target:
            found = at_point(searcher, point, sketches, own)
            # a search at this refine factor may break ties of codes differently from the longer one of the curve
            if found.recall_sketch >= target:
                return found, curve
    best = max(curve, key=lambda point: point.recall_sketch)
    raise QualityGateFailed(
        f"{searcher.facts['index_key']} reaches recall@{K} {best.recall_sketch:.3f} on the sketches (nprobe "
        f"{best.nprobe}, refine factor {best.refine_factor}; {best.recall_self:.3f} on gallery vectors), below "
        f"--recall-target {target}; nothing was published. Give a longer code (a larger PQ), refine codes such as "
        ",Refine(SQ8), fewer lists or a lower target"
    )


def at_point(searcher: Searcher, point: Point, sketches: GroundTruth, own: GroundTruth | None = None) -> Point:
    """`point` with its recall measured again by searching at that setting."""
    found = [
        truth.recall(searcher.nearest(truth.queries, K, point.nprobe, point.refine_factor)[0])
        for truth in (sketches, own)
        if truth is not None
    ]
    return replace(point, recall_sketch=found[0], recall_self=found[-1] if own is not None else point.recall_self)


def measure(searcher: Searcher, sketches: GroundTruth, own: GroundTruth, target: float) -> Iterator[Point]:
    """Yield the curve: nprobe in powers of two with every refine factor, until recall stops improving."""
    factors = _factors(searcher)
    last, after = 0.0, 0
    for nprobe, scanned in _nprobes(searcher, sketches):
        points = _at(searcher, (sketches, own), nprobe, scanned, factors)
        progress.advance(len(points))
        yield from points
        most = max(point.recall_sketch for point in points)
        after += most >= target
        if after > BEYOND or (last > 0 and most - last < FLAT and scanned > K * 100):
            return
        last = most


def _factors(searcher: Searcher) -> tuple[int, ...]:
    """Refine factors worth trying: only 1 without re-ranking, and none that exceeds the number of rows."""
    if not searcher.segments[0].refine:
        return (1,)
    rows = int(searcher.facts["ntotal"])
    return tuple(f for f in REFINE_FACTORS if f == 1 or K * f // 2 < rows)


def _at(
    searcher: Searcher, truths: tuple[GroundTruth, GroundTruth], nprobe: int, scanned: float, factors: Sequence[int]
) -> list[Point]:
    found = [searcher.candidates(t.queries, K * factors[-1], nprobe) for t in truths]
    row = faiss_backend.ivf_of(searcher.segments[0].stored).code_size + faiss_backend.ID_BYTES
    points = []
    for factor in factors:
        deep = K * factor
        recall = [
            t.recall(faiss_backend.top(ordinals[:, :deep], scores[:, :deep], K))
            for t, (ordinals, scores) in zip(truths, found, strict=True)
        ]
        ranked = min(deep, int(searcher.facts["ntotal"])) * searcher.segments[0].refine_bytes
        read = round(scanned * row + ranked, 1)
        points.append(Point(nprobe, factor, recall[0], recall[1], round(scanned, 1), read))
    return points


def _nprobes(searcher: Searcher, truth: GroundTruth) -> list[tuple[int, float]]:
    """Values of nprobe to try, each with the mean number of vectors scanned per query."""
    nlist = int(searcher.facts["nlist"])
    values = [2**i for i in range(nlist.bit_length()) if 2**i <= nlist]
    values += [] if values[-1] == nlist else [nlist]
    each = [faiss_backend.scanned(segment.stored, truth.queries, values) for segment in searcher.segments]
    costs = list(zip(values, (sum(costs) for costs in zip(*each, strict=True)), strict=True))
    return costs[:1] + [pair for pair in costs[1:] if pair[1] <= MOST_SCANNED]


def timed(searcher: Searcher, curve: Sequence[Point], point: Point, truth: GroundTruth) -> list[dict[str, float]]:
    """Queries per second on one thread, in one batch, along the curve at the operating point's refine factor.

    Timings differ from run to run, so they belong in the build report and never in a manifest.
    """
    rows = []
    with faiss_backend.threads(1):
        for p in (p for p in curve if p.refine_factor == point.refine_factor):
            started = time.perf_counter()
            searcher.nearest(truth.queries, K, p.nprobe, p.refine_factor)
            rate = len(truth.queries) / (time.perf_counter() - started)
            rows.append({**p.as_json(), "queries_per_second": round(rate, 1)})
    return rows
