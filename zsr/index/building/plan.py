"""Choose the index to build: candidate keys, bytes and memory, and the ranking of measured candidates.

`zsr.index.building.benchmark` measures the candidates on the gallery; this module reads no vector.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field

from zsr.errors import ConfigError, Infeasible
from zsr.index import faiss_backend

POINTS_PER_CENTROID: Final = 39  # below this, faiss warns that a k-means is poorly trained
TRAIN_POINTS_PER_LIST: Final = 64
GRAPH_FROM_LISTS: Final = 16384  # from here on, comparing a query with every centroid costs more than scanning lists
EXACT_ROWS: Final = 50_000  # galleries up to this size are searched exactly: a full scan takes milliseconds
WHOLE_BYTES: Final = 32 << 20  # larger ones up to this size keep (almost) uncompressed vectors: they are small anyway
WHOLE_CODES: Final = ("Flat", "SQfp16", "SQ8")  # largest first; their loss of recall is too small to need measurement
SCALAR_POINTS: Final = 65_536  # training vectors of scalar codes, for each dimension's range; values beyond are clipped
PROBING_LOSS: Final = 0.02  # recall that lists not probed may cost, in addition to the loss of the codes
NEAR_RECALL: Final = 0.01  # candidates this close in recall are ranked by cost
NEAR_BYTES: Final = 1.05
SEGMENT_ROWS: Final = 100_000_000
UNITS: Final = {"B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", 1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}


class IndexConfig(BaseModel):
    """How to build an index.

    Attributes:
        index_key: faiss factory key, such as Flat (exact search) or IVF1024,PQ32,RFlat. If not given: exact search up
            to 50,000 vectors, beyond that chosen by a benchmark of candidates.
        recall_target: min recall@10 of the sketch queries against exact search; below it nothing is published.
        max_index_memory_usage: max bytes of codes, ids, centroids and refine codes, such as 1GB or 900MiB.
        current_memory_available: max memory of one build process, such as 16GB.
        train_size: max training vectors; enough for the lists and codes if not given.
        seed: of the training sample and of k-means.
        threads: training threads; they affect the bytes of the index, so they are not detected from the machine.
        segment_rows: max vectors per file of lists; a larger index is split into segments that share a template.
        num_workers: max shards to add in parallel; the number of CPUs of the cluster if not given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    index_key: str | None = None
    recall_target: float = Field(default=0.9, gt=0, le=1)
    max_index_memory_usage: str | None = None
    current_memory_available: str | None = None
    train_size: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**31)
    threads: int = Field(default=4, ge=1, le=1024)
    segment_rows: int = Field(default=SEGMENT_ROWS, ge=1)
    num_workers: int | None = Field(default=None, ge=1)


@dataclass(frozen=True, slots=True)
class Evidence:
    """Measurements of one candidate on gallery vectors, extrapolated to full size.

    Attributes:
        index_key: the candidate.
        bytes: of codes, ids, centroids and refine codes at full size.
        recall: recall@10 of real queries with every list probed.
        refine_factor: candidates re-ranked for that recall, in multiples of k.
        build_seconds: CPU seconds of training and adding, extrapolated; query_seconds: of one query.
    """

    index_key: str
    bytes: int
    recall: float
    refine_factor: int
    build_seconds: float
    query_seconds: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lasting(self) -> dict[str, Any]:
        """The reproducible fields, without timings: a manifest may hold only these."""
        return {name: value for name, value in asdict(self).items() if not name.endswith("seconds")}


@dataclass(frozen=True, slots=True)
class IndexPlan:
    """The index to build.

    Attributes:
        index_key: faiss factory key.
        count, dim, metric: of the gallery.
        nlist: inverted lists.
        train_size: vectors to train on.
        index_bytes: codes, ids, centroids, codebooks and refine codes: the memory that a server needs.
        peak_memory: estimated peak memory in bytes of the largest build process.
        reasons: one sentence each.
        evidence: measured candidates, best first; empty if the key was given or the gallery is small.
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
    evidence: tuple[Evidence, ...] = ()

    @property
    def exact(self) -> bool:
        return faiss_backend.is_exact(self.index_key)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "exact": self.exact}


def parse_bytes(text: str) -> int:
    """Parse a size such as 1GB (10^9), 1.5GiB (1.5 * 2^30) or 4096B into bytes.

    Raises:
        ConfigError: no unit, an unknown unit, or not a positive number.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?B|B)", text)
    size = int(float(found[1]) * UNITS[found[2]]) if found else 0
    if size < 1:
        raise ConfigError(
            f"size {text!r} is not understood; expected a number and one of {sorted(UNITS)}, such as 900MiB"
        )
    return size


def show_bytes(size: float) -> str:
    """Format `size` rounded up, so that `parse_bytes` never returns less."""
    for unit in ("TB", "GB", "MB", "KB"):
        if size >= UNITS[unit]:
            return f"{math.ceil(size / UNITS[unit] * 10) / 10:g}{unit}"
    return f"{math.ceil(size)}B"


