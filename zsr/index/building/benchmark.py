"""Measure candidate codes on the gallery's own vectors with real queries, before an index is built.

What decides whether a code finds the ten nearest is how well it tells the few hundred nearest apart. So the trial looks
for the exact neighbours of some real sketches among up to a million vectors, trains each code on a uniform sample, and
asks it to rank those neighbours. A uniform sample alone is too thin: its nearest are far apart, and every code looks
good. Galleries beyond `POPULATION` are measured at that and at a quarter of it, and the line through both, over the
logarithm of the size, is followed to the full size.

A trial costs at most TRIAL_FRACTION of the build: the codes whose length promises the target come first, and no further
one is measured when those before have used it.

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
NEAR: Final = 100  # exact neighbours of each query that the codes have to rank
SAMPLE: Final = 32_768
SMALLEST_SAMPLE: Final = 4096
SAMPLED: Final = 8  # vectors of the gallery per vector of the sample: a small gallery builds quickly
LISTS: Final = 2048  # with 256 the residuals were so long that PQ64 seemed .11 of recall worse than it was
LIST_POINTS: Final = 16  # vectors of the sample a list
FACTORS: Final = (1, 2, 4, 8)  # candidates re-ranked, in multiples of K
CODE_ITERATIONS: Final = 6  # of the k-means of product codes; a build takes faiss's 25
CODE_POINTS: Final = 32  # training vectors a centroid of product codes; a build takes 256
OPQ_POINTS: Final = 4096
OPQ_ITERATIONS: Final = 8
PROBED: Final = 16  # lists that a query is taken to look into when its time is extrapolated
TRIAL_FRACTION: Final = 0.2  # of the CPU seconds that the cheapest build measured so far is predicted to take
# recall@10 by bits per dimension: RaBitQ1, 2, 4 and SQ8 on a million vectors; it orders the trials and decides nothing
PROMISED: Final = ((0.45, 0.67, 0.88, 0.99), (1.0, 2.0, 4.0, 8.0))


@dataclass(frozen=True)
class BenchmarkData:
    """What a trial works on.

    Attributes:
        sample: (S, D) uniform over the gallery. near: (M, D), every vector that is among the nearest of some query.
        truth: the queries' neighbours as rows of `near`, among `population` vectors.
        quarter: (M,) bool, those of `near` that a population of a quarter of the size would hold.
    """

    sample: np.ndarray
    near: np.ndarray
    truth: GroundTruth
    population: int
    quarter: np.ndarray
    decoded: dict[str, np.ndarray] = field(default_factory=dict)

    def scores(self, key: str, found: np.ndarray, metric: str) -> np.ndarray:
        """Scores of the rows `found` (Q, C) of `near` by the refine codes of `key`: (Q, C)."""
        kind = faiss_backend.parse(key)["refine"] or "whole"
        if kind not in self.decoded:
            codec: Any = faiss_backend.refiner(key, self.sample)
            self.decoded[kind] = codec.sa_decode(codec.sa_encode(self.near)) if codec else self.near
        return faiss_backend.exact_scores(self.truth.queries, self.decoded[kind][found], metric)


def ground_of(gallery: Vectors, queries: Vectors, seed: int) -> BenchmarkData:
    """Two passes over the gallery in Ray tasks: the neighbours and the sample, then the neighbours' vectors."""
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
    """Evidence for the candidates that fit the budget, the promising ones first, for TRIAL_FRACTION of the build.

    Deterministic but for its timings, and for how many candidates are measured: at least one, and none that takes more
    bytes than one that reached the target.

    Raises:
        Infeasible: no candidate fits the budget.
    """
    count, dim, metric = gallery.rows, gallery.space.dim, gallery.space.metric
    points = min(count, config.train_size or count)
    every = [key for code in candidates(count, dim, points) for key in refined(code)]
    fitting = set(require_budget(every, count, dim, metric, config))
    codes = [code for code in candidates(count, dim, points) if fitting & set(refined(code))]
    note("plan: look for the exact neighbors of %d queries among %d vectors", QUERIES, min(count, POPULATION))
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
    """Recall of a code, and of the best of its refinements."""
    own, best = seen[0].recall, max(evidence.recall for evidence in seen)
    return f"recall@{K} {own:.3f}" + (f", {best:.3f} with refine codes" if len(seen) > 1 else "")


