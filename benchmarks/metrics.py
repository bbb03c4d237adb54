"""Exact metrics at the size of sketchy-25-sempcyc against the per-query scikit-learn loop of released code.

    python -m benchmarks.metrics [--sample 150] [--quickdraw]

The baseline does what released evaluations do for each query: float64 Euclidean distances to the gallery,
`average_precision_score` over all of it and over its top 200, and the hits in the top 100. It is timed on a sample of
the queries, before and after ours, and its time is scaled to all of them; both sides must agree on the APs. Set
OMP_NUM_THREADS=1 to hold ours to one thread, as the loop is.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from sklearn.metrics import average_precision_score

from zsr import metrics


@dataclass(frozen=True)
class Data:
    """Random unit-variance embeddings (Q, D), (N, D) with a weak class signal, and uniform class labels."""

    query: NDArray[np.float32]
    gallery: NDArray[np.float32]
    query_label: NDArray[np.str_]
    gallery_label: NDArray[np.str_]


def make(queries: int, gallery: int, classes: int, width: int = 64) -> Data:
    """Seeded data of one size."""
    rng = np.random.default_rng(0)
    centre = 0.5 * rng.standard_normal((classes, width))
    q_code, g_code = rng.integers(0, classes, queries), rng.integers(0, classes, gallery)
    q = (centre[q_code] + rng.standard_normal((queries, width))).astype(np.float32)
    g = (centre[g_code] + rng.standard_normal((gallery, width))).astype(np.float32)
    return Data(q, g, q_code.astype(str), g_code.astype(str))


def released_loop(data: Data, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """AP (rows,) as the released code computes it, one query at a time."""
    return np.array([released_query(data, row) for row in rows])


def released_query(data: Data, row: int) -> float:
    """AP of one query; the other two scores are computed as they are there, and dropped."""
    relevant = data.gallery_label == data.query_label[row]
    similarity = np.exp(-cdist(data.query[row : row + 1].astype(np.float64), data.gallery.astype(np.float64))[0])
    score = float(average_precision_score(relevant, similarity))
    first = np.argsort(-similarity)[:200]
    if relevant[first].any():
        average_precision_score(relevant[first], similarity[first])
    relevant[first[:100]].mean()
    return score


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Result, wall seconds and processor seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - wall, time.process_time() - processor


def peak() -> float:
    """Largest resident memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def compare(data: Data, sample: int) -> dict[str, float]:
    """Time both sides and print the table."""
    rows = np.random.default_rng(1).permutation(len(data.query))[:sample]
    scale = len(data.query) / sample

    def ours() -> metrics.RankScores:
        return metrics.rank_scores(data.query, data.gallery, data.query_label, data.gallery_label, "l2", (100, 200))

    _, before, before_cpu = timed(lambda: released_loop(data, rows))
    ranked, wall, processor = timed(ours)
    memory = peak()
    wanted, after, after_cpu = timed(lambda: released_loop(data, rows))
    np.testing.assert_allclose(ranked.ap[rows], wanted, atol=1e-5)
    base, base_cpu = scale * (before + after) / 2, scale * (before_cpu + after_cpu) / 2
    print(f"{len(data.query)} queries x {len(data.gallery)} photos, {data.query.shape[1]}-d")
    print(f"{'':34}{'wall s':>10}{'cpu s':>10}{'us/query':>10}")
    for name, seconds, cpu in (
        (f"scikit-learn loop (from {sample} queries)", base, base_cpu),
        ("zsr.metrics", wall, processor),
    ):
        print(f"{name:34}{seconds:10.2f}{cpu:10.2f}{1e6 * seconds / len(data.query):10.0f}")
    print(f"ratio: {base / wall:.1f} times (wall), {base_cpu / processor:.1f} (cpu); peak memory {memory:.2f} GiB")
    return {"ratio": base / wall, "ratio_cpu": base_cpu / processor, "seconds": wall, "peak_gib": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=150, help="queries on which the baseline is timed")
    parser.add_argument("--quickdraw", action="store_true", help="the size of QuickDraw-30 instead: 92,291 x 54,151")
    flags = parser.parse_args()
    data = make(92_291, 54_151, 30) if flags.quickdraw else make(14_421, 14_626, 25)
    print(json.dumps(compare(data, flags.sample)))


if __name__ == "__main__":
    main()
