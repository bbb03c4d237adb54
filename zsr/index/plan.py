"""Which index to build: lists, codes, training sample, bytes and memory, and why."""

import math
import re
from dataclasses import asdict, dataclass
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field

from zsr.errors import ConfigError, Infeasible
from zsr.index import engine

POINTS_PER_CENTROID: Final = 39  # below it faiss calls a k-means poorly trained
TRAIN_POINTS_PER_LIST: Final = 64
FEWEST_FOR_PQ: Final = 64  # four points for each of the 16 centroids of a 4-bit code
GRAPH_FROM_LISTS: Final = 16384  # from here on comparing a query with every centroid costs more than scanning lists
UNITS: Final = {"B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", 1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}


class IndexConfig(BaseModel):
    """How to build an index.

    Attributes:
        index_key: faiss factory key, such as IVF1024,PQ32; chosen from the gallery if not given.
        recall_target: recall@10 against exact search that the sketches must reach, or nothing is published.
        max_index_memory_usage: most bytes of codes, ids and centroids, such as 1GB or 900MiB.
        current_memory_available: most bytes of memory that one process of the build may use.
        train_size: most vectors to train on; enough for the lists and codes if not given.
        seed: of the training sample and of k-means.
        threads: of training; part of what shapes the bytes, therefore not taken from the machine.
        num_workers: most shards to add at once; as many as the cluster has cores if not given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    index_key: str | None = None
    recall_target: float = Field(default=0.9, gt=0, le=1)
    max_index_memory_usage: str | None = None
    current_memory_available: str | None = None
    train_size: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**31)
    threads: int = Field(default=4, ge=1, le=1024)
    num_workers: int | None = Field(default=None, ge=1)


@dataclass(frozen=True, slots=True)
class IndexPlan:
    """What will be built.

    Attributes:
        index_key: faiss factory key.
        count, dim, metric: of the gallery.
        nlist: inverted lists.
        train_size: vectors to train on.
        index_bytes: codes, ids, centroids and codebooks. What a server keeps warm.
        peak_memory: bytes of the hungriest process of the build, estimated.
        reasons: why, one sentence each.
    """

    index_key: str
    count: int
    dim: int
    metric: str
    nlist: int
    train_size: int
    index_bytes: int
    peak_memory: int
    reasons: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def parse_bytes(text: str) -> int:
    """Bytes that a size such as 1GB (10^9), 1.5GiB (1.5 * 2^30) or 4096B names.

    Raises:
        ConfigError: no unit, an unknown one, or not a positive number.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?B|B)", text)
    size = int(float(found[1]) * UNITS[found[2]]) if found else 0
    if size < 1:
        raise ConfigError(
            f"size {text!r} is not understood; expected a number and one of {sorted(UNITS)}, such as 900MiB"
        )
    return size


def show_bytes(size: float) -> str:
    """`size` rounded up to a form that `parse_bytes` reads back as no less."""
    for unit in ("TB", "GB", "MB", "KB"):
        if size >= UNITS[unit]:
            return f"{math.ceil(size / UNITS[unit] * 10) / 10:g}{unit}"
    return f"{math.ceil(size)}B"


