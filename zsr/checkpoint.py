"""Read a trained model: from the checkpoint artifact that a run has published, without the code that trains.

A checkpoint holds `model.safetensors` (the chosen weights) and, if the run kept all, one `steps/NNNNNNNN.safetensors`
per epoch. Its config has the model with its options and input sizes.
"""

import json
from collections.abc import Mapping
from typing import Any

from safetensors.torch import load
from torch import Tensor, nn

from zsr.artifact import Artifact, canonical
from zsr.errors import DamagedArtifact
from zsr.models import build
from zsr.models.protocol import Embedder, Inputs


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers on the CPU, contiguous and without shared storage, as safetensors requires."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in module.state_dict().items()}


def parse(data: bytes, where: str) -> dict[str, Tensor]:
    """Read tensors from safetensors bytes. Raises DamagedArtifact if they cannot be read."""
    try:
        return load(data)
    except Exception as error:  # SafetensorError has no public base class
        raise DamagedArtifact(f"{where}: not safetensors: {error}") from error


def open_model(checkpoint: Artifact, name: str = "model.safetensors") -> Embedder:
    """Load the model of a checkpoint, in eval mode on the CPU.

    Args:
        name: the weights file; `steps/...` for those of one epoch.

    Raises:
        DamagedArtifact: bytes or tensors do not match the manifest or the model.
        ConfigError: a model or option that is unknown to this version.
    """
    config = checkpoint.config
    model = build(str(config["model"]), config["options"], Inputs.model_validate(config["inputs"]))
    state = parse(checkpoint.read(name), f"{checkpoint.directory / name}")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise DamagedArtifact(
            f"{checkpoint.directory / name}: does not fit model {config['model']}: {error}"
        ) from error
    return model.eval()


def summary(model: Embedder) -> str:
    """One line with the size of a model."""
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{parameters:,} parameters, {trained:,} of them trained, {model.dim}-d embeddings"


def canonical_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as plain JSON values, tuples as lists, so that a plan from flags equals one read from a manifest."""
    plain: dict[str, Any] = json.loads(canonical(dict(options)))
    return plain
