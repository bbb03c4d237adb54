"""Keep two lines of Ray's out of the jobs' output: they look fatal, and are not.

Ray's core logs at error level, once per process, that an actor which may restart was made with arguments in the object
store, and that the restart fails if they are lost (github.com/ray-project/ray/issues/53727). Every actor of Ray Data
and of Ray Train is made so. Their arguments live as long as the process that made the actor, without which no restart
would be of use, so nothing can get lost. There is no setting for this line alone, and no logger: C++ writes it.

The head says at error level that it failed to kill an actor whose process has ended by itself meanwhile, as those of a
finished stage do.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import ray
from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

LINE: Final = "has constructor arguments in the object store and max_restarts > 0."
GONE: Final = "Failed to kill actor"
_FORWARDED: Final = "ray_print_logs"  # Ray's name for what prints the output of workers in the driver


def keep_out() -> None:
    """Keep the line out of what this driver prints, both its own and its workers'. Call once after each `ray.init`."""
    with _without_line():
        _provoke()
    printer = next((handler for name, handler in dispatcher.handlers if name == _FORWARDED), None)
    if printer is not None:
        dispatcher.remove_handler(_FORWARDED)
        dispatcher.add_handler(_FORWARDED, without_line(printer))


def without_line(printer: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    """`printer` of a batch of lines from Ray's processes, which never sees the two."""

    def printed(batch: dict[str, Any]) -> None:
        lines = [line for line in batch["lines"] if LINE not in line and GONE not in line]
        if lines:
            printer({**batch, "lines": lines})

    return printed


def _provoke() -> None:
    """Have this process log the line now: make an actor that no node takes, and remove it before anyone looks."""

    class Nobody:
        def __init__(self, _: object) -> None: ...

    kind: Any = ray.remote(max_restarts=1, num_cpus=0, resources={"zsr_nowhere": 1})(Nobody)
    ray.kill(kind.remote(ray.put(None)))


@contextmanager
def _without_line() -> Iterator[None]:
    """Hold back what is written to this process's standard error, and write all but the line afterwards."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        kept = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            held.seek(0)
            os.write(2, b"".join(line for line in held if LINE.encode() not in line))
