"""Registries of models, data sources and backbones, which installed packages extend.

A package adds one by an entry point, `NAME = "PACKAGE.MODULE:ATTRIBUTE"`, in the group zsr.models,
zsr.sources or zsr.backbones. The module is imported when NAME is first used.
"""

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final, TypeVar

from zsr.errors import ConfigError

T = TypeVar("T")

MODELS: Final = "zsr.models"
SOURCES: Final = "zsr.sources"
BACKBONES: Final = "zsr.backbones"


class Registry(Mapping[str, T]):
    """Entries by name: the built-in ones in their order, then those of other packages, which cannot replace a name.

    Args:
        group: of entry points.
        what: one entry, in words, for messages.
        ours: "MODULE:ATTRIBUTE" by name.
        load: module and name of the attribute -> entry; by default the attribute itself.
    """

    def __init__(self, group: str, what: str, ours: Mapping[str, str], load: Callable[[Any, str], T] = getattr) -> None:
        self.group, self.what, self._ours, self._load = group, what, ours, load
        self._loaded: dict[str, T] = {}
        self._found: dict[str, EntryPoint] | None = None

    def _points(self) -> dict[str, EntryPoint]:
        if self._found is None:
            self._found = {name: EntryPoint(name, value, self.group) for name, value in self._ours.items()}
            for point in sorted(entry_points(group=self.group)):
                self._found.setdefault(point.name, point)
        return self._found

    def __getitem__(self, name: str) -> T:
        """Raises ConfigError if there is no such entry, or the package that brings it cannot be imported."""
        if name not in self._loaded:
            if name not in self:
                raise ConfigError(f"no {self.what} {name!r}; there are {', '.join(self)}")
            point = self._points()[name]
            try:
                self._loaded[name] = self._load(import_module(point.module), point.attr)
            except Exception as error:  # a package of somebody else may raise anything
                if name in self._ours:
                    raise
                raise ConfigError(f"{self.what} {name!r}: entry point {point.value} does not load: {error}") from error
        return self._loaded[name]

    def __contains__(self, name: object) -> bool:
        return name in self._ours or name in self._points()

    def __iter__(self) -> Iterator[str]:
        return iter(self._points())

    def __len__(self) -> int:
        return len(self._points())