def lists_for(count: int, points: int) -> int:
    """Inverted lists for `count` vectors when `points` may be trained on: the power of two nearest to 4 sqrt(count)."""
    nlist: int = 2 ** round(math.log2(4 * math.sqrt(count)))
    while nlist > 1 and nlist * POINTS_PER_CENTROID > points:
        nlist //= 2
    return nlist


def lists_key(count: int, points: int) -> str:
    """The IVF part of a key, with an HNSW graph over the centroids if there are many lists."""
    nlist = lists_for(count, points)
    return f"IVF{nlist}{'_HNSW32' if nlist >= GRAPH_FROM_LISTS else ''}"


def unmeasured(count: int, dim: int, metric: str, config: IndexConfig) -> str | None:
    """The key of a gallery small enough to store vectors (almost) uncompressed within the budget, without a benchmark.

    None if the gallery is too large, or the budget too small, to choose without a benchmark.
    """
    if count <= EXACT_ROWS:
        keys = list(WHOLE_CODES)
    elif count * dim * 4 <= WHOLE_BYTES:
        keys = [f"{lists_key(count, min(count, config.train_size or count))},{code}" for code in WHOLE_CODES]
    else:
        keys = []
    return next((key for key in keys if index_bytes(key, count, dim, metric) <= limit_of(config)), None)


def candidates(count: int, dim: int, points: int) -> list[str]:
    """Keys to benchmark if `unmeasured` returns none, without refine codes: see `refined`."""
    lists = lists_key(count, points)
    keys = []
    for transform, width in transforms(dim):
        # OPQ is learned for product codes, and slowly
        codes = [c for c in _codes(width) if c.startswith("PQ") or not transform.startswith("OPQ")]
        keys += [f"{transform}{lists},{code}" for code in codes]
    return keys


