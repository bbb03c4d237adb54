"""Evaluation protocol: leakage checks, and one model's scores, intervals, curve and examples.

    Side -> zero_shot() or few_shot() checks -> evaluate() exact | evaluate_hits() through an index -> Evaluation

A score is zero-shot only if none of the evaluated classes was a training class; `zero_shot` checks this. In the
few-shot setting a few items of these classes were training items, and `few_shot` raises if one of them is evaluated.
One of the two must be called before every evaluation.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from zsr import metrics
from zsr.errors import ConfigError, Leakage
from zsr.metrics import Floats, Ints, Labels, RankScores
from zsr.models.protocol import Metric

STRIP: Final = 10  # results shown per example query
INSTANCE: Final = (1, 5)  # cut-offs of Acc@k

Place = Literal["best", "median", "worst"]


@dataclass(frozen=True)
class Items:
    """Item metadata, without embeddings.

    Attributes:
        ids: (N,) int64.
        keys: (N,) names given by the user.
        labels: (N,) class names.
        pairs: (N,) id of the photo that the item is or belongs to; None without instance-level metrics.
    """

    ids: Ints
    keys: Labels
    labels: Labels
    pairs: Ints | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        lengths = {len(self.ids), len(self.keys), len(self.labels)}
        if len(lengths) != 1:
            raise ConfigError(f"{len(self.ids)} ids, {len(self.keys)} keys, {len(self.labels)} labels; must be equal")
        if self.pairs is not None and len(self.pairs) != len(self.ids):
            raise ConfigError(f"{len(self.pairs)} pairs for {len(self.ids)} ids; must be equal")

    @property
    def classes(self) -> frozenset[str]:
        return frozenset(np.unique(self.labels).tolist())

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Side(Items):
    """Queries or gallery as embedding rows; the rows of a multi-vector item share its id, and the best one counts.

    Attributes:
        embeddings: (N, D) float32, or packed bits uint8 (N, D/8).
        part: (N,) number of the row among the vectors of its item; None if every item has one vector.
    """

    embeddings: NDArray[Any]
    part: NDArray[np.int16] | None = None

    def __post_init__(self) -> None:
        Items.__post_init__(self)
        if self.embeddings.ndim != 2 or len(self.embeddings) != len(self.ids):
            raise ConfigError(f"embeddings of shape {self.embeddings.shape} for {len(self.ids)} ids; expected (N, D)")

    def only(self, classes: Collection[str]) -> "Side":
        """The rows whose class is in `classes`."""
        return self.rows(np.isin(self.labels, sorted(classes)))

    def rows(self, keep: NDArray[Any]) -> "Side":
        """Select rows by a mask (N,) or by row numbers."""
        part, pairs = (None if column is None else column[keep] for column in (self.part, self.pairs))
        return Side(self.ids[keep], self.keys[keep], self.labels[keep], self.embeddings[keep], part, pairs=pairs)

    def merged(self) -> tuple[Items, NDArray[Any]]:
        """One row per item, in order of first appearance, and embeddings (items, P, D).

        Items with fewer than P vectors repeat their first, which does not change the maximum over vectors.

        Raises:
            ConfigError: an id appears twice with the same part, or with different keys or classes.
        """
        if not len(self):
            return Items(self.ids, self.keys, self.labels, pairs=self.pairs), self.embeddings[:, None]
        self._check_repeats()
        _, first, item, count = np.unique(self.ids, return_index=True, return_inverse=True, return_counts=True)
        order = np.argsort(item, kind="stable")
        within = np.arange(len(order)) - np.repeat(np.cumsum(count) - count, count)
        table = np.repeat(first[:, None], count.max(), axis=1)
        table[item[order], within] = order
        table = table[np.argsort(first)]
        rows = table[:, 0]
        pairs = None if self.pairs is None else self.pairs[rows]
        return Items(self.ids[rows], self.keys[rows], self.labels[rows], pairs=pairs), self.embeddings[table]

    def _check_repeats(self) -> None:
        part = np.zeros(len(self), np.int16) if self.part is None else self.part
        order = np.lexsort((part, self.ids))
        ids, same = self.ids[order], self.ids[order][1:] == self.ids[order][:-1]
        twice = same & (part[order][1:] == part[order][:-1])
        if twice.any():
            raise ConfigError(
                f"id {ids[1:][twice][0]} appears twice with the same part ({int(twice.sum())} such rows): every score "
                "would count it twice; was a shard read twice?"
            )
        torn = same & ((self.labels[order][1:] != self.labels[order][:-1]) | _differs(self.keys[order]))
        if torn.any():
            raise ConfigError(f"id {ids[1:][torn][0]} has parts of different keys or classes; rebuild the embeddings")


def _differs(values: Labels) -> NDArray[np.bool_]:
    return np.asarray(values[1:] != values[:-1], dtype=np.bool_)


def zero_shot(
    query: Side, gallery: Side, *, unseen: Collection[str], trained: Collection[str], generalised: bool = False
) -> None:
    """Raise if an evaluation is not zero-shot, or its rows do not match the split.

    Args:
        unseen: test classes of the split.
        trained: training classes recorded in the checkpoint; empty for the raw baseline.
        generalised: the gallery (never the queries) may also hold training classes.

    Raises:
        Leakage: a training class is evaluated as unseen.
        ConfigError: no query, a class of the split that the data lack, a class outside the split, different widths, or
            an id that appears twice.
    """
    if leaked := sorted(set(trained) & set(unseen)):
        raise Leakage(
            f"the checkpoint was trained on {_some(leaked)}, which the split evaluates as unseen; evaluate it on its "
            "own split, or retrain without these classes"
        )
    _rankable(query, gallery, unseen, generalised=generalised)


def few_shot(query: Side, gallery: Side, *, unseen: Collection[str], support: Ints) -> None:
    """Raise if a few-shot evaluation contains a training item, or its rows do not match the split.

    Args:
        unseen: test classes of the split; a few items of each are training items.
        support: (S,) ids of these training items.

    Raises:
        Leakage: one of them is a query or in the gallery.
        ConfigError: as `zero_shot`.
    """
    for side, items in (("queries", query), ("gallery", gallery)):
        if leaked := items.keys[np.isin(items.ids, support)].tolist():
            raise Leakage(f"the {side} hold {_some(leaked)}, which are training items; leave these rows out")
    _rankable(query, gallery, unseen, generalised=False)


def _rankable(query: Side, gallery: Side, unseen: Collection[str], *, generalised: bool) -> None:
    if not len(query) or not len(gallery):
        raise ConfigError(f"{len(query)} queries and {len(gallery)} gallery items: nothing to rank; check the split")
    for side, items in (("queries", query), ("gallery", gallery)):
        if absent := sorted(set(unseen) - items.classes):
            raise ConfigError(f"the split names {_some(absent)} but the {side} have no such class; check the spelling")
    _inside("queries", query, unseen)
    if not generalised:
        _inside("gallery", gallery, unseen)
    if query.embeddings.shape[1] != gallery.embeddings.shape[1]:
        raise ConfigError(
            f"queries are {query.embeddings.shape[1]} wide and gallery items {gallery.embeddings.shape[1]}; "
            "embed both with one checkpoint"
        )
    for items in (query, gallery):
        items._check_repeats()


def _inside(side: str, items: Items, classes: Collection[str]) -> None:
    if outside := sorted(items.classes - set(classes)):
        raise ConfigError(f"the {side} hold {_some(outside)}, outside the split's unseen classes; drop these rows")


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# ---- results ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hit:
    """One result of an example query."""

    id: int
    key: str
    label: str
    right: bool


@dataclass(frozen=True)
class Example:
    """A query and its first results; `place` is the rank of its average precision among all queries."""

    place: Place
    id: int
    key: str
    label: str
    average_precision: float
    hits: tuple[Hit, ...]


@dataclass(frozen=True)
class ClassScore:
    """mAP@all over the queries of one class; `confused_with` is the most frequent wrong class in their top ten."""

    label: str
    queries: int
    gallery: int
    score: float
    chance: float
    confused_with: str


@dataclass(frozen=True)
class Confusion:
    """Confusion matrix: classes of the top ten results, by class of the query.

    Attributes:
        labels: C classes of the queries, sorted.
        share: C rows of C + 1 fractions that sum to 1: one per class, and one for all other classes.
    """

    labels: tuple[str, ...]
    share: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Generalised:
    """Additional scores of the generalised setting, where the gallery also holds seen classes.

    Attributes:
        seen_queries: number of queries of seen classes.
        seen, harmonic, together: by metric name, the mean over seen queries, its harmonic mean with that over unseen
            queries, and the mean over all queries.
    """

    seen_queries: int
    seen: Mapping[str, float]
    harmonic: Mapping[str, float]
    together: Mapping[str, float]


@dataclass(frozen=True)
class Search:
    """The index that results were retrieved with, and its operating point.

    Attributes:
        index_key: faiss factory string.
        nprobe: inverted lists probed per query.
        k: results per query.
        recall: recall@10 of the sketch queries against exact search when the index was tuned, 0 to 1.
        bytes: size of the index.
    """

    index_key: str
    nprobe: int
    k: int
    recall: float
    bytes: int


@dataclass(frozen=True)
class Evaluation:
    """All measurements of one ranking.

    Attributes:
        name: of the model or baseline.
        metric: similarity metric of the embeddings.
        queries, gallery, classes: number of each; a multi-vector item counts once.
        ks: cut-offs.
        scores: metric name to mean over queries; the names are those of `metrics.RankScores.means`, and
            mAP@all(classes), the mean over classes of their means;
            mAP@all(disjoint), over queries of the classes that the backbone was not trained on;
            Acc@1, Acc@5: the query's own item is in the top k; Acc@1(class), Acc@5(class): among items of its class.
        chance: expected values for a random ranking, by the same names; VOC-interpolated scores have no closed form.
        intervals: 95 % bootstrap intervals of mAP@all and P@k; classes are resampled first, then queries.
        per_class: sorted by class name.
        curve: interpolated precision at recall 0, .01, ... 1.
        examples: best, median and worst queries, spread over classes.
        confusion: classes of the top ten results.
        spread: of AP over the queries of the same item; None if no item has two.
        disjoint: number of queries of classes that the backbone was not trained on; None if that is unknown.
        generalised: scores of seen queries, in the generalised setting.
        search: None for exact search.
        replicates: bootstrap means of mAP@all; paired between two evaluations of the same queries. Not in JSON.
    """

    name: str
    metric: str
    queries: int
    gallery: int
    classes: int
    ks: tuple[int, ...]
    scores: Mapping[str, float]
    chance: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    per_class: tuple[ClassScore, ...]
    curve: tuple[float, ...]
    examples: tuple[Example, ...]
    confusion: Confusion
    spread: metrics.Spread | None = None
    disjoint: int | None = None
    generalised: Generalised | None = None
    search: Search | None = None
    replicates: Floats = field(default_factory=lambda: np.zeros(0), repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Sampling:
    """Bootstrap and example queries.

    Attributes:
        examples: number of example queries, divided between best, median and worst.
        samples: bootstrap replicates.
        seed: of the bootstrap.
        disjoint: classes that the backbone was not trained on; None if that is unknown.
    """

    examples: int = 9
    samples: int = 1000
    seed: int = 0
    disjoint: tuple[str, ...] | None = None


DEFAULT: Final = Sampling()


def evaluate(
    name: str,
    query: Side,
    gallery: Side,
    *,
    metric: Metric = "cosine",
    ks: Sequence[int] = (100, 200),
    sampling: Sampling = DEFAULT,
    device: str | None = None,
) -> Evaluation:
    """Rank the whole gallery for every query and score the ranking. Call `zero_shot` or `few_shot` first.

    Args:
        ks: cut-offs, capped at the size of the gallery.
        sampling: bootstrap and example settings.
        device: of the ranking, see `metrics.rank_scores`.

    Raises:
        ConfigError: see `Side.merged` and `metrics.rank_scores`.
    """
    queries, q = query.merged()
    items, g = gallery.merged()
    cuts = _cuts(ks, len(items))
    ranked = metrics.rank_scores(q, g, queries.labels, items.labels, metric, cuts, device=device)
    shown = metrics.top(q, g, metric, STRIP, device=device)
    found = _evaluation(name, metric, queries, items, ranked, shown, sampling)
    if queries.pairs is None or items.pairs is None:
        return found
    pairs = queries.pairs, items.pairs
    for suffix, within in (("", None), ("(class)", (queries.labels, items.labels))):
        ranks = metrics.pair_ranks(q, g, *pairs, metric, within=within, device=device)
        if ranks is None:
            break
        scores = {f"Acc@{k}{suffix}": float(ranks.accuracy(k).mean()) for k in INSTANCE}
        levels = {f"Acc@{k}{suffix}": ranks.chance(k) for k in INSTANCE}
        found = replace(found, scores={**found.scores, **scores}, chance={**found.chance, **levels})
    return found


def evaluate_generalised(
    name: str,
    query: Side,
    seen: Side,
    gallery: Side,
    *,
    metric: Metric = "cosine",
    ks: Sequence[int] = (100, 200),
    sampling: Sampling = DEFAULT,
    device: str | None = None,
) -> Evaluation:
    """`evaluate` unseen queries in a gallery of seen and unseen items, and also score queries of seen classes.

    Args:
        seen: queries of seen classes.

    Raises:
        ConfigError: see `evaluate`.
    """
    found = evaluate(name, query, gallery, metric=metric, ks=ks, sampling=sampling, device=device)
    queries, q = seen.merged()
    items, g = gallery.merged()
    ranked = metrics.rank_scores(q, g, queries.labels, items.labels, metric, _cuts(ks, len(items)), device=device)
    scores, count = ranked.means(), len(queries)
    together = {
        key: (found.queries * found.scores[key] + count * score) / (found.queries + count)
        for key, score in scores.items()
    }
    harmonic = {key: metrics.harmonic(score, found.scores[key]) for key, score in scores.items()}
    return replace(found, generalised=Generalised(count, scores, harmonic, together))


def evaluate_hits(
    name: str,
    query: Items,
    gallery: Items,
    hits: Ints,
    search: Search,
    *,
    metric: Metric = "cosine",
    scores: NDArray[Any] | None = None,
    ks: Sequence[int] = (100, 200),
    sampling: Sampling = DEFAULT,
) -> Evaluation:
    """Score the results of an index: a relevant item that it did not return counts zero in every metric.

    Args:
        query, gallery: one row per item (see `Side.merged` for multi-vector items).
        hits: (Q, k) gallery ids, best first, padded with -1; row i is for query i.
        search: the index and its operating point.
        scores: (Q, k) descending, to group ties (Hamming codes); None means no ties.

    Raises:
        ConfigError: no query, an id that is not in the gallery, or one that appears twice in a list.
    """
    place = _resolve(hits, query, gallery)
    right = (place >= 0) & (gallery.labels[place] == query.labels[:, None])
    relevant = metrics.count_relevant(query.labels, gallery.labels)
    ranked = metrics.rank_hits(right, relevant, len(gallery), _cuts(ks, len(gallery)), scores)
    return _evaluation(name, metric, query, gallery, ranked, place[:, :STRIP], sampling, search)


def _resolve(hits: Ints, query: Items, gallery: Items) -> Ints:
    """Gallery rows (Q, k) of the ids in `hits`, -1 where padded."""
    if hits.ndim != 2 or not hits.size or len(hits) != len(query) or not len(gallery):
        raise ConfigError(f"hits of shape {hits.shape} for {len(query)} queries; expected one non-empty list per query")
    order = np.argsort(gallery.ids)
    at = np.minimum(np.searchsorted(gallery.ids, hits, sorter=order), len(gallery) - 1)
    place = np.where(hits >= 0, order[at], -1)
    unknown = (hits >= 0) & (gallery.ids[place] != hits)
    if unknown.any():
        raise ConfigError(f"the index returned id {hits[unknown][0]}, which the gallery lacks; was it built from it?")
    ordered = np.sort(place, axis=1)
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        raise ConfigError("a result list holds one id twice; keep only the best vector of a multi-vector item")
    return place


def _cuts(ks: Sequence[int], gallery: int) -> tuple[int, ...]:
    return tuple(sorted({min(k, gallery) for k in ks}))


def _evaluation(
    name: str,
    metric: str,
    query: Items,
    gallery: Items,
    ranked: RankScores,
    shown: Ints,
    sampling: Sampling,
    search: Search | None = None,
) -> Evaluation:
    """Assemble an Evaluation; `shown` holds the top gallery rows (Q, 10) of each query, padded with -1."""
    resample = partial(metrics.bootstrap, samples=sampling.samples, seed=sampling.seed)
    resampled = {"mAP@all": resample(ranked.ap, query.labels)}
    resampled |= {f"P@{k}": resample(ranked.precision(k), query.labels) for k in ranked.ks}
    by_class = _per_class(query, gallery, ranked, shown)
    scores, chance = ranked.means(), metrics.chance(ranked.relevant, len(gallery), ranked.ks)
    scores["mAP@all(classes)"] = float(np.mean([entry.score for entry in by_class]))
    chance["mAP@all(classes)"] = float(np.mean([entry.chance for entry in by_class]))
    honest = np.isin(query.labels, sampling.disjoint or ())
    if honest.any():
        scores["mAP@all(disjoint)"] = float(ranked.ap[honest].mean())
        chance["mAP@all(disjoint)"] = metrics.chance(ranked.relevant[honest], len(gallery))["mAP@all"]
        resampled["mAP@all(disjoint)"] = resample(ranked.ap[honest], query.labels[honest])
    chosen = _choose(query, ranked, sampling.examples)
    return Evaluation(
        name=name,
        metric=metric,
        queries=len(query),
        gallery=len(gallery),
        classes=len(query.classes),
        ks=ranked.ks,
        scores=scores,
        chance=chance,
        intervals={key: metrics.interval(values) for key, values in resampled.items()},
        per_class=by_class,
        curve=tuple(ranked.curve.tolist()),
        examples=tuple(_example(place, row, query, gallery, ranked, shown) for place, row in chosen),
        confusion=_confusion(query, gallery, shown),
        spread=None if query.pairs is None else metrics.spread(ranked.ap, query.pairs),
        disjoint=None if sampling.disjoint is None else int(honest.sum()),
        search=search,
        replicates=resampled["mAP@all"],
    )


def _confusion(query: Items, gallery: Items, shown: Ints) -> Confusion:
    names = sorted(query.classes)
    column = {name: place for place, name in enumerate(names)}
    # the last column counts all other classes
    of_item = np.array([column.get(str(label), len(names)) for label in gallery.labels])
    counts = np.zeros((len(names), len(names) + 1))
    rows = np.broadcast_to(np.searchsorted(names, query.labels)[:, None], shown.shape)
    np.add.at(counts, (rows[shown >= 0], of_item[shown[shown >= 0]]), 1)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return Confusion(tuple(names), tuple(map(tuple, share.tolist())))


def _per_class(query: Items, gallery: Items, ranked: RankScores, shown: Ints) -> tuple[ClassScore, ...]:
    scores = []
    for label, score in metrics.per_class(ranked.ap, query.labels).items():
        mine = query.labels == label
        met = gallery.labels[shown[mine][shown[mine] >= 0]]
        wrong, times = np.unique(met[met != label], return_counts=True)
        scores.append(
            ClassScore(
                label=label,
                queries=int(mine.sum()),
                gallery=int(ranked.relevant[mine][0]),
                score=score,
                chance=metrics.chance(ranked.relevant[mine][:1], ranked.gallery)["mAP@all"],
                confused_with=str(wrong[times.argmax()]) if len(wrong) else "",
            )
        )
    return tuple(scores)


def _choose(query: Items, ranked: RankScores, count: int) -> list[tuple[Place, int]]:
    """Rows of the best, median and worst queries, spread over classes: a class repeats only after all others."""
    order = np.lexsort((query.ids, -ranked.ap))
    middle = np.lexsort((query.ids, np.abs(ranked.ap - np.median(ranked.ap))))
    lists: dict[Place, Ints] = {"best": order, "median": middle, "worst": order[::-1]}
    shares = dict(zip(lists, [len(part) for part in np.array_split(np.arange(min(count, len(query))), 3)], strict=True))
    chosen: list[tuple[Place, int]] = []
    turn: dict[str, int] = {}
    for place, rows in lists.items():
        for _ in range(shares[place]):
            taken = {row for _, row in chosen}
            free = [row for row in rows.tolist() if row not in taken]
            row = min(free, key=lambda row: turn.get(str(query.labels[row]), 0))
            turn[str(query.labels[row])] = turn.get(str(query.labels[row]), 0) + 1
            chosen.append((place, row))
    return chosen


def _example(place: Place, row: int, query: Items, gallery: Items, ranked: RankScores, shown: Ints) -> Example:
    label = str(query.labels[row])
    hits = tuple(
        Hit(int(gallery.ids[g]), str(gallery.keys[g]), str(gallery.labels[g]), bool(gallery.labels[g] == label))
        for g in shown[row]
        if g >= 0
    )
    return Example(place, int(query.ids[row]), str(query.keys[row]), label, float(ranked.ap[row]), hits)
