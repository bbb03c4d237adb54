"""The one place that connects to Ray and maps work over it.

A job attaches to the cluster that `ray job submit` put it on, or starts a small local one. `map_pieces` runs a function
over named pieces of work (shards) through Ray Data, with its back-pressure and its retries after a lost worker or node.
"""

import atexit
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray.cluster_utils import Cluster
from ray.data import DataContext

from zsr import measure, noise, progress, worker
from zsr.errors import Infeasible
from zsr.storage import shared_environment

logger = logging.getLogger("zsr")

LOCAL_CPUS = 4  # logical: two training workers plus the data tasks that feed them, also on a laptop with 2 cores


_local: Cluster | None = None  # the cluster that this process started, if it did
_several_nodes: bool = ray_constants.ENABLE_RAY_CLUSTER


def connect() -> None:
    """Attach to the cluster of RAY_ADDRESS (set inside a submitted job), or start a local one. Safe to call again."""
    if ray.is_initialized():
        return
    worker.setup()
    os.environ.setdefault("RAY_DATA_USAGE_DISABLED", "1")  # else an actor collects what is run and a thread sends it
    address = os.environ.get("RAY_ADDRESS") or _start_local()
    root = str(Path(__file__).resolve().parents[1])
    environment = {
        # without it, Ray Train's placement-group cleaner asks whichever cluster of the machine it finds first whether
        # its controller lives, and removes the workers of a run when that one does not know it
        "RAY_ADDRESS": address,
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Ray Train's own logging set-up would undo the levels of worker.setup
        **{f"RAY_TRAIN_ENABLE_{who}_STRUCTURED_LOGGING": "0" for who in ("CONTROLLER", "WORKER")},
        **shared_environment(),
        **{name: value for name, value in os.environ.items() if name == "ZSR_FAULT"},
    }
    runtime = {"env_vars": environment, "worker_process_setup_hook": "zsr.worker.setup"}
    ray.init(address=address, runtime_env=runtime, logging_level=logging.ERROR)
    noise.keep_out()
    set_data_context()


def _start_local() -> str:
    """Start a one-node cluster that ends with this process, however that ends; its address.

    It listens on loopback alone: nobody has to have a token to run a job on a laptop, so no other machine may reach it.
    """
    global _local
    cpus = max(LOCAL_CPUS, os.cpu_count() or 1)
    os.environ.update(worker.LOOPBACK)  # for the cluster's processes
    ray_constants.ENABLE_RAY_CLUSTER = False  # and for this one, where Ray has read its environment
    head = {
        "num_cpus": cpus,
        "object_store_memory": 512 << 20,
        "include_dashboard": False,
        "node_ip_address": "127.0.0.1",
    }
    _local = Cluster(initialize_head=True, shutdown_at_exit=True, head_node_args=head)
    atexit.register(disconnect)  # before the cluster goes: else this process tries to recover what that held
    return str(_local.address)


def set_data_context() -> None:
    """Deterministic order and no progress bars in job logs; for each process that runs a Ray Data stream."""
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # our errors carry their exit code; a wrapper would lose it
    worker.setup()  # again: importing ray.data sets its own log levels


def gpus() -> int:
    """GPUs of the cluster, not of this machine: a head often has none."""
    return int(resources().get("GPU", 0))


def resources() -> dict[str, float]:
    """What the nodes of the cluster offer now, by name. Connects if need be."""
    connect()
    offered: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return offered


def own_device() -> str:
    """The device that Ray gave to the task or actor which asks."""
    return "cuda" if ray.get_runtime_context().get_accelerator_ids().get("GPU") else "cpu"


def require_workers(workers: int) -> None:
    """Refuse more training workers than a local cluster has room for; they would wait for ever, and say nothing.

    A cluster that was there before may still grow, so there it is a warning.

    Raises:
        Infeasible: naming the most that fit.
    """
    have = resources()
    most = int(have["GPU"]) if have.get("GPU") else int(have.get("CPU", 0)) - 1  # one CPU reads what the workers eat
    if workers <= most:
        return
    message = f"{workers} workers, and room for {most} in the cluster ({have.get('CPU', 0):.0f} CPUs, {gpus()} GPUs)"
    if _local is not None:
        raise Infeasible(f"{message}; use --num-workers {max(1, most)}")
    logger.warning("%s: they wait until nodes are added", message)


def decoders(ranks: int) -> tuple[int, float]:
    """How many actors each of `ranks` trainers may keep to read for it, and the CPUs that one asks Ray for.

    One CPU for each trainer and one for the job itself are left out. Where fewer than two are left for a rank, an actor
    asks for a fraction: those that hold a CPU never give it back, and after the loss of a node all ranks must still
    find a place for one, or the ranks that have theirs would wait for ever for the one that has not.
    """
    left = max(0.0, resources().get("CPU", 0.0) - 1 - ranks) / ranks
    return max(1, int(left)), 1.0 if left >= 2 else round(left / 4, 2)


def disconnect() -> None:
    """Leave the cluster, and stop it if this process started it. Safe to call when not connected."""
    global _local
    if ray.is_initialized():
        ray.shutdown()
    if _local is not None:
        _local.shutdown()  # type: ignore[no-untyped-call]
        _local = None
        for name in worker.LOOPBACK:
            os.environ.pop(name, None)
        ray_constants.ENABLE_RAY_CLUSTER = _several_nodes


def map_pieces(
    what: str, function: Callable[..., Any], pieces: Sequence[dict[str, Any]], **options: Any
) -> list[dict[str, Any]]:
    """All of `stream_pieces`, for results that are small."""
    return list(stream_pieces(what, function, pieces, **options))


def stream_pieces(
    what: str,
    function: Callable[..., Any],
    pieces: Sequence[dict[str, Any]],
    *,
    rows: Sequence[int] | None = None,
    unit: str | None = None,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Run `function` once for every piece, each as a Ray task, and yield its results in the order of `pieces`.

    Args:
        what: a word for the progress lines and the metrics.
        function: piece -> result, both small mappings of JSON-like values, or a class that Ray Data makes an actor of.
            It writes its output itself. What all pieces share goes into `fn_kwargs` or `fn_constructor_kwargs`.
        rows: rows of each piece, for progress; `function` calls `progress.advance` as it goes through them. Left out,
            finished pieces are counted.
        unit: what is counted; left out, rows, or shards where `rows` is left out.
        options: for Ray Data's `map`, such as fn_kwargs, compute, num_cpus or memory.

    Raises:
        Whatever `function` raises: a failing piece stops the job, since bad rows were quarantined inside it.
    """
    if not pieces:
        return
    connect()
    if isinstance(function, type):
        shared = options.pop("fn_constructor_kwargs", {})
        options["fn_constructor_kwargs"] = {"stage": what, "kind": function, "shared": shared}
        counted: Callable[..., Any] = measure.Actor
    else:
        options["fn_kwargs"] = {"stage": what, "function": function, "shared": options.pop("fn_kwargs", {})}
        counted = measure.task
    sizes, default = ([1] * len(pieces), "shards") if rows is None else (rows, "rows")
    items = measure.Items(sizes)
    dataset = ray.data.from_items(items.numbered(pieces), override_num_blocks=len(pieces)).map(counted, **options)
    try:
        with progress.stage(what, sum(sizes), unit or default, poll=items.done) as shown:
            yield from items.passed(dataset.iter_rows())
            shown.done = sum(sizes)
    finally:
        items.forget()
