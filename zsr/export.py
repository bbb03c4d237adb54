"""Export a checkpoint as one safetensors file, its configuration and a model card, for use without Ray.

    DIR/model.safetensors    weights under the model's own names; `backbone/SIDE/...` if the backbone is included
    DIR/config.json          `Description`: model, backbone of its features, provenance
    DIR/README.md            the model card

config.json is written last and holds the SHA-256 of the weights: a directory without it, or with other weights, is not
an export. `zsr.load(DIR)` reads it, see `zsr.exported`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import save
from torch import Tensor

from zsr.artifact import Artifact, canonical, open_artifact, sha256, write_atomically
from zsr.checkpoint import open_model, summary, tensors
from zsr.data.decode import COMPATIBLE, VERSION
from zsr.embedding.encode import Featurizer, featurizer
from zsr.embedding.settings import BackboneSettings
from zsr.errors import ConfigError, DamagedArtifact
from zsr.models import backbones
from zsr.models.protocol import Inputs
from zsr.storage import files_below, is_file, read_file

WEIGHTS: Final = "model.safetensors"
CONFIG: Final = "config.json"
CARD: Final = "README.md"
BACKBONE: Final = "backbone/"  # prefix of the names of the backbone's tensors, followed by SIDE/
LARGEST: Final = 64 << 20  # max bytes of a config.json


class Description(BaseModel):
    """Content of config.json.

    Attributes:
        model, options, inputs: arguments of `zsr.models.build`.
        features: configuration of the FEATURES that it was trained on; None if it has an image tower.
        backbones: architecture of the included backbone by modality; empty if it is not included.
        settings, split, facts, parents: metadata of the checkpoint: training settings, data and scores.
        checkpoint: its digest.
        weights: SHA-256 of model.safetensors.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    model: str
    options: dict[str, Any]
    inputs: Inputs
    features: dict[str, Any] | None
    backbones: dict[str, dict[str, Any]] = {}
    settings: dict[str, Any]
    split: dict[str, Any]
    facts: dict[str, Any]
    parents: dict[str, str]
    checkpoint: str
    weights: str


def export(
    checkpoint: Artifact,
    output: Path,
    *,
    data: Artifact | None = None,
    include_backbone: bool = False,
    weights: Path | None = None,
) -> Description:
    """Write a checkpoint's chosen weights, configuration and model card to the directory `output`.

    Args:
        data: the DATA that it was trained on, for its name and attribution in the card.
        include_backbone: include the backbone that computed its features; otherwise `zsr.load` reads it from its
            package or from a file.
        weights: weights of that backbone, see `featurizer_of`.

    Raises:
        ConfigError: `output` holds something else; the checkpoint was trained on other data; or see `featurizer_of`.
        DamagedArtifact: the checkpoint does not verify, or the backbone has another digest.
    """
    if data is not None and data.digest != checkpoint.parents["data"]:
        raise ConfigError(
            f"--data {data.digest[:12]}: the checkpoint is of {checkpoint.parents['data'][:12]}; give that DATA"
        )
    model = open_model(checkpoint)
    found = featurizer_of(checkpoint.config["features"], weights) if include_backbone else None
    content = save({**tensors(model), **_backbone_tensors(found)})
    description = description_of(checkpoint, sha256(content), {} if found is None else _architectures(found))
    text = canonical(description.model_dump(mode="json"))
    _refuse_other(output, text)
    write_atomically(output / WEIGHTS, content)
    source = {} if data is None else dict(data.config["source"])
    write_atomically(output / CARD, card(description, summary(model), source).encode())
    write_atomically(output / CONFIG, text)
    return description


def description_of(
    checkpoint: Artifact, weights: str, included: Mapping[str, dict[str, Any]] | None = None
) -> Description:
    """The Description of an export of `checkpoint`.

    Args:
        weights: digest of the file or artifact with the weights.
        included: architectures of the included backbones, by modality.
    """
    return Description(
        **{name: checkpoint.config[name] for name in ("model", "options", "inputs", "features", "settings", "split")},
        backbones=dict(included or {}),
        facts=dict(checkpoint.facts),
        parents=dict(checkpoint.parents),
        checkpoint=checkpoint.digest,
        weights=weights,
    )


def read_description(directory: Path) -> Description:
    """Read the configuration of an export.

    Raises:
        ConfigError: there is none.
        DamagedArtifact: it is not in the format of `export`.
    """
    path = directory / CONFIG
    try:
        data = read_file(path, LARGEST + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{directory}: no {CONFIG}; expected a directory written by zsr export") from None
    if len(data) > LARGEST:
        raise DamagedArtifact(f"{path}: more than {LARGEST} bytes; export again")
    try:
        return Description.model_validate_json(data)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3])
        raise DamagedArtifact(f"{path}: {wrong}; export again with this version") from error


def featurizer_of(features: Mapping[str, Any] | None, weights: Path | None) -> Featurizer:
    """The Featurizer of FEATURES with the configuration `features`, whose weights must have the digest in it.

    Args:
        weights: a file or directory; for a fine-tuned backbone the ROOT of its checkpoint, OUTPUT/backbone of
            zsr features; None for the weights of the backbone's package.

    Raises:
        ConfigError: the checkpoint has an image tower, its features were imported or computed with an incompatible
            image decoder, or no weights are given.
        DamagedArtifact: the weights have another digest.
    """
    settings = settings_of(features)
    wanted = str(dict(features or {})["weights"])
    if "saw" not in dict(features or {}):
        return featurizer(settings, backbones.weights_path(settings.backbone, weights), wanted)
    if weights is None:
        raise ConfigError(f"backbone {settings.backbone} was fine-tuned; give its checkpoint {wanted} as weights")
    tuned = open_artifact(weights, "checkpoint")
    if tuned.digest != wanted:
        raise DamagedArtifact(f"{weights}: checkpoint {tuned.digest[:12]}, expected {wanted[:12]}")
    return featurizer(settings, tuned, wanted)


