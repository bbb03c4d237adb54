"""Rolling reservoirs: what they hold follows from how many rows have gone by."""

import numpy as np
import pyarrow as pa
import torch

from zsr.data.pictures import LISTED
from zsr.data.stream import Rolling

LABELS = (0, 1, 0, 2, 0, 1, 0, 0)  # of rows 0 to 7


def rolling(capacity: int, labels: tuple[int, ...] = LABELS, seed: int = 0) -> Rolling:
    count = np.arange(len(labels))
    columns = [count // 3, count % 3, count + 100, count + 100, np.array(labels)]
    return Rolling.of(pa.table(columns, LISTED.names).cast(LISTED), 4, capacity, seed)


def held(side: Rolling, label: int, consumed: int) -> set[int]:
    """Rows that 200 draws find."""
    generator = torch.Generator().manual_seed(0)
    return set(side.draw(torch.full((200,), label), generator, consumed).tolist())


def test_a_full_reservoir_holds_the_last_rows_of_its_class() -> None:
    side = rolling(capacity=2)
    assert [held(side, 0, n) for n in (4, 5, 7, 8)] == [{0, 2}, {2, 4}, {4, 6}, {6, 7}]


def test_the_stream_goes_round() -> None:
    side = rolling(capacity=2)
    assert held(side, 0, 0) == held(side, 0, 8) == held(side, 0, 800) == {6, 7}
    assert held(side, 0, 1) == {7, 0}


def test_a_class_with_no_more_rows_than_that_is_always_held_in_full() -> None:
    side = rolling(capacity=2)
    assert all(held(side, 1, n) == {1, 5} and held(side, 2, n) == {3} for n in range(20))
    assert side.sizes.tolist() == [2, 2, 1, 0]


def test_every_row_comes_by_in_a_pass() -> None:
    labels = tuple(np.random.default_rng(0).integers(0, 3, 500).tolist())
    side = rolling(capacity=5, labels=labels)
    found = set.union(*(held(side, label, n) for n in range(0, 500, 2) for label in range(3)))
    assert found == set(range(500))


def test_draws_are_uniform_over_the_reservoir() -> None:
    side = rolling(capacity=4)
    rows = side.draw(torch.zeros(4000, dtype=torch.int64), torch.Generator().manual_seed(1), 8)
    counts = torch.bincount(rows, minlength=8)
    assert counts[[2, 4, 6, 7]].sum() == 4000
    assert all(abs(int(counts[row]) - 1000) < 110 for row in (2, 4, 6, 7))  # four standard deviations


def test_the_seed_turns_the_stream() -> None:
    assert held(rolling(capacity=2, seed=4), 0, 0) == held(rolling(capacity=2), 0, 4)
