"""Stage counters: work items, rows, seconds and CPU seconds, for Prometheus and for a command's timeline.

Prometheus scrapes `ray.util.metrics` from every node's metrics port (`cluster/grafana.json` shows them). The timeline
needs sums over processes that may have ended, so `spend` also writes them to the cluster's key-value store, from which
`spent` collects them.

For progress, a task counts its rows and writes the count to that store at most once per second, under the number of its
work item; the driver reads the counts of unfinished items when it refreshes the display. So progress advances within a
shard, costs one addition on the main path, and a task that is retried after the loss of its worker restarts at 0.
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
    "zsr_pieces": "work items (shards) finished by a stage",
    "zsr_rows": "rows written by a stage",
    "zsr_cpu_seconds": "CPU seconds used by the tasks and actors of a stage",
}
SECONDS: Final = ("zsr_piece_seconds", "duration of one work item", (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000))
NUMBER: Final = "zsr_number"  # keys that `Items.numbered` adds to a work item, and `reported` removes again
PREFIX: Final = "zsr_prefix"
STAGE: Final = ("zsr_stage_seconds", "duration of the last run of a stage, measured by its driver")


def exported() -> list[str]:
    """The metric names in Prometheus: Ray adds the prefix `ray_`, and the suffix `_total` to counters."""
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
    """Record a finished work item of `stage`, with its rows and duration."""
    tags = {"stage": stage}
    _counter("zsr_pieces").inc(1, tags)
    if rows:
        _counter("zsr_rows").inc(rows, tags)
    _histogram().observe(seconds, tags)


def stage_took(stage: str, seconds: float) -> None:
    """Record the duration of a whole stage in the driver. Does nothing without a connection to a cluster."""
    if ray.is_initialized():
        _gauge().set(seconds, {"stage": stage})


def _prefix() -> bytes:
    return f"zsr/spent/{ray.get_runtime_context().get_job_id()}/".encode()


def spend(stage: str, cpu_seconds: float) -> None:
    """Record CPU seconds of this process for `stage`, not reported before. For tasks, actors and workers."""
    _counter("zsr_cpu_seconds").inc(cpu_seconds, {"stage": stage})
    value = json.dumps({"stage": stage, "cpu_seconds": cpu_seconds}).encode()
    internal_kv._internal_kv_put(_prefix() + uuid.uuid4().hex.encode(), value)


def spent() -> Counter[str]:
    """CPU seconds by stage that the processes of this job have reported since the last call."""
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
    """Record the work item whose `results` the block fills; `cpu` is the process's CPU time from which it counts."""
    began = time.monotonic()
    yield
    spend(stage, time.process_time() - cpu)
    count(stage, rows=int(results.get("rows", 0)), seconds=time.monotonic() - began)


class Items:
    """The work items of one stage: the rows of each, and how many of them are done.

    Attributes:
        sizes: rows of each item.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = sizes
        self.prefix = f"zsr/progress/{ray.get_runtime_context().get_job_id()}/{uuid.uuid4().hex}/"
        self.results = 0  # number of items with results, which arrive in order
        self.rows = 0

    def numbered(self, pieces: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """The items with the keys that `reported` needs."""
        return [{**piece, NUMBER: number, PREFIX: self.prefix} for number, piece in enumerate(pieces)]

    def passed(self, results: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield the results, and count their items as done."""
        for result in results:
            self.rows += self.sizes[self.results]
            self.results += 1
            yield result

    def done(self) -> int:
        """Rows done: those of items with results, and those reported by tasks for other items."""
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
    """The row count of one work item, reported to the driver at most once every `progress.REFRESH` seconds."""

    def __init__(self, key: str) -> None:
        self.key, self.rows, self.told = key.encode(), 0, time.monotonic()

    def __call__(self, count: int) -> None:
        self.rows += count
        if time.monotonic() - self.told >= progress.REFRESH:
            self.tell()

    def tell(self) -> None:
        """Write the count."""
        with suppress(Exception):  # an error here must not fail the task
            internal_kv._internal_kv_put(self.key, str(self.rows).encode(), overwrite=True)
        self.told = time.monotonic()


@contextmanager
def reported(piece: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Report the body's progress on a work item of `Items.numbered`; yields the original item. Runs in a task."""
    number, prefix = piece.pop(NUMBER), piece.pop(PREFIX)
    report = _Report(f"{prefix}{number}")
    with progress.counting(report):
        yield piece
    if report.rows:
        report.tell()  # results arrive in order, so this one may wait for that of an earlier item


def task(piece: dict[str, Any], *, stage: str, function: Callable[..., Any], shared: Mapping[str, Any]) -> Any:
    """Call `function(piece, **shared)` with telemetry; runs in a Ray task."""
    results: dict[str, Any] = {}
    with _measured(stage, results, time.process_time()), reported(piece) as own:
        results |= function(own, **shared)
    return results


class Actor:
    """Ray actor that calls an object of `kind` with telemetry. Its construction counts for the first call."""

    def __init__(self, *, stage: str, kind: Callable[..., Any], shared: Mapping[str, Any]) -> None:
        self.stage, self.cpu = stage, time.process_time()
        self.inner: Callable[..., Any] | None = None
        try:
            self.inner = kind(**shared)
        except Exception as error:
            self.failed = error  # raised by the first call: of an actor that fails to start, Ray passes on only text

    def __call__(self, piece: dict[str, Any]) -> Any:
        if self.inner is None:
            raise self.failed
        results: dict[str, Any] = {}
        with _measured(self.stage, results, self.cpu), reported(piece) as own:
            results |= self.inner(own)
        self.cpu = time.process_time()
        return results
