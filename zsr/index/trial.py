"""Measure candidate codes on the gallery's own vectors with real queries, before an index is built.

What decides whether a code finds the ten nearest is how well it tells the few hundred nearest apart. So the trial looks
for the exact neighbours of some real sketches among up to a million vectors, trains each code on a uniform sample, and
asks it to rank those neighbours. A uniform sample alone is too thin: its nearest are far apart, and every code looks
good. Galleries beyond `POPULATION` are measured at that and at a quarter of it, and the line through both, over the
logarithm of the size, is followed to the full size.

Shapes: Q queries, N coded vectors, D dimensions, W dimensions after the transform.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from zsr.index import engine
from zsr.index.plan import PROBING_LOSS, Evidence, IndexConfig, candidates, index_bytes, refined, require_budget
from zsr.index.truth import K, Truth, exact
from zsr.index.vectors import Vectors

POPULATION: Final = 1_000_000
QUERIES: Final = 256
NEAR: Final = 100  # exact neighbours of each query that the codes have to rank
SAMPLE: Final = 32_768
LISTS: Final = 2048  # with 256 the residuals were so long that PQ64 seemed .11 of recall worse than it was
LIST_POINTS: Final = 16  # vectors of the sample a list
FACTORS: Final = (1, 2, 4, 8)  # candidates re-ranked, in multiples of K
CODE_ITERATIONS: Final = 6  # of the k-means of product codes; a build takes faiss's 25
CODE_POINTS: Final = 32  # training vectors a centroid of product codes; a build takes 256
OPQ_POINTS: Final = 4096
OPQ_ITERATIONS: Final = 8
PROBED: Final = 16  # lists that a query is taken to look into when its time is extrapolated


@dataclass(frozen=True)
class Ground:
    """What a trial works on.

    Attributes:
        sample: (S, D) uniform over the gallery. near: (M, D), every vector that is among the nearest of some query.
        truth: the queries' neighbours as rows of `near`, among `population` vectors.
        quarter: (M,) bool, those of `near` that a population of a quarter of the size would hold.
    """

    sample: np.ndarray
    near: np.ndarray
    truth: Truth
    population: int
    quarter: np.ndarray
    decoded: dict[str, np.ndarray] = field(default_factory=dict)

    def scores(self, key: str, found: np.ndarray, metric: str) -> np.ndarray:
        """Scores of the rows `found` (Q, C) of `near` by the refine codes of `key`: (Q, C)."""
        kind = engine.parse(key)["refine"] or "whole"
        if kind not in self.decoded:
            codec: Any = engine.refiner(key, self.sample)
            self.decoded[kind] = codec.sa_decode(codec.sa_encode(self.near)) if codec else self.near
        return engine.exact_scores(self.truth.queries, self.decoded[kind][found], metric)


def ground_of(gallery: Vectors, queries: Vectors, seed: int) -> Ground:
    """Two passes over the gallery in Ray tasks: the neighbours and the sample, then the neighbours' vectors."""
    share = min(1.0, POPULATION / gallery.rows)
    sketches = queries.sample(QUERIES, seed)
    truth = exact(gallery, sketches, depth=NEAR, share=share, seed=seed)
    chosen = np.unique(truth.ordinals[truth.ordinals >= 0])
    places = np.where(truth.ordinals >= 0, np.searchsorted(chosen, truth.ordinals), -1)
    truth = Truth(truth.queries, places, truth.scores, truth.floor)
    quarter = np.random.default_rng(seed).random(len(chosen)) < 0.25
    return Ground(gallery.sample(SAMPLE, seed), gallery.take(chosen), truth, round(gallery.rows * share), quarter)


def measure(gallery: Vectors, queries: Vectors, config: IndexConfig) -> list[Evidence]:
    """Evidence for every candidate that fits the budget. Deterministic but for its timings.

    Raises:
        Infeasible: no candidate fits the budget.
    """
    count, dim, metric = gallery.rows, gallery.space.dim, gallery.space.metric
    points = min(count, config.train_size or count)
    every = [key for code in candidates(count, dim, points) for key in refined(code)]
    fitting = set(require_budget(every, count, dim, metric, config))
    codes = [code for code in candidates(count, dim, points) if fitting & set(refined(code))]
    ground = ground_of(gallery, queries, config.seed)
    with engine.threads(1):
        return [
            evidence
            for transform, its in _by_transform(codes)
            for evidence in _trials(ground, transform, its, metric, count, fitting, config.recall_target)
        ]


