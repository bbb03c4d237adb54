"""What stages count while they run: pieces, rows, seconds and CPU seconds, for Prometheus and for a job's timeline.

Prometheus reads the `ray.util.metrics` from every node's metrics port (`cluster/grafana.json` shows them). The timeline
wants sums over processes that may be gone by then, so `spend` also leaves them in the cluster's key-value store, and
`spent` takes them out there.

For the progress of a stage a task keeps its own count of rows and writes it to that store at most once a second, under
the number of its work item; the driver reads the counts of unfinished items when it refreshes what it shows. So
progress moves within a shard, costs the main path an addition, and a task that runs again after the loss of its worker
begins at 0 again.
"""

import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, Final

import ray
from ray.experimental import internal_kv
from ray.util import metrics

from zsr import progress

COUNTERS: Final = {
    "zsr_pieces": "pieces of work (shards) that a stage has finished",
    "zsr_rows": "rows that a stage has written",
    "zsr_cpu_seconds": "CPU seconds that a stage's tasks and actors have used",
}
SECONDS: Final = ("zsr_piece_seconds", "how long one piece took", (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000))
NUMBER: Final = "zsr_number"  # keys that `Items.numbered` adds to a work item, and `reported` takes out again
PREFIX: Final = "zsr_prefix"
STAGE: Final = ("zsr_stage_seconds", "how long the last run of a stage took, as its driver saw it")


def exported() -> list[str]:
    """The names under which Prometheus finds them: Ray puts `ray_` before, and `_total` behind what only grows."""
    return [*(f"ray_{name}_total" for name in COUNTERS), f"ray_{SECONDS[0]}_bucket", f"ray_{STAGE[0]}"]


@cache
def _counter(name: str) -> metrics.Counter:
    return metrics.Counter(name, COUNTERS[name], tag_keys=("stage",))


@cache
def _histogram() -> metrics.Histogram:
    name, about, boundaries = SECONDS
    return metrics.Histogram(name, about, boundaries=list(boundaries), tag_keys=("stage",))


@cache
def _gauge() -> metrics.Gauge:
    name, about = STAGE
    return metrics.Gauge(name, about, tag_keys=("stage",))


def count(stage: str, *, rows: int, seconds: float) -> None:
    """One finished piece of `stage`: its rows, and how long it took."""
    tags = {"stage": stage}
    _counter("zsr_pieces").inc(1, tags)
    if rows:
        _counter("zsr_rows").inc(rows, tags)
    _histogram().observe(seconds, tags)


def stage_took(stage: str, seconds: float) -> None:
    """The driver's clock of a whole stage. Before the driver has connected to a cluster there is nobody to tell."""
    if ray.is_initialized():
        _gauge().set(seconds, {"stage": stage})


def _prefix() -> bytes:
    return f"zsr/spent/{ray.get_runtime_context().get_job_id()}/".encode()


def spend(stage: str, cpu_seconds: float) -> None:
    """CPU seconds that this process has used for `stage` and not reported yet. For tasks, actors and workers."""
    _counter("zsr_cpu_seconds").inc(cpu_seconds, {"stage": stage})
    value = json.dumps({"stage": stage, "cpu_seconds": cpu_seconds}).encode()
    internal_kv._internal_kv_put(_prefix() + uuid.uuid4().hex.encode(), value)


def spent() -> Counter[str]:
    """CPU seconds by stage that this job's processes have reported since the last call."""
    found: Counter[str] = Counter()
    if not ray.is_initialized():
        return found
    for key in internal_kv._internal_kv_list(_prefix()):
        value = json.loads(internal_kv._internal_kv_get(key) or b"{}")
        internal_kv._internal_kv_del(key)
        if value:
            found[value["stage"]] += value["cpu_seconds"]
    return found


@contextmanager
def _measured(stage: str, results: dict[str, Any], cpu: float) -> Iterator[None]:
    """Count the piece that the block fills `results` with; `cpu` is the processor's clock since when it counts."""
    began = time.monotonic()
    yield
    spend(stage, time.process_time() - cpu)
    count(stage, rows=int(results.get("rows", 0)), seconds=time.monotonic() - began)


class Items:
    """The work items of one stage: how many rows each has, and how many of them are done.

    Attributes:
        sizes: rows of each item.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = sizes
        self.prefix = f"zsr/progress/{ray.get_runtime_context().get_job_id()}/{uuid.uuid4().hex}/"
        self.results = 0  # items whose results have come; they come in order
        self.rows = 0

    def numbered(self, pieces: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """The items with what `reported` needs to know."""
        return [{**piece, NUMBER: number, PREFIX: self.prefix} for number, piece in enumerate(pieces)]

    def passed(self, results: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Pass the results through, counting their items as done."""
        for result in results:
            self.rows += self.sizes[self.results]
            self.results += 1
            yield result

    def done(self) -> int:
        """Rows done: those of items with results, and what tasks have told of others."""
        rows, results = self.rows, self.results
        for key in internal_kv._internal_kv_list(self.prefix.encode()):
            number = int(key.rpartition(b"/")[2])
            if number < results:
                internal_kv._internal_kv_del(key)
            else:
                rows += min(self.sizes[number], int(internal_kv._internal_kv_get(key) or 0))
        return rows

    def forget(self) -> None:
        """Remove all counts."""
        internal_kv._internal_kv_del(self.prefix.encode(), del_by_prefix=True)


class _Report:
    """The count of one work item, told to the driver at most once every `progress.REFRESH` seconds."""

    def __init__(self, key: str) -> None:
        self.key, self.rows, self.told = key.encode(), 0, time.monotonic()

    def __call__(self, count: int) -> None:
        self.rows += count
        if time.monotonic() - self.told >= progress.REFRESH:
            self.tell()

    def tell(self) -> None:
        """Write the count."""
        with suppress(Exception):  # a count is not worth a task
            internal_kv._internal_kv_put(self.key, str(self.rows).encode(), overwrite=True)
        self.told = time.monotonic()


@contextmanager
def reported(piece: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Count what the body does for a work item of `Items.numbered`, and yield the item as it was. Runs in a task."""
    number, prefix = piece.pop(NUMBER), piece.pop(PREFIX)
    report = _Report(f"{prefix}{number}")
    with progress.counting(report):
        yield piece
    if report.rows:
        report.tell()  # results come in order, and this one may wait for an earlier item's


def task(piece: dict[str, Any], *, stage: str, function: Callable[..., Any], shared: Mapping[str, Any]) -> Any:
    """`function(piece, **shared)`, counted; runs in a Ray task."""
    results: dict[str, Any] = {}
    with _measured(stage, results, time.process_time()), reported(piece) as own:
        results |= function(own, **shared)
    return results


class Actor:
    """An object of `kind`, whose calls are counted; runs as a Ray actor. What making it cost goes to its first call."""

    def __init__(self, *, stage: str, kind: Callable[..., Any], shared: Mapping[str, Any]) -> None:
        self.stage, self.cpu = stage, time.process_time()
        self.inner: Callable[..., Any] | None = None
        try:
            self.inner = kind(**shared)
        except Exception as error:
            self.failed = (
                error  # raised by the first call: of an actor that fails to start, Ray passes on the text alone
            )

    def __call__(self, piece: dict[str, Any]) -> Any:
        if self.inner is None:
            raise self.failed
        results: dict[str, Any] = {}
        with _measured(self.stage, results, self.cpu), reported(piece) as own:
            results |= self.inner(own)
        self.cpu = time.process_time()
        return results
