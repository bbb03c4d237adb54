"""What the planner chooses, and what it refuses with which nearest feasible value."""

import re

import numpy as np
import pytest

from tests.index.helpers import clustered
from zsr.errors import ConfigError, Infeasible
from zsr.index import engine
from zsr.index.plan import IndexConfig, index_bytes, parse_bytes, plan, show_bytes


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


@pytest.mark.parametrize(
    ("count", "key"),
    [
        (20, "IVF1,Flat"),
        (200, "IVF4,PQ128x4"),
        (400, "IVF8,PQ128x4"),
        (9984, "IVF256,PQ128"),
        (1_000_000, "IVF4096,PQ128"),
        (100_000_000, "IVF32768_HNSW32,PQ128"),
    ],
)
def test_ivf_pq_is_chosen_wherever_its_codes_can_be_trained(count: int, key: str) -> None:
    assert plan(count, 512, "ip", IndexConfig()).index_key == key


def test_few_vectors_are_said_to_be_few() -> None:
    assert any("4-bit codes" in reason for reason in plan(300, 64, "ip", IndexConfig()).reasons)
    assert any("kept whole" in reason for reason in plan(30, 64, "ip", IndexConfig()).reasons)


def test_codes_divide_an_odd_dimension() -> None:
    assert plan(20_000, 31, "l2", IndexConfig()).index_key.endswith(",PQ31")
    assert plan(20_000, 30, "l2", IndexConfig()).index_key.endswith(",PQ10")


def test_a_budget_shortens_the_codes() -> None:
    free = plan(100_000, 128, "ip", IndexConfig())
    tight = plan(100_000, 128, "ip", IndexConfig(max_index_memory_usage=show_bytes(free.index_bytes - 200_000)))
    assert (free.index_key, tight.index_key) == ("IVF1024,PQ32", "IVF1024,PQ16")
    assert any("--max-index-memory-usage" in reason for reason in tight.reasons)


def test_an_infeasible_budget_names_the_smallest_index_and_its_bytes() -> None:
    with pytest.raises(Infeasible, match=r"smallest, IVF1024,PQ1, needs \d+ bytes") as refused:
        plan(100_000, 128, "ip", IndexConfig(max_index_memory_usage="1KB"))
    named = re.search(r"at least (\S+)", str(refused.value))
    assert named is not None
    assert plan(100_000, 128, "ip", IndexConfig(max_index_memory_usage=named[1])).index_key == "IVF1024,PQ1"


def test_little_memory_trains_on_fewer_vectors_and_too_little_is_refused() -> None:
    free = plan(1_000_000, 128, "ip", IndexConfig())
    tight = plan(1_000_000, 128, "ip", IndexConfig(current_memory_available="100MB"))
    assert tight.train_size < free.train_size
    assert tight.peak_memory <= 100_000_000
    with pytest.raises(Infeasible, match="needs") as refused:
        plan(1_000_000, 128, "ip", IndexConfig(current_memory_available="1MB"), largest_shard=100_000)
    named = re.search(r"at least (\S+),", str(refused.value))
    assert named is not None
    again = plan(1_000_000, 128, "ip", IndexConfig(current_memory_available=named[1]), largest_shard=100_000)
    assert again.peak_memory <= parse_bytes(named[1])


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("PQ16", "not understood"),
        ("IVF64,PQ16x4fs", "not understood"),
        ("IVF64,PQ16,RFlat", "not understood"),
        ("IVF0,PQ16", "not understood"),
        ("IVF64,PQ7", "does not fit"),
        ("IVF2000,PQ16", "too few"),
    ],
)
def test_a_key_that_cannot_be_built_is_refused(key: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        plan(1000, 64, "ip", IndexConfig(index_key=key))


@pytest.mark.parametrize("key", ["IVF16,PQ8x6", "OPQ8_16,IVF16,PQ8x6", "PCAR16,IVF16,SQ8", "IVF32_HNSW16,Flat"])
def test_planned_bytes_are_those_of_the_index(key: str) -> None:
    vectors = clustered(3000, 1)
    index = engine.train(key, "ip", vectors, seed=0, count=1)
    index.add_with_ids(vectors, np.arange(len(vectors)))
    assert index_bytes(key, len(vectors), vectors.shape[1], "ip") == pytest.approx(len(engine.to_bytes(index)), rel=0.1)
