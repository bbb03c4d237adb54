"""What is evaluated: the seen/unseen guard, and one model's numbers, intervals, curve and examples.

    Side -> zero_shot() refuses -> evaluate() exact | evaluate_hits() through an index -> Evaluation -> report

A score counts as zero-shot only if no class that it is computed on was trained on; `zero_shot` holds that line and is
to be called before every evaluation.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from zsr.errors import ConfigError, Leakage
from zsr.evaluation import metrics
from zsr.evaluation.metrics import Floats, Ints, Labels, RankScores
from zsr.models.protocol import Metric

STRIP: Final = 10  # results shown for an example query

Place = Literal["best", "median", "worst"]


@dataclass(frozen=True)
class Items:
    """Things that have an id, without their embeddings.

    Attributes:
        ids: (N,) int64.
        keys: (N,) the user's own names.
        labels: (N,) class names.
    """

    ids: Ints
    keys: Labels
    labels: Labels

    def __post_init__(self) -> None:
        lengths = {len(self.ids), len(self.keys), len(self.labels)}
        if len(lengths) != 1:
            raise ConfigError(f"{len(self.ids)} ids, {len(self.keys)} keys, {len(self.labels)} labels: one each a row")

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
        keep = np.isin(self.labels, sorted(classes))
        part = None if self.part is None else self.part[keep]
        return Side(self.ids[keep], self.keys[keep], self.labels[keep], self.embeddings[keep], part)

    def merged(self) -> tuple[Items, NDArray[Any]]:
        """One row an item, in order of first appearance, and embeddings (items, P, D).

        Items with fewer than P parts repeat their first: a maximum over parts does not change.

        Raises:
            ConfigError: an id appears twice with one part, or with two keys or classes.
        """
        if not len(self):
            return Items(self.ids, self.keys, self.labels), self.embeddings[:, None]
        self._check_repeats()
        _, first, item, count = np.unique(self.ids, return_index=True, return_inverse=True, return_counts=True)
        order = np.argsort(item, kind="stable")
        within = np.arange(len(order)) - np.repeat(np.cumsum(count) - count, count)
        table = np.repeat(first[:, None], count.max(), axis=1)
        table[item[order], within] = order
        table = table[np.argsort(first)]
        rows = table[:, 0]
        return Items(self.ids[rows], self.keys[rows], self.labels[rows]), self.embeddings[table]

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
class Search:
    """How results were retrieved through an index, as the index room measured it.

    Attributes:
        index_key: faiss factory string.
        nprobe: inverted lists visited a query.
        k: length of each list.
        recall: share of the exact top k that the index returned, 0 to 1.
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
        scores: metric name to mean over queries; the names are those of `metrics.RankScores.means`.
        chance: the same names, expected of a random ranking; VOC-interpolated scores have no closed form.
        intervals: 95 % bootstrap intervals of mAP@all and P@k, classes drawn first, then queries.
        per_class: sorted by class name.
        curve: interpolated precision at recall 0, .01, ... 1.
        examples: best, median and worst queries, spread over classes.
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
    search: Search | None = None
    replicates: Floats = field(default_factory=lambda: np.zeros(0), repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Sampling:
    """What is drawn from the queries.

    Attributes:
        examples: how many example queries are kept, shared between best, median and worst.
        samples: bootstrap replicates.
        seed: of the bootstrap.
    """

    examples: int = 9
    samples: int = 1000
    seed: int = 0


DEFAULT: Final = Sampling()


def evaluate(
    name: str,
    query: Side,
    gallery: Side,
    *,
    metric: Metric = "cosine",
    ks: Sequence[int] = (100, 200),
    sampling: Sampling = DEFAULT,
) -> Evaluation:
    """Rank the whole gallery for every query and measure it. Call `zero_shot` first.

    Args:
        ks: cut-offs, each drawn down to the size of the gallery.
        sampling: of the bootstrap and the examples.

    Raises:
        ConfigError: see `Side.merged` and `metrics.rank_scores`.
    """
    queries, q = query.merged()
    items, g = gallery.merged()
    cuts = _cuts(ks, len(items))
    ranked = metrics.rank_scores(q, g, queries.labels, items.labels, metric, cuts)
    return _evaluation(name, metric, queries, items, ranked, metrics.top(q, g, metric, STRIP), sampling)


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
    resample = partial(metrics.bootstrap, labels=query.labels, samples=sampling.samples, seed=sampling.seed)
    resampled = {"mAP@all": resample(ranked.ap)} | {f"P@{k}": resample(ranked.precision(k)) for k in ranked.ks}
    chosen = _choose(query, ranked, sampling.examples)
    return Evaluation(
        name=name,
        metric=metric,
        queries=len(query),
        gallery=len(gallery),
        classes=len(query.classes),
        ks=ranked.ks,
        scores=ranked.means(),
        chance=metrics.chance(ranked.relevant, len(gallery), ranked.ks),
        intervals={key: metrics.interval(values) for key, values in resampled.items()},
        per_class=_per_class(query, gallery, ranked, shown),
        curve=tuple(ranked.curve.tolist()),
        examples=tuple(_example(place, row, query, gallery, ranked, shown) for place, row in chosen),
        search=search,
        replicates=resampled["mAP@all"],
    )


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
