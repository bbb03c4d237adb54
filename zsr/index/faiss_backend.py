"""The only module that uses faiss: index keys, reading under limits, threads, inverted lists, exact scores.

faiss's type stubs miss most of what SWIG exposes, so its objects are `Any` outside of this module.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import faiss as _faiss
import numpy as np

from zsr.errors import ConfigError, DamagedArtifact

faiss: Any = _faiss
KEY: Final = re.compile(
    r"(?P<transform>(?:OPQ\d+(?:_[1-9]\d*)?|PCAR?\d+),)?(?:IVF(?P<nlist>\d+)(?:_HNSW(?P<links>\d+))?,)?"
    r"(?P<code>PQ\d+x4(?P<fast>fs)|PQ\d+(?:x\d+)?|RaBitQ[1-8]?|SQ4|SQ6|SQ8|SQfp16|Flat)"
    r"(?:,(?:(?P<exact>RFlat)|Refine\((?P<refine>SQ4|SQ6|SQ8|SQfp16)\)))?",
    re.ASCII,
)
ALLOWED: Final = (
    "[OPQm|PCAd|PCARd,][IVFn[_HNSWm],](Flat|SQfp16|SQ8|SQ6|SQ4|PQm[xbits]|PQmx4fs|RaBitQ[1-8])"
    "[,RFlat|,Refine(SQ4|SQ6|SQ8|SQfp16)]"
)
MAX_KEY: Final = 100  # characters; Python refuses to read numbers of thousands of digits
MAX_LISTS: Final = 2**24  # faiss allocates every list of an empty index
MAX_LINKS: Final = 256
MAX_BITS: Final = 16  # of a product code
REFINE: Final = {
    "SQ4": faiss.ScalarQuantizer.QT_4bit,
    "SQ6": faiss.ScalarQuantizer.QT_6bit,
    "SQ8": faiss.ScalarQuantizer.QT_8bit,
    "SQfp16": faiss.ScalarQuantizer.QT_fp16,
}
METRIC: Final = {"ip": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}
TRANSFORM_POINTS: Final = 65_536  # OPQ subsamples to the same number
LIST_ITERATIONS: Final = 10  # of the k-means over the lists, as faiss sets it for an IVF
ID_BYTES: Final = 8  # an inverted list stores an int64 per code
# faiss's precomputed table for L2 is several times as large as the index, and not bounded by the size of its file
SMALL: Final = faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE


def parse(key: str) -> re.Match[str]:
    """Parse an index key. Without IVFn all vectors are in one list, which every query scans.

    Raises:
        ConfigError: a key that this package does not support.
    """
    found = KEY.fullmatch(key[: MAX_KEY + 1])
    if found is None or len(key) > MAX_KEY:
        raise ConfigError(
            f"--index-key {key[:MAX_KEY]!r} is not understood; expected {ALLOWED}, in this spelling, without spaces, "
            "such as Flat or IVF1024,PQ32,RFlat"
        )
    numbers = {
        "IVF lists": (found["nlist"], 1, MAX_LISTS),
        "HNSW links": (found["links"], 2, MAX_LINKS),
        "bits of a PQ code": (_bits(found["code"]), 1, MAX_BITS),
    }
    for name, (text, fewest, most) in numbers.items():
        if text is not None and not fewest <= int(text) <= most:
            raise ConfigError(f"--index-key {key!r} is not understood; expected {fewest} to {most} {name}")
    return found


def _bits(code: str) -> str | None:
    return code.partition("x")[2].removesuffix("fs") or None if code.startswith("PQ") else None


def list_count(key: str) -> int:
    """Number of inverted lists of an index of `key`; 1 without IVFn."""
    return int(parse(key)["nlist"] or 1)


def is_exact(key: str) -> bool:
    """Whether an index of `key` searches exactly: every query is compared with every uncompressed vector."""
    parts = parse(key)
    whole = parts["code"] == "Flat" and parts["transform"] is None and parts["refine"] is None
    return whole and list_count(key) == 1


def empty(key: str, dim: int, metric: str) -> Any:
    """Create an untrained index of the codes of `key`, with a flat coarse quantizer.

    An HNSW graph over the centroids, if the key has one, is built after training: see `train`. Fast-scan codes are
    stored like other 4-bit codes and packed when an index is opened: see `packed`.

    Raises:
        ConfigError: the key does not fit this dimension.
    """
    parts = parse(key)
    require_fit(key, dim)
    flat = f"{parts['transform'] or ''}IVF{list_count(key)},{parts['code'].removesuffix('fs')}"
    try:
        return faiss.index_factory(dim, flat, METRIC[metric])
    except RuntimeError as error:
        reason = str(error).rpartition("Error: ")[2] or str(error)
        raise ConfigError(f"--index-key {key!r} does not fit vectors of dimension {dim}: {reason}") from error


def require_fit(key: str, dim: int) -> None:
    """Raise ConfigError if the transform or the code of `key` does not fit vectors of dimension `dim`.

    faiss reports some of these only in training, and others by an assertion without key and dimension.
    """
    parts, width = parse(key), dim
    if parts["transform"]:
        kind, first, second = transform_parts(parts["transform"])
        width = second or (dim if kind == "OPQ" else first)
        if not 1 <= width <= dim:
            _refuse_fit(key, dim, f"{kind} keeps 1 to {dim} dimensions, found {width}")
        if kind == "OPQ" and (first < 1 or width % first):
            _refuse_fit(
                key, dim, f"OPQ splits {width} dimensions into {first} equal parts; possible: {_divisors(width)}"
            )
    if parts["code"].startswith("PQ"):
        count = int(re.findall(r"\d+", parts["code"])[0])
        if count < 1 or width % count:
            _refuse_fit(
                key, dim, f"PQ splits {width} dimensions into {count} equal parts; possible: {_divisors(width)}"
            )


def _refuse_fit(key: str, dim: int, reason: str) -> None:
    raise ConfigError(f"--index-key {key!r} does not fit vectors of dimension {dim}: {reason}")


def _divisors(width: int) -> str:
    return ", ".join(str(m) for m in range(1, width + 1) if width % m == 0)


def lists_interact(key: str) -> bool:
    """Whether the results in one list depend on the other lists that are probed for the same query.

    Fast-scan quantizes its lookup tables over all lists of a query, and multi-bit RaBitQ skips vectors whose first bit
    ranks them below the results found so far.
    """
    parts = parse(key)
    return bool(parts["fast"]) or re.fullmatch("RaBitQ[2-8]", parts["code"]) is not None


def refiner(key: str, sample: np.ndarray) -> Any | None:
    """Train the codec of the refine codes of `key` on `sample` (n, D); None if the key has no such codes."""
    kind = parse(key)["refine"]
    if kind is None:
        return None
    codec = faiss.IndexScalarQuantizer(sample.shape[1], REFINE[kind])
    codec.train(sample)
    return codec


def refine_bytes(key: str, dim: int) -> int:
    """Bytes of one vector's refine code; a full vector counts as float32."""
    parts = parse(key)
    if parts["exact"]:
        return 4 * dim
    return int(faiss.ScalarQuantizer(dim, REFINE[parts["refine"]]).code_size) if parts["refine"] else 0