def transforms(dim: int) -> list[tuple[str, int]]:
    """Transforms to try before coding, as key prefix and output dimension."""
    found = [("", dim)]
    found += [(f"PCAR{width},", width) for width in (dim * 5 // 8 // 8 * 8, dim // 2 // 8 * 8) if 16 <= width < dim]
    if dim % 4 == 0 and dim >= 32:
        found.append((f"OPQ{dim // 4},", dim))
    return found


def _codes(width: int) -> list[str]:
    """Codes to try for `width` dimensions: product codes that divide it, RaBitQ and scalar codes."""
    most = [m for m in range(1, width + 1) if width % m == 0]
    products = [m for m in most if 2 * m <= width < 9 * m][-3:]
    return [
        *(f"PQ{m}" for m in products),
        *(f"PQ{m}x4fs" for m in products[-1:]),
        *(f"RaBitQ{bits}" for bits in (1, 2, 3, 4, 5, 6, 8)),
        "SQ4",
        "SQ8",
    ]


def refined(key: str) -> list[str]:
    """`key` alone and with each kind of refine code."""
    return [key, f"{key},Refine(SQ8)", f"{key},Refine(SQfp16)", f"{key},RFlat"]


def index_bytes(key: str, count: int, dim: int, metric: str) -> int:
    """Bytes of an index of `count` vectors: codes, ids, refine codes, centroids and their graph, codebooks, rotation.

    Raises:
        ConfigError: the key is not understood or does not fit `dim`.
    """
    ivf = faiss_backend.ivf_of(faiss_backend.empty(key, dim, metric))
    parts = faiss_backend.parse(key)
    centroids = ivf.nlist * (ivf.d * 4 + int(parts["links"] or 0) * 8)
    codebooks = ivf.d * ivf.pq.ksub * 4 if hasattr(ivf, "pq") else ivf.d * 8
    rotation = ivf.d * dim * 4 if parts["transform"] else 0
    row = ivf.code_size + faiss_backend.ID_BYTES + faiss_backend.refine_bytes(key, dim)
    return int(count * row + centroids + codebooks + rotation)


def limit_of(config: IndexConfig) -> float:
    """The budget in bytes; infinite if none was given."""
    return math.inf if config.max_index_memory_usage is None else parse_bytes(config.max_index_memory_usage)


def require_budget(keys: Sequence[str], count: int, dim: int, metric: str, config: IndexConfig) -> list[str]:
    """Return those of `keys` that fit the budget.

    Raises:
        Infeasible: none fits; the message names the smallest key and the bytes it needs.
    """
    sizes = {key: index_bytes(key, count, dim, metric) for key in keys}
    fitting = [key for key, size in sizes.items() if size <= limit_of(config)]
    if not fitting:
        key, size = min(sizes.items(), key=lambda pair: pair[1])
        raise Infeasible(
            f"no index of {count} vectors of dimension {dim} fits --max-index-memory-usage "
            f"{config.max_index_memory_usage}: the smallest, {key}, needs {size} bytes; give at least "
            f"{show_bytes(size)}"
        )
    return fitting


def rank(evidence: Sequence[Evidence], target: float) -> tuple[list[Evidence], str]:
    """Rank measured candidates from best to worst, and state the rule.

    If some reach `target` plus PROBING_LOSS, the fewest bytes win, and among about equal bytes the least CPU time;
    otherwise the highest recall wins, and among about equal recall the least CPU time.
    """
    good = [e for e in evidence if e.recall >= target + PROBING_LOSS]
    if good:
        fewest = min(e.bytes for e in good)
        near = [e for e in good if e.bytes <= NEAR_BYTES * fewest]
        why = f"the fewest bytes of those that reach {target} + {PROBING_LOSS} for what probing loses"
    else:
        most = max(e.recall for e in evidence)
        near = [e for e in evidence if e.recall >= most - NEAR_RECALL]
        why = f"none reaches {target} + {PROBING_LOSS}: the highest recall"
    first = min(near, key=lambda e: (e.build_seconds, e.bytes, e.index_key))
    rest = sorted((e for e in evidence if e is not first), key=lambda e: (-e.recall, e.bytes, e.index_key))
    return [first, *rest], f"{why}, and of {len(near)} about equal ones the cheapest to build"


def plan(
    count: int,
    dim: int,
    metric: str,
    config: IndexConfig,
    *,
    largest_shard: int = 0,
    evidence: Sequence[Evidence] = (),
) -> IndexPlan:
    """Choose the index for `count` vectors of dimension `dim`.

    Args:
        largest_shard: rows of the largest shard, which one add task holds in memory.
        evidence: candidates measured by `zsr.index.building.benchmark`; required if no key is given and `unmeasured`
            returns none.

    Raises:
        ConfigError: an invalid key or size, or a key that does not fit `dim`.
        Infeasible: too few vectors for the key, or a budget that no candidate meets; names the smallest that would do.
    """
    ranked: list[Evidence] = []
    if config.index_key is not None:
        key, reasons = config.index_key, [f"{config.index_key} was requested"]
        _require_lists(key, count)
    elif evidence:
        ranked, why = rank(evidence, config.recall_target)
        key, reasons = ranked[0].index_key, [f"{ranked[0].index_key}: {why}"]
    else:
        key = unmeasured(count, dim, metric, config) or require_budget(WHOLE_CODES, count, dim, metric, config)[0]
        reasons = [f"{key}: {count} vectors of {dim} dimensions are few, nothing was measured"]
    require_budget([key], count, dim, metric, config)
    if faiss_backend.is_exact(key):
        reasons.append("exact search: a query is compared with every vector")
    size, nlist = index_bytes(key, count, dim, metric), faiss_backend.list_count(key)
    train_size = _train_size(key, count, dim, metric, config, reasons)
    # the shard as stored and as float32, and its index twice while that is serialized
    adding = largest_shard * (dim * 16 + 2 * size // count)
    peak = max(_training_memory(train_size, nlist, dim), adding)
    _check_memory(config.current_memory_available, peak, train_size, largest_shard)
    return IndexPlan(key, count, dim, metric, nlist, train_size, size, peak, tuple(reasons), tuple(ranked))


def _require_lists(key: str, count: int) -> None:
    """Raise Infeasible if there are more lists than vectors, before faiss allocates them."""
    if (lists := faiss_backend.list_count(key)) > count:
        raise Infeasible(
            f"--index-key {key!r} has {lists} lists: {count} vectors are too few; give at most IVF{count}, "
            "or Flat for exact search"
        )


def _train_size(key: str, count: int, dim: int, metric: str, config: IndexConfig, reasons: list[str]) -> int:
    """Number of training vectors: enough for lists and codes, limited by gallery, `train_size` and memory."""
    ivf = faiss_backend.ivf_of(faiss_backend.empty(key, dim, metric))
    centroids = ivf.pq.ksub if hasattr(ivf, "pq") else 1
    scalar = SCALAR_POINTS if re.search("SQ[468]", key) else 0
    wanted = max(TRAIN_POINTS_PER_LIST * ivf.nlist, 256 * centroids, scalar)
    available = min(count, config.train_size or count)
    fewest = max(ivf.nlist, centroids)
    if available < fewest:
        raise Infeasible(
            f"--index-key {key!r} trains {ivf.nlist} lists and {centroids} centroids per code: {available} vectors are "
            f"too few; give at least {fewest} vectors, or at most IVF{available} and "
            f"{max(1, int(math.log2(available)))} bits"
        )
    size = min(available, wanted)
    if config.current_memory_available is not None:
        size = max(min(size, _affordable(config.current_memory_available, ivf.nlist, dim)), min(size, fewest))
    if max(ivf.nlist, centroids) > 1:
        per = f"{size // ivf.nlist} per list, {size // centroids} per centroid of the codes"
        reasons.append(f"{size} training vectors: {per}")
    if max(ivf.nlist, centroids) > 1 and size < POINTS_PER_CENTROID * max(ivf.nlist, centroids):
        reasons.append(f"k-means needs {POINTS_PER_CENTROID} per centroid: these are coarse")
    return int(size)


def _training_memory(train_size: int, nlist: int, dim: int) -> int:
    """Bytes of the sample as read and as one array, faiss's residuals and copies, and the centroids twice."""
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
