"""Set up worker processes: silence known third-party warnings, and tune the allocator.

Ray calls `setup` in every worker process through the runtime environment. Nothing heavy is imported here, since it
would slow down the start of each process.
"""

import ctypes
import functools
import logging
import os
import threading
import warnings
from collections.abc import Callable

# without this, Ray uses an address that other machines can reach; it reads the variable when it is imported
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
# Ray Train logs each `report` call at INFO, a starting node logs a received signal, and Ray logs that another cluster
# runs on this machine
ADVICE = ("ray.train", "ray._private.utils", "DeepSpeed", "ray._private.node")
# Ray Data and Ray Train's worker log the stack of each exception that they also raise. Ray Train's placement-group
# cleaner asks the dashboard each second whether its controller is alive, and logs errors if there is no dashboard or
# several clusters share a machine
COMPLAINTS = (
    "ray.data",
    "ray.train.v2._internal.util",
    "ray.train.v2._internal.callbacks.placement_group_callback",
    "ray.train.v2._internal.execution.controller.placement_group_cleaner",
    "ray._private.services",
)
CLEANER = "PlacementGroupCleanerMonitor"  # Ray's name of the thread of that cleaner


def local_cpus() -> int:
    """CPUs of a local cluster: at least 4, so that two training workers and their data loading fit, also on a laptop
    with two cores.
    """
    return max(4, os.cpu_count() or 1)


def setup() -> None:
    """Set log levels and warning filters of this process."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch.distributed prints hundreds
    for name in ADVICE:
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in COMPLAINTS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    inherited = threading.excepthook
    if not (isinstance(inherited, functools.partial) and inherited.func is _thread_failed):
        threading.excepthook = functools.partial(_thread_failed, inherited)


def _thread_failed(inherited: Callable[[threading.ExceptHookArgs], object], args: threading.ExceptHookArgs) -> None:
    """Print a failed thread's traceback, except that of the cleaner, which fails when its cluster ends.

    The cleaner removes the remains of a killed controller, which the end of the cluster removes too.
    """
    if args.thread is None or args.thread.name != CLEANER:
        inherited(args)


# runtime environment of actors that call `keep_freed_memory`
ONE_ARENA = {"env_vars": {"MALLOC_ARENA_MAX": "1"}}
# constants of malloc.h
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next batch instead of returning it to the operating system.

    Activations of a batch of images are hundreds of MB in blocks that glibc maps and unmaps one by one, and the kernel
    zeroes each page again. For EfficientNet-Lite0 this was more than half of all time on a CPU. It only affects the
    main arena: arenas of other threads, on which Ray calls actors, still return memory, so actors must be started with
    ONE_ARENA. Does nothing with other C libraries.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, _NEVER)
