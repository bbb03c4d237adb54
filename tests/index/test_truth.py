"""Exact neighbours through deletes and additions: what is still known, and what is not claimed."""

import numpy as np

from zsr.index.ground_truth import DEPTH, GroundTruth, K


def _truth(ordinals: list[int], scores: list[float], floor: float) -> GroundTruth:
    return GroundTruth(
        np.zeros((1, 2), np.float32),
        np.array([ordinals]),
        np.array([scores], np.float32),
        np.array([floor], np.float32),
    )


def test_recall_counts_a_neighbour_as_near_as_the_last_one() -> None:
    truth = _truth(list(range(11)), [1.0] * 9 + [0.5, 0.5], -np.inf)
    assert truth.k == K
    assert truth.recall(np.array([[0, 1, 2, 3, 4, 5, 6, 7, 8, 10]])) == 1.0
    assert truth.recall(np.array([[0, 1, 2, 3, 4, 5, 6, 7, 8, 11]])) == 0.9


def test_a_query_is_dropped_when_deletes_leave_fewer_than_ten_known_neighbours() -> None:
    scores = [1 - i / 100 for i in range(12)]
    listed = _truth(list(range(12)), scores, scores[-1])
    assert len(listed.without(np.array([0, 1])).sure().queries) == 1
    assert len(listed.without(np.array([0, 1, 2])).sure().queries) == 0
    whole = _truth(list(range(12)), scores, -np.inf)
    assert len(whole.without(np.array([0, 1, 2])).sure().queries) == 1


def test_a_joined_list_claims_nothing_below_the_floor_of_either() -> None:
    old = _truth([0, 1, 2], [0.9, 0.8, 0.7], 0.7)
    new = _truth([10, 11, -1], [0.75, 0.1, -np.inf], -np.inf)
    joined = old.joined(new)
    assert joined.ordinals[0].tolist()[:5] == [0, 1, 10, 2, -1]
    assert joined.floor[0] == np.float32(0.7)
    assert joined.ordinals.shape[1] <= DEPTH
