"""Training batches. Plain torch: no Ray, no pyarrow.

Shapes: B batch, F feature (or C, H, W for images), S class embedding, N seen classes.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Pairs of a sketch and a photo of the same class: row i of every tensor belongs to class `label[i]`.

    Attributes:
        sketch: (B, F) or (B, C, H, W), the query modality (texts in image-text models).
        photo: (B, F) or (B, C, H, W), same class as the sketch of its row; with paired sampling the same instance.
        label: (B,) int64, index into the sorted seen classes.
        word: (B, S) class embedding of the row.
        negative: (B, F) photo of another seen class; only in triplet batches.
        negative_label: (B,) int64; only in triplet batches.
        epoch, index: the epoch, and the batch within the epoch, both counted from 0; schedules depend on them.
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

    def __len__(self) -> int:
        return int(self.label.shape[0])
