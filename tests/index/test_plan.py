"""What the planner chooses, and what it refuses with which nearest feasible value."""

import re

import numpy as np
import pytest

from tests.index.helpers import clustered
from zsr.errors import ConfigError, Infeasible
from zsr.index import faiss_backend
from zsr.index.building.benchmark import by_promise
from zsr.index.building.plan import (
    Evidence,
    IndexConfig,
    candidates,
    index_bytes,
    parse_bytes,
    plan,
    rank,
    refined,
    show_bytes,
    unmeasured,
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


@pytest.mark.parametrize(
    ("count", "dim", "key"),
    [(1, 16, "Flat"), (300, 512, "Flat"), (50_000, 512, "Flat"), (50_001, 64, "IVF1024,Flat"), (50_001, 512, None)],
)
def test_few_vectors_are_searched_exactly_and_nothing_is_measured(count: int, dim: int, key: str | None) -> None:
    assert unmeasured(count, dim, "ip", IndexConfig()) == key
    if key is not None:
        chosen = plan(count, dim, "ip", IndexConfig())
        assert (chosen.index_key, chosen.exact) == (key, key == "Flat")


@pytest.mark.parametrize(("budget", "key"), [("21MB", "Flat"), ("11MB", "SQfp16"), ("6MB", "SQ8"), ("1MB", None)])
def test_a_budget_shortens_the_codes_of_few_vectors(budget: str, key: str | None) -> None:
    tight = IndexConfig(max_index_memory_usage=budget)
    assert unmeasured(10_000, 512, "ip", tight) == key


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
    with pytest.raises(Infeasible, match=r"smallest, SQ8, needs \d+ bytes") as refused:
        plan(10_000, 512, "ip", IndexConfig(max_index_memory_usage="1KB"))
    named = re.search(r"at least (\S+)", str(refused.value))
    assert named is not None
    assert plan(10_000, 512, "ip", IndexConfig(max_index_memory_usage=named[1])).index_key == "SQ8"


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
        ("", "not understood"),
        ("HNSW32", "not understood"),
        ("IVF4", "not understood"),
        ("flat", "not understood"),
        (" Flat", "not understood"),
        ("Flat;rm -rf", "not understood"),
        ("IVF4,Flat\n", "not understood"),
        ("IVF99999999999999999999,Flat", "not understood"),
        ("IVF" + "9" * 5000 + ",Flat", "not understood"),
        ("PQ16x0", "not understood"),
        ("IVF16,PQ16x17", "not understood"),
        ("IVF16_HNSW0,Flat", "not understood"),
        ("PCA65,Flat", "PCA keeps 1 to 64 dimensions, found 65"),
        ("PCAR0,IVF4,SQ8", "does not fit"),
        ("OPQ7,IVF4,PQ7", "does not fit"),
        ("OPQ8_128,PQ8", "does not fit"),
        ("OPQ0,PQ8", "does not fit"),
        ("PCA32,PQ64", "does not fit"),
        ("PQ0", "does not fit"),
        ("IVF1001,Flat", "at most IVF1000, or Flat"),
        ("IVF16000000,Flat", "too few"),
        ("PQ16x12", "too few"),
        ("IVF64,PQ16x8fs", "not understood"),
        ("IVF64,PQ16,Refine(PQ8)", "not understood"),
        ("IVF64,RaBitQ9", "not understood"),
        ("IVF0,PQ16", "not understood"),
        ("IVF64,PQ7", "does not fit"),
        ("IVF2000,PQ16", "too few"),
    ],
)
def test_a_key_that_cannot_be_built_is_refused_by_one_line_that_names_it(key: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as refused:
        plan(1000, 64, "ip", IndexConfig(index_key=key))
    assert str(refused.value).startswith(f"--index-key {key[:100]!r}")
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("key", ["Flat", "IVF1,Flat", "Flat,RFlat"])
def test_these_keys_are_exact_search(key: str) -> None:
    assert faiss_backend.is_exact(key)


@pytest.mark.parametrize("key", ["SQ8", "IVF2,Flat", "PCA8,Flat", "Flat,Refine(SQ8)", "PQ16,RFlat"])
def test_these_keys_are_not(key: str) -> None:
    assert not faiss_backend.is_exact(key)


@pytest.mark.parametrize(
    "key", ["Flat", "SQ8", "PQ8x6", "IVF16,PQ8x6", "OPQ8_16,IVF16,PQ8x6", "PCAR16,IVF16,SQ8", "IVF9,RaBitQ3"]
)
def test_planned_bytes_are_those_of_the_index(key: str) -> None:
    vectors = clustered(3000, 1)
    index = faiss_backend.train(key, "ip", vectors, seed=0, count=1)
    index.add_with_ids(vectors, np.arange(len(vectors)))
    assert index_bytes(key, len(vectors), vectors.shape[1], "ip") == pytest.approx(
        len(faiss_backend.to_bytes(index)), rel=0.1
    )


def test_the_codes_whose_length_promises_the_target_are_measured_first() -> None:
    codes = ["IVF64,PQ8", "IVF64,PQ16", "IVF64,PQ32", "IVF64,SQ8"]  # 1, 2, 4 and 8 bits per dimension of 64
    assert by_promise(codes, 64, 0.6)[0] == "IVF64,PQ16"
    assert by_promise(codes, 64, 0.86)[0] == "IVF64,PQ32"
    assert by_promise(codes, 64, 0.97)[0] == "IVF64,SQ8"