def settings_of(features: Mapping[str, Any] | None) -> BackboneSettings:
    """The settings in the configuration of FEATURES. Raises ConfigError if no backbone known here computed them."""
    if features is None:
        raise ConfigError("this checkpoint has its own image tower and needs no backbone")
    if features["backbone"] == "imported":
        raise ConfigError("the features of this checkpoint were imported, so its backbone is unknown")
    if features["decode"] not in COMPATIBLE:
        raise ConfigError(
            f"its images were decoded by decoder version {features['decode']}, but this is {VERSION}; train again"
        )
    return BackboneSettings(**{k: features[k] for k in BackboneSettings.model_fields if k != "texts"})


def _backbone_tensors(found: Featurizer | None) -> dict[str, Tensor]:
    named = {} if found is None else _distinct(found)
    return {f"{BACKBONE}{side}/{k}": v for side, backbone in named.items() for k, v in tensors(backbone).items()}


def _distinct(found: Featurizer) -> dict[str, backbones.Backbone]:
    """One backbone per modality, or one for `both`."""
    shared = found.backbones["sketch"] is found.backbones["photo"]
    return {"both": found.backbones["photo"]} if shared else dict(found.backbones)


def _architectures(found: Featurizer) -> dict[str, dict[str, Any]]:
    return {side: backbone.architecture.model_dump(mode="json") for side, backbone in _distinct(found).items()}


def _refuse_other(output: Path, text: bytes) -> None:
    """Raise ConfigError if `output` holds anything other than an earlier attempt at the same export."""
    if is_file(output):
        raise ConfigError(f"--output {output}: is a file; expected a directory to create")
    there = {path.relative_to(output).parts[0] for path in files_below(output) if path.name[0] != "."}
    same = CONFIG in there and read_file(output / CONFIG) == text
    if CONFIG in there and not same:
        raise ConfigError(f"--output {output}: holds another export; give a new directory")
    if strange := sorted(there - {WEIGHTS, CONFIG, CARD}):
        raise ConfigError(f"--output {output}: holds {strange[:5]}; give an empty or new directory")


def card(description: Description, size: str, source: Mapping[str, Any]) -> str:
    """The model card as Markdown.

    Args:
        size: one line on parameters and width.
        source: source of the data, with its name and attribution, if known.
    """
    return "\n\n".join((*_what(description, size), *_where_from(description, source))) + "\n"


def _what(description: Description, size: str) -> tuple[str, ...]:
    query = description.inputs.query
    example = {"sketch": '["drawing.png"]', "text": '["a red bicycle"]'}[query]
    use = (
        '    import zsr\n\n    model = zsr.load("DIR")\n'
        f'    queries = model.embed_{query}({example})\n    photos = model.embed_photo(["one.jpg", "two.jpg"])'
    )
    return (
        f"# {description.model}: {query} to photo",
        f"{size}, compared by {description.facts['metric']}. Made by zsr from checkpoint `{description.checkpoint}`.",
        "## Use",
        use,
        _backbone_line(description),
    )


def _backbone_line(description: Description) -> str:
    if description.inputs.tower is not None:
        return f"Images are encoded by its own image tower, {description.inputs.tower.architecture['name']}."
    features = description.features or {}
    if features.get("backbone") == "imported":
        return "Its input is imported features: use `model.embed_features`."
    where = "in the file" if description.backbones else "not in the file; zsr.load requires its weights"
    return (
        f"Images are encoded by the backbone {features['backbone']} (layer {features['layer']}, {features['size']} "
        f"pixels, sha256 `{features['weights']}`), which is {where}."
    )


def _where_from(description: Description, source: Mapping[str, Any]) -> tuple[str, ...]:
    facts, split = description.facts, description.split
    score, trained = facts["validation_map_all"], description.inputs.classes
    chosen = "last step (no validation classes)" if score is None else f"mAP@all {score:.4f} on validation classes"
    attribution = f" {source['attribution']}" if source.get("attribution") else ""
    return (
        "## Training",
        f"- data {source.get('name', '')} `{description.parents['data']}`, split {split['source']}\n"
        f"- chosen by: {chosen}, step {facts['best_step']} of {facts['steps']}; unseen classes were not used\n"
        f"- classes seen: {len(facts['saw'])}; trained on {len(trained)}: {', '.join(trained)}\n"
        f"- unseen classes: {len(split['unseen'])}: {', '.join(split['unseen'])}",
        "## Options",
        "\n".join(f"- {name}: {json.dumps(value)}" for name, value in sorted(description.options.items())),
        "## Settings",
        "\n".join(f"- {name}: {json.dumps(value)}" for name, value in sorted(description.settings.items())),
        "## License",
        "The code of zsr is Apache-2.0. The license of these weights depends on the training data and on the initial "
        f"weights; zsr grants no rights to those.{attribution}",
    )
