"""Run a function once per work item: by Ray Data, or in this process if a worker would take longer to start.

A worker takes seconds to start and to import torch. Smaller work runs in the calling process, by the same function on
the same arguments, with one thread as in a worker, so that the results have the same bits. The environment variable
ZSR_EXECUTOR overrides the choice: `ray` runs everything in workers, `local` everything that needs no GPU in this
process, for a debugger or a machine on which Ray does not start.
"""

import copy
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

from threadpoolctl import threadpool_limits

from zsr import progress
from zsr.errors import ConfigError

VARIABLE: Final = "ZSR_EXECUTOR"
# rows that one CPU processes in about the time that a worker takes to start
IMAGES: Final = 256  # for decoding, or a forward pass of a network
QUERIES: Final = 1_024  # for searching
VECTORS: Final = 20_000  # for reading, copying or a forward pass of a small model

_here = False


def in_this_process() -> bool:
    """Whether a work item is being processed in this process, without a GPU assigned by Ray."""
    return _here


def is_this_machine() -> bool:
    """Whether no cluster is given, so that only this machine does the work."""
    cluster = sys.modules.get("zsr.cluster")  # not imported here: it loads Ray, which takes seconds
    if cluster is not None and cluster.is_connected():
        return bool(cluster.started_here())
    return os.environ.get("RAY_ADDRESS", "") in ("", "local")


def runs_here(small: bool, gpus: float = 0) -> bool:
    """Whether work runs in this process.

    Args:
        small: whether one CPU finishes it before a worker would have started.
        gpus: GPUs that each worker requires.

    Raises:
        ConfigError: ZSR_EXECUTOR has an unknown value.
    """
    choice = os.environ.get(VARIABLE) or "auto"
    if choice not in ("auto", "local", "ray"):
        raise ConfigError(f"{VARIABLE} is {choice!r}; it must be auto, local or ray")
    return not gpus and (choice == "local" or (choice == "auto" and small))


def map_pieces(
    what: str, function: Callable[..., Any], pieces: Sequence[dict[str, Any]], **options: Any
) -> list[dict[str, Any]]:
    """The results of `stream_pieces` as a list, for small results."""
    return list(stream_pieces(what, function, pieces, **options))


def stream_pieces(
    what: str,
    function: Callable[..., Any],
    pieces: Sequence[dict[str, Any]],
    *,
    small: bool = False,
    rows: Sequence[int] | None = None,
    unit: str | None = None,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Run `function` once per work item and yield its results in the order of `pieces`.

    Args:
        what: name of the stage, for progress lines and metrics.
        function: work item -> result, both small mappings of JSON-like values; or a class with such instances, of which
            each worker creates one. It writes its output itself. Arguments shared by all items are passed as
            `fn_kwargs` or `fn_constructor_kwargs`.
        small: see `runs_here`.
        rows: rows of each item, for progress; `function` calls `progress.advance` while it processes them. By default
            finished items are counted.
        unit: unit of the counts; by default rows, or shards without `rows`.
        options: arguments of Ray Data's `map`, such as fn_kwargs, compute, num_cpus or memory.

    Raises:
        The errors of `function`: a failing item stops the job, since bad rows are quarantined within items.
    """
    if not pieces:
        return
    sizes, default = ([1] * len(pieces), "shards") if rows is None else (rows, "rows")
    if runs_here(small, options.get("num_gpus", 0)):
        shared = options.get("fn_constructor_kwargs" if isinstance(function, type) else "fn_kwargs", {})
        yield from _here_in_turn(what, function, pieces, shared, sizes, unit or default, counts_rows=rows is not None)
    else:
        from zsr.cluster import stream_by_ray  # imported here: it loads Ray, which takes seconds

        yield from stream_by_ray(what, function, pieces, sizes, unit or default, options)


def _here_in_turn(
    what: str,
    function: Callable[..., Any],
    pieces: Sequence[dict[str, Any]],
    shared: Mapping[str, Any],
    sizes: Sequence[int],
    unit: str,
    *,
    counts_rows: bool,
) -> Iterator[dict[str, Any]]:
    """`stream_pieces` in this process. Arguments are copied, as they would be when sent to a worker."""
    shared = copy.deepcopy(dict(shared))
    done = 0

    def count(rows: int) -> None:
        nonlocal done
        done += rows

    with progress.stage(what, sum(sizes), unit, poll=lambda: done) as shown:
        with _as_worker():
            call = function(**shared) if isinstance(function, type) else lambda piece: function(piece, **shared)
        passed = 0
        for piece, size in zip(pieces, sizes, strict=True):
            # only around each call: the caller runs between two of them
            with _as_worker(), progress.counting(count if counts_rows else progress.ignore):
                result = dict(call(dict(piece)))
            passed += size
            done = passed
            yield result
        shown.done = passed


@contextmanager
def _as_worker() -> Iterator[None]:
    """Limit this process to one thread, as in a worker with one CPU: sums over several threads have other bits."""
    global _here
    outer, _here = _here, True
    threads = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
    try:
        with threadpool_limits(1):
            if threads is not None:  # torch's own MKL, which the limits do not reach
                sys.modules["torch"].set_num_threads(1)
            yield
    finally:
        _here = outer
        if threads is not None:  # the called function may have changed it, as for a worker process
            sys.modules["torch"].set_num_threads(threads)