def packed(index: Any) -> Any:
    """Repack the 4-bit codes of an opened index into the layout of the fast-scan kernels, in memory."""
    fast = faiss.IndexIVFPQFastScan(ivf_of(index))
    fast.referenced_objects = [index]
    if not isinstance(index, faiss.IndexPreTransform):
        return fast
    moved = faiss.IndexPreTransform(index.chain.at(0), fast)
    moved.referenced_objects = [index, fast]
    return moved


def template_of(path: Path) -> bytes:
    """Serialize the trained index at `path` (verified by the caller) without its lists. Raises DamagedArtifact."""
    index = _open(path, faiss.IO_FLAG_SKIP_IVF_DATA)
    ivf = ivf_of(index)
    lists = faiss.ArrayInvertedLists(ivf.nlist, ivf.code_size)
    ivf.replace_invlists(lists, True)
    lists.this.disown()
    index.ntotal = ivf.ntotal = 0
    return to_bytes(index)


def ivf_of(index: Any) -> Any:
    """The IVF part of an index, after its transform if it has one."""
    ivf = faiss.downcast_index(faiss.extract_index_ivf(index))
    ivf.referenced_objects = [index]  # a bare pointer into `index`, which must live as long
    return ivf


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Use `count` OpenMP threads inside the block."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def train(key: str, metric: str, sample: np.ndarray, seed: int, count: int) -> Any:
    """Train an index on `sample` (n, D) float32 with `count` threads; it holds no vector."""
    index = empty(key, sample.shape[1], metric)
    ivf = ivf_of(index)
    for clustering in [ivf.cp] + ([ivf.pq.cp] if hasattr(ivf, "pq") else []):
        clustering.seed = seed
        clustering.min_points_per_centroid = 1  # the plan already reports too few points
    if hasattr(ivf, "do_polysemous_training"):
        ivf.do_polysemous_training = False  # only for Hamming filtering, which is not used; the slowest step
    if isinstance(index, faiss.IndexPreTransform):
        train_transform(index.chain.at(0), sample, metric)
    with threads(count):
        index.train(sample)
    if links := parse(key)["links"]:
        _graph_over_centroids(ivf, int(links))
    return index


