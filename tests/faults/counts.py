"""How much is tried: the counts of each change, or those of the night where the variable ZSR_NIGHTLY is set."""

import os


def count(change: int, night: int) -> int:
    """`night` if ZSR_NIGHTLY is set and not empty, else `change`."""
    return night if os.environ.get("ZSR_NIGHTLY") else change
