"""What every Ray worker process of ours does first: keep advice and known noise out of the jobs' logs.

Ray calls `setup` through the runtime environment. Nothing heavy is imported here, since each process pays for it.
"""

import ctypes
import functools
import logging
import os
import threading
import warnings
from collections.abc import Callable

# Ray looks for an address that other machines can reach, unless it takes itself to be on a laptop's system, which it
# decides when it is imported
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
# Ray Train reports each `report` call at INFO, a starting node that a signal came, and Ray that another cluster runs on
# this machine
ADVICE = ("ray.train", "ray._private.utils", "DeepSpeed", "ray._private.node")
# Ray Data, and Ray Train's worker, print the stack of each exception that they also raise. Ray Train's placement-group
# cleaner asks the dashboard each second whether its controller lives, and complains where none runs or where several
# clusters share a machine
COMPLAINTS = (
    "ray.data",
    "ray.train.v2._internal.util",
    "ray.train.v2._internal.callbacks.placement_group_callback",
    "ray.train.v2._internal.execution.controller.placement_group_cleaner",
    "ray._private.services",
)
CLEANER = "PlacementGroupCleanerMonitor"  # Ray's name of the thread of that cleaner


def local_cpus() -> int:
    """CPUs that a cluster of this machine alone offers: two training workers and the tasks that feed them fit, also on
    a laptop with two cores.
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
    """Print a failed thread's traceback, but not the cleaner's: it fails when its cluster ends, as that of a job does.

    It is there to remove what a killed controller leaves behind, and the end of the cluster removes that, too.
    """
    if args.thread is None or args.thread.name != CLEANER:
        inherited(args)


# runtime environment of actors that call `keep_freed_memory`
ONE_ARENA = {"env_vars": {"MALLOC_ARENA_MAX": "1"}}
# of malloc.h
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Have the C library keep what is freed for the next batch, in place of handing it back to the system.

    Activations of a batch of pictures are hundreds of MB in blocks that glibc maps and unmaps one by one; the system
    fills each page with zeros again. For EfficientNet-Lite0 that was more than half of all time on a CPU. It reaches
    the main arena only: another thread's, and Ray calls actors on such a thread, gives memory back all the same, so
    actors are to be started with ONE_ARENA. Does nothing under other C libraries.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, _NEVER)
