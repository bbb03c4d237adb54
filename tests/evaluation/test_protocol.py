"""The guard refuses what is not zero-shot, and an evaluation adds up."""

from typing import Any

import numpy as np
import pytest

from zsr import metrics
from zsr.errors import ConfigError, Leakage
from zsr.evaluation.protocol import (
    Items,
    Sampling,
    Search,
    Side,
    evaluate,
    evaluate_generalised,
    evaluate_hits,
    few_shot,
    zero_shot,
)

CLASSES = ("bat", "cow", "door")
SEARCH = Search("IVF4,PQ2", nprobe=2, k=5, recall=0.9, bytes=1000)


def side(count: int, *, seed: int = 0, width: int = 4, classes: tuple[str, ...] = CLASSES, base: int = 0) -> Side:
    rng = np.random.default_rng(seed)
    labels = np.array([classes[i % len(classes)] for i in range(count)])
    keys = np.array([f"{label}/{i}.png" for i, label in enumerate(labels)])
    centre = np.eye(len(CLASSES), width)[[CLASSES.index(c) if c in CLASSES else 0 for c in labels]]
    embeddings = (centre + 0.6 * rng.standard_normal((count, width))).astype(np.float32)
    return Side(np.arange(base, base + count, dtype=np.int64), keys, labels, embeddings)


def guard(**changes: Any) -> None:
    accepted: dict[str, Any] = {"query": side(9), "gallery": side(30), "unseen": CLASSES, "trained": ("apple",)}
    zero_shot(**{**accepted, **changes})


def test_an_honest_evaluation_passes() -> None:
    guard()