def _could_win(code: str, found: Sequence[Evidence], gallery: Vectors, target: float) -> bool:
    """Whether `code` takes about as few bytes as the smallest that has reached the target, or none has; see `rank`."""
    reached = [evidence.bytes for evidence in found if evidence.recall >= target + PROBING_LOSS]
    size = index_bytes(code, gallery.rows, gallery.space.dim, gallery.space.metric)
    return size <= NEAR_BYTES * min(reached, default=size)


def by_promise(codes: Sequence[str], dim: int, target: float) -> list[str]:
    """`codes` by how near their bits per dimension of the gallery are to those that usually reach the target.

    Those behind a rotation for product codes come last, since learning it takes longer than many trials.
    """
    wanted = float(np.interp(target + PROBING_LOSS, *PROMISED))
    bits = {code: 8 * faiss_backend.ivf_of(faiss_backend.empty(code, dim, "ip")).code_size / dim for code in codes}
    return sorted(codes, key=lambda code: (code.startswith("OPQ"), abs(math.log2(bits[code] / wanted))))


@dataclass(frozen=True)
class Moved:
    """A field behind a transform and a coarse quantizer, which all codes of that transform share.

    Attributes:
        sample, near, queries: (., W). centroids: (L, W). seconds: CPU, of learning the transform and of applying it to
            one vector; of one distance to a centroid.
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
    """Measures one code after the other; what codes behind one transform share is made once."""

    def __init__(self, ground: BenchmarkData, metric: str, count: int, fitting: set[str], target: float) -> None:
        self.ground, self.metric, self.count, self.fitting, self.target = ground, metric, count, fitting, target
        self.moved = cache(lambda transform: _move(ground, transform, metric))

    def of(self, code: str) -> list[Evidence]:
        """Evidence for `code` and those of its refinements that fit the budget."""
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
    """CPU seconds of one code, measured on the field and extrapolated."""

    def __init__(self, moved: Moved) -> None:
        self.moved = moved
        self.train = self.encode = self.scan = 0.0  # of training; a vector; a vector and query

    def build(self, code: str, count: int, dim: int) -> float:
        """Of a build of `count` vectors: transform, k-means over the lists, codebooks, and adding."""
        nlist = faiss_backend.list_count(code)
        points = min(count, 64 * nlist)
        links = faiss_backend.parse(code)["links"]
        compared = nlist if links is None else int(links) * 2 * math.log2(nlist)
        lists = points * nlist * faiss_backend.LIST_ITERATIONS * self.moved.distance
        adding = count * (self.moved.applying + compared * self.moved.distance + self.encode)
        more = 25 / CODE_ITERATIONS * 256 / CODE_POINTS if faiss_backend.parse(code)["code"].startswith("PQ") else 1
        return self.moved.learning + lists + self.train * more + adding

    def query(self, code: str, count: int) -> float:
        """Of a query that looks into PROBED lists."""
        nlist = faiss_backend.list_count(code)
        return nlist * self.moved.distance + PROBED * count / nlist * self.scan


def _coded(ground: BenchmarkData, moved: Moved, code: str, metric: str, timing: _Timing) -> np.ndarray:
    """Rows of `near` in the order that the codes give them, for every query: (Q, NEAR and more)."""
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
    """recall@10 at full size, and the smallest factor of re-ranking that reaches the target, or the best."""
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
    """recall@10 of the first candidates (Q, C), the best by `scores` (Q, C) first."""
    near, scores = found[:, : K * factor], scores[:, : K * factor]
    return truth.recall(faiss_backend.top(near, np.where(near >= 0, scores, -np.inf), K))
