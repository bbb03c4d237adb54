"""What is evaluated: the seen/unseen guard, and one model's numbers, intervals, curve and examples.

    Side -> zero_shot() or few_shot() refuses -> evaluate() exact | evaluate_hits() through an index -> Evaluation

A score counts as zero-shot only if no class that it is computed on was trained on; `zero_shot` holds that line. In the
few-shot setting a few items of these classes were trained on, and `few_shot` refuses if one of them is evaluated. One
of the two is to be called before every evaluation.
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

STRIP: Final = 10  # results shown for an example query
INSTANCE: Final = (1, 5)  # cut-offs of Acc@k

Place = Literal["best", "median", "worst"]


@dataclass(frozen=True)
class Items:
    """Things that have an id, without their embeddings.

    Attributes:
        ids: (N,) int64.
        keys: (N,) the user's own names.
        labels: (N,) class names.
        pairs: (N,) id of the photo that the item is or belongs to, or None where nobody asks for instances.
    """

    ids: Ints
    keys: Labels
    labels: Labels
    pairs: Ints | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        lengths = {len(self.ids), len(self.keys), len(self.labels)}
        if len(lengths) != 1:
            raise ConfigError(f"{len(self.ids)} ids, {len(self.keys)} keys, {len(self.labels)} labels: one each a row")
        if self.pairs is not None and len(self.pairs) != len(self.ids):
            raise ConfigError(f"{len(self.pairs)} pairs for {len(self.ids)} ids: one each a row")

    @property
    def classes(self) -> frozenset[str]:
        return frozenset(np.unique(self.labels).tolist())

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Side(Items):
    """Queries or gallery as EMB rows: an id may repeat with another `part`, its best part then counts.

    Attributes:
        embeddings: (N, D) float32, or packed bits uint8 (N, D/8).
        part: (N,) number of the row among the vectors of its item; None if every item has one.
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
        """The rows that a mask (N,) keeps, or that row numbers name."""
        part, pairs = (None if column is None else column[keep] for column in (self.part, self.pairs))
        return Side(self.ids[keep], self.keys[keep], self.labels[keep], self.embeddings[keep], part, pairs=pairs)

    def merged(self) -> tuple[Items, NDArray[Any]]:
        """One row an item, in order of first appearance, and embeddings (items, P, D).

        Items with fewer than P parts repeat their first: a maximum over parts does not change.

        Raises:
            ConfigError: an id appears twice with one part, or with two keys or classes.
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
    """Refuse an evaluation that is not zero-shot, or that cannot mean what it says.

    Args:
        unseen: classes that the split evaluates.
        trained: classes that the checkpoint says it was trained on; empty for the raw floor.
        generalised: the gallery (never the queries) may hold trained classes too.

    Raises:
        Leakage: a trained class is evaluated as unseen.
        ConfigError: no query, a class of the split that the data lack, a class outside the split, widths that differ,
            or an id that appears twice.
    """
    if leaked := sorted(set(trained) & set(unseen)):
        raise Leakage(
            f"the checkpoint was trained on {_some(leaked)}, which the split evaluates as unseen; evaluate it on its "
            "own split, or train again without these classes"
        )
    _rankable(query, gallery, unseen, generalised=generalised)


def few_shot(query: Side, gallery: Side, *, unseen: Collection[str], support: Ints) -> None:
    """Refuse a few-shot evaluation on an item that was trained on, or one that cannot mean what it says.

    Args:
        unseen: classes that the split evaluates; a few items of each were trained on.
        support: (S,) ids of these items.

    Raises:
        Leakage: one of them is a query or in the gallery.
        ConfigError: as `zero_shot`.
    """
    for side, items in (("queries", query), ("gallery", gallery)):
        if leaked := items.keys[np.isin(items.ids, support)].tolist():
            raise Leakage(f"the {side} hold {_some(leaked)}, which the checkpoint was trained on; leave these rows out")
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
    """A query and its first results. `place` says where its average precision stands among all queries."""

    place: Place
    id: int
    key: str
    label: str
    average_precision: float
    hits: tuple[Hit, ...]


@dataclass(frozen=True)
class ClassScore:
    """mAP@all over the queries of one class; `confused_with` is the wrong class met most often in their first ten."""

    label: str
    queries: int
    gallery: int
    score: float
    chance: float
    confused_with: str


@dataclass(frozen=True)
class Confusion:
    """What stands among the first ten results, by class of the query.

    Attributes:
        labels: C classes of the queries, sorted.
        share: C rows of C + 1 shares that sum to 1: of each of these classes, and of all others.
    """

    labels: tuple[str, ...]
    share: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Generalised:
    """What the generalised setting adds: the gallery holds seen classes too, and seen queries are asked as well.

    Attributes:
        seen_queries: how many.
        seen, harmonic, together: metric name to the mean over seen queries, its harmonic mean with the one over unseen
            queries, and the mean over all queries of both kinds.
    """

    seen_queries: int
    seen: Mapping[str, float]
    harmonic: Mapping[str, float]
    together: Mapping[str, float]


@dataclass(frozen=True)
class Search:
    """How results were retrieved through an index, as the index room measured it.

    Attributes:
        index_key: faiss factory string.
        nprobe: inverted lists visited a query.
        k: length of each list.
        recall: share of the exact top ten that the index found for sketches when it was tuned, 0 to 1.
        bytes: size of the index.
    """

    index_key: str
    nprobe: int
    k: int
    recall: float
    bytes: int


@dataclass(frozen=True)
class Evaluation:
    """Everything measured of one ranking.

    Attributes:
        name: of the model or floor.
        metric: how embeddings were compared.
        queries, gallery, classes: how many were ranked; an item with several parts counts once.
        ks: cut-offs.
        scores: metric name to mean over queries; the names are those of `metrics.RankScores.means`, and
            mAP@all(classes), the mean over classes of their means;
            mAP@all(disjoint), over queries of the classes that the backbone was not trained on;
            Acc@1, Acc@5: the query's own item is in the top k; Acc@1(class), Acc@5(class): among items of its class.
        chance: the same names, expected of a random ranking; VOC-interpolated scores have no closed form.
        intervals: 95 % bootstrap intervals of mAP@all and P@k, classes drawn first, then queries.
        per_class: sorted by class name.
        curve: interpolated precision at recall 0, .01, ... 1.
        examples: best, median and worst queries, spread over classes.
        confusion: classes among the first ten results.
        spread: of AP over the queries that belong to one item; None where no two do.
        disjoint: how many queries are of classes that the backbone was not trained on; None if that is not known.
        generalised: scores of seen queries, in the generalised setting.
        search: None for exact search.
        replicates: bootstrap means of mAP@all; those of two evaluations of the same queries are paired. Not in JSON.
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
    """What is drawn from the queries.

    Attributes:
        examples: how many example queries are kept, shared between best, median and worst.
        samples: bootstrap replicates.
        seed: of the bootstrap.
        disjoint: classes that the backbone was not trained on; None if that is not known.
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
    """Rank the whole gallery for every query and measure it. Call `zero_shot` or `few_shot` first.

    Args:
        ks: cut-offs, each drawn down to the size of the gallery.
        sampling: of the bootstrap and the examples, and what else is measured.
        device: where the ranking is done, see `metrics.rank_scores`.

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
    """`evaluate` of unseen queries in a gallery of seen and unseen items, and the same of seen queries beside it.

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
    """Measure what an index returned: a relevant item that it did not return counts zero in every metric.

    Args:
        query, gallery: one row an item (`Side.merged` gives them for sides with parts).
        hits: (Q, k) gallery ids, best first, -1 where the index returned fewer; row i answers query i.
        search: how they were retrieved.
        scores: (Q, k) highest first, to group ties (Hamming codes); None takes the ranks as they stand.

    Raises:
        ConfigError: no query, an id that the gallery lacks, or one that appears twice in a list.
    """
    place = _resolve(hits, query, gallery)
    right = (place >= 0) & (gallery.labels[place] == query.labels[:, None])
    relevant = metrics.count_relevant(query.labels, gallery.labels)
    ranked = metrics.rank_hits(right, relevant, len(gallery), _cuts(ks, len(gallery)), scores)
    return _evaluation(name, metric, query, gallery, ranked, place[:, :STRIP], sampling, search)


def _resolve(hits: Ints, query: Items, gallery: Items) -> Ints:
    """Gallery rows (Q, k) of the ids in `hits`, -1 where padded."""
    if hits.ndim != 2 or not hits.size or len(hits) != len(query) or not len(gallery):
        raise ConfigError(f"hits of shape {hits.shape} for {len(query)} queries; expected one non-empty list a query")
    order = np.argsort(gallery.ids)
    at = np.minimum(np.searchsorted(gallery.ids, hits, sorter=order), len(gallery) - 1)
    place = np.where(hits >= 0, order[at], -1)
    unknown = (hits >= 0) & (gallery.ids[place] != hits)
    if unknown.any():
        raise ConfigError(f"the index returned id {hits[unknown][0]}, which the gallery lacks; was it built from it?")
    ordered = np.sort(place, axis=1)
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        raise ConfigError("a result list holds one id twice; merge the parts of an item by best score first")
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
    """`shown` holds the first gallery rows (Q, 10) of each query, -1 where there are fewer."""
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
    # the last column takes every other class
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
    """Rows of the best, median and worst queries; a class comes again only when every class had its turn."""
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