def _by_transform(codes: Sequence[str]) -> list[tuple[str, list[str]]]:
    found: dict[str, list[str]] = {}
    for code in codes:
        found.setdefault(engine.parse(code)["transform"] or "", []).append(code)
    return list(found.items())


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


def _move(ground: Ground, transform: str, metric: str) -> Moved:
    clock = time.process_time()
    sample, near, queries = ground.sample, ground.near, ground.truth.queries
    if transform:
        chain = engine.transform(transform, sample.shape[1])
        if hasattr(chain, "niter"):
            engine.shorten(chain, OPQ_ITERATIONS, OPQ_POINTS)
        engine.train_transform(chain, sample, metric)
        sample, near, queries = (chain.apply(x) for x in (sample, near, queries))
    learning = time.process_time() - clock
    clock = time.process_time()
    if transform:
        chain.apply(ground.sample)
    applying = (time.process_time() - clock) / len(sample)
    nlist = min(LISTS, max(1, len(sample) // LIST_POINTS))
    clock = time.process_time()
    centroids = engine.kmeans(sample, nlist, metric)
    work = len(sample) * nlist * engine.LIST_ITERATIONS
    return Moved(sample, near, queries, centroids, learning, applying, (time.process_time() - clock) / work)


def _trials(
    ground: Ground, transform: str, codes: Sequence[str], metric: str, count: int, fitting: set[str], target: float
) -> Iterator[Evidence]:
    moved = _move(ground, transform, metric)
    for code in codes:
        timing = _Timing(moved)
        found = _coded(ground, moved, code, metric, timing)
        dim = ground.sample.shape[1]
        build = timing.build(code, count, dim)
        for key in refined(code):
            if key in fitting:
                recall, factor = _recall(ground, key, found, metric, count, target)
                size = index_bytes(key, count, dim, metric)
                query = timing.query(code, count)
                yield Evidence(key, size, recall, factor, round(build, 2), float(f"{query:.3g}"))


class _Timing:
    """CPU seconds of one code, measured on the field and extrapolated."""

    def __init__(self, moved: Moved) -> None:
        self.moved = moved
        self.train = self.encode = self.scan = 0.0  # of training; a vector; a vector and query

    def build(self, code: str, count: int, dim: int) -> float:
        """Of a build of `count` vectors: transform, k-means over the lists, codebooks, and adding."""
        nlist = int(engine.parse(code)["nlist"])
        points = min(count, 64 * nlist)
        links = engine.parse(code)["links"]
        compared = nlist if links is None else int(links) * 2 * math.log2(nlist)
        lists = points * nlist * engine.LIST_ITERATIONS * self.moved.distance
        adding = count * (self.moved.applying + compared * self.moved.distance + self.encode)
        more = 25 / CODE_ITERATIONS * 256 / CODE_POINTS if engine.parse(code)["code"].startswith("PQ") else 1
        return self.moved.learning + lists + self.train * more + adding

    def query(self, code: str, count: int) -> float:
        """Of a query that looks into PROBED lists."""
        nlist = int(engine.parse(code)["nlist"])
        return nlist * self.moved.distance + PROBED * count / nlist * self.scan


def _coded(ground: Ground, moved: Moved, code: str, metric: str, timing: _Timing) -> np.ndarray:
    """Rows of `near` in the order that the codes give them, for every query: (Q, NEAR and more)."""
    index = engine.trial_index(code, moved.centroids, metric, CODE_ITERATIONS, CODE_POINTS)
    clock = time.process_time()
    index.train(moved.sample)
    timing.train = time.process_time() - clock
    clock = time.process_time()
    index.add(moved.near)
    added = (time.process_time() - clock) / len(moved.near)
    timing.encode = max(0.0, added - len(moved.centroids) * moved.distance)
    clock = time.process_time()
    ordinals, _ = engine.probe(engine.scanner(index, code), moved.queries, K * FACTORS[-1], len(moved.centroids))
    timing.scan = (time.process_time() - clock) / (len(moved.queries) * len(moved.near))
    return ordinals


def _recall(ground: Ground, key: str, found: np.ndarray, metric: str, count: int, target: float) -> tuple[float, int]:
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
    parts = engine.parse(key)
    return bool(parts["refine"] or parts["exact"])


def _ranked(truth: Truth, found: np.ndarray, scores: np.ndarray, factor: int) -> float:
    """recall@10 of the first candidates (Q, C), the best by `scores` (Q, C) first."""
    near, scores = found[:, : K * factor], scores[:, : K * factor]
    return truth.recall(engine.top(near, np.where(near >= 0, scores, -np.inf), K))
