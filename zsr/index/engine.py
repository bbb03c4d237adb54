"""The one file that handles faiss objects: index keys, reading under limits, threads, inverted lists, exact scores.

faiss's own type stubs miss most of what SWIG exposes, so its objects are `Any` outside of this file.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import faiss as _faiss
import numpy as np

from zsr.errors import ConfigError, DamagedArtifact

faiss: Any = _faiss
KEY: Final = re.compile(
    r"(?P<transform>(?:OPQ\d+(?:_\d+)?|PCAR?\d+),)?IVF(?P<nlist>\d+)(?:_HNSW(?P<links>\d+))?,"
    r"(?P<code>PQ\d+(?:x\d+)?|SQ4|SQ6|SQ8|SQfp16|Flat)"
)
METRIC: Final = {"ip": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}
ID_BYTES: Final = 8  # an inverted list keeps an int64 beside every code
# the table that faiss makes to search by L2 is several times as large as the index itself, and not bounded by its file
SMALL: Final = faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE


def parse(key: str) -> re.Match[str]:
    """The parts of an index key. Raises ConfigError for one that this package does not build."""
    found = KEY.fullmatch(key)
    if found is None or int(found["nlist"]) == 0:
        raise ConfigError(
            f"index key {key!r} is not understood; expected [OPQm|PCAd|PCARd,]IVFn[_HNSWm],"
            "(PQm[xbits]|SQ4|SQ6|SQ8|SQfp16|Flat), such as IVF1024,PQ32 (exact re-ranking is always added, and "
            "fast-scan codes cannot lie on disk)"
        )
    return found


def empty(key: str, dim: int, metric: str) -> Any:
    """An untrained index with a flat coarse quantizer.

    A graph over the centroids, where the key asks for one, is made after training: see `train`.

    Raises:
        ConfigError: faiss refuses the key for this dimension.
    """
    parts = parse(key)
    flat = f"{parts['transform'] or ''}IVF{parts['nlist']},{parts['code']}"
    try:
        return faiss.index_factory(dim, flat, METRIC[metric])
    except RuntimeError as error:
        reason = str(error).rpartition("Error: ")[2] or str(error)
        raise ConfigError(f"index key {key!r} does not fit vectors of dimension {dim}: {reason}") from error


def ivf_of(index: Any) -> Any:
    """The IVF part of an index, behind its transform if it has one."""
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
    """An index trained on `sample` (n, D) float32 with `count` threads; it holds no vector."""
    index = empty(key, sample.shape[1], metric)
    ivf = ivf_of(index)
    for clustering in [ivf.cp] + ([ivf.pq.cp] if hasattr(ivf, "pq") else []):
        clustering.seed = seed
        clustering.min_points_per_centroid = 1  # the plan has already said where points are few
    if hasattr(ivf, "do_polysemous_training"):
        ivf.do_polysemous_training = False  # serves Hamming filtering, which is not used, and is the slowest step
    with threads(count):
        index.train(sample)
    if links := parse(key)["links"]:
        _graph_over_centroids(ivf, int(links))
    return index


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
    """`index` in faiss's format."""
    return bytes(faiss.serialize_index(index).data)


@contextmanager
def _limits(size: int, where: str) -> Iterator[None]:
    """Let faiss allocate no vector and run no loop larger than its file; the defaults are 1 TB and no limit."""
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
    """The index in `data`, which the caller has verified. Raises DamagedArtifact."""
    with _limits(len(data), where):
        return faiss.deserialize_index(np.frombuffer(data, np.uint8), SMALL)


def open_whole(path: Path) -> Any:
    """The index of one file at `path`, which the caller has verified, its lists mapped from that file, read-only.

    Raises:
        DamagedArtifact: faiss cannot read it.
    """
    return _open(path, faiss.IO_FLAG_MMAP)


def open_split(path: Path, lists_path: Path) -> Any:
    """The index at `path` with its lists mapped read-only from `lists_path`. The caller has verified both files.

    Raises:
        DamagedArtifact: faiss cannot read it, or the lists are of another size than the index says.
    """
    index = _open(path, faiss.IO_FLAG_SKIP_IVF_DATA)
    lists = lists_of(index)
    if lists.totsize != lists_path.stat().st_size:
        raise DamagedArtifact(
            f"{lists_path}: {lists_path.stat().st_size} bytes, but {path.name} expects {lists.totsize}; build it again"
        )
    _check_lists(index, lists, str(path))
    # faiss's own flag for a moved directory prints to the C stdout, which a job keeps for its results
    lists.filename = str(lists_path)
    lists.do_mmap()
    return index


