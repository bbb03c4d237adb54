"""Connect to a Ray cluster, and map functions over work items. The only module that connects to Ray.

A job attaches to the cluster of `ray job submit`, or starts a small local one. `stream_by_ray` runs a function over
work items (shards) by Ray Data, with its backpressure and its retries after a lost worker or node.
"""

import atexit
import logging
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import grpc
import ray
from ray._private import ray_constants, services
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # compiled
from ray.cluster_utils import Cluster
from ray.data import DataContext

from zsr import noise, process, progress, telemetry
from zsr.errors import ConfigError, ZsrError
from zsr.interrupt import WATCH
from zsr.storage import shared_environment

logger = logging.getLogger("zsr")

FOR_TESTS = ("ZSR_FAULT", "ZSR_FAKE_GPU", "ZSR_EXECUTOR")  # variables set by tests, passed to every process of a job
ANSWER: Final = 5.0  # timeout in seconds for an answer of the head; Ray itself would try for over 13 minutes
# max bytes of the path of Ray's session folder: Ray appends the rest, and a socket's path is limited to 107 bytes
SHORT: Final = 107 - len("/ray/session_2026-11-28_09-00-00_000000_4194304/sockets/plasma_store.1")


_local: Cluster | None = None  # the cluster started by this process, if any
_leaving = ExitStack()  # undoes the side effects of `connect` other than the connection


def connect() -> None:
    """Attach to the cluster of RAY_ADDRESS (set inside a submitted job), or start a local one. Safe to call again.

    Raises:
        ConfigError: no Ray cluster answers at RAY_ADDRESS, or it refuses this process.
        ZsrError: a local cluster did not start.
    """
    if ray.is_initialized():
        return
    process.setup()
    os.environ.setdefault("RAY_DATA_USAGE_DISABLED", "1")  # no actor and thread that collect and send usage statistics
    given = os.environ.get("RAY_ADDRESS", "")
    address = _start_local() if given in ("", "local") else _answering(given)
    root = str(Path(__file__).resolve().parents[1])
    environment = {
        # otherwise Ray Train's placement-group cleaner may ask another cluster of this machine whether its controller
        # is alive, and remove the workers of a run that this cluster does not know
        "RAY_ADDRESS": address,
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Ray Train's own logging set-up would undo the levels of process.setup
        **{f"RAY_TRAIN_ENABLE_{who}_STRUCTURED_LOGGING": "0" for who in ("CONTROLLER", "WORKER")},
        **shared_environment(),
        **{name: value for name, value in os.environ.items() if name in FOR_TESTS},
    }
    runtime = {"env_vars": environment, "worker_process_setup_hook": "zsr.process.setup"}
    try:
        ray.init(address=address, runtime_env=runtime, logging_level=logging.ERROR)
    except Exception as error:  # Ray raises many types: another version of Ray or Python, a missing or rejected token
        said = " ".join(str(error).split())
        if _local is not None:
            raise _not_started(said) from error
        raise ConfigError(_unusable(given, said)) from error
    WATCH.install()  # Ray has replaced the handler of SIGTERM
    noise.keep_out()
    set_data_context()


def _unusable(address: str, why: str) -> str:
    return (
        f"RAY_ADDRESS is {address!r}: {why}; set it to HOST:PORT of a running Ray cluster, or unset it "
        "(`unset RAY_ADDRESS`) to run only on this machine"
    )


def _not_started(why: str) -> ZsrError:
    return ZsrError(f"Ray did not start on this machine: {why}; a busy machine may be too slow: run the command again")


def _answering(given: str) -> str:
    """The address to pass to Ray for RAY_ADDRESS, after a Ray head has answered there.

    For a head that listens only on loopback, the loopback address is kept, which Ray would replace with the machine's
    own.

    Raises:
        ConfigError: nothing answers within seconds, or it is not a Ray head.
    """
    scheme, separator, rest = given.rpartition("://")
    if separator and scheme != "ray":
        raise ConfigError(_unusable(given, f"{scheme}:// is not an address of a Ray head"))
    try:
        address = rest if separator else services.canonicalize_bootstrap_address_or_die(given)
        why = _unreachable(address) if separator else _refusal(address)
        if why and address != given and _on_loopback(given):
            address, why = given, _refusal(given)
            if not why:
                _leaving.enter_context(_loopback())
    except (ValueError, OSError) as error:
        why = " ".join(str(error).split())
    if why:
        raise ConfigError(_unusable(given, why))
    return given if separator else address


def _on_loopback(address: str) -> bool:
    return address.rpartition(":")[0].strip("[]") in ("127.0.0.1", "localhost", "::1")


def _refusal(address: str) -> str:
    """Why there is no usable Ray head at HOST:PORT; empty if one answers."""
    if why := _unreachable(address):
        return why
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):  # not checked, since only Ray has the certificates
        return ""
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")(b"", timeout=ANSWER, wait_for_ready=True)
        except grpc.RpcError as error:
            if error.code() not in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                return f"the server at {address} is not a Ray head"
            if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":  # Ray would try for 20 s and not say this
                return (
                    f"the cluster at {address} requires a token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to "
                    "its token file"
                )
    return ""


