"""Image towers of the library `transformers`: ResNet, ViT, DINOv2 and CLIP, from a local directory.

The directory is as written by `save_pretrained` or downloaded from a hub: config.json with the sizes, weights as
safetensors (one file, or shards with an index), optionally preprocessor_config.json. Nothing is downloaded, no code of
the directory is run, and nothing is unpickled.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from zsr.errors import ConfigError, DamagedArtifact

CONFIG: Final = "config.json"
PREPROCESSING: Final = "preprocessor_config.json"
WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
DERIVED: Final = {"stage_names", "out_features", "out_indices"}  # only used by transformers' object detectors


@dataclass(frozen=True, slots=True)
class Kind:
    """A family of towers.

    Attributes:
        types: allowed values of `model_type` in config.json.
        config, network: names of classes of transformers.
        outputs: per layer, extracts the feature from the network's output.
        width: per layer, the key of its width in the configuration.
        options: per layer, arguments of the network's constructor.
        fixed: configuration entries that override those of the directory.
        tokens: the module that turns images into tokens (B, 1 + positions, H), class token first; prompts are inserted
            after the class token.
    """

    types: tuple[str, ...]
    config: str
    network: str
    outputs: Mapping[str, Callable[[Any], Tensor]]
    width: Mapping[str, str]
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    tokens: str = ""


KINDS: Final[Mapping[str, Kind]] = {
    "resnet": Kind(
        ("resnet",),
        "ResNetConfig",
        "ResNetModel",
        {"pooled": lambda output: output.pooler_output.flatten(1)},
        {"pooled": "hidden_sizes"},
    ),
    "vit": Kind(
        ("vit",),
        "ViTConfig",
        "ViTModel",
        {"cls": lambda output: output.last_hidden_state[:, 0], "pooled": lambda output: output.pooler_output},
        {"cls": "hidden_size", "pooled": "pooler_output_size"},
        {"cls": {"add_pooling_layer": False}},  # weights fine-tuned for classification have no such layer
        tokens="embeddings",
    ),
    "dinov2": Kind(
        ("dinov2",),
        "Dinov2Config",
        "Dinov2Model",
        {"cls": lambda output: output.last_hidden_state[:, 0]},
        {"cls": "hidden_size"},
        fixed={"use_mask_token": False},  # only used in pretraining; a parameter without a gradient
        tokens="embeddings",
    ),
    "clip": Kind(
        ("clip", "clip_vision_model"),
        "CLIPVisionConfig",
        "CLIPVisionModelWithProjection",
        {"projected": lambda output: output.image_embeds},
        {"projected": "projection_dim"},
        tokens="vision_model.embeddings",
    ),
}


class Pretrained(nn.Module):
    """A tower built from its configuration; its parameters are random until `load`.

    Args:
        name: key of `KINDS`.
        layer: key of its outputs.
        config: from `read_config`, optionally with `prompts`: the number of learned tokens added to those of an image
            (visual prompts, as CLIP-AT tunes them; recalled). Prompts are not part of any weights file.

    Raises:
        ConfigError: invalid sizes, prompts for a network without tokens, or transformers is not installed.
    """

    def __init__(self, name: str, layer: str, config: Mapping[str, Any]) -> None:
        super().__init__()
        library, kind = _library(), KINDS[name]
        self.name, self.layer = name, layer
        self.options = dict(kind.options.get(layer, {}))
        try:
            self.network: Any = getattr(library, kind.network)(_settings(name, config), **self.options)
        except (TypeError, ValueError, KeyError, RuntimeError, ZeroDivisionError) as error:
            raise ConfigError(f"backbone {name}: its configuration is not valid: {error!r}") from error
        width = config[kind.width[layer]]
        self.dim = int(width if isinstance(width, int) else width[-1])
        if count := int(config.get("prompts", 0)):
            self._prompt(count, kind)

    def _prompt(self, count: int, kind: Kind) -> None:
        if not kind.tokens:
            raise ConfigError(f"backbone {self.name} has no tokens and takes no prompts; only ViT, DINOv2 and CLIP do")
        self.prompts = nn.Parameter(0.02 * torch.randn(count, self.network.config.hidden_size))

        def join(_module: nn.Module, _inputs: Any, tokens: Tensor) -> Tensor:
            prompts = self.prompts.expand(len(tokens), -1, -1)
            return torch.cat([tokens[:, :1], prompts, tokens[:, 1:]], dim=1)

        self.network.get_submodule(kind.tokens).register_forward_hook(join)

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images (B, 3, H, W) -> features (B, F)."""
        return KINDS[self.name].outputs[self.layer](self.network(pixel_values=images))

    def load(self, directory: Path) -> None:
        """Load the weights of a directory, as float32, with transformers, which maps the names in old files.

        Weights of other parts (a classifier, CLIP's text tower) are ignored.

        Raises:
            ConfigError: no such files.
            DamagedArtifact: the weights do not match the network, or some are missing.
        """
        weights_files(directory)
        try:
            loaded, found = type(self.network).from_pretrained(
                directory,
                config=self.network.config,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **self.options,
            )
        except Exception as error:  # safetensors and transformers have no common exception class
            raise DamagedArtifact(f"{directory}: does not fit backbone {self.name}: {error}") from error
        if found["missing_keys"]:
            raise DamagedArtifact(
                f"{directory}: lacks {len(found['missing_keys'])} weights of backbone {self.name} with layer "
                f"{self.layer}, such as {min(found['missing_keys'])!r}; use weights that were saved with it"
            )
        self.network.load_state_dict(loaded.state_dict())


