"""Model registry. To add a model, add a file to this folder and a line to MODELS, or an entry point to another package.

A model's module has its class and `Config`, and optionally PRESETS, SCHEDULE and SMALL.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, cast

from pydantic import ValidationError

from zsr import plugins
from zsr.errors import ConfigError

if TYPE_CHECKING:
    from zsr.models.protocol import Embedder, Inputs, ModelConfig

__all__ = ["MODELS", "Entry", "build", "configure"]


@dataclass(frozen=True, slots=True)
class Entry:
    """A registered model.

    Attributes:
        config: class of its options, `Config` of its module.
        model: its class.
        presets: named sets of options, `PRESETS` of its module (without the default values).
        schedule: model-specific defaults of epochs, steps_per_epoch and patience, if any; `SCHEDULE` of its module.
        small: options of a small instance for tests, built in milliseconds; `SMALL` of its module.
    """

    config: type[ModelConfig]
    model: type[Embedder]
    presets: Mapping[str, ModelConfig] = field(default_factory=dict)
    schedule: Mapping[str, int] = field(default_factory=dict)
    small: Mapping[str, Any] = field(default_factory=dict)


def _entry_of(module: Any, name: str) -> Entry:
    return Entry(
        config=module.Config,
        model=getattr(module, name),
        presets=getattr(module, "PRESETS", {}),
        schedule=getattr(module, "SCHEDULE", {}),
        small=getattr(module, "SMALL", {}),
    )


MODELS: Final = plugins.Registry(
    plugins.MODELS,
    "model",
    {
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
    },
    _entry_of,
)


def configure(name: str, options: Mapping[str, Any], preset: str | None = None) -> ModelConfig:
    """The complete options of model `name`: its defaults or a preset, overridden by `options`.

    Raises:
        ConfigError: no such model, preset or option, or an invalid value.
    """
    entry = MODELS[name]
    if preset is not None and preset not in entry.presets:
        raise ConfigError(f"model {name} has no preset {preset!r}; its presets are {sorted(entry.presets)}")
    base = entry.presets[preset].model_dump() if preset is not None else {}
    try:
        return entry.config.model_validate({**base, **options})
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"model {name}: {wrong}; its options are {sorted(entry.config.model_fields)}") from error


def build(name: str, options: Mapping[str, Any], inputs: Inputs) -> Embedder:
    """Build model `name` for input sizes `inputs`, initialized from torch's global generator.

    Raises:
        ConfigError: see `configure`; or the model does not support such inputs.
    """
    make = cast("Callable[[ModelConfig, Inputs], Embedder]", MODELS[name].model)  # the base class has another signature
    return make(configure(name, options), inputs)
