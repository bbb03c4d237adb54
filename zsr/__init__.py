"""zsr: zero-shot retrieval, trained and indexed at scale.

The public names are imported when they are first used: `import zsr` itself loads nothing heavy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from zsr.artifact import open_artifact
    from zsr.checkpoint import open_model
    from zsr.errors import ZsrError
    from zsr.exported import load
    from zsr.index.searching.searcher import Searcher
    from zsr.index.searching.sharded import ShardedSearcher

__version__ = "0.1.0"

__all__ = ["Searcher", "ShardedSearcher", "ZsrError", "__version__", "load", "open_artifact", "open_model"]

_FROM: Final = {
    "Searcher": "zsr.index.searching.searcher",
    "ShardedSearcher": "zsr.index.searching.sharded",
    "ZsrError": "zsr.errors",
    "load": "zsr.exported",
    "open_artifact": "zsr.artifact",
    "open_model": "zsr.checkpoint",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _FROM:
        raise AttributeError(f"module 'zsr' has no attribute {name!r}; public names are {__all__}")
    found = getattr(import_module(_FROM[name]), name)
    globals()[name] = found  # so that this is called once
    return found


def __dir__() -> list[str]:
    return __all__