def train_transform(transform: Any, sample: np.ndarray, metric: str) -> None:
    """Train a rotation or projection on `sample` (n, D).

    For the inner product a projection must not shift the origin, as faiss's mean subtraction would: that would add an
    inner product with the mean, different for every vector, to every score.
    """
    moved = faiss.downcast_VectorTransform(transform)
    if isinstance(moved, faiss.OPQMatrix) and moved.pq is None:
        _quiet(moved)
    # evenly spaced rows: faiss copies its input, and more rows do not improve the covariance
    moved.train(np.ascontiguousarray(sample[:: max(1, len(sample) // TRANSFORM_POINTS)]))
    if metric == "ip" and isinstance(moved, faiss.PCAMatrix):
        faiss.copy_array_to_vector(np.zeros(moved.d_out, np.float32), moved.b)


def _graph_over_centroids(ivf: Any, links: int) -> None:
    """Replace the flat coarse quantizer by an HNSW graph over the same centroids."""
    centroids = ivf.quantizer.reconstruct_n(0, ivf.nlist)
    graph = faiss.IndexHNSWFlat(ivf.d, links, ivf.metric_type)
    with threads(1):  # the graph depends on the order in which threads insert
        graph.add(centroids)
    ivf.quantizer = graph
    graph.this.disown()
    ivf.own_fields = True


def to_bytes(index: Any) -> bytes:
    """Serialize `index` in faiss's format."""
    return bytes(faiss.serialize_index(index).data)


@contextmanager
def _limits(size: int, where: str) -> Iterator[None]:
    """Limit faiss's allocations and loops to the size of its file; the defaults are 1 TB and no limit."""
    before = faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit()
    faiss.set_deserialization_vector_byte_limit(size)
    faiss.set_deserialization_loop_limit(size)
    try:
        yield
    except RuntimeError as error:
        raise DamagedArtifact(f"{where}: faiss cannot read it: {error}") from error
    finally:
        faiss.set_deserialization_vector_byte_limit(before[0])
        faiss.set_deserialization_loop_limit(before[1])


def from_bytes(data: bytes, where: str) -> Any:
    """Deserialize the index in `data`, which the caller has verified. Raises DamagedArtifact."""
    with _limits(len(data), where):
        return faiss.deserialize_index(np.frombuffer(data, np.uint8), SMALL)


def open_whole(path: Path) -> Any:
    """Open the single-file index at `path`, which the caller has verified, with its lists memory-mapped read-only.

    Raises:
        DamagedArtifact: faiss cannot read it.
    """
    return _open(path, faiss.IO_FLAG_MMAP)


def open_split(path: Path, lists_path: Path) -> Any:
    """Open the index at `path` with its lists mapped read-only from `lists_path`. The caller has verified both files.

    Raises:
        DamagedArtifact: faiss cannot read it, or the lists file does not have the size that the index expects.
    """
    index = _open(path, faiss.IO_FLAG_SKIP_IVF_DATA)
    lists = lists_of(index)
    if lists.totsize != lists_path.stat().st_size:
        raise DamagedArtifact(
            f"{lists_path}: {lists_path.stat().st_size} bytes, but {path.name} expects {lists.totsize}; build it again"
        )
    _check_lists(index, lists, str(path))
    # faiss's flag for a moved directory prints to the C stdout, which is reserved for a job's results
    lists.filename = str(lists_path)
    lists.do_mmap()
    return index


def _check_lists(index: Any, lists: Any, where: str) -> None:
    """Raise DamagedArtifact if a list extends beyond its file: faiss does not check what it maps."""
    row = lists.code_size + ID_BYTES
    total = 0
    for number in range(lists.nlist):
        size = lists.list_size(number)
        total += size
        if lists.lists.at(number).offset + size * row > lists.totsize:
            raise DamagedArtifact(f"{where}: list {number} is outside of {lists.totsize} bytes; build the index again")
    if total != index.ntotal:
        raise DamagedArtifact(f"{where}: its lists hold {total} vectors, not {index.ntotal}; build the index again")


def _open(path: Path, flags: int) -> Any:
    with _limits(path.stat().st_size, str(path)):
        index = faiss.read_index(str(path), flags | faiss.IO_FLAG_READ_ONLY | SMALL)
    lists = lists_of(index)
    if not isinstance(lists, faiss.OnDiskInvertedLists):
        raise DamagedArtifact(f"{path}: its lists are not on disk; build the index again")
    lists.prefetch_nthread = 0  # its 32 threads per call made a single query eight times slower
    return index


def lists_of(index: Any) -> Any:
    """The inverted lists of an index."""
    lists = faiss.downcast_InvertedLists(ivf_of(index).invlists)
    lists.referenced_objects = [index]  # a bare pointer into `index`, which must live as long
    return lists


def list_sizes(index: Any) -> np.ndarray:
    """Vectors in each list, (nlist,) int64."""
    lists = lists_of(index)
    return np.array([lists.list_size(i) for i in range(lists.nlist)], np.int64)


def list_ids(index: Any, number: int) -> np.ndarray:
    """Ordinals in list `number`, (n,) int64."""
    lists = lists_of(index)
    size = lists.list_size(number)
    return faiss.rev_swig_ptr(lists.get_ids(number), size).copy() if size else np.empty(0, np.int64)


def list_offsets(index: Any) -> np.ndarray:
    """Offset of each list in its file, (nlist,) int64 bytes. `index` must have been opened by this module."""
    lists = lists_of(index)
    return np.array([lists.lists.at(i).offset for i in range(lists.nlist)], np.int64)


def with_lists_in(index: Any, name: str, sizes: np.ndarray) -> bytes:
    """Serialize `index` with its lists in the file `name`, which holds, list after list, all codes and then all ids.

    Args:
        sizes: (nlist,) int64, vectors in each list.
    """
    ivf = ivf_of(index)
    lists = faiss.OnDiskInvertedLists(ivf.nlist, ivf.code_size, name)
    counts = np.ascontiguousarray(sizes, np.uint64)  # in a variable, since the pointer below does not keep it alive
    lists.set_all_lists_sizes(faiss.swig_ptr(counts))
    lists.totsize = int(sizes.sum()) * (ivf.code_size + ID_BYTES)
    ivf.replace_invlists(lists, True)
    lists.this.disown()
    index.ntotal = ivf.ntotal = int(sizes.sum())
    return to_bytes(index)


def probe(
    index: Any, queries: np.ndarray, depth: int, nprobe: int, allowed: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Search the `depth` nearest vectors by code in `nprobe` lists.

    Args:
        allowed: (ceil(ntotal / 8),) uint8 bitmap of the ordinals to consider, lowest bit first; None allows all.

    Returns:
        ordinals (B, depth) int64, padded with -1; scores (B, depth) float32, computed from the codes, higher is nearer:
        inner product, or minus the Euclidean distance.
    """
    parameters = _parameters(nprobe, allowed)
    if isinstance(index, faiss.IndexPreTransform):
        parameters = faiss.SearchParametersPreTransform(index_params=parameters)
    found, ordinals = index.search(queries, depth, params=parameters)
    return ordinals, _scores(index, found, ordinals)


def _parameters(nprobe: int, allowed: np.ndarray | None) -> Any:
    wanted = {} if allowed is None else {"sel": faiss.IDSelectorBitmap(allowed)}
    return faiss.SearchParametersIVF(nprobe=nprobe, **wanted)


def _scores(index: Any, found: np.ndarray, ordinals: np.ndarray) -> np.ndarray:
    """Convert faiss's distances `found` (B, depth) into scores as `probe` returns them."""
    scores = found if index.metric_type == faiss.METRIC_INNER_PRODUCT else -np.sqrt(np.maximum(found, 0))
    return np.where(ordinals >= 0, scores, -np.inf).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Probes:
    """Queries with the lists to probe for each.

    Attributes:
        vectors: (B, W) float32, after the transform of the index.
        lists: (B, P) int64, -1 for none. distances: (B, P) float32, faiss's distances to the lists' centroids.
    """

    vectors: np.ndarray
    lists: np.ndarray
    distances: np.ndarray

    def take(self, rows: np.ndarray) -> "Probes":
        """Some of the queries."""
        return Probes(self.vectors[rows], self.lists[rows], self.distances[rows])

    def within(self, first: int, last: int) -> tuple[np.ndarray, "Probes"]:
        """Restrict to lists in [first, last): rows (n,) of the queries that probe any of them, and their probes."""
        inside = (self.lists >= first) & (self.lists < last)
        rows = np.flatnonzero(inside.any(axis=1))
        lists = np.where(inside[rows], self.lists[rows], -1)
        return rows, Probes(self.vectors[rows], lists, self.distances[rows])


def coarse(index: Any, queries: np.ndarray, nprobe: int) -> Probes:
    """The `nprobe` lists that `probe` searches for queries (B, D)."""
    moved = _moved(index, queries)
    distances, lists = ivf_of(index).quantizer.search(moved, nprobe)
    return Probes(moved, lists, distances)


def probe_assigned(
    index: Any, probes: Probes, depth: int, allowed: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """As `probe`, in preassigned lists."""
    count, nprobe = probes.lists.shape
    found, ordinals = np.empty((count, depth), np.float32), np.empty((count, depth), np.int64)
    vectors, distances = (np.ascontiguousarray(a, np.float32) for a in (probes.vectors, probes.distances))
    lists, at = np.ascontiguousarray(probes.lists, np.int64), faiss.swig_ptr
    # the C function, since the Python wrapper accepts no parameters
    ivf_of(index).search_preassigned_c(
        count,
        at(vectors),
        depth,
        at(lists),
        at(distances),
        at(found),
        at(ordinals),
        False,
        _parameters(nprobe, allowed),
    )
    return ordinals, _scores(index, found, ordinals)


def _moved(index: Any, vectors: np.ndarray) -> np.ndarray:
    """Vectors (n, D) after the transform of the index, if it has one: (n, W)."""
    return np.asarray(index.chain.at(0).apply(vectors) if isinstance(index, faiss.IndexPreTransform) else vectors)


def scanned(index: Any, queries: np.ndarray, nprobes: list[int]) -> list[float]:
    """Mean number of vectors in the probed lists per query, for each of `nprobes` (ascending)."""
    near = coarse(index, queries, nprobes[-1]).lists
    sizes = np.where(near >= 0, list_sizes(index)[near], 0)
    return [float(sizes[:, :n].sum(axis=1).mean()) for n in nprobes]


def exact_scores(queries: np.ndarray, candidates: np.ndarray, metric: str) -> np.ndarray:
    """Inner product, or minus the Euclidean distance, of candidates (B, K, D) and queries (B, D): (B, K) float32.

    Each score depends on its two vectors only, not on the rest of the batch, so that equal vectors tie exactly.
    """
    if metric == "ip":
        return np.asarray(np.einsum("bd,bkd->bk", queries, candidates), np.float32)
    difference = candidates - queries[:, None, :]
    return np.asarray(-np.sqrt(np.einsum("bkd,bkd->bk", difference, difference)), np.float32)


def exact_nearest(
    queries: np.ndarray, vectors: np.ndarray, depth: int, spare: int, metric: str
) -> tuple[np.ndarray, np.ndarray]:
    """The min(depth, N) nearest of `vectors` (N, D) for each of `queries` (Q, D): rows and exact scores, best first.

    faiss proposes `spare` extra candidates, since its batched sums round differently from `exact_scores`.
    """
    wanted = min(len(vectors), depth + spare)
    rows = np.empty((len(queries), min(len(vectors), depth)), np.int64)
    scores = np.empty(rows.shape, np.float32)
    with threads(1):
        for at in range(0, len(queries), 256):
            block = queries[at : at + 256]
            near = faiss.knn(block, vectors, wanted, METRIC[metric])[1]
            exact = exact_scores(block, vectors[near], metric)
            order = np.lexsort((near, -exact), axis=1)[:, :depth]
            rows[at : at + 256] = np.take_along_axis(near, order, 1)
            scores[at : at + 256] = np.take_along_axis(exact, order, 1)
    return rows, scores


def top(ordinals: np.ndarray, scores: np.ndarray, k: int) -> np.ndarray:
    """The k ordinals with the highest scores per row (B, C), ties broken by ordinal."""
    order = np.lexsort((ordinals, -scores), axis=1)[:, :k]
    return np.asarray(np.take_along_axis(ordinals, order, 1))


def transform(key: str, dim: int) -> Any:
    """Create the untrained transform of a key prefix such as "PCAR64,"."""
    kind, first, second = transform_parts(key)
    if kind == "OPQ":
        return faiss.OPQMatrix(dim, first, second or dim)
    return faiss.PCAMatrix(dim, first, 0, kind == "PCAR")


def transform_parts(key: str) -> tuple[str, int, int]:
    """Kind of a transform such as "OPQ8_32,", its number, and its second number or 0."""
    kind, first, second = re.fullmatch(r"(OPQ|PCAR?)(\d+)(?:_(\d+))?,", key).groups()  # type: ignore[union-attr]
    return kind, int(first), int(second or 0)


def _quiet(rotation: Any) -> None:
    """Silence an OPQ rotation's hundreds of warnings about few training vectors."""
    codes = faiss.ProductQuantizer(rotation.d_out, rotation.M, 8)
    codes.cp.min_points_per_centroid = 1
    rotation.pq = codes
    rotation.referenced_objects = [codes]


def shorten(rotation: Any, iterations: int, points: int) -> None:
    """Shorten the training of an OPQ rotation: few iterations and vectors, no warnings."""
    _quiet(rotation)
    rotation.niter, rotation.max_train_points = iterations, points


def kmeans(sample: np.ndarray, count: int, metric: str) -> np.ndarray:
    """`count` centroids (L, D) of `sample` (n, D), as an IVF index finds them."""
    clustering = faiss.Clustering(sample.shape[1], count)
    clustering.niter, clustering.min_points_per_centroid = LIST_ITERATIONS, 1
    clustering.train(sample, faiss.IndexFlat(sample.shape[1], METRIC[metric]))
    return np.asarray(faiss.vector_to_array(clustering.centroids).reshape(count, -1))


def trial_index(code: str, centroids: np.ndarray, metric: str, iterations: int, points: int) -> Any:
    """Create an index of the codes of key `code` over given centroids (L, W), with codebooks that train quickly."""
    index = empty(f"IVF{len(centroids)},{parse(code)['code']}", centroids.shape[1], metric)
    index.quantizer.train(centroids)
    index.quantizer.add(centroids)
    if hasattr(index, "pq"):
        index.pq.cp.niter, index.pq.cp.max_points_per_centroid = iterations, points
        index.pq.cp.min_points_per_centroid = 1
        index.do_polysemous_training = False
    return index


def scanner(index: Any, code: str) -> Any:
    """`index` ready to search: itself, or packed for the fast-scan kernels."""
    return packed(index) if parse(code)["fast"] else index


def assigned(index: Any, vectors: np.ndarray) -> tuple[np.ndarray, float]:
    """Number of `vectors` (n, D) per list (nlist,), and the mean squared distance to their list's centroid over their
    mean squared length.
    """
    moved, ivf = _moved(index, vectors), ivf_of(index)
    near = ivf.quantizer.search(moved, 1)[1][:, 0]
    sizes = np.bincount(near, minlength=ivf.nlist)
    left = moved - ivf.quantizer.reconstruct_batch(near)
    lengths = [float(np.einsum("nw,nw->", x, x, dtype=np.float64)) for x in (left, moved)]
    return sizes, lengths[0] / max(1e-30, lengths[1])
