"""What a model eats. Plain torch: no Ray, no pyarrow.

Shapes: B batch, F feature (or C, H, W for images), S semantic vector, N seen classes.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Self

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Same-class pairs: row i of every tensor belongs to class `label[i]`.

    Attributes:
        sketch: (B, F) or (B, C, H, W), the query modality (texts in image-text models).
        photo: (B, F) or (B, C, H, W), same class as the sketch of its row; with paired sampling the same instance.
        label: (B,) int64, index into the sorted seen classes.
        word: (B, S) class vector of the row.
        negative: (B, F) photo of another seen class; only in triplet batches.
        negative_label: (B,) int64; only in triplet batches.
        epoch, index: the clock of schedules, both counted from 0: the epoch, and the batch inside the epoch.
    """

    sketch: Tensor
    photo: Tensor
    label: Tensor
    word: Tensor
    negative: Tensor | None = None
    negative_label: Tensor | None = None
    epoch: int = 0
    index: int = 0

    def map(self, **changes: Any) -> Self:
        """A copy with some fields replaced."""
        return replace(self, **changes)

    def to(self, device: str) -> Self:
        """A copy with every tensor on `device`."""
        return self.map(**{name: value.to(device, non_blocking=True) for name, value in self._tensors().items()})

    def rows(self, start: int, stop: int) -> Self:
        """Rows start..stop of every field: a rank's share of a global batch."""
        return self.map(**{name: value[start:stop] for name, value in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in held.items() if isinstance(value, Tensor)}

    def __len__(self) -> int:
        return int(self.label.shape[0])
