"""Baseline without training: the backbone's features, compared by cosine. A trained model has to beat it.

Shapes: B batch, F feature.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Final, Literal

from torch import Tensor

from zsr.errors import ConfigError
from zsr.models.protocol import Choice, ClosedForm, Inputs, ModelConfig, Rows, Scaling


class Config(ModelConfig):
    """Options.

    Attributes:
        scaling: none uses the features as they are; standard standardizes them per modality on the training rows, which
            removes the difference of the modalities' means.
    """

    scaling: Literal["none", "standard"] = "none"


PRESETS: Final[Mapping[str, Config]] = {"standardised": Config(scaling="standard")}


class Raw(ClosedForm):
    """The identity: embeddings (B, 1, F) are the features.

    Raises:
        ConfigError: the modalities' features differ in width and cannot be compared.
    """

    wants_words = False

    def __init__(self, config: Config, inputs: Inputs) -> None:
        super().__init__(inputs)
        self.config = config
        self.scaling: Scaling = config.scaling
        if inputs.sketch_dim != inputs.photo_dim:
            raise ConfigError(
                f"raw compares features as they are, but sketches have {inputs.sketch_dim} dimensions and photos "
                f"{inputs.photo_dim}; use one backbone for both, or model ridge"
            )

    @property
    def dim(self) -> int:
        return self.inputs.photo_dim

    def fit(self, rows: Iterable[Rows], word: Tensor, score: Callable[[], float] | None) -> Choice:
        """Nothing to fit."""
        return Choice({}, {})

    def embed(self, modality: str, features: Tensor) -> Tensor:
        return features.unsqueeze(1)
