"""Named points at which a test may kill the process or fill the disk.

`here("artifact.seal")` is one dictionary look-up in production. A test arms a point through the environment variable
ZSR_FAULT, `NAME=kill` (SIGKILL to this process) or `NAME=enospc` (OSError ENOSPC), with `@N` to fire at the N-th
passing. `POINTS` lists every name, so that a test which iterates it covers a new point on the day it appears.
"""

import errno
import os
import signal
from collections import Counter
from typing import Final

POINTS: Final = (
    "artifact.write",
    "artifact.receipt",
    "artifact.manifest",
    "artifact.seal",
    "artifact.link",
    "prepare.shard",
    "features.shard",
    "train.save",
    "train.step",
    "embed.shard",
    "index.train",
    "index.add",
    "index.merge",
    "index.tune",
)

_passed: Counter[str] = Counter()


def here(point: str) -> None:
    """Do nothing, unless the environment arms this point."""
    armed = os.environ.get("ZSR_FAULT")
    if armed is None:
        return
    name, _, action = armed.partition("=")
    action, _, nth = action.partition("@")
    if name != point:
        return
    _passed[point] += 1
    if _passed[point] != int(nth or 1):
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "enospc":
        raise OSError(errno.ENOSPC, "no space left on device (injected)", point)
