"""Retrieval metrics: pure functions from embeddings and labels to one value per query, and their means.

Symbols: Q queries, N gallery items, D dimensions, P vectors per item, R relevant items of a query, k a cut-off, K
cut-offs.

A query's average precision is the sum of the precision at each relevant item, divided by R. Papers cut the list at k
and divide by three different numbers, so each has its own name here:

    mAP@all         / R, over the whole ranking
    mAP@k(k)        / k                  Yelamarthi et al. 2018
    mAP@k(hits)     / hits in the top k  Dey et al. 2019, SEM-PCYC: lenient, it may exceed P@k
    mAP@k(min)      / min(k, R)          SAKE and later
    VOC             the same with each precision replaced by the max at that or a higher recall (SAKE and successors)

Precision at k also has three variants: P@k divides the hits in the top k by k, P@k(min) divides them by min(k, R), and
P@k(cut) is P@min(k, R), as in ZSE-SBIR's code. They are equal if R is at least k.

Tied scores form one group: each relevant item of a group counts the precision at the end of the group, as in
scikit-learn's `average_precision_score`. A group that crosses the cut k counts in proportion: if it has h hits in g
items, h m/g of them count for the m ranks above the cut. So no score depends on the order of the gallery. A query
without a relevant item, or without a hit, scores 0 and is included in the mean.

Scores are computed block by block, in numpy or with torch on the given device; both give the same counts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from zsr import progress
from zsr.errors import ConfigError
from zsr.models.protocol import Metric

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Scores = NDArray[np.float32]
Labels = NDArray[np.str_]

BLOCK: Final = 16 << 20  # bytes of scores held at once
DEVICE_BLOCK: Final = 512 << 20  # the same on a GPU; sorting takes about five times as much memory
DRAWS: Final = 4 << 20  # bootstrap samples held at once
RECALL_LEVELS: Final = 101


@dataclass(frozen=True)
class RankScores:
    """Per-query scores of a ranking; every reported metric is a mean over an array derived from these.

    Attributes:
        gallery: N, the number of items ranked.
        relevant: (Q,) R of each query.
        ap, voc: (Q,) average precision over the whole ranking, plain and VOC-interpolated.
        ks: the K cut-offs.
        hits: (K, Q) relevant items in the top k; fractional if a tied group crosses the cut.
        hits_cut: (K, Q) the same for the top min(k, R).
        ap_sum, voc_sum: (K, Q) summed precision at those hits: the numerator of every mAP@k.
        curve: (101,) interpolated precision at recall 0, .01, ... 1, the mean over queries.
    """

    gallery: int
    relevant: Ints
    ap: Floats
    voc: Floats
    ks: tuple[int, ...]
    hits: Floats
    hits_cut: Floats
    ap_sum: Floats
    voc_sum: Floats
    curve: Floats

    def precision(self, k: int) -> Floats:
        """P@k = hits / k."""
        return self._hits(k) / k

    def precision_min(self, k: int) -> Floats:
        """P@k(min) = hits / min(k, R)."""
        return _ratio(self._hits(k), np.minimum(k, self.relevant))

    def precision_cut(self, k: int) -> Floats:
        """P@k(cut) = hits in the top min(k, R) / min(k, R)."""
        return _ratio(self.hits_cut[self._row(k)], np.minimum(k, self.relevant))

    def recall(self, k: int) -> Floats:
        """recall@k = hits / R."""
        return _ratio(self._hits(k), self.relevant)

    def ap_k(self, k: int) -> Floats:
        """AP@k(k)."""
        summed: Floats = self.ap_sum[self._row(k)]
        return summed / k

    def ap_hits(self, k: int) -> Floats:
        """AP@k(hits)."""
        return _ratio(self.ap_sum[self._row(k)], self._hits(k))

    def ap_min(self, k: int) -> Floats:
        """AP@k(min)."""
        return _ratio(self.ap_sum[self._row(k)], np.minimum(k, self.relevant))

    def voc_min(self, k: int) -> Floats:
        """VOC-interpolated AP@k(min), the mAP@200 of SAKE's released code."""
        return _ratio(self.voc_sum[self._row(k)], np.minimum(k, self.relevant))

    def means(self) -> dict[str, float]:
        """The mean over queries of every metric, by name."""
        named = {"mAP@all": self.ap, "mAP@all(VOC)": self.voc}
        for k in self.ks:
            named |= {
                f"P@{k}": self.precision(k),
                f"P@{k}(min)": self.precision_min(k),
                f"P@{k}(cut)": self.precision_cut(k),
                f"recall@{k}": self.recall(k),
                f"mAP@{k}(k)": self.ap_k(k),
                f"mAP@{k}(hits)": self.ap_hits(k),
                f"mAP@{k}(min)": self.ap_min(k),
                f"mAP@{k}(min, VOC)": self.voc_min(k),
            }
        return {name: float(values.mean()) for name, values in named.items()}

    def _row(self, k: int) -> int:
        if k not in self.ks:
            raise ConfigError(f"cut-off {k} was not ranked; ks was {self.ks}")
        return self.ks.index(k)

    def _hits(self, k: int) -> Floats:
        hits: Floats = self.hits[self._row(k)]
        return hits


