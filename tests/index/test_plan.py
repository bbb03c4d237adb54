"""What the planner chooses, and what it refuses with which nearest feasible value."""

import re

import numpy as np
import pytest

from tests.index.helpers import clustered
from zsr.errors import ConfigError, Infeasible
from zsr.index import engine
from zsr.index.plan import (
    Evidence,
    IndexConfig,
    candidates,
    index_bytes,
    parse_bytes,
    plan,
    rank,
    refined,
    show_bytes,
    small,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [("1GB", 10**9), ("1GiB", 2**30), ("1.5 MiB", 3 * 2**19), ("900KB", 900_000), ("17B", 17)],
)
def test_sizes_are_decimal_or_binary_by_their_unit(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "1", "GB", "-1GB", "1 gb", "1e9B", "0B", "1GB ", "0.1B", "1PB"])
def test_a_size_that_is_not_plain_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not understood"):
        parse_bytes(text)


@pytest.mark.parametrize("size", [1, 999, 1001, 123_456_789, 10**12 + 1])
def test_a_shown_size_reads_back_as_no_less(size: int) -> None:
    assert parse_bytes(show_bytes(size)) >= size


@pytest.mark.parametrize(("count", "key"), [(20, "IVF1,Flat"), (400, "IVF8,Flat"), (9984, "IVF256,Flat")])
def test_few_vectors_are_kept_whole(count: int, key: str) -> None:
    assert small(count, 512)
    assert plan(count, 512, "ip", IndexConfig()).index_key == key


def test_a_budget_shortens_the_codes_of_few_vectors() -> None:
    tight = IndexConfig(max_index_memory_usage="8MB")
    assert plan(10_000, 512, "ip", tight).index_key == "IVF256,SQ8"


def _seen(key: str, size: int, recall: float, seconds: float = 1.0) -> Evidence:
    return Evidence(key, size, recall, 1, seconds, 1e-4)


def test_the_fewest_bytes_win_among_those_that_reach_the_target() -> None:
    seen = [_seen("A", 100, 0.99), _seen("B", 60, 0.93), _seen("C", 50, 0.91), _seen("D", 62, 0.94, 0.5)]
    ranked, why = rank(seen, 0.9)
    assert ranked[0].index_key == "D", why  # about as few bytes as B, and cheaper; C leaves no room for probing
    assert [e.index_key for e in ranked[1:]] == ["A", "B", "C"]


def test_the_highest_recall_wins_where_none_reaches_the_target() -> None:
    seen = [_seen("A", 100, 0.80), _seen("B", 60, 0.795, 0.5), _seen("C", 50, 0.70, 0.1)]
    assert rank(seen, 0.9)[0][0].index_key == "B"


def test_candidates_of_many_vectors_are_transformed_and_coded_in_many_ways() -> None:
    keys = candidates(1_000_000, 128, 1_000_000)
    for key in ("IVF4096,PQ64", "PCAR64,IVF4096,PQ32", "OPQ32,IVF4096,PQ32", "IVF4096,RaBitQ4", "IVF4096,PQ64x4fs"):
        assert key in keys
    assert candidates(100_000_000, 128, 100_000_000)[0].startswith("IVF32768_HNSW32,")
    assert refined("IVF8,PQ4")[1:] == ["IVF8,PQ4,Refine(SQ8)", "IVF8,PQ4,Refine(SQfp16)", "IVF8,PQ4,RFlat"]


def test_an_infeasible_budget_names_the_smallest_index_and_its_bytes() -> None:
    with pytest.raises(Infeasible, match=r"smallest, IVF256,SQ4, needs \d+ bytes") as refused:
        plan(10_000, 512, "ip", IndexConfig(max_index_memory_usage="1KB"))
    named = re.search(r"at least (\S+)", str(refused.value))
    assert named is not None
    assert plan(10_000, 512, "ip", IndexConfig(max_index_memory_usage=named[1])).index_key == "IVF256,SQ4"


def test_little_memory_trains_on_fewer_vectors_and_too_little_is_refused() -> None:
    key = "IVF4096,PQ32"
    free = plan(1_000_000, 128, "ip", IndexConfig(index_key=key))
    tight = plan(1_000_000, 128, "ip", IndexConfig(index_key=key, current_memory_available="100MB"))
    assert tight.train_size < free.train_size
    assert tight.peak_memory <= 100_000_000
    little = IndexConfig(index_key=key, current_memory_available="1MB")
    with pytest.raises(Infeasible, match="needs") as refused:
        plan(1_000_000, 128, "ip", little, largest_shard=100_000)
    named = re.search(r"at least (\S+),", str(refused.value))
    assert named is not None
    enough = IndexConfig(index_key=key, current_memory_available=named[1])
    again = plan(1_000_000, 128, "ip", enough, largest_shard=100_000)
    assert again.peak_memory <= parse_bytes(named[1])


def test_train_size_bounds_the_vectors_to_train_on() -> None:
    free = plan(1_000_000, 128, "ip", IndexConfig(index_key="IVF1024,PQ32"))
    bound = plan(1_000_000, 128, "ip", IndexConfig(index_key="IVF1024,PQ32", train_size=20_000))
    assert bound.train_size == 20_000 < free.train_size


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("PQ16", "not understood"),
        ("IVF64,PQ16x8fs", "not understood"),
        ("IVF64,PQ16,Refine(PQ8)", "not understood"),
        ("IVF64,RaBitQ9", "not understood"),
        ("IVF0,PQ16", "not understood"),
        ("IVF64,PQ7", "does not fit"),
        ("IVF2000,PQ16", "too few"),
    ],
)
def test_a_key_that_cannot_be_built_is_refused(key: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        plan(1000, 64, "ip", IndexConfig(index_key=key))


@pytest.mark.parametrize("key", ["IVF16,PQ8x6", "OPQ8_16,IVF16,PQ8x6", "PCAR16,IVF16,SQ8", "IVF9,RaBitQ3"])
def test_planned_bytes_are_those_of_the_index(key: str) -> None:
    vectors = clustered(3000, 1)
    index = engine.train(key, "ip", vectors, seed=0, count=1)
    index.add_with_ids(vectors, np.arange(len(vectors)))
    assert index_bytes(key, len(vectors), vectors.shape[1], "ip") == pytest.approx(len(engine.to_bytes(index)), rel=0.1)
