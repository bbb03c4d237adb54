"""What a model eats. Plain torch: no Ray, no pyarrow.

Shapes: B batch, F feature (or C, H, W for images), S semantic vector, N seen classes.
"""

from dataclasses import dataclass, fields, replace
from typing import Self

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Same-class pairs: row i of every tensor belongs to class `label[i]`.

    Attributes:
        sketch: (B, F) or (B, C, H, W), the query modality (texts in image-text models).
        photo: (B, F) or (B, C, H, W), same class as the sketch of its row; the same instance where `paired` sampling is on.
        label: (B,) int64, index into the sorted seen classes.
        word: (B, S) class vector of the row.
        negative: (B, F) photo of another seen class; only in triplet batches.
        negative_label: (B,) int64; only in triplet batches.
    """

    sketch: Tensor
    photo: Tensor
    label: Tensor
    word: Tensor
    negative: Tensor | None = None
    negative_label: Tensor | None = None

    def map(self, **changes: Tensor) -> Self:
        """A copy with some fields replaced."""
        return replace(self, **changes)

    def to(self, device: str) -> Self:
        """A copy with every tensor on `device`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in moved.items() if v is not None})

    def rows(self, start: int, stop: int) -> Self:
        """Rows start..stop of every field: a rank's share of a global batch."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v[start:stop] for k, v in parts.items() if v is not None})

    def __len__(self) -> int:
        return int(self.label.shape[0])