def rank_scores(
    query: ArrayLike | torch.Tensor,
    gallery: ArrayLike | torch.Tensor,
    query_label: ArrayLike,
    gallery_label: ArrayLike,
    metric: Metric = "cosine",
    ks: Sequence[int] = (100, 200),
    *,
    block: int | None = None,
    device: str | None = None,
) -> RankScores:
    """Rank the whole gallery for every query by exact search.

    Args:
        query, gallery: (Q, D), (N, D), or (Q, P, D), (N, P, D): multi-vector items score by their best pair of vectors.
            Floating point for cosine and l2; packed bits uint8 (.., D/8) for hamming. Numpy arrays or torch tensors.
        query_label, gallery_label: (Q,), (N,) class names; an item is relevant if it has the query's class.
        metric: cosine, l2 (nearest first) or hamming (nearest first).
        ks: cut-offs; a cut-off above N ranks the whole gallery, and metrics defined with / k still divide by k.
        block: bytes of scores held at once; None is the default of the device.
        device: a torch device such as cuda; None ranks on the CPU in numpy, which is faster there.

    Raises:
        ConfigError: no query, no gallery, lengths or widths that do not match, or a value that is not finite.
    """
    q_label, g_label = np.asarray(query_label, dtype=str), np.asarray(gallery_label, dtype=str)
    by_class = np.argsort(g_label, kind="stable")
    scorer = _scorer(query, gallery, metric, by_class, device)
    _same_length(scorer, q_label, g_label)
    blocks = list(_blocks(q_label, g_label[by_class], scorer.rows(block)))
    parts = [part for _, part in progress.counted((len(b.rows), _rank_block(scorer, b, tuple(ks))) for b in blocks)]
    return _gather(parts, np.concatenate([b.rows for b in blocks]), tuple(ks), len(g_label))


def mean_average_precision(
    query: ArrayLike | torch.Tensor,
    gallery: ArrayLike | torch.Tensor,
    query_label: ArrayLike,
    gallery_label: ArrayLike,
    metric: Metric = "cosine",
    *,
    device: str | None = None,
) -> float:
    """mAP@all; arguments and errors of `rank_scores`."""
    return float(rank_scores(query, gallery, query_label, gallery_label, metric, ks=(), device=device).ap.mean())


