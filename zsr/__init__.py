"""zsr: zero-shot retrieval, trained and indexed at scale.

The package imports nothing heavy on its own; `zsr.models` runs without Ray, DeepSpeed and pyarrow.
"""

from importlib import import_module
from typing import Any, Final

__version__ = "0.1.0"

_PUBLIC: Final = {
    "ZsrError": "zsr.errors",
    "load": "zsr.exported",
    "open_artifact": "zsr.artifact",
    "open_model": "zsr.training.checkpoint",
    "Searcher": "zsr.index.search",
    "ShardedSearcher": "zsr.index.sharded",
}
__all__ = [
    "Searcher",
    "ShardedSearcher",
    "ZsrError",
    "__version__",
    "load",
    "open_artifact",
    "open_model",
]  # resolved lazily


def __getattr__(name: str) -> Any:
    """Resolve a public name when it is first used."""
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'zsr' has no attribute {name!r}; public names are {sorted(__all__)}")