def plan(count: int, dim: int, metric: str, config: IndexConfig, *, largest_shard: int = 0) -> IndexPlan:
    """The index for `count` vectors of length `dim`.

    Args:
        largest_shard: rows of the largest shard, which one add task holds in memory.

    Raises:
        ConfigError: a key or size that is not understood, or a key that does not fit `dim`.
        Infeasible: too few vectors for the key, or a budget that no candidate meets; names the nearest that can be met.
    """
    if config.index_key is not None:
        keys, reasons = [config.index_key], [f"{config.index_key} was asked for"]
    else:
        keys, reasons = _candidates(min(count, config.train_size or count), count, dim)
    key, size = _within_budget(keys, count, dim, metric, config.max_index_memory_usage, reasons)
    nlist = int(engine.parse(key)["nlist"])
    train_size = _train_size(key, count, dim, metric, config, reasons)
    # a shard as it arrives and as float32, its index twice while that is written
    adding = largest_shard * (dim * 16 + 2 * size // count)
    peak = max(_training_memory(train_size, nlist, dim), adding)
    _check_memory(config.current_memory_available, peak, train_size, largest_shard)
    reasons.append("candidates are re-ranked exactly from the stored vectors, so codes only have to find them")
    return IndexPlan(key, count, dim, metric, nlist, train_size, size, peak, tuple(reasons))


def _candidates(points: int, count: int, dim: int) -> tuple[list[str], list[str]]:
    """Keys from the most to the least accurate, and why. `points`: vectors that may be trained on."""
    nlist = 2 ** round(math.log2(4 * math.sqrt(count)))
    while nlist > 1 and nlist * POINTS_PER_CENTROID > points:
        nlist //= 2
    graph = "_HNSW32" if nlist >= GRAPH_FROM_LISTS else ""
    lists = f"IVF{nlist}{graph}"
    reasons = [
        f"{nlist} lists: near 4*sqrt({count}), with at least {POINTS_PER_CENTROID} training vectors each where possible"
    ]
    if points < FEWEST_FOR_PQ:
        reasons.append(f"vectors kept whole: {points} are too few to train product codes ({FEWEST_FOR_PQ} needed)")
        return [f"{lists},Flat", f"{lists},SQ8"], reasons
    bits = min(8, max(4, int(math.log2(points / POINTS_PER_CENTROID))))
    widths = [m for m in range(1, dim + 1) if dim % m == 0]
    first = next(m for m in widths if 4 * m >= dim)
    reasons.append(
        f"{first} product codes of {dim // first} dimensions: at most 4 dimensions a code, and {first} divides {dim}"
    )
    if bits < 8:
        reasons.append(
            f"{bits}-bit codes: {points} training vectors give {points // 2**bits} for each of {2**bits} centroids; "
            f"8 bits want {256 * POINTS_PER_CENTROID} vectors"
        )
    suffix = "" if bits == 8 else f"x{bits}"
    return [f"{lists},PQ{m}{suffix}" for m in reversed(widths) if m <= first], reasons


def index_bytes(key: str, count: int, dim: int, metric: str) -> int:
    """Bytes of an index of `count` vectors: codes and ids, centroids with their graph, codebooks and rotation.

    Raises:
        ConfigError: the key is not understood or does not fit `dim`.
    """
    ivf = engine.ivf_of(engine.empty(key, dim, metric))
    parts = engine.parse(key)
    centroids = ivf.nlist * (ivf.d * 4 + int(parts["links"] or 0) * 8)
    codebooks = ivf.d * ivf.pq.ksub * 4 if hasattr(ivf, "pq") else ivf.d * 8
    rotation = ivf.d * dim * 4 if parts["transform"] else 0
    return int(count * (ivf.code_size + engine.ID_BYTES) + centroids + codebooks + rotation)


def _within_budget(
    keys: list[str], count: int, dim: int, metric: str, budget: str | None, reasons: list[str]
) -> tuple[str, int]:
    """The first of `keys` that fits the budget, and its bytes."""
    limit = None if budget is None else parse_bytes(budget)
    sizes = [(key, index_bytes(key, count, dim, metric)) for key in keys]
    for key, size in sizes:
        if limit is None or size <= limit:
            if key != keys[0]:
                reasons.append(
                    f"{key}: {keys[0]} takes {show_bytes(sizes[0][1])}, --max-index-memory-usage is {budget}"
                )
            return key, size
    key, size = min(sizes, key=lambda pair: pair[1])
    raise Infeasible(
        f"no index of {count} vectors of dimension {dim} fits --max-index-memory-usage {budget}: the smallest, {key}, "
        f"needs {size} bytes; give at least {show_bytes(size)}"
    )


def _train_size(key: str, count: int, dim: int, metric: str, config: IndexConfig, reasons: list[str]) -> int:
    """Vectors to train on: enough for lists and codes, no more than the gallery, the cap and the memory allow."""
    ivf = engine.ivf_of(engine.empty(key, dim, metric))
    centroids = ivf.pq.ksub if hasattr(ivf, "pq") else 1
    wanted = max(TRAIN_POINTS_PER_LIST * ivf.nlist, 256 * centroids)
    available = min(count, config.train_size or count)
    fewest = max(ivf.nlist, centroids)
    if available < fewest:
        raise Infeasible(
            f"{key} trains {ivf.nlist} lists and {centroids} centroids a code: {available} vectors are too few; "
            f"give at least {fewest} vectors, or at most IVF{available} and {max(1, int(math.log2(available)))} bits"
        )
    size = min(available, wanted)
    if config.current_memory_available is not None:
        size = max(min(size, _affordable(config.current_memory_available, ivf.nlist, dim)), min(size, fewest))
    reasons.append(f"{size} training vectors: {size // ivf.nlist} a list, {size // centroids} a centroid of the codes")
    if size < POINTS_PER_CENTROID * max(ivf.nlist, centroids):
        reasons.append(
            f"k-means wants {POINTS_PER_CENTROID} a centroid: these are coarse, and re-ranking has to repair it"
        )
    return int(size)


def _training_memory(train_size: int, nlist: int, dim: int) -> int:
    """Bytes: the sample as it arrives and in one array, faiss's residuals and copies, and the centroids twice."""
    return train_size * dim * 16 + nlist * dim * 8


def _affordable(available: str, nlist: int, dim: int) -> int:
    """The largest training sample within `available` memory, at least 0."""
    return max(0, parse_bytes(available) - nlist * dim * 8) // (dim * 16)


def _check_memory(available: str | None, peak: int, train_size: int, largest_shard: int) -> None:
    if available is not None and parse_bytes(available) < peak:
        raise Infeasible(
            f"the build needs {peak} bytes of memory in one process (training on {train_size} vectors, or adding a "
            f"shard of {largest_shard} rows) but --current-memory-available is {available}; give at least "
            f"{show_bytes(peak)}, or write smaller shards"
        )
