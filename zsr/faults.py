"""Fault injection: named points at which a test may kill the process or simulate a full disk.

`here("artifact.seal")` is one dictionary lookup in production. A test arms a point through the environment variable
ZSR_FAULT, `NAME=kill` (SIGKILL to this process), `NAME=enospc` (OSError ENOSPC) or `NAME=wait` (ten minutes), with `@N`
to fire at the N-th call, and with `@N@FILE` to fire only in the one process that can create FILE, but not in its peers
or after a restart. `POINTS` lists every name, so that tests that iterate over it cover new points automatically.
"""

import errno
import os
import signal
import time
from collections import Counter
from typing import Final

POINTS: Final = (
    "artifact.write",
    "artifact.receipt",
    "artifact.manifest",
    "artifact.seal",
    "artifact.link",
    "prepare.listing",
    "prepare.shard",
    "features.shard",
    "train.report",
    "train.save",
    "train.saved",
    "train.step",
    "embed.shard",
    "index.train",
    "index.add",
    "index.merge",
    "index.tune",
    "index.change",
    "search.assign",
    "search.scan",
    "search.shard",
    "search.names",
    "evaluate.row",
)

_passed: Counter[str] = Counter()


def here(point: str) -> None:
    """Do nothing, unless the environment arms this point."""
    armed = os.environ.get("ZSR_FAULT")
    if armed is None:
        return
    name, _, rest = armed.partition("=")
    action, nth, marker = (*rest.split("@", 2), "", "")[:3]
    if name != point:
        return
    _passed[point] += 1
    if _passed[point] != int(nth or 1) or not _first(marker):
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "wait":
        time.sleep(600)
    if action == "enospc":
        raise OSError(errno.ENOSPC, "no space left on device (injected)", point)


def _first(marker: str) -> bool:
    """Whether no process has fired before, by a file that only one can create; True without a file."""
    if not marker:
        return True
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True