def test_a_checkpoint_trained_on_an_unseen_class_is_refused() -> None:
    with pytest.raises(Leakage, match="'cow'"):
        guard(trained=("apple", "cow"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unseen": (*CLASSES, "unicorn")}, "'unicorn'"),
        ({"query": side(0)}, "0 queries"),
        ({"query": side(9, width=5)}, "5 wide"),
        ({"unseen": CLASSES[:2]}, "outside the split"),
        ({"gallery": side(31, classes=(*CLASSES, "apple"))}, "the gallery hold 'apple'"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        guard(**changes)


def test_the_generalised_gallery_may_hold_trained_classes_but_the_queries_may_not() -> None:
    wide = side(31, classes=(*CLASSES, "apple"))
    guard(gallery=wide, generalised=True)
    with pytest.raises(ConfigError, match="the queries hold 'apple'"):
        guard(query=wide, gallery=wide, generalised=True)


def test_an_id_that_repeats_without_a_part_number_is_refused() -> None:
    twice = side(30)
    twice.ids[3] = twice.ids[0]
    with pytest.raises(ConfigError, match="appears twice"):
        guard(gallery=twice)


def test_parts_that_disagree_on_the_class_are_refused() -> None:
    torn = Side(
        np.array([1, 1]), np.array(["a", "a"]), np.array(["bat", "cow"]), np.ones((2, 4)), np.array([0, 1], "i2")
    )
    with pytest.raises(ConfigError, match="different keys or classes"):
        torn.merged()


@pytest.mark.parametrize("shape", [(2, 3), (3,)])
def test_columns_of_different_length_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError):
        Side(np.arange(3), np.array(["a", "b", "c"]), np.array(["x", "y", "z"]), np.zeros(shape))
    with pytest.raises(ConfigError):
        Items(np.arange(3), np.array(["a"]), np.array(["x", "y", "z"]))


def test_only_keeps_the_rows_of_its_classes() -> None:
    kept = side(9).only(["cow"])
    assert kept.classes == {"cow"}
    assert kept.ids.tolist() == [1, 4, 7]


def test_parts_are_merged_by_best_score_in_any_row_order() -> None:
    query, gallery = side(6), side(30, seed=1, base=100)
    other = side(6, seed=2)
    rows = np.random.default_rng(3).permutation(11)  # the last item has one part, the others two

    def stack(first: Any, second: Any) -> Any:
        return np.concatenate([first, second[:5]])[rows]

    ids, keys, labels = (stack(column, column) for column in (query.ids, query.keys, query.labels))
    part = np.array([0] * 6 + [1] * 5, dtype=np.int16)[rows]
    parts = Side(ids, keys, labels, stack(query.embeddings, other.embeddings), part)
    items, embeddings = parts.merged()
    assert embeddings.shape == (6, 2, 4)
    best = np.stack([query.embeddings, other.embeddings], axis=1)
    best[5, 1] = best[5, 0]
    wanted = metrics.rank_scores(best, gallery.embeddings, query.labels, gallery.labels)
    found = evaluate("cvae", parts, gallery)
    assert found.queries == 6
    assert found.scores["mAP@all"] == pytest.approx(wanted.ap.mean())
    assert sorted(items.ids.tolist()) == list(range(6))


def test_an_evaluation_adds_up() -> None:
    query, gallery = side(12), side(31, seed=1, base=100)
    found = evaluate("model", query, gallery, ks=(5, 100), sampling=Sampling(examples=7, samples=200))
    assert (found.queries, found.gallery, found.classes, found.ks) == (12, 31, 3, (5, 31))
    assert [entry.label for entry in found.per_class] == list(CLASSES)
    weighted = sum(entry.score * entry.queries for entry in found.per_class) / 12
    assert found.scores["mAP@all"] == pytest.approx(weighted)
    assert sum(entry.gallery for entry in found.per_class) == 31
    low, high = found.intervals["mAP@all"]
    assert low <= found.scores["mAP@all"] <= high
    assert len(found.curve) == 101
    assert found.replicates.shape == (200,)
    assert all(
        entry.confused_with in (*CLASSES, "") and entry.confused_with != entry.label for entry in found.per_class
    )


def test_examples_are_distinct_ordered_and_spread_over_classes() -> None:
    found = evaluate("model", side(24), side(31, seed=1, base=100), sampling=Sampling(examples=9))
    assert [example.place for example in found.examples] == ["best"] * 3 + ["median"] * 3 + ["worst"] * 3
    assert len({example.id for example in found.examples}) == 9
    for place in ("best", "median", "worst"):
        assert {example.label for example in found.examples if example.place == place} == set(CLASSES)
    best, worst = found.examples[0], found.examples[6]
    assert best.average_precision >= worst.average_precision
    for example in found.examples:
        assert len(example.hits) == 10
        assert all(hit.right == (hit.label == example.label) for hit in example.hits)


def test_few_queries_give_few_examples() -> None:
    assert len(evaluate("model", side(2), side(31, seed=1)).examples) == 2


def test_through_a_perfect_index_equals_exact() -> None:
    query, gallery = side(12), side(31, seed=1, base=100)
    exact = evaluate("model", query, gallery)
    items, _ = query.merged()
    all_items, embeddings = gallery.merged()
    hits = all_items.ids[metrics.top(query.embeddings, embeddings, "cosine", 31)]
    through = evaluate_hits("model", items, all_items, hits, SEARCH)
    assert through.scores == pytest.approx(exact.scores)
    assert through.examples == exact.examples
    assert through.search == SEARCH


def test_padded_lists_count_what_is_missing_as_zero() -> None:
    query = Items(np.array([1]), np.array(["q"]), np.array(["bat"]))
    gallery = Items(np.array([5, 6, 7]), np.array(["a", "b", "c"]), np.array(["bat", "cow", "bat"]))
    found = evaluate_hits("model", query, gallery, np.array([[7, -1]]), SEARCH, ks=(2,))
    assert found.scores["mAP@all"] == pytest.approx(0.5)
    assert [hit.id for hit in found.examples[0].hits] == [7]


@pytest.mark.parametrize(
    ("hits", "message"),
    [([[9, -1]], "which the gallery lacks"), ([[5, 5]], "twice"), ([[5, 6], [5, 6]], "one non-empty list")],
)
def test_lists_that_do_not_belong_to_the_gallery_are_refused(hits: list[list[int]], message: str) -> None:
    query = Items(np.array([1]), np.array(["q"]), np.array(["bat"]))
    gallery = Items(np.array([5, 6]), np.array(["a", "b"]), np.array(["bat", "cow"]))
    with pytest.raises(ConfigError, match=message):
        evaluate_hits("model", query, gallery, np.array(hits), SEARCH)


# ---- few-shot and generalised ----------------------------------------------------------------------------------------


def test_few_shot_refuses_an_item_that_was_trained_on() -> None:
    query, gallery = side(9), side(30, base=100)
    few_shot(query, gallery, unseen=CLASSES, support=np.array([50, 51]))
    with pytest.raises(Leakage, match=r"the queries hold 'door/2.png'"):
        few_shot(query, gallery, unseen=CLASSES, support=np.array([2]))
    with pytest.raises(Leakage, match="the gallery hold"):
        few_shot(query, gallery, unseen=CLASSES, support=np.array([101]))
    with pytest.raises(ConfigError, match="'unicorn'"):
        few_shot(query, gallery, unseen=(*CLASSES, "unicorn"), support=np.array([50]))


def test_generalised_scores_are_those_of_each_kind_of_query_in_the_same_gallery() -> None:
    query, seen = side(12), side(8, seed=3, classes=("apple", "bee"), base=50)
    both = side(40, seed=1, classes=(*CLASSES, "apple", "bee"), base=100)
    found = evaluate_generalised("model", query, seen, both, ks=(5,))
    alone = evaluate("model", query, both, ks=(5,))
    assert found.scores == alone.scores
    wanted = metrics.rank_scores(seen.embeddings, both.embeddings, seen.labels, both.labels, ks=(5,)).means()
    assert found.generalised is not None
    assert found.generalised.seen == wanted
    for name, score in wanted.items():
        mine = found.scores[name]
        assert found.generalised.harmonic[name] == pytest.approx(metrics.harmonic(score, mine))
        assert found.generalised.together[name] == pytest.approx((12 * mine + 8 * score) / 20)


# ---- what else is measured -------------------------------------------------------------------------------------------


OWN = 100 + np.arange(12) % 3 + 3 * (np.arange(12) // 6)  # photos of the same class, two drawings of each


def paired(items: Side, pairs: Any) -> Side:
    return Side(items.ids, items.keys, items.labels, items.embeddings, items.part, pairs=np.asarray(pairs))


def test_pairs_give_accuracies_and_the_spread_over_drawings() -> None:
    query, gallery = side(12), side(30, seed=1, base=100)
    found = evaluate("model", paired(query, OWN), paired(gallery, gallery.ids))
    ranks = metrics.pair_ranks(query.embeddings, gallery.embeddings, OWN, gallery.ids)
    assert ranks is not None
    assert found.scores["Acc@5"] == pytest.approx(ranks.accuracy(5).mean())
    assert found.chance["Acc@5"] == pytest.approx(5 / 30)
    assert found.chance["Acc@5(class)"] == pytest.approx(5 / 10)
    assert found.scores["Acc@1(class)"] >= found.scores["Acc@1"]
    assert found.spread is not None
    assert (found.spread.groups, found.spread.queries) == (6, 12)
    without = evaluate("model", query, gallery)
    assert without.spread is None
    assert not any(name.startswith("Acc") for name in without.scores)


def test_classes_new_to_the_backbone_have_a_score_of_their_own() -> None:
    query, gallery = side(12), side(30, seed=1, base=100)
    found = evaluate("model", query, gallery, sampling=Sampling(disjoint=("bat", "cow")))
    by_class = {entry.label: entry.score for entry in found.per_class}
    assert found.scores["mAP@all(disjoint)"] == pytest.approx((by_class["bat"] + by_class["cow"]) / 2)
    assert found.disjoint == 8
    low, high = found.intervals["mAP@all(disjoint)"]
    assert low <= found.scores["mAP@all(disjoint)"] <= high
    assert "mAP@all(disjoint)" not in evaluate("model", query, gallery, sampling=Sampling(disjoint=())).scores


def test_confusion_counts_the_first_ten_results() -> None:
    query, gallery = side(12), side(31, seed=1, classes=(*CLASSES, "apple"), base=100)
    found = evaluate("model", query, gallery)
    first = metrics.top(query.embeddings, gallery.embeddings, k=10)
    for row, label in zip(found.confusion.share, found.confusion.labels, strict=True):
        results = gallery.labels[first[query.labels == label]]
        wanted = [float((results == name).mean()) for name in (*CLASSES, "apple")]
        assert row == pytest.approx(wanted)


def test_the_mean_over_classes_weighs_classes_alike() -> None:
    query = side(13)  # one class has a query more
    found = evaluate("model", query, side(30, seed=1, base=100))
    assert found.scores["mAP@all(classes)"] == pytest.approx(np.mean([entry.score for entry in found.per_class]))
    assert found.scores["mAP@all(classes)"] != pytest.approx(found.scores["mAP@all"], abs=1e-12)
