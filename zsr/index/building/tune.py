"""Recall@10 against exact search over nprobe and refine_factor, and the cheapest operating point that meets the target.

Sketches are far from photos in the embedding space, so recall measured with gallery vectors flatters an index: both are
measured, and the target is held on the sketches.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from zsr import fault, progress
from zsr.errors import QualityGateFailed
from zsr.index import faiss_backend
from zsr.index.ground_truth import GroundTruth, K
from zsr.index.searching.searcher import Searcher

QUERIES: Final = 1000  # of each kind: recall@10 of 0.9 is then known to about 0.01
EXACT_QUERIES: Final = 200  # for exact search, whose recall is 1 but for rounding: enough to see that it is
ROUNDING: Final = 1e-3  # recall that exact search may lose where faiss rounds two neighbors at a distance to one
REFINE_FACTORS: Final = (1, 2, 4, 8, 16, 32)
MOST_SCANNED: Final = 250_000  # vectors a query; beyond it a scan of the codes is no better than exact search
BEYOND: Final = 2  # doublings of nprobe that the curve goes on after the target is met
FLAT: Final = 0.0005  # recall that a doubling of nprobe must gain for the curve to go on


@dataclass(frozen=True, slots=True)
class Point:
    """One setting and what it costs and finds.

    Attributes:
        recall_sketch, recall_self: recall@10 of real queries and of gallery vectors.
        scanned: vectors whose codes are compared with a query, on average.
        read: bytes of codes, ids and refine codes that a query touches, on average; the cost that is minimised.
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
    """How many queries of each kind the recall of an index of `key` is measured with."""
    return EXACT_QUERIES if faiss_backend.is_exact(key) else QUERIES


def tune(searcher: Searcher, sketches: GroundTruth, own: GroundTruth, target: float) -> tuple[Point, tuple[Point, ...]]:
    """The point that reads the fewest bytes a query among those whose recall on the sketches meets `target`; the curve.

    Raises:
        QualityGateFailed: none does; the message names the best.
    """
    fault.here("index.tune")
    if faiss_backend.is_exact(str(searcher.facts["index_key"])):
        target = min(target, 1 - ROUNDING)
    curve = tuple(measure(searcher, sketches, own, target))
    for point in sorted(curve, key=lambda p: (p.read, p.nprobe, p.refine_factor)):
        if point.recall_sketch >= target:
            found = at_point(searcher, point, sketches, own)
            # a shorter search may break ties of codes another way than the long one that the curve was read from
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
    """`point` with the recall that a search at it has now."""
    found = [
        truth.recall(searcher.nearest(truth.queries, K, point.nprobe, point.refine_factor)[0])
        for truth in (sketches, own)
        if truth is not None
    ]
    return replace(point, recall_sketch=found[0], recall_self=found[-1] if own is not None else point.recall_self)


def measure(searcher: Searcher, sketches: GroundTruth, own: GroundTruth, target: float) -> Iterator[Point]:
    """The curve: powers of two of nprobe with every refine factor, on from one list until nothing more is gained."""
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
    """Refine factors worth trying: one where nothing is re-ranked, none beyond all rows."""
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
    """Values of nprobe to try, each with the vectors that a query scans."""
    nlist = int(searcher.facts["nlist"])
    values = [2**i for i in range(nlist.bit_length()) if 2**i <= nlist]
    values += [] if values[-1] == nlist else [nlist]
    each = [faiss_backend.scanned(segment.stored, truth.queries, values) for segment in searcher.segments]
    costs = list(zip(values, (sum(costs) for costs in zip(*each, strict=True)), strict=True))
    return costs[:1] + [pair for pair in costs[1:] if pair[1] <= MOST_SCANNED]


def timed(searcher: Searcher, curve: Sequence[Point], point: Point, truth: GroundTruth) -> list[dict[str, float]]:
    """Queries a second on one thread, in one batch, along the curve at the operating point's refine factor.

    Timings differ from run to run, so they are for the report beside the versions and never in a manifest.
    """
    rows = []
    with faiss_backend.threads(1):
        for p in (p for p in curve if p.refine_factor == point.refine_factor):
            started = time.perf_counter()
            searcher.nearest(truth.queries, K, p.nprobe, p.refine_factor)
            rate = len(truth.queries) / (time.perf_counter() - started)
            rows.append({**p.as_json(), "queries_per_second": round(rate, 1)})
    return rows
