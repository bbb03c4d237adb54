"""Benchmark candidate codes on gallery vectors with real queries, before an index is built.

Whether a code finds the ten nearest neighbors depends on how well it separates the nearest few hundred. The benchmark
therefore searches the exact neighbors of real sketches among up to a million vectors, trains each code on a uniform
sample, and measures how well the code ranks those neighbors. A uniform sample alone is too sparse: its nearest vectors
are far apart, so every code looks good. For galleries larger than `POPULATION`, recall is measured at that size and at
a quarter of it, and extrapolated to the full size linearly in the logarithm of the size.

The benchmark costs at most TRIAL_FRACTION of the build: codes whose length usually reaches the target come first, and
no further code starts once this budget is used up.

Shapes: Q queries, N coded vectors, D dimensions, W dimensions after the transform.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

import numpy as np

from zsr.index import faiss_backend
from zsr.index.building.plan import (
    NEAR_BYTES,
    PROBING_LOSS,
    Evidence,
    IndexConfig,
    candidates,
    index_bytes,
    refined,
    require_budget,
)
from zsr.index.building.report import note
from zsr.index.ground_truth import GroundTruth, K, exact
from zsr.index.storage.embeddings import Vectors

POPULATION: Final = 1_000_000
QUERIES: Final = 256
NEAR: Final = 100  # exact neighbors per query that the codes have to rank
SAMPLE: Final = 32_768
SMALLEST_SAMPLE: Final = 4096
SAMPLED: Final = 8  # gallery vectors per sample vector: a small gallery builds quickly
LISTS: Final = 2048  # with 256 lists the residuals were so long that PQ64 measured .11 too low in recall
LIST_POINTS: Final = 16  # sample vectors per list
FACTORS: Final = (1, 2, 4, 8)  # candidates re-ranked, in multiples of K
CODE_ITERATIONS: Final = 6  # k-means iterations of product codes; a build uses faiss's default of 25
CODE_POINTS: Final = 32  # training vectors per centroid of product codes; a build uses 256
OPQ_POINTS: Final = 4096
OPQ_ITERATIONS: Final = 8
PROBED: Final = 16  # lists probed per query, as assumed when query time is extrapolated
TRIAL_FRACTION: Final = 0.2  # of the predicted CPU seconds of the cheapest build measured so far
# recall@10 by bits per dimension: RaBitQ1, 2, 4 and SQ8 on a million vectors; only orders the candidates
PROMISED: Final = ((0.45, 0.67, 0.88, 0.99), (1.0, 2.0, 4.0, 8.0))


@dataclass(frozen=True)
class BenchmarkData:
    """Vectors, queries and ground truth of the benchmark.

    Attributes:
        sample: (S, D), uniform over the gallery. near: (M, D), the union of all queries' nearest neighbors.
        truth: the queries' neighbors among `population` vectors, as rows of `near`.
        quarter: (M,) bool, the rows of `near` that belong to a random quarter of the population.
    """

    sample: np.ndarray
    near: np.ndarray
    truth: GroundTruth
    population: int
    quarter: np.ndarray
    decoded: dict[str, np.ndarray] = field(default_factory=dict)

    def scores(self, key: str, found: np.ndarray, metric: str) -> np.ndarray:
        """Scores (Q, C) of the rows `found` (Q, C) of `near` by the refine codes of `key`."""
        kind = faiss_backend.parse(key)["refine"] or "whole"
        if kind not in self.decoded:
            codec: Any = faiss_backend.refiner(key, self.sample)
            self.decoded[kind] = codec.sa_decode(codec.sa_encode(self.near)) if codec else self.near
        return faiss_backend.exact_scores(self.truth.queries, self.decoded[kind][found], metric)


def ground_of(gallery: Vectors, queries: Vectors, seed: int) -> BenchmarkData:
    """Collect the benchmark data in two passes of Ray tasks: neighbors and sample, then the neighbors' vectors."""
    share = min(1.0, POPULATION / gallery.rows)
    sketches = queries.sample(QUERIES, seed)
    truth = exact(gallery, sketches, depth=NEAR, share=share, seed=seed)
    chosen = np.unique(truth.ordinals[truth.ordinals >= 0])
    places = np.where(truth.ordinals >= 0, np.searchsorted(chosen, truth.ordinals), -1)
    truth = GroundTruth(truth.queries, places, truth.scores, truth.floor)
    quarter = np.random.default_rng(seed).random(len(chosen)) < 0.25
    size = min(SAMPLE, max(SMALLEST_SAMPLE, gallery.rows // SAMPLED))
    return BenchmarkData(gallery.sample(size, seed), gallery.take(chosen), truth, round(gallery.rows * share), quarter)


def measure(gallery: Vectors, queries: Vectors, config: IndexConfig) -> list[Evidence]:
    """Benchmark the candidates that fit the budget, most promising first, within TRIAL_FRACTION of the build.

    Deterministic except for the timings and the number of candidates measured: at least one, and none that takes more
    bytes than one that reached the target.

    Raises:
        Infeasible: no candidate fits the budget.
    """
    count, dim, metric = gallery.rows, gallery.space.dim, gallery.space.metric
    points = min(count, config.train_size or count)
    every = [key for code in candidates(count, dim, points) for key in refined(code)]
    fitting = set(require_budget(every, count, dim, metric, config))
    codes = [code for code in candidates(count, dim, points) if fitting & set(refined(code))]
    note("plan: search the exact neighbors of %d queries among %d vectors", QUERIES, min(count, POPULATION))
    trial = _Trial(ground_of(gallery, queries, config.seed), metric, count, fitting, config.recall_target)
    found: list[Evidence] = []
    clock = time.process_time()
    with faiss_backend.threads(1):
        for number, code in enumerate(by_promise(codes, dim, config.recall_target), 1):
            if not _could_win(code, found, gallery, config.recall_target):
                continue
            seen = trial.of(code)
            found += seen
            spent, allowed = time.process_time() - clock, TRIAL_FRACTION * min(e.build_seconds for e in found)
            note("plan: %d of %d, %s: %s, %.1f s so far", number, len(codes), code, _shown(seen), spent)
            if spent > allowed:
                note("plan: stop after %.1f s, %.0f%% of the build", spent, 100 * TRIAL_FRACTION)
                break
    return found


def _shown(seen: Sequence[Evidence]) -> str:
    """Recall of a code alone and with its best refine code, for the log."""
    own, best = seen[0].recall, max(evidence.recall for evidence in seen)
    return f"recall@{K} {own:.3f}" + (f", {best:.3f} with refine codes" if len(seen) > 1 else "")


def _could_win(code: str, found: Sequence[Evidence], gallery: Vectors, target: float) -> bool:
    """Whether `code` is about as small as the smallest code that reached the target, or none did yet; see `rank`."""
    reached = [evidence.bytes for evidence in found if evidence.recall >= target + PROBING_LOSS]
    size = index_bytes(code, gallery.rows, gallery.space.dim, gallery.space.metric)
    return size <= NEAR_BYTES * min(reached, default=size)


def by_promise(codes: Sequence[str], dim: int, target: float) -> list[str]:
    """Sort `codes` by how close their bits per dimension are to those that usually reach the target.

    Codes with an OPQ rotation come last, since learning the rotation takes longer than benchmarking many codes.
    """
    wanted = float(np.interp(target + PROBING_LOSS, *PROMISED))
    bits = {code: 8 * faiss_backend.ivf_of(faiss_backend.empty(code, dim, "ip")).code_size / dim for code in codes}
    return sorted(codes, key=lambda code: (code.startswith("OPQ"), abs(math.log2(bits[code] / wanted))))


@dataclass(frozen=True)
class Moved:
    """Benchmark data after a transform, with a coarse quantizer; shared by all codes with that transform.

    Attributes:
        sample, near, queries: (., W).
        centroids: (L, W), of the coarse quantizer.
        learning: CPU seconds to learn the transform. applying: to transform one vector.
        distance: CPU seconds of one distance to a centroid.
    """

    sample: np.ndarray
    near: np.ndarray
    queries: np.ndarray
    centroids: np.ndarray
    learning: float
    applying: float
    distance: float


def _move(ground: BenchmarkData, transform: str, metric: str) -> Moved:
    clock = time.process_time()
    sample, near, queries = ground.sample, ground.near, ground.truth.queries
    if transform:
        chain = faiss_backend.transform(transform, sample.shape[1])
        if hasattr(chain, "niter"):
            faiss_backend.shorten(chain, OPQ_ITERATIONS, OPQ_POINTS)
        faiss_backend.train_transform(chain, sample, metric)
        sample, near, queries = (chain.apply(x) for x in (sample, near, queries))
    learning = time.process_time() - clock
    clock = time.process_time()
    if transform:
        chain.apply(ground.sample)
    applying = (time.process_time() - clock) / len(sample)
    nlist = min(LISTS, max(1, len(sample) // LIST_POINTS))
    clock = time.process_time()
    centroids = faiss_backend.kmeans(sample, nlist, metric)
    work = len(sample) * nlist * faiss_backend.LIST_ITERATIONS
    return Moved(sample, near, queries, centroids, learning, applying, (time.process_time() - clock) / work)


class _Trial:
    """Benchmarks one code after the other; transformed data are cached, since codes share them."""

    def __init__(self, ground: BenchmarkData, metric: str, count: int, fitting: set[str], target: float) -> None:
        self.ground, self.metric, self.count, self.fitting, self.target = ground, metric, count, fitting, target
        self.moved = cache(lambda transform: _move(ground, transform, metric))

    def of(self, code: str) -> list[Evidence]:
        """Measure `code` alone and with each refine code that fits the budget."""
        moved, dim = self.moved(faiss_backend.parse(code)["transform"] or ""), self.ground.sample.shape[1]
        timing = _Timing(moved)
        found = _coded(self.ground, moved, code, self.metric, timing)
        build, query = round(timing.build(code, self.count, dim), 2), float(f"{timing.query(code, self.count):.3g}")
        seen = []
        for key in (key for key in refined(code) if key in self.fitting):
            recall, factor = _recall(self.ground, key, found, self.metric, self.count, self.target)
            seen.append(Evidence(key, index_bytes(key, self.count, dim, self.metric), recall, factor, build, query))
        return seen


class _Timing:
    """CPU seconds of one code, measured on the benchmark data and extrapolated."""

    def __init__(self, moved: Moved) -> None:
        self.moved = moved
        self.train = self.encode = self.scan = 0.0  # for training; per vector; per vector and query

    def build(self, code: str, count: int, dim: int) -> float:
        """CPU seconds to build an index of `count` vectors: transform, k-means of the lists, codebooks, adding."""
        nlist = faiss_backend.list_count(code)
        points = min(count, 64 * nlist)
        links = faiss_backend.parse(code)["links"]
        compared = nlist if links is None else int(links) * 2 * math.log2(nlist)
        lists = points * nlist * faiss_backend.LIST_ITERATIONS * self.moved.distance
        adding = count * (self.moved.applying + compared * self.moved.distance + self.encode)
        more = 25 / CODE_ITERATIONS * 256 / CODE_POINTS if faiss_backend.parse(code)["code"].startswith("PQ") else 1
        return self.moved.learning + lists + self.train * more + adding

    def query(self, code: str, count: int) -> float:
        """CPU seconds of a query that probes PROBED lists."""
        nlist = faiss_backend.list_count(code)
        return nlist * self.moved.distance + PROBED * count / nlist * self.scan


def _coded(ground: BenchmarkData, moved: Moved, code: str, metric: str, timing: _Timing) -> np.ndarray:
    """Rows of `near` ranked by the codes, for every query: (Q, C)."""
    index = faiss_backend.trial_index(code, moved.centroids, metric, CODE_ITERATIONS, CODE_POINTS)
    clock = time.process_time()
    index.train(moved.sample)
    timing.train = time.process_time() - clock
    clock = time.process_time()
    index.add(moved.near)
    added = (time.process_time() - clock) / len(moved.near)
    timing.encode = max(0.0, added - len(moved.centroids) * moved.distance)
    clock = time.process_time()
    ordinals, _ = faiss_backend.probe(
        faiss_backend.scanner(index, code), moved.queries, K * FACTORS[-1], len(moved.centroids)
    )
    timing.scan = (time.process_time() - clock) / (len(moved.queries) * len(moved.near))
    return ordinals


def _recall(
    ground: BenchmarkData, key: str, found: np.ndarray, metric: str, count: int, target: float
) -> tuple[float, int]:
    """recall@10 at full size, and the smallest refine factor that reaches the target, or else the best one."""
    factors = FACTORS if _refines(key) else (1,)
    scores = (
        ground.scores(key, found, metric) if _refines(key) else -np.broadcast_to(np.arange(found.shape[1]), found.shape)
    )
    whole = [_ranked(ground.truth, found, scores, factor) for factor in factors]
    grown = count / ground.population
    if grown > 1:
        kept = ground.quarter[found] & (found >= 0)
        order = np.argsort(~kept, axis=1, kind="stable")
        few = np.take_along_axis(np.where(kept, found, -1), order, 1)
        thin, scores = ground.truth.without(np.flatnonzero(~ground.quarter)), np.take_along_axis(scores, order, 1)
        parts = [_ranked(thin, few, scores, factor) for factor in factors]
        slopes = [(a - b) / math.log(4) for a, b in zip(whole, parts, strict=True)]
        whole = [min(1.0, max(0.0, a + slope * math.log(grown))) for a, slope in zip(whole, slopes, strict=True)]
    good = [i for i, recall in enumerate(whole) if recall >= target + PROBING_LOSS]
    at = good[0] if good else int(np.argmax(whole))
    return round(whole[at], 4), factors[at]


def _refines(key: str) -> bool:
    parts = faiss_backend.parse(key)
    return bool(parts["refine"] or parts["exact"])


def _ranked(truth: GroundTruth, found: np.ndarray, scores: np.ndarray, factor: int) -> float:
    """recall@10 of the first K * factor candidates of `found` (Q, C), re-ranked by `scores` (Q, C)."""
    near, scores = found[:, : K * factor], scores[:, : K * factor]
    return truth.recall(faiss_backend.top(near, np.where(near >= 0, scores, -np.inf), K))