def _unreachable(address: str) -> str:
    """Why no connection can be made to HOST:PORT; empty if one can."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return "expected HOST:PORT"
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER):
            return ""
    except (OSError, OverflowError, UnicodeError) as error:
        return f"nothing answers at {address} ({getattr(error, 'strerror', None) or error})"


@contextmanager
def _loopback() -> Iterator[None]:
    """Make Ray use 127.0.0.1 as this machine's address, in this process and its children."""
    several_nodes = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False  # for this process, in which Ray has already read the environment
    try:
        with environment(process.LOOPBACK):
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = several_nodes


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, and restore them afterwards."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def private_folder(parent: str | None = None) -> Iterator[str]:
    """A folder for a cluster's sessions that is removed when the cluster ends.

    In a shared folder, Ray would take the most recently started cluster for the current one.
    """
    folder = tempfile.mkdtemp(prefix="zsr-", dir=parent)

    def remove() -> None:
        shutil.rmtree(folder, ignore_errors=True)

    WATCH.at_end(remove)
    try:
        yield folder
    finally:
        remove()


@contextmanager
def session_folders() -> Iterator[tuple[str, str]]:
    """Folders for Ray's sessions, whose sockets need a short path, and for spilled objects, which need disk space.

    Raises:
        ConfigError: none of RAY_TMPDIR, TMPDIR and /tmp is writable.
    """
    wanted = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    with ExitStack() as stack:
        try:
            os.makedirs(wanted, exist_ok=True)
            spilled = stack.enter_context(private_folder(wanted))
            short = len(os.fsencode(spilled)) <= SHORT
            folder = spilled if short else stack.enter_context(private_folder("/tmp"))
        except OSError as error:
            raise ConfigError(
                f"no folder for Ray's sessions: {error}; set RAY_TMPDIR or TMPDIR to a writable folder"
            ) from error
        yield folder, spilled


@contextmanager
def _token(folder: str) -> Iterator[None]:
    """Create a token for this process's own cluster, if the environment requires token auth and has none."""
    loader = AuthenticationTokenLoader.instance()
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token" or loader.has_token(ignore_auth_mode=True):
        yield
        return
    path = Path(folder, "token")
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))
    try:
        with environment({"RAY_AUTH_TOKEN_PATH": str(path)}):
            loader.reset_cache()
            yield
    finally:
        loader.reset_cache()


def _start_local() -> str:
    """Start a one-node cluster that always ends with this process; returns its address.

    It listens only on loopback: local jobs need no token, so no other machine may reach it.
    """
    global _local
    folder, spilled = _leaving.enter_context(session_folders())
    _leaving.enter_context(environment({"RAY_TMPDIR": folder}))
    _leaving.enter_context(_loopback())
    _leaving.enter_context(_token(folder))
    head = {
        "num_cpus": process.local_cpus(),
        "object_store_memory": 512 << 20,
        "include_dashboard": False,
        "node_ip_address": "127.0.0.1",
        "object_spilling_directory": spilled,
    }
    try:
        _local = Cluster(initialize_head=True, shutdown_at_exit=True, head_node_args=head)
    except Exception as error:  # Ray raises plain Exception if its processes do not start in time
        raise _not_started(" ".join(str(error).split())) from error
    WATCH.install()  # Cluster has replaced the handler of SIGTERM
    atexit.register(disconnect)  # before the cluster stops; otherwise this process would try to recover its objects
    return str(_local.address)


def set_data_context() -> None:
    """Configure Ray Data for deterministic order, without progress bars; for each process that runs a stream."""
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # a wrapper would hide the exit code of our errors
    process.setup()  # again: importing ray.data sets its own log levels


def is_connected() -> bool:
    """Whether this process is connected to a cluster."""
    return bool(ray.is_initialized())


def started_here() -> bool:
    """Whether this process started the cluster that it is connected to: a single node without an autoscaler."""
    return _local is not None


def resources() -> dict[str, float]:
    """The current resources of the cluster, by name. Connects to it if necessary."""
    connect()
    offered: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return offered


def decoders(ranks: int) -> tuple[int, float]:
    """Number of data-loading actors per rank of `ranks` trainers, and the CPUs that each of them requests.

    One CPU per trainer and one for the job itself are reserved. If fewer than two CPUs are left per rank, an actor
    requests a fraction of one: actors never release their CPUs, and after the loss of a node every rank must still be
    able to place an actor, or the other ranks would wait forever for the rank without one.
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
    _leaving.close()


def stream_by_ray(
    what: str,
    function: Callable[..., Any],
    pieces: Sequence[dict[str, Any]],
    sizes: Sequence[int],
    unit: str,
    options: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    """`executor.stream_pieces` on Ray's workers: each work item is a Ray task, or a call of an actor.

    Args:
        sizes: size of each item in `unit`.
    """
    connect()
    given = dict(options)
    if isinstance(function, type):
        shared = given.pop("fn_constructor_kwargs", {})
        given["fn_constructor_kwargs"] = {"stage": what, "kind": function, "shared": shared}
        counted: Callable[..., Any] = telemetry.Actor
    else:
        given["fn_kwargs"] = {"stage": what, "function": function, "shared": given.pop("fn_kwargs", {})}
        counted = telemetry.task
    items = telemetry.Items(sizes)
    dataset = ray.data.from_items(items.numbered(pieces), override_num_blocks=len(pieces)).map(counted, **given)
    try:
        with progress.stage(what, sum(sizes), unit, poll=items.done) as shown:
            yield from items.passed(dataset.iter_rows())
            shown.done = sum(sizes)
    finally:
        items.forget()