def rank_hits(
    right: ArrayLike,
    relevant: ArrayLike,
    gallery: int,
    ks: Sequence[int] = (100, 200),
    scores: ArrayLike | None = None,
) -> RankScores:
    """Score the result lists of an index: items not returned count zero, with the same divisors as exact search.

    Args:
        right: (Q, L) whether the item at each rank is relevant; False for padding.
        relevant: (Q,) R, all relevant items of the gallery, returned or not.
        gallery: N.
        ks: cut-offs; ranks beyond L hold no hit.
        scores: (Q, L) scores in descending order, to group ties; None means no ties.

    Raises:
        ConfigError: shapes that do not match, no query, or scores that increase along a list.
    """
    hit, total = np.atleast_2d(np.asarray(right, dtype=bool)), np.asarray(relevant, dtype=np.int64)
    if not hit.size or len(hit) != len(total):
        raise ConfigError(
            f"{hit.shape} retrieved flags for {len(total)} queries; one non-empty list per query is required"
        )
    first, last = _groups(hit.shape, scores)
    step = max(1, BLOCK // (80 * hit.shape[1]))  # about ten int64 or float64 arrays of this width are alive
    rows = [slice(at, at + step) for at in range(0, len(hit), step)]
    parts = [_list_block(hit[r], total[r], (first[r], last[r]), tuple(ks)) for r in rows]
    return _gather(parts, np.arange(len(hit)), tuple(ks), gallery)


def top(
    query: ArrayLike | torch.Tensor,
    gallery: ArrayLike | torch.Tensor,
    metric: Metric = "cosine",
    k: int = 10,
    *,
    device: str | None = None,
) -> Ints:
    """Gallery positions (Q, min(k, N)) of the best items, best first, ties in gallery order."""
    scorer = _scorer(query, gallery, metric, None, device)
    return np.concatenate([_top_block(scorer(rows), k) for rows in scorer.steps()])


def _top_block(scores: Scores | torch.Tensor, k: int) -> Ints:
    best, place = torch.as_tensor(scores).topk(min(k, scores.shape[1]), dim=1)
    values, places = best.cpu().numpy(), place.cpu().numpy()
    return np.take_along_axis(places, np.lexsort((places, -values), axis=1), axis=1)


def per_class(values: Floats, labels: Labels) -> dict[str, float]:
    """Mean of `values` (Q,) over the queries of each class, sorted by class name."""
    names, code, count = np.unique(labels, return_inverse=True, return_counts=True)
    means = np.bincount(code, values) / count
    return dict(zip(names.tolist(), means.tolist(), strict=True))


def count_relevant(query_label: Labels, gallery_label: Labels) -> Ints:
    """R (Q,): the number of gallery items of each query's class."""
    ordered = np.sort(gallery_label)
    found: Ints = np.searchsorted(ordered, query_label, "right") - np.searchsorted(ordered, query_label, "left")
    return found


# ---- instance pairs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairRanks:
    """Rank of each query's own item (the photo that a sketch depicts), the best one if there are several.

    Attributes:
        query: (M,) rows of the queries that have such an item in the gallery.
        above: (M,) number of gallery items with a higher score.
        tied: (M,) number of items with the same score, itself included.
        items: (M,) number of correct items in the gallery.
        gallery: (M,) number of items ranked.
    """

    query: Ints
    above: Ints
    tied: Ints
    items: Ints
    gallery: Ints

    def accuracy(self, k: int) -> Floats:
        """Acc@k (M,): 1 if the query's own item is in the top k, else 0; a fraction if ties with it cross the cut."""
        share: Floats = np.clip((k - self.above) / self.tied, 0.0, 1.0)
        return share

    def chance(self, k: int) -> float:
        """Acc@k of a random ranking: 1 - C(N - T, k) / C(N, k) with T correct items, averaged over queries."""
        miss = np.ones(len(self.query))
        for draw in range(k):
            miss *= np.clip(self.gallery - self.items - draw, 0, None) / np.maximum(self.gallery - draw, 1)
        return float(1 - miss.mean())


def pair_ranks(
    query: ArrayLike | torch.Tensor,
    gallery: ArrayLike | torch.Tensor,
    query_pair: ArrayLike,
    gallery_pair: ArrayLike,
    metric: Metric = "cosine",
    *,
    within: tuple[ArrayLike, ArrayLike] | None = None,
    device: str | None = None,
) -> PairRanks | None:
    """Rank of the gallery item with the query's own pair id, or None if no query has one in the gallery.

    Args:
        query, gallery, metric, device: as in `rank_scores`.
        query_pair, gallery_pair: (Q,), (N,) ids that are equal for items that belong together, such as the photo's id.
        within: class names of queries and gallery; then only items of the query's class are ranked, as in fine-grained
            retrieval, and a query whose own item is of another class is left out. None ranks the whole gallery.

    Raises:
        ConfigError: see `rank_scores`.
    """
    wanted, pairs = np.asarray(query_pair), np.asarray(gallery_pair)
    classes = None
    if within is not None:
        # integer class codes: comparing them is much faster than comparing names
        classes = _codes(*(np.asarray(side, dtype=str) for side in within))
        # the own item must also have the query's class
        wanted, pairs = (
            pair * (1 + max(part.max() for part in classes)) + code
            for pair, code in zip(_codes(wanted, pairs), classes, strict=True)
        )
    order = np.argsort(pairs, kind="stable")
    first, last = (np.searchsorted(pairs[order], wanted, side) for side in ("left", "right"))
    has = np.flatnonzero(last > first)
    inside = None if classes is None else (classes[0], classes[1][order])
    if not len(has):
        return None
    scorer = _scorer(query, gallery, metric, order, device)
    found = [_pair_block(scorer, has[part], first, last, inside) for part in scorer.steps(len(has))]
    above, tied, size = (np.concatenate(column) for column in zip(*found, strict=True))
    return PairRanks(has, above, tied, (last - first)[has], size)


def _codes(one: NDArray[Any], other: NDArray[Any]) -> tuple[Ints, Ints]:
    """Encode values as small integers: equal codes for equal values."""
    _, code = np.unique(np.concatenate([one, other]), return_inverse=True)
    return code[: len(one)], code[len(one) :]


def _pair_block(
    scorer: "_Scorer", rows: Ints, first: Ints, last: Ints, inside: tuple[Ints, Ints] | None
) -> tuple[Ints, Ints, Ints]:
    """Items above, items tied and items ranked (b,) for queries `rows`, whose own items are at first:last."""
    scores = scorer(rows)
    scores = scores.cpu().numpy() if isinstance(scores, torch.Tensor) else scores
    counts = np.empty((3, len(rows)), dtype=np.int64)
    for at, row in enumerate(rows):
        ranked, best = scores[at], scores[at, first[row] : last[row]].max()
        if inside is not None:
            ranked = ranked[inside[1] == inside[0][row]]
        above = np.count_nonzero(ranked > best)
        counts[:, at] = above, np.count_nonzero(ranked >= best) - above, len(ranked)
    return counts[0], counts[1], counts[2]


@dataclass(frozen=True)
class Spread:
    """Variation of AP over the queries of one item, such as sketches of one photo by different people.

    Attributes:
        groups, queries: number of items with two or more queries, and of these queries.
        within: pooled std of AP within an item: the square root of the variance within items, weighted by degrees of
            freedom.
        overall: std of AP over the same queries.
        range: max minus min AP of an item, averaged over items.
    """

    groups: int
    queries: int
    within: float
    overall: float
    range: float


def spread(values: Floats, pair: ArrayLike) -> Spread | None:
    """Spread of `values` (Q,) over queries with equal `pair` (Q,), or None if no pair has two queries."""
    _, code, count = np.unique(np.asarray(pair), return_inverse=True, return_counts=True)
    several = count[code] > 1
    if not several.any():
        return None
    _, code, count = np.unique(code[several], return_inverse=True, return_counts=True)
    kept = values[several]
    mean = np.bincount(code, kept) / count
    variance = np.bincount(code, np.square(kept - mean[code])) / (count - 1)
    order = np.lexsort((kept, code))
    ends = np.cumsum(count)
    ranges = kept[order][ends - 1] - kept[order][ends - count]
    freedom = count - 1
    within = float(np.sqrt((variance * freedom).sum() / freedom.sum()))
    return Spread(len(count), len(kept), within, float(kept.std(ddof=1)), float(ranges.mean()))


def harmonic(seen: float, unseen: float) -> float:
    """Harmonic mean 2 s u / (s + u), the summary of the generalised setting; 0 if both are 0."""
    return 2 * seen * unseen / (seen + unseen) if seen + unseen else 0.0


# ---- chance ----------------------------------------------------------------------------------------------------------


def chance(relevant: Ints, gallery: int, ks: Sequence[int] = ()) -> dict[str, float]:
    """Expected metrics of a random ranking without ties, in closed form; keys are those of `RankScores.means`.

    For a relevant item at rank i, the expected number of hits at or above it is 1 + (i-1)(R-1)/(N-1), so with the
    harmonic numbers H

        E[AP] = H_N/N + (R-1)/(N-1) (1 - H_N/N),      E[sum at k] = R/N (H_k + (R-1)/(N-1) (k - H_k))

    and given h >= 1 hits in the top k, E[AP@k(hits)] is E[AP] with R = h, N = k. VOC-interpolated scores have no closed
    form and are left out.

    Args:
        relevant: (Q,) R of each query.
        gallery: N.
    """
    r, n = relevant.astype(np.float64), gallery
    some = relevant > 0
    spread = (r - 1) / max(n - 1, 1)
    h_n = _harmonic(n)
    levels = {"mAP@all": np.where(some, h_n / n + spread * (1 - h_n / n), 0.0)}
    for k in ks:
        cut = min(k, n)
        hits, h_k = cut * r / n, _harmonic(cut)
        total = np.where(some, r / n * (h_k + spread * (cut - h_k)), 0.0)
        any_hit = 1 - _no_hit(relevant, n, cut)
        levels |= {
            f"P@{k}": hits / k,
            f"P@{k}(min)": _ratio(hits, np.minimum(k, relevant)),
            f"P@{k}(cut)": r / n,
            f"recall@{k}": np.where(some, cut / n, 0.0),
            f"mAP@{k}(k)": total / k,
            f"mAP@{k}(hits)": any_hit * h_k / cut + (hits - any_hit) / max(cut - 1, 1) * (1 - h_k / cut),
            f"mAP@{k}(min)": _ratio(total, np.minimum(k, relevant)),
        }
    return {name: float(values.mean()) for name, values in levels.items()}


def _harmonic(n: int) -> float:
    return float((1 / np.arange(1, n + 1)).sum())


def _no_hit(relevant: Ints, n: int, k: int) -> Floats:
    """Probability (Q,) that k samples of N without replacement miss all R: the product of (N-R-i)/(N-i), i < k."""
    counts, code = np.unique(relevant, return_inverse=True)
    draws = np.arange(k)
    missed = np.clip(n - counts[:, None] - draws, 0, None) / (n - draws)
    return np.asarray(missed.prod(1)[code], dtype=np.float64)


# ---- bootstrap -------------------------------------------------------------------------------------------------------


def bootstrap(values: Floats, labels: Labels, samples: int = 1000, seed: int = 0) -> Floats:
    """Two-level bootstrap: means (samples,) over resampled classes, and resampled queries within each class.

    A zero-shot score generalizes to new classes, so these cause most of its variance. Samples depend on the labels and
    the seed only: two models on the same queries get the same samples, and the difference of their replicates is a
    paired comparison.

    Args:
        values: (Q,) one score per query.
        labels: (Q,) class of each query.
    """
    names, code = np.unique(labels, return_inverse=True)
    rng = np.random.default_rng(seed)
    times = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=samples)
    total, count = np.zeros(samples), np.zeros(samples)
    for c in range(len(names)):
        members = values[code == c]
        drawn = np.repeat(np.arange(samples), times[:, c])
        step = max(1, DRAWS // len(members))
        for at in range(0, len(drawn), step):
            into = drawn[at : at + step]
            picks = rng.integers(len(members), size=(len(into), len(members)), dtype=np.int32)
            total += np.bincount(into, members[picks].sum(1), minlength=samples)
        count += times[:, c] * len(members)
    return np.asarray(total / count, dtype=np.float64)


def interval(replicates: Floats, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of bootstrap replicates."""
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# ---- scores ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scorer:
    """Scores (rows, N) of some queries, higher is better. `compare` gets (rows * P, W) and all (N * P', W).

    Queries and gallery are numpy arrays, or tensors on the device used for ranking.
    """

    query: Any
    gallery: Any
    compare: Callable[[Any, Any], Any]

    def rows(self, block: int | None = None) -> int:
        """Number of queries whose scores fit into `block` bytes, all vectors of multi-vector items included."""
        cells = int(self.query.shape[1] * self.gallery.shape[0] * self.gallery.shape[1])
        on_device = isinstance(self.query, torch.Tensor)
        return max(1, (block or (DEVICE_BLOCK if on_device else BLOCK)) // (4 * cells))

    def steps(self, count: int | None = None) -> Iterator[Ints]:
        """Row numbers 0 to `count` (default: all queries), in blocks."""
        places = np.arange(len(self.query) if count is None else count)
        step = self.rows()
        return (places[at : at + step] for at in range(0, len(places), step))

    def __call__(self, rows: Ints) -> Any:
        parts, (items, others, width) = self.query.shape[1], self.gallery.shape
        # BLAS computes a single row as a matrix-vector product, whose tail columns round differently: equal items
        # would not tie any more
        padded = np.repeat(rows, 2) if len(rows) * parts == 1 else rows
        scores = self.compare(self.query[padded].reshape(-1, width), self.gallery.reshape(-1, width))
        if parts == others == 1:
            return scores[: len(rows)]
        by_part = scores.reshape(-1, parts, items, others)
        best = by_part.amax((1, 3)) if isinstance(by_part, torch.Tensor) else by_part.max((1, 3))
        return best[: len(rows)]


def _scorer(
    query: ArrayLike | torch.Tensor,
    gallery: ArrayLike | torch.Tensor,
    metric: Metric,
    order: Ints | None,
    device: str | None,
) -> _Scorer:
    q, g = _embeddings(query, "query", metric), _embeddings(gallery, "gallery", metric)
    if q.shape[2] != g.shape[2]:
        raise ConfigError(f"queries are {q.shape[2]} wide and gallery items {g.shape[2]}; they must be equal")
    g = g if order is None else g[order]
    if metric == "hamming" and device is None:
        return _Scorer(_words(q), _words(g), _minus_hamming)
    q, g = {"cosine": _cosine, "l2": _euclidean, "hamming": _signs}[metric](q, g)
    if device is None:
        return _Scorer(q, _by_column(g), _inner_product)
    return _Scorer(torch.from_numpy(q).to(device), torch.from_numpy(g).to(device), torch.inner)


def _embeddings(values: ArrayLike | torch.Tensor, side: str, metric: Metric) -> NDArray[Any]:
    """`values` as (items, parts, width), float32 or packed uint8."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = values.float().numpy() if values.is_floating_point() else values.numpy()
    array = np.asarray(values)
    if array.ndim not in (2, 3) or not array.size:
        raise ConfigError(f"{side} embeddings have shape {array.shape}; expected a non-empty (items, [parts,] width)")
    if (array.dtype == np.uint8) != (metric == "hamming"):
        raise ConfigError(f"{side} embeddings are {array.dtype}; {metric} requires {_wanted(metric)}")
    array = array if metric == "hamming" else array.astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        raise ConfigError(f"{side} embeddings hold a value that is not finite; they cannot be ranked")
    return array[:, None] if array.ndim == 2 else array


def _wanted(metric: Metric) -> str:
    return "packed bits, uint8" if metric == "hamming" else "floating point"


def _cosine(q: NDArray[Any], g: NDArray[Any]) -> tuple[Scores, Scores]:
    return _unit(q), _unit(g)


def _signs(q: NDArray[Any], g: NDArray[Any]) -> tuple[Scores, Scores]:
    """Bits as -1 and 1, whose inner product is the number of bits minus twice the Hamming distance."""
    left, right = (np.unpackbits(x, axis=2).astype(np.float32) * 2 - 1 for x in (q, g))
    return left, right


def _by_column(g: NDArray[Any]) -> NDArray[Any]:
    """`g` (N, P, W) stored so that its transpose, used in the matrix product, is contiguous."""
    flat = np.ascontiguousarray(g.reshape(-1, g.shape[2]).T).T
    return flat.reshape(g.shape)


def _unit(x: NDArray[Any]) -> Scores:
    norm = np.linalg.norm(x.astype(np.float64), axis=2, keepdims=True)
    unit: Scores = np.divide(x, norm, out=np.zeros_like(x), where=norm > 0, casting="unsafe")
    return unit


def _euclidean(q: NDArray[Any], g: NDArray[Any]) -> tuple[Scores, Scores]:
    """Rows whose inner product is -|q - g|^2: [2q, -|q|^2, 1] and [g, 1, -|g|^2].

    Both are first centered near the gallery's mean, since a common offset costs float32 precision; the offset is a
    multiple of a power of two, so that integer vectors at equal distances still tie.
    """
    centre, spread = g.mean((0, 1), dtype=np.float64), float(g.std(dtype=np.float64))
    step = 2.0 ** np.floor(np.log2(spread)) if spread > 0 else 1.0
    centre = np.round(centre / step) * step
    q, g = q - centre, g - centre
    q_norm, g_norm = -np.square(q).sum(2, keepdims=True), -np.square(g).sum(2, keepdims=True)
    left = np.concatenate([2 * q, q_norm, np.ones_like(q_norm)], axis=2)
    right = np.concatenate([g, np.ones_like(g_norm), g_norm], axis=2)
    return left.astype(np.float32), right.astype(np.float32)


def _inner_product(q: NDArray[Any], g: NDArray[Any]) -> Scores:
    return np.asarray(q @ g.T, dtype=np.float32)


def _words(codes: NDArray[Any]) -> NDArray[np.uint64]:
    """Packed bits (items, parts, bytes) as 64-bit words, padded with zero bits."""
    padding = [(0, 0), (0, 0), (0, -codes.shape[2] % 8)]
    return np.ascontiguousarray(np.pad(codes, padding)).view(np.uint64)


def _minus_hamming(q: NDArray[Any], g: NDArray[Any]) -> Scores:
    distance = np.zeros((len(q), len(g)), np.float32)
    for word in range(q.shape[1]):
        distance += np.bitwise_count(q[:, word, None] ^ g[None, :, word])
    return -distance


def _same_length(scorer: _Scorer, query_label: Labels, gallery_label: Labels) -> None:
    for side, items, labels in (("query", scorer.query, query_label), ("gallery", scorer.gallery, gallery_label)):
        if len(items) != len(labels):
            raise ConfigError(
                f"{len(items)} {side} embeddings and {len(labels)} labels; one label per item is required"
            )


# ---- ranking ---------------------------------------------------------------------------------------------------------


class _Block(NamedTuple):
    """Queries of one class, and the range of its items in a gallery sorted by class."""

    rows: Ints
    relevant: slice


class _Ranked(NamedTuple):
    """Per-query results of one block: (b,), (b,), (b,), four times (K, b), and the summed curve (101,)."""

    relevant: Ints
    ap: Floats
    voc: Floats
    hits: Floats
    hits_cut: Floats
    ap_sum: Floats
    voc_sum: Floats
    curve: Floats


class _Hits(NamedTuple):
    """The hits of b queries, (b, W) from worst to best, padded in front.

    Attributes:
        seen: number of items ranked at or above the hit, its tied group included.
        found: number of relevant items among those.
        valid: False for padding.
    """

    seen: Ints
    found: Ints
    valid: Bools


def _blocks(query_label: Labels, gallery_label: Labels, rows: int) -> Iterator[_Block]:
    order = np.argsort(query_label, kind="stable")
    names, first, count = np.unique(query_label[order], return_index=True, return_counts=True)
    left, right = (np.searchsorted(gallery_label, names, side) for side in ("left", "right"))
    for c in range(len(names)):
        # besides the scores, about eight float64 arrays with a column per relevant item are alive
        share = 1 + 16 * (right[c] - left[c]) / len(gallery_label)
        step = max(1, int(rows / share))
        for at in range(first[c], first[c] + count[c], step):
            yield _Block(order[at : min(at + step, first[c] + count[c])], slice(int(left[c]), int(right[c])))


def _rank_block(scorer: _Scorer, block: _Block, ks: tuple[int, ...]) -> _Ranked:
    total = np.full(len(block.rows), block.relevant.stop - block.relevant.start, dtype=np.int64)
    if block.relevant.stop == block.relevant.start:
        return _nothing(total, len(ks))
    scores = scorer(block.rows)
    count = _count_sorted if isinstance(scores, torch.Tensor) else _count_binned
    cuts = tuple(dict.fromkeys([*ks, *(min(k, int(total[0])) for k in ks)]))
    own, seen, starts = count(scores, block.relevant, cuts)
    hits = _Hits(seen, own.shape[1] - _first_of_equals(own), np.ones(own.shape, dtype=bool))
    return _reduce(hits, total, ks, lambda limit: starts[cuts.index(int(limit[0]))])


def _nothing(total: Ints, cuts: int) -> _Ranked:
    zero, cut = np.zeros(len(total)), np.zeros((cuts, len(total)))
    return _Ranked(total, zero, zero, cut, cut, cut, cut, np.zeros(RECALL_LEVELS))


Counted = tuple[Scores, Ints, list[Ints]]


def _count_binned(scores: Scores, relevant: slice, ks: tuple[int, ...]) -> Counted:
    """Rank the relevant items of each row by counting, without sorting the row.

    Returns the sorted scores of the relevant items (b, R); how many of `scores` (b, N) are at least as high as each
    (b, R); and per cut of `ks` how many are higher than the best hit that is not entirely inside (b,), which is the
    start of its tied group.

    Scores are counted in bins and sorted only in bins that hold a relevant item: 2.5 times as fast as sorting the row.
    The bin is a monotone function of the score, so the count is exact.
    """
    own = np.sort(scores[:, relevant], axis=1)
    bins = min(max(1 << (scores.shape[1] - 1).bit_length(), 1 << 10), 1 << 16)
    low, high = scores.min(1), scores.max(1)
    scale = np.divide(np.float32(bins - 1), high - low, out=np.zeros_like(high), where=high > low)
    shared = np.zeros(bins, dtype=bool)
    seen, starts = np.empty(own.shape, dtype=np.int64), np.empty((len(ks), len(own)), dtype=np.int64)
    scaled, bin_of = np.empty(scores.shape[1], np.float32), np.empty(scores.shape[1], np.intp)
    for row, mine in enumerate(own):
        np.subtract(scores[row], low[row], out=scaled)
        np.multiply(scaled, scale[row], out=scaled)
        np.copyto(bin_of, scaled, casting="unsafe")
        own_bin = ((mine - low[row]) * scale[row]).astype(np.intp)
        shared[own_bin] = True
        close = scores[row].take(shared.take(bin_of).nonzero()[0])
        shared[own_bin] = False
        close.sort()
        alone = np.bincount(bin_of, minlength=bins)
        alone[own_bin] = 0
        below = alone.cumsum()[own_bin]
        np.subtract(scores.shape[1] - below, close.searchsorted(mine), out=seen[row])
        for cut, k in enumerate(ks):
            column = len(mine) - 1 - np.count_nonzero(seen[row] <= k)
            starts[cut, row] = scores.shape[1] - below[column] - close.searchsorted(mine[column], "right")
    return own, seen, list(starts)


def _count_sorted(scores: torch.Tensor, relevant: slice, ks: tuple[int, ...]) -> Counted:
    """The same by sorting whole rows, which is fast on a GPU."""
    own = scores[:, relevant].sort(dim=1).values
    ordered = scores.sort(dim=1).values
    seen = scores.shape[1] - torch.searchsorted(ordered, own)
    starts = []
    for k in ks:
        column = (own.shape[1] - 1 - (seen <= k).sum(1)) % own.shape[1]
        threshold = own.gather(1, column[:, None])
        starts.append(scores.shape[1] - torch.searchsorted(ordered, threshold, right=True)[:, 0])
    return own.cpu().numpy(), seen.cpu().numpy(), [start.cpu().numpy() for start in starts]


def _first_of_equals(ordered: Scores) -> Ints:
    """For each position in sorted rows (b, R), the first position with the same value."""
    place = np.broadcast_to(np.arange(ordered.shape[1]), ordered.shape)
    same = ordered[:, 1:] == ordered[:, :-1]
    if not same.any():
        return place
    place = place.copy()
    place[:, 1:][same] = 0
    return np.maximum.accumulate(place, axis=1)


def _crossing(hits: _Hits, limit: Ints) -> Ints:
    """Column (b,) of the best hit that is not entirely inside the top `limit` (b,); -1 if there is none."""
    column: Ints = hits.seen.shape[1] - 1 - (hits.valid & (hits.seen <= limit[:, None])).sum(1)
    return column


def _groups(shape: tuple[int, ...], scores: ArrayLike | None) -> tuple[Ints, Ints]:
    """First and last position (Q, L) of the tied group of each position."""
    place = np.broadcast_to(np.arange(shape[1]), shape)
    if scores is None:
        return place, place
    values = np.asarray(scores)
    if values.shape != shape or (values[:, 1:] > values[:, :-1]).any():
        raise ConfigError(f"scores of shape {values.shape} for {shape} results; expected the same shape, highest first")
    step = values[:, 1:] != values[:, :-1]
    edge = np.ones((shape[0], 1), dtype=bool)
    first = np.maximum.accumulate(np.where(np.hstack([edge, step]), place, 0), axis=1)
    last = np.minimum.accumulate(np.where(np.hstack([step, edge]), place, shape[1])[:, ::-1], axis=1)[:, ::-1]
    return first, last


def _list_block(hit: Bools, total: Ints, groups: tuple[Ints, Ints], ks: tuple[int, ...]) -> _Ranked:
    first, last = groups
    # hits to the back, best last, as `_Hits` requires
    order = np.argsort(hit[:, ::-1], axis=1, kind="stable")
    worst_first = hit.shape[1] - 1 - order
    end = np.take_along_axis(last, worst_first, axis=1)
    found = np.take_along_axis(hit.cumsum(1), end, axis=1)
    hits = _Hits(end + 1, found, np.take_along_axis(hit, worst_first, axis=1))
    start = np.take_along_axis(first, worst_first, axis=1)
    return _reduce(hits, total, ks, lambda limit: start[np.arange(len(hit)), _crossing(hits, limit)])


def _reduce(hits: _Hits, total: Ints, ks: tuple[int, ...], start: Callable[[Ints], Ints]) -> _Ranked:
    """Per-query results; `start` maps cut-off ranks (b,) to the start of the tied group that crosses each cut."""
    precision = np.where(hits.valid, hits.found / hits.seen, 0.0)
    best = np.maximum.accumulate(precision, axis=1)
    summed, hits_cut = np.zeros((len(ks), 3, len(total))), np.zeros((len(ks), len(total)))
    for row, k in enumerate(ks):
        limit = np.full(len(total), k)
        summed[row] = _cut(hits, precision, limit, start(limit))
        short = np.clip(total, 1, k)
        hits_cut[row] = summed[row, 0] if (short == k).all() else _cut(hits, precision, short, start(short))[0]
    return _Ranked(
        total,
        _ratio(precision.sum(1), total),
        _ratio(np.where(hits.valid, best, 0.0).sum(1), total),
        summed[:, 0],
        hits_cut,
        summed[:, 1],
        summed[:, 2],
        _curve(best, total),
    )


def _cut(hits: _Hits, precision: Floats, limit: Ints, start: Ints) -> tuple[Floats, Floats, Floats]:
    """Hits, summed precision and summed VOC precision (b,) within the top `limit` (b,).

    Args:
        start: (b,) start of the tied group that crosses the limit.
    """
    end = hits.seen[np.arange(len(precision)), _crossing(hits, limit)]
    # the best hits are last: columns that cannot be inside the cut are skipped, which saves much for small cuts
    reach = np.maximum(end, limit)[:, None]
    width = int((hits.valid & (hits.seen <= reach)).sum(1).max(initial=0))
    best = slice(-width or None, None)
    seen, valid, precision = hits.seen[:, best], hits.valid[:, best], precision[:, best]
    inside = valid & (seen <= limit[:, None])
    crosses = valid & (seen == end[:, None]) & ~inside
    share = inside + crosses * np.clip((limit - start) / np.maximum(end - start, 1), 0, 1)[:, None]
    count = share.sum(1)
    at = np.where(share > 0, np.where(inside, precision, (count / limit)[:, None]), 0.0)
    return count, (share * at).sum(1), (share * np.maximum.accumulate(at, axis=1)).sum(1)


def _curve(best: Floats, total: Ints) -> Floats:
    """Interpolated precision at 101 recall levels, summed over queries: the max at that or a higher recall."""
    level = np.arange(RECALL_LEVELS)
    needed = np.maximum(-(-level * total[:, None] // (RECALL_LEVELS - 1)), 1)
    column = best.shape[1] - needed
    reached = (column >= 0) & (total > 0)[:, None]
    values = np.take_along_axis(best, np.maximum(column, 0), axis=1)
    summed: Floats = np.where(reached, values, 0.0).sum(0)
    return summed


def _gather(parts: Sequence[_Ranked], rows: Ints, ks: tuple[int, ...], gallery: int) -> RankScores:
    """Concatenate blocks in the order of the queries."""
    back = np.argsort(rows)

    def column(index: int) -> NDArray[Any]:
        return np.concatenate([part[index] for part in parts], axis=-1)[..., back]

    curve = np.sum([part.curve for part in parts], axis=0) / len(rows)
    first = column(0), column(1), column(2)
    return RankScores(gallery, *first, ks, column(3), column(4), column(5), column(6), curve)


def _ratio(values: NDArray[Any], divisor: NDArray[Any]) -> Floats:
    """values / divisor, 0 where the divisor is 0."""
    ratio: Floats = np.divide(values, divisor, out=np.zeros(np.shape(values)), where=divisor > 0)
    return ratio
