"""The models by name. One more model is one file in this folder and one line in `MODELS`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, cast

from pydantic import ValidationError

from zsr.errors import ConfigError
from zsr.models import caae, cfsa, classifier, contrastive, cvae, doodle2search, lcale, raw, ridge, sem_pcyc, sketch_gcn
from zsr.models.protocol import Embedder, Inputs, ModelConfig

__all__ = ["MODELS", "Entry", "build", "configure"]


@dataclass(frozen=True, slots=True)
class Entry:
    """A model.

    Attributes:
        config: its options.
        model: its class.
        presets: named sets of options (the options' own defaults need no name).
        schedule: defaults of the run's epochs, steps_per_epoch and patience, where those of the papers do not fit it.
    """

    config: type[ModelConfig]
    model: type[Embedder]
    presets: Mapping[str, ModelConfig] = field(default_factory=dict)
    schedule: Mapping[str, int] = field(default_factory=dict)


MODELS: Final[Mapping[str, Entry]] = MappingProxyType(
    {
        "raw": Entry(raw.Config, raw.Raw, raw.PRESETS),
        "ridge": Entry(ridge.Config, ridge.Ridge),
        "classifier": Entry(classifier.Config, classifier.Classifier),
        "sem-pcyc": Entry(sem_pcyc.Config, sem_pcyc.SemPcyc, sem_pcyc.PRESETS),
        "cvae": Entry(cvae.Config, cvae.CVAE, cvae.PRESETS),
        "caae": Entry(caae.Config, caae.CAAE, caae.PRESETS),
        "doodle2search": Entry(doodle2search.Config, doodle2search.Doodle2Search, doodle2search.PRESETS),
        "sketch-gcn": Entry(sketch_gcn.Config, sketch_gcn.SketchGcn, sketch_gcn.PRESETS),
        "lcale": Entry(lcale.Config, lcale.Lcale, lcale.PRESETS),
        "cfsa": Entry(cfsa.Config, cfsa.Cfsa, cfsa.PRESETS),
        "contrastive": Entry(contrastive.Config, contrastive.Contrastive, schedule=contrastive.SCHEDULE),
    }
)


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
    make = cast(Callable[[ModelConfig, Inputs], Embedder], _entry(name).model)  # the base class has another signature
    return make(configure(name, options), inputs)


def _entry(name: str) -> Entry:
    if name not in MODELS:
        raise ConfigError(f"no model {name!r}; known are {sorted(MODELS)}")
    return MODELS[name]
