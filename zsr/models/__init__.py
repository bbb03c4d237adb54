"""The models by name. One more model is one file in this folder and one line in `_OURS`, or a package with an entry
point; the module of a model is imported when the model is first used.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Final, cast

from pydantic import ValidationError

from zsr.errors import ConfigError

if TYPE_CHECKING:
    from zsr.models.protocol import Embedder, Inputs, ModelConfig

__all__ = ["GROUP", "MODELS", "Entry", "build", "configure"]

GROUP: Final = "zsr.models"  # of entry points: other packages' models
_OURS: Final = {
    "raw": "zsr.models.raw:Raw",
    "ridge": "zsr.models.ridge:Ridge",
    "classifier": "zsr.models.classifier:Classifier",
    "sem-pcyc": "zsr.models.sem_pcyc:SemPcyc",
    "cvae": "zsr.models.cvae:CVAE",
    "caae": "zsr.models.caae:CAAE",
    "doodle2search": "zsr.models.doodle2search:Doodle2Search",
    "sketch-gcn": "zsr.models.sketch_gcn:SketchGcn",
    "lcale": "zsr.models.lcale:Lcale",
    "cfsa": "zsr.models.cfsa:Cfsa",
    "contrastive": "zsr.models.contrastive:Contrastive",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A model.

    Attributes:
        config: its options, `Config` of its module.
        model: its class.
        presets: named sets of options, `PRESETS` of its module (the options' own defaults need no name).
        schedule: defaults of the run's epochs, steps_per_epoch and patience, where those of the papers do not fit it;
            `SCHEDULE` of its module.
    """

    config: type[ModelConfig]
    model: type[Embedder]
    presets: Mapping[str, ModelConfig] = field(default_factory=dict)
    schedule: Mapping[str, int] = field(default_factory=dict)


class Registry(Mapping[str, Entry]):
    """Models by name: ours, and those that installed packages register under the entry point group GROUP.

    An entry point `NAME = PACKAGE.MODULE:CLASS` adds a model; its module has `Config`, and may have PRESETS and
    SCHEDULE, as those of this folder do.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Entry] = {}
        self._points: dict[str, EntryPoint] | None = None

    def _known(self) -> dict[str, EntryPoint]:
        """All models, ours first; a name of ours is not taken over."""
        if self._points is None:
            ours = {name: EntryPoint(name, value, GROUP) for name, value in _OURS.items()}
            others = {point.name: point for point in sorted(entry_points(group=GROUP)) if point.name not in ours}
            self._points = ours | others
        return self._points

    def __getitem__(self, name: str) -> Entry:
        if name not in self._loaded:
            point = EntryPoint(name, _OURS[name], GROUP) if name in _OURS else self._known()[name]
            module = importlib.import_module(point.module)
            self._loaded[name] = Entry(
                config=module.Config,
                model=getattr(module, point.attr),
                presets=getattr(module, "PRESETS", {}),
                schedule=getattr(module, "SCHEDULE", {}),
            )
        return self._loaded[name]

    def __contains__(self, name: object) -> bool:  # without importing it
        return name in _OURS or name in self._known()

    def __iter__(self) -> Iterator[str]:
        return iter(self._known())

    def __len__(self) -> int:
        return len(self._known())


MODELS: Final = Registry()


def configure(name: str, options: Mapping[str, Any], preset: str | None = None) -> ModelConfig:
    """The full options of model `name`: its defaults or a preset of it, with `options` on top.

    Raises:
        ConfigError: no such model, preset or option, or a value that the option does not take.
    """
    entry = _entry(name)
    if preset is not None and preset not in entry.presets:
        raise ConfigError(f"model {name} has no preset {preset!r}; its presets are {sorted(entry.presets)}")
    base = entry.presets[preset].model_dump() if preset is not None else {}
    try:
        return entry.config.model_validate({**base, **options})
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"model {name}: {wrong}; its options are {sorted(entry.config.model_fields)}") from error


def build(name: str, options: Mapping[str, Any], inputs: Inputs) -> Embedder:
    """Model `name` for data of sizes `inputs`, initialised from torch's global generator.

    Raises:
        ConfigError: see `configure`; or the model cannot serve such inputs.
    """
    make = cast("Callable[[ModelConfig, Inputs], Embedder]", _entry(name).model)  # the base class has another signature
    return make(configure(name, options), inputs)


def _entry(name: str) -> Entry:
    if name not in MODELS:
        raise ConfigError(f"no model {name!r}; known are {sorted(MODELS)}")
    return MODELS[name]