def _check_lists(index: Any, lists: Any, where: str) -> None:
    """Raise DamagedArtifact if a list reaches out of its file: faiss reads what it maps without looking."""
    row = lists.code_size + ID_BYTES
    total = 0
    for number in range(lists.nlist):
        size = lists.list_size(number)
        total += size
        if lists.lists.at(number).offset + size * row > lists.totsize:
            raise DamagedArtifact(
                f"{where}: list {number} lies outside of {lists.totsize} bytes; build the index again"
            )
    if total != index.ntotal:
        raise DamagedArtifact(f"{where}: its lists hold {total} vectors, not {index.ntotal}; build the index again")


def _open(path: Path, flags: int) -> Any:
    with _limits(path.stat().st_size, str(path)):
        index = faiss.read_index(str(path), flags | faiss.IO_FLAG_READ_ONLY | SMALL)
    lists = lists_of(index)
    if not isinstance(lists, faiss.OnDiskInvertedLists):
        raise DamagedArtifact(f"{path}: its lists are not on disk; build the index again")
    lists.prefetch_nthread = 0  # its 32 threads a call made a single query eight times slower
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
    """Where each list starts in its file, (nlist,) int64 bytes. `index` was opened here."""
    lists = lists_of(index)
    return np.array([lists.lists.at(i).offset for i in range(lists.nlist)], np.int64)


def with_lists_in(index: Any, name: str, sizes: np.ndarray) -> bytes:
    """`index` as bytes, its lists replaced by the file `name` that holds, list after list, all codes and then all ids.

    Args:
        sizes: (nlist,) int64, vectors in each list.
    """
    ivf = ivf_of(index)
    lists = faiss.OnDiskInvertedLists(ivf.nlist, ivf.code_size, name)
    counts = np.ascontiguousarray(sizes, np.uint64)  # named, since the pointer below does not keep it alive
    lists.set_all_lists_sizes(faiss.swig_ptr(counts))
    lists.totsize = int(sizes.sum()) * (ivf.code_size + ID_BYTES)
    ivf.replace_invlists(lists, True)
    lists.this.disown()
    index.ntotal = ivf.ntotal = int(sizes.sum())
    return to_bytes(index)


def probe(index: Any, queries: np.ndarray, depth: int, nprobe: int) -> np.ndarray:
    """Ordinals of the `depth` nearest by code among `nprobe` lists: (B, depth) int64, -1 where there are fewer."""
    parameters: Any = faiss.SearchParametersIVF(nprobe=nprobe)
    if isinstance(index, faiss.IndexPreTransform):
        parameters = faiss.SearchParametersPreTransform(index_params=parameters)
    found: np.ndarray = index.search(queries, depth, params=parameters)[1]
    return found


def scanned(index: Any, queries: np.ndarray, nprobes: list[int]) -> list[float]:
    """Mean number of vectors that a query's probed lists hold, for each of `nprobes` (ascending)."""
    moved = index.chain.at(0).apply(queries) if isinstance(index, faiss.IndexPreTransform) else queries
    _, near = ivf_of(index).quantizer.search(moved, nprobes[-1])
    sizes = np.where(near >= 0, list_sizes(index)[near], 0)
    return [float(sizes[:, :n].sum(axis=1).mean()) for n in nprobes]


def exact_scores(queries: np.ndarray, candidates: np.ndarray, metric: str) -> np.ndarray:
    """Inner product, or minus the Euclidean distance, of candidates (B, K, D) and queries (B, D): (B, K) float32.

    Each score is a function of its two vectors alone, whatever else is in the batch, so that equal vectors tie exactly.
    """
    if metric == "ip":
        return np.asarray(np.einsum("bd,bkd->bk", queries, candidates), np.float32)
    difference = candidates - queries[:, None, :]
    return np.asarray(-np.sqrt(np.einsum("bkd,bkd->bk", difference, difference)), np.float32)