def weights_files(directory: Path) -> tuple[Path, ...]:
    """The files of a directory that affect features, sorted by name.

    Raises:
        ConfigError: not such a directory, an adapter, or weights that are not safetensors.
    """
    if not (directory / CONFIG).is_file():
        raise ConfigError(f"{directory}: found no {CONFIG}; expected a directory with it and {WEIGHTS}")
    if (directory / "adapter_config.json").exists():
        raise ConfigError(f"{directory}: found an adapter; merge it into its base model and save the result")
    files = [directory / CONFIG, *_safetensors(directory)]
    if (directory / PREPROCESSING).is_file():
        files.append(directory / PREPROCESSING)
    return tuple(sorted(files, key=lambda file: file.name))


def _safetensors(directory: Path) -> list[Path]:
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if not (directory / INDEX).is_file():
        raise ConfigError(
            f"{directory}: found neither {WEIGHTS} nor {INDEX}; only safetensors are read, convert the weights"
        )
    shards = _json(directory / INDEX).get("weight_map", {})
    names = sorted({str(name) for name in shards.values()})
    if bad := [name for name in names if Path(name).name != name or not (directory / name).is_file()]:
        raise ConfigError(f"{directory / INDEX}: names {bad[0]!r}; expected a file in the same directory")
    return [directory / INDEX, *(directory / name for name in names)]


def read_config(name: str, directory: Path) -> dict[str, Any]:
    """Read the configuration of backbone `name` from config.json, with the library's defaults for missing entries.

    The result can be written as JSON. Of a full CLIP model it is the image tower's part.

    Raises:
        ConfigError: no such file, another kind of model, or quantized weights.
    """
    path = directory / CONFIG
    raw = _json(path)
    if (found := raw.get("model_type")) not in KINDS[name].types:
        raise ConfigError(f"{path}: model_type {found!r}, expected {' or '.join(KINDS[name].types)} for {name}")
    if "quantization_config" in raw:
        raise ConfigError(f"{path}: quantized weights; use weights in 16 or 32 bits")
    if "vision_config" in raw:
        above = {"projection_dim": raw["projection_dim"]} if "projection_dim" in raw else {}
        raw = {**raw["vision_config"], **above}
    try:
        full: dict[str, Any] = _settings(name, raw).to_dict()
    except Exception as error:  # the library validates with its own exceptions
        raise ConfigError(f"{path}: {error}") from error
    return {**{key: value for key, value in full.items() if key in _known(name)}, **KINDS[name].fixed}


def read_preprocessing(directory: Path) -> dict[str, Any]:
    """`shift`, `divisor` and `interpolation`, each if preprocessor_config.json has it.

    (pixel * rescale - mean) / std is (pixel - mean / rescale) / (std / rescale).

    Raises:
        ConfigError: an interpolation other than bilinear or bicubic, not one number per channel, or pixels that are not
            rescaled or normalized.
    """
    path = directory / PREPROCESSING
    raw = _json(path) if path.is_file() else {}
    if off := [key for key in ("do_rescale", "do_normalize") if raw.get(key) is False]:
        raise ConfigError(f"{path}: {off[0]} is false; expected pixels that are rescaled and normalized")
    found: dict[str, Any] = {}
    try:
        rescale = float(raw.get("rescale_factor", 1 / 255))
        if "image_mean" in raw and "image_std" in raw:
            found["shift"] = tuple(float(mean) / rescale for mean in raw["image_mean"])
            found["divisor"] = tuple(float(std) / rescale for std in raw["image_std"])
        if "resample" in raw:
            found["interpolation"] = {2: "bilinear", 3: "bicubic"}[raw["resample"]]
    except (TypeError, ValueError, KeyError, ZeroDivisionError) as error:
        raise ConfigError(f"{path}: {error!r}; expected 3 means, 3 stds, and resample 2 or 3") from error
    return found


def _known(name: str) -> set[str]:
    """Configuration entries that define the network: not labels, code, kernels or bookkeeping."""
    library = _library()
    return set(_class(name)().to_dict()) - set(library.PretrainedConfig().to_dict()) - DERIVED


def _settings(name: str, config: Mapping[str, Any]) -> Any:
    known = _known(name)
    return _class(name)(**{key: value for key, value in config.items() if key in known})


def _class(name: str) -> Any:
    return getattr(_library(), KINDS[name].config)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: found a {type(found).__name__}, expected a JSON object")
    return found


def _library() -> Any:
    """Import transformers; only here, since it takes seconds."""
    try:
        import transformers  # the extra `towers`
    except ImportError:
        raise ConfigError("this backbone requires transformers; install zsr with the extra 'towers'") from None
    library: Any = transformers  # only partly typed
    library.logging.set_verbosity_error()  # missing weights raise an error here; unused ones need no report
    library.logging.disable_progress_bar()
    return library
