"""Metrics: values worked out by hand, scikit-learn, closed forms against simulation, and what must not matter."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score
from torchmetrics.functional.retrieval import (
    retrieval_average_precision,
    retrieval_hit_rate,
    retrieval_precision,
    retrieval_recall,
)

from zsr import metrics
from zsr.errors import ConfigError
from zsr.metrics import RankScores
from zsr.models.protocol import Metric

SPLITS = Path(__file__).parents[3] / "shared" / "papers" / "splits.json"


def listed(flags: list[int], relevant: int, ks: tuple[int, ...], gallery: int = 1000) -> RankScores:
    """One ranked list of hits and misses."""
    return metrics.rank_hits(np.array([flags]), [relevant], gallery, ks)


def ranked(flags: list[int], ks: tuple[int, ...]) -> RankScores:
    """The same through exact search: a one-dimensional gallery at growing distances from the query."""
    gallery = np.arange(1, len(flags) + 1, dtype=np.float32)[:, None]
    labels = np.where(flags, "yes", "no")
    return metrics.rank_scores(np.zeros((1, 1), np.float32), gallery, ["yes"], labels, "l2", ks)


def codes(rng: np.random.Generator, count: int, width: int = 1) -> NDArray[np.uint8]:
    return rng.integers(0, 256, (count, width)).astype(np.uint8)


def names(rng: np.random.Generator, count: int, classes: int) -> NDArray[np.str_]:
    return rng.integers(0, classes, count).astype(str)


def assert_equal(left: RankScores, right: RankScores) -> None:
    for field in ("relevant", "ap", "voc", "hits", "hits_cut", "ap_sum", "voc_sum", "curve"):
        np.testing.assert_allclose(getattr(left, field), getattr(right, field), atol=1e-12, err_msg=field)


# ---- by hand ---------------------------------------------------------------------------------------------------------


def test_the_three_divisors_and_precision_at_five_differ() -> None:
    scores = listed([1, 0, 1, 0, 0], relevant=3, ks=(5,))
    assert scores.precision(5) == pytest.approx([0.4])
    assert scores.ap_k(5) == pytest.approx([(1 + 2 / 3) / 5])
    assert scores.ap_hits(5) == pytest.approx([0.8333333], abs=1e-6)
    assert scores.ap_min(5) == pytest.approx([0.5555556], abs=1e-6)


def test_ap_over_the_whole_ranking_counts_the_late_hit() -> None:
    assert ranked([1, 0, 1, 0, 0, 0, 0, 0, 0, 1], ks=()).ap == pytest.approx([(1 + 2 / 3 + 3 / 10) / 3])


@pytest.mark.parametrize("score", [lambda f: listed(f, 5, (10, 11)), lambda f: ranked(f, (10, 11))])
def test_worked_example_of_twelve_ranks(score: Any) -> None:
    scores = score([1, 0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1])
    assert scores.ap == pytest.approx([0.680952], abs=1e-6)
    assert scores.voc == pytest.approx([0.697619], abs=1e-6)
    assert scores.ap_hits(10) == pytest.approx([0.747024], abs=1e-6)
    assert scores.ap_min(10) == pytest.approx([0.597619], abs=1e-6)
    assert scores.voc_min(10) == pytest.approx([0.614286], abs=1e-6)
    assert scores.precision(10) == pytest.approx([0.4])
    assert scores.precision_min(10) == pytest.approx([0.8])
    assert scores.precision_cut(10) == pytest.approx([0.6])  # three hits in the top five, as ZSE-SBIR's code
    assert 11 * scores.precision(11) - 10 * scores.precision(10) == pytest.approx([0.0])  # released code's "P@10"


def test_a_cut_beyond_the_gallery_makes_hits_and_min_equal_to_all() -> None:
    scores = ranked([0, 1, 1, 0, 1], ks=(5, 50))
    for k in (5, 50):
        assert scores.ap_hits(k) == pytest.approx(scores.ap)
        assert scores.ap_min(k) == pytest.approx(scores.ap)
    assert scores.precision(50) == pytest.approx([3 / 50])
    assert scores.recall(50) == pytest.approx([1.0])


def test_a_perfect_ranking_of_161_items() -> None:
    scores = ranked([1] * 161 + [0] * 100, ks=(200,))
    assert scores.precision(200) == pytest.approx([0.805])
    assert scores.ap_k(200) == pytest.approx([0.805])
    assert scores.ap_min(200) == pytest.approx([1.0])
    assert scores.precision_min(200) == pytest.approx([1.0])
    assert scores.precision_cut(200) == pytest.approx([1.0])


def test_a_query_without_hit_or_relevant_item_scores_zero_and_stays() -> None:
    gallery, query = np.array([[1.0], [2.0], [9.0]]), np.zeros((3, 1))
    scores = metrics.rank_scores(query, gallery, ["a", "b", "nowhere"], ["a", "a", "b"], "l2", ks=(2,))
    assert scores.ap == pytest.approx([1.0, 1 / 3, 0.0])
    for values in (scores.precision(2), scores.recall(2), scores.ap_hits(2), scores.ap_min(2), scores.voc_min(2)):
        assert values[1:].tolist() == [0.0, 0.0]
    assert all(np.isfinite(list(scores.means().values())))
    assert scores.means()["mAP@all"] == pytest.approx((1 + 1 / 3) / 3)


def test_precision_recall_curve_of_two_hits() -> None:
    curve = ranked([1, 0, 0, 1], ks=()).curve
    assert curve[[0, 50]].tolist() == [1.0, 1.0]
    assert curve[[51, 100]].tolist() == [0.5, 0.5]


# ---- ties, order, duplicates -----------------------------------------------------------------------------------------


def test_all_tied_scores_give_the_prevalence_in_any_order() -> None:
    labels = np.array(["a", "b", "b", "a", "b"])
    for order in ([0, 1, 2, 3, 4], [1, 2, 4, 0, 3], [0, 3, 1, 2, 4]):
        scores = metrics.rank_scores(np.zeros((1, 1)), np.zeros((5, 1)), ["a"], labels[order], "cosine", ks=(2,))
        assert scores.ap == pytest.approx([0.4])
        assert scores.precision(2) == pytest.approx([0.4])
        assert scores.ap_hits(2) == pytest.approx([0.4])


def test_agrees_with_scikit_learn_on_tied_codes() -> None:
    for seed in range(25):
        rng = np.random.default_rng(seed)
        query, gallery = codes(rng, 20), codes(rng, int(rng.integers(2, 90)))
        q_label, g_label = names(rng, len(query), 4), names(rng, len(gallery), 4)
        found = metrics.rank_scores(query, gallery, q_label, g_label, "hamming", ks=()).ap
        near = -np.bitwise_count(query[:, None, 0] ^ gallery[None, :, 0]).astype(float)
        for row, label in enumerate(q_label):
            wanted = average_precision_score(g_label == label, near[row]) if label in g_label else 0.0
            assert found[row] == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_agrees_with_scikit_learn_on_real_vectors(metric: Metric) -> None:
    rng = np.random.default_rng(1)
    # small integers: the scores are exact in float32, and many tie
    query, gallery = rng.integers(-2, 3, (30, 4)).astype(float), rng.integers(-2, 3, (200, 4)).astype(float)
    gallery[100:] = gallery[:100]
    q_label, g_label = names(rng, 30, 3), names(rng, 200, 3)
    if metric == "l2":
        near = -((query[:, None] - gallery[None]) ** 2).sum(2)
    else:
        query, gallery = np.sign(query) + (query == 0), np.sign(gallery) + (gallery == 0)  # equal norms
        near = query @ gallery.T
    found = metrics.rank_scores(query, gallery, q_label, g_label, metric, ks=()).ap
    wanted = [average_precision_score(g_label == q_label[row], near[row]) for row in range(30)]
    np.testing.assert_allclose(found, wanted, atol=1e-9)


def test_agrees_with_torchmetrics_where_its_definition_is_the_same() -> None:
    """P@k, recall@k, AP, and AP of the top k, which torchmetrics divides by the hits in it; all without ties."""
    rng = np.random.default_rng(12)
    query, gallery = rng.standard_normal((25, 6)), rng.standard_normal((120, 6))
    q_label, g_label = names(rng, 25, 4), names(rng, 120, 4)
    found = metrics.rank_scores(query, gallery, q_label, g_label, "l2", ks=(7, 40))
    near = torch.from_numpy(1 / (1 + ((query[:, None] - gallery[None]) ** 2).sum(2)))
    for row, label in enumerate(q_label):
        right = torch.from_numpy(g_label == label)
        assert found.ap[row] == pytest.approx(float(retrieval_average_precision(near[row], right)), abs=1e-6)
        for k in (7, 40):
            wanted = {
                "precision": retrieval_precision(near[row], right, top_k=k),
                "recall": retrieval_recall(near[row], right, top_k=k),
                "ap_hits": retrieval_average_precision(near[row], right, top_k=k),
            }
            for name, value in wanted.items():
                assert getattr(found, name)(k)[row] == pytest.approx(float(value), abs=1e-6), name


@pytest.mark.parametrize("metric", ["cosine", "l2", "hamming"])
def test_torch_on_a_device_counts_as_numpy_does(metric: Metric) -> None:
    rng = np.random.default_rng(13)
    for parts in (1, 3):
        if metric == "hamming":
            query: NDArray[Any] = codes(rng, 30 * parts).reshape(30, parts, 1)
            gallery: NDArray[Any] = codes(rng, 200).reshape(200, 1, 1)
        else:  # small integers tie often
            query = rng.integers(-2, 3, (30, parts, 4)).astype(float)
            gallery = rng.integers(-2, 3, (200, 1, 4)).astype(float)
        labels = names(rng, 30, 5), names(rng, 200, 4)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        here = metrics.rank_scores(query, gallery, *labels, metric, ks=(1, 20, 300))
        there = metrics.rank_scores(query, gallery, *labels, metric, ks=(1, 20, 300), device=device)
        if metric == "cosine":  # unit vectors round, another product rounds them another way, and so ties break
            assert np.abs(there.ap - here.ap).max() < 0.01
        else:
            assert_equal(there, here)
        first = metrics.top(query, gallery, metric, 5, device=device)
        assert first.shape == (30, 5)


@pytest.mark.parametrize("metric", ["cosine", "l2", "hamming"])
def test_gallery_order_and_blocks_change_nothing(metric: Metric) -> None:
    rng = np.random.default_rng(2)
    query: NDArray[Any] = codes(rng, 40, 9) if metric == "hamming" else rng.standard_normal((40, 9))
    gallery: NDArray[Any] = codes(rng, 300, 9) if metric == "hamming" else rng.standard_normal((300, 9))
    q_label, g_label = names(rng, 40, 5), names(rng, 300, 5)
    whole = metrics.rank_scores(query, gallery, q_label, g_label, metric, ks=(7, 90))
    order = rng.permutation(300)
    assert_equal(metrics.rank_scores(query, gallery[order], q_label, g_label[order], metric, ks=(7, 90)), whole)
    assert_equal(metrics.rank_scores(query, gallery, q_label, g_label, metric, (7, 90), block=1), whole)


def test_duplicating_the_gallery_changes_precision_but_not_map() -> None:
    rng = np.random.default_rng(3)
    query, gallery = rng.standard_normal((21, 64)), rng.standard_normal((301, 64))
    q_label, g_label = names(rng, 21, 5), names(rng, 301, 5)
    one = metrics.rank_scores(query, gallery, q_label, g_label, ks=(10,), block=1)
    two = metrics.rank_scores(query, np.vstack([gallery, gallery]), q_label, np.tile(g_label, 2), ks=(10,), block=1)
    np.testing.assert_allclose(two.ap, one.ap, atol=1e-12)
    assert not np.allclose(two.precision(10), one.precision(10))


def test_the_list_scorer_equals_exact_search_when_the_list_is_whole() -> None:
    for seed in range(10):
        rng = np.random.default_rng(seed)
        query, gallery = codes(rng, 15), codes(rng, 60)
        q_label, g_label = names(rng, 15, 4), names(rng, 60, 4)
        exact = metrics.rank_scores(query, gallery, q_label, g_label, "hamming", ks=(1, 10, 80))
        near = -np.bitwise_count(query[:, None, 0] ^ gallery[None, :, 0]).astype(float)
        order = np.argsort(-near, axis=1, kind="stable")
        right = g_label[order] == q_label[:, None]
        relevant = metrics.count_relevant(q_label, g_label)
        tied = np.take_along_axis(near, order, axis=1)
        assert_equal(metrics.rank_hits(right, relevant, 60, (1, 10, 80), tied), exact)


def test_long_lists_are_scored_block_by_block() -> None:
    rng = np.random.default_rng(11)
    right = rng.random((300, 2000)) < 0.1
    whole = metrics.rank_hits(right, right.sum(1) + 5, 9000, (50,))
    one_by_one = [metrics.rank_hits(row[None], [row.sum() + 5], 9000, (50,)) for row in right]
    np.testing.assert_allclose(whole.ap, [scores.ap[0] for scores in one_by_one], atol=1e-12)
    np.testing.assert_allclose(whole.hits[0], [scores.hits[0, 0] for scores in one_by_one], atol=1e-12)


def test_what_the_index_did_not_return_counts_zero() -> None:
    scores = listed([1, 0, 1, 0], relevant=4, ks=(3, 100))
    assert scores.ap == pytest.approx([(1 + 2 / 3) / 4])
    assert scores.recall(100) == pytest.approx([0.5])
    assert scores.ap_min(100) == pytest.approx([(1 + 2 / 3) / 4])
    assert scores.curve[100] == 0.0


def test_parts_count_by_the_best_pair() -> None:
    rng = np.random.default_rng(4)
    query, gallery = rng.standard_normal((6, 3, 8)), rng.standard_normal((50, 2, 8))
    q_label, g_label = names(rng, 6, 2), names(rng, 50, 2)
    near = -((query[:, None, :, None] - gallery[None, :, None]) ** 2).sum(-1).min((2, 3)) * -1
    found = metrics.rank_scores(query, gallery, q_label, g_label, "l2", ks=()).ap
    wanted = [average_precision_score(g_label == q_label[row], -near[row]) for row in range(6)]
    np.testing.assert_allclose(found, wanted, atol=1e-9)


def test_l2_keeps_its_digits_far_from_the_origin() -> None:
    rng = np.random.default_rng(5)
    query, gallery = rng.standard_normal((10, 8)), rng.standard_normal((80, 8))
    labels = names(rng, 10, 3), names(rng, 80, 3)
    near = metrics.mean_average_precision(query, gallery, *labels, metric="l2")
    assert metrics.mean_average_precision(query + 1e3, gallery + 1e3, *labels, metric="l2") == pytest.approx(
        near, abs=1e-3
    )


def test_torch_tensors_and_half_precision_are_accepted() -> None:
    rng = np.random.default_rng(6)
    query, gallery = rng.standard_normal((5, 8)).astype(np.float16), rng.standard_normal((30, 8)).astype(np.float16)
    labels = names(rng, 5, 2), names(rng, 30, 2)
    tensors = torch.from_numpy(query).requires_grad_(), torch.from_numpy(gallery)
    assert metrics.mean_average_precision(*tensors, *labels) == metrics.mean_average_precision(query, gallery, *labels)


def test_top_gives_the_nearest_first() -> None:
    gallery = np.array([[3.0], [1.0], [1.0], [2.0]])
    assert metrics.top(np.zeros((1, 1)), gallery, "l2", k=3).tolist() == [[1, 2, 3]]
    assert metrics.top(np.zeros((2, 1)), gallery, "l2", k=9).shape == (2, 4)


@pytest.mark.parametrize(
    ("query", "gallery", "metric", "message"),
    [
        (np.zeros((2, 3)), np.zeros((4, 5)), "cosine", "3 wide and gallery items 5"),
        (np.zeros((0, 3)), np.zeros((4, 3)), "cosine", "non-empty"),
        (np.full((2, 3), np.nan), np.zeros((4, 3)), "l2", "not finite"),
        (np.zeros((2, 3)), np.zeros((4, 3)), "hamming", "packed bits"),
        (np.zeros((3, 3)), np.zeros((4, 3)), "cosine", "one label per item"),
    ],
)
def test_input_that_means_nothing_is_refused(query: Any, gallery: Any, metric: Metric, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        metrics.rank_scores(query, gallery, ["a", "b"], ["a"] * 4, metric)


def test_lists_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="one non-empty list"):
        metrics.rank_hits(np.zeros((2, 3)), [1], 10)
    with pytest.raises(ConfigError, match="highest first"):
        metrics.rank_hits(np.ones((1, 2)), [1], 10, scores=[[1.0, 2.0]])
    with pytest.raises(ConfigError, match="was not ranked"):
        listed([1], 1, ks=(5,)).precision(6)


# ---- pairs -----------------------------------------------------------------------------------------------------------


def test_accuracy_on_pairs_by_hand() -> None:
    gallery = np.array([[0.0], [1.0], [2.0], [3.0]])
    query = np.array([[0.1], [2.9], [2.9], [0.0]])
    ranks = metrics.pair_ranks(query, gallery, [10, 12, 11, 99], [10, 11, 12, 13], "l2")
    assert ranks is not None
    assert ranks.query.tolist() == [0, 1, 2]  # nothing in the gallery belongs to 99
    assert ranks.above.tolist() == [0, 1, 2]
    assert ranks.accuracy(1).tolist() == [1.0, 0.0, 0.0]
    assert ranks.accuracy(2).tolist() == [1.0, 1.0, 0.0]
    assert ranks.chance(1) == pytest.approx(0.25)
    inside = metrics.pair_ranks(
        query, gallery, [10, 12, 11, 99], [10, 11, 12, 13], "l2", within=(["a", "b", "a", "a"], ["a", "a", "b", "b"])
    )
    assert inside is not None
    assert inside.above.tolist() == [0, 1, 0]
    assert inside.gallery.tolist() == [2, 2, 2]
    other = metrics.pair_ranks(query, gallery, [10, 12, 11, 99], [10, 11, 12, 13], "l2", within=(["b"] * 4, ["a"] * 4))
    assert other is None  # no item of the query's own is of its class


def test_accuracy_on_pairs_agrees_with_torchmetrics_hit_rate() -> None:
    rng = np.random.default_rng(14)
    query, gallery = rng.standard_normal((40, 5)), rng.standard_normal((60, 5))
    owner = rng.integers(0, 60, 40)
    ranks = metrics.pair_ranks(query, gallery, owner, np.arange(60), "l2")
    assert ranks is not None
    near = torch.from_numpy(1 / (1 + ((query[:, None] - gallery[None]) ** 2).sum(2)))
    for k in (1, 5):
        wanted = [float(retrieval_hit_rate(near[i], torch.arange(60) == owner[i], top_k=k)) for i in range(40)]
        assert ranks.accuracy(k).tolist() == wanted


def test_pairs_that_tie_share_the_places() -> None:
    ranks = metrics.pair_ranks(np.zeros((1, 1)), np.zeros((4, 1)), [1], [0, 1, 2, 3], "l2")
    assert ranks is not None
    assert ranks.accuracy(1) == pytest.approx([0.25])


def test_the_best_of_several_right_items_counts_and_chance_knows() -> None:
    gallery = np.array([[5.0], [1.0], [2.0]])
    ranks = metrics.pair_ranks(np.zeros((1, 1)), gallery, [7], [7, 7, 8], "l2")
    assert ranks is not None
    assert ranks.accuracy(1).tolist() == [1.0]
    assert ranks.chance(1) == pytest.approx(2 / 3)
    assert ranks.chance(2) == 1.0


def test_no_pair_in_the_gallery_is_no_accuracy() -> None:
    assert metrics.pair_ranks(np.zeros((2, 1)), np.ones((2, 1)), [1, 2], [3, 4], "l2") is None


def test_spread_over_sketches_of_one_photo_by_hand() -> None:
    spread = metrics.spread(np.array([0.2, 0.4, 0.9, 0.5, 0.5]), [1, 1, 2, 3, 3])
    assert spread is not None
    assert (spread.groups, spread.queries) == (2, 4)
    # variances .02 and 0, pooled over one degree of freedom each
    assert spread.within == pytest.approx(0.1)
    assert spread.range == pytest.approx(0.1)
    assert spread.overall == pytest.approx(np.std([0.2, 0.4, 0.5, 0.5], ddof=1))
    assert metrics.spread(np.array([0.2, 0.4]), [1, 2]) is None


def test_harmonic_mean_of_seen_and_unseen() -> None:
    assert metrics.harmonic(0.6, 0.3) == pytest.approx(0.4)
    assert metrics.harmonic(0.0, 0.0) == 0.0


# ---- chance ----------------------------------------------------------------------------------------------------------


def test_chance_is_what_random_rankings_score() -> None:
    rng = np.random.default_rng(7)
    relevant = np.repeat([1, 4, 12], 6000)
    right = rng.permuted(np.arange(40)[None] < relevant[:, None], axis=1)
    scores = metrics.rank_hits(right, relevant, 40, (5, 20, 60)).means()
    closed = metrics.chance(relevant, 40, (5, 20, 60))
    assert set(closed) == {name for name in scores if "VOC" not in name}
    for name, level in closed.items():
        assert scores[name] == pytest.approx(level, abs=0.006), name


def test_chance_of_a_single_item_and_of_nothing_relevant() -> None:
    assert metrics.chance(np.array([1]), 1)["mAP@all"] == 1.0
    assert set(metrics.chance(np.array([0]), 9, (3,)).values()) == {0.0}


@pytest.mark.skipif(not SPLITS.exists(), reason="the published label counts lie in ../shared/papers/splits.json")
@pytest.mark.parametrize(("split", "level"), [("sketchy_yelamarthi_unseen21", 0.0482), ("sempcyc25", 0.0400)])
def test_random_embeddings_score_the_published_chance(split: str, level: float) -> None:
    content = json.loads(SPLITS.read_text())
    content["sempcyc25"] = content["sketchy_sempcyc_val12"] + content["sketchy_sempcyc_test13"]

    def labels(counts: dict[str, int]) -> NDArray[np.str_]:
        spelt = {name.replace("-", "_").replace(" ", "_"): count for name, count in counts.items()}
        return np.concatenate([np.full(spelt[name], name) for name in content[split]])

    q_label, g_label = labels(content["sketchy_sketch_counts"]), labels(content["sketchy_ext_gallery_counts"])
    assert (len(q_label), len(g_label)) in {(12_694, 10_453), (14_421, 14_626), (12_694, 12_553)}
    rng = np.random.default_rng(8)
    some = rng.permutation(len(q_label))[:1500]
    query, gallery = rng.standard_normal((1500, 16)), rng.standard_normal((len(g_label), 16))
    scores = metrics.rank_scores(query, gallery, q_label[some], g_label, ks=(200,))
    closed = metrics.chance(metrics.count_relevant(q_label, g_label), len(g_label), (200,))
    assert scores.precision(200).mean() == pytest.approx(level, abs=0.002)
    assert closed["P@200"] == pytest.approx(level, abs=0.0002)
    assert scores.ap.mean() == pytest.approx(closed["mAP@all"], abs=0.002)


# ---- means and intervals ---------------------------------------------------------------------------------------------


def test_per_class_means() -> None:
    assert metrics.per_class(np.array([1.0, 0.0, 0.5]), np.array(["b", "b", "a"])) == {"a": 0.5, "b": 0.5}


def test_bootstrap_is_seeded_and_paired() -> None:
    rng = np.random.default_rng(9)
    values, labels = rng.random(400), names(rng, 400, 8)
    first = metrics.bootstrap(values, labels, 200, seed=1)
    assert np.array_equal(first, metrics.bootstrap(values, labels, 200, seed=1))
    assert not np.array_equal(first, metrics.bootstrap(values, labels, 200, seed=2))
    np.testing.assert_allclose(metrics.bootstrap(values + 0.1, labels, 200, seed=1) - first, 0.1)


def test_bootstrap_over_classes_is_wider_when_classes_differ() -> None:
    rng = np.random.default_rng(10)
    labels = np.repeat(np.arange(10).astype(str), 50)
    alike, unlike = rng.random(500), np.repeat(np.linspace(0, 1, 10), 50)
    low, high = metrics.interval(metrics.bootstrap(unlike, labels))
    narrow = metrics.interval(metrics.bootstrap(alike, labels))
    assert low < 0.5 < high
    # class means 0 to 1 with deviation .319: ten drawn classes have standard error .101
    assert high - low == pytest.approx(2 * 1.96 * 0.101, rel=0.15)
    assert narrow[1] - narrow[0] < 0.1
