"""Augmentation of pictures in a batch: a random part of each, resized back and perhaps mirrored.

Drawn from torch's global generator, which the training loop seeds by (seed, step, rank).
"""

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from zsr.batch import Batch

AREA: Final = (0.5, 1.0)  # share of the picture that is kept
ASPECT: Final = (0.75, 4 / 3)


def augmented(batch: Batch) -> Batch:
    """`batch` with every picture cropped and mirrored, each by its own draw."""
    changes = {"sketch": crop_and_mirror(batch.sketch), "photo": crop_and_mirror(batch.photo)}
    if batch.negative is not None:
        changes["negative"] = crop_and_mirror(batch.negative)
    return batch.map(**changes)


def crop_and_mirror(pixels: Tensor) -> Tensor:
    """Pictures (B, H, W, 3) uint8 -> (B, H, W, 3) float32, 0 to 255: a crop of each, every second mirrored."""
    count = len(pixels)
    draw = torch.rand(5, count).to(pixels.device)
    area = AREA[0] + (AREA[1] - AREA[0]) * draw[0]
    aspect = ASPECT[0] * (ASPECT[1] / ASPECT[0]) ** draw[1]
    # in the coordinates of `affine_grid`, where a side goes from -1 to 1
    width, height = (area * aspect).sqrt().clamp(max=1.0), (area / aspect).sqrt().clamp(max=1.0)
    sign = torch.where(draw[4] < 0.5, 1.0, -1.0)
    theta = torch.zeros(count, 2, 3, device=pixels.device)
    theta[:, 0, 0], theta[:, 0, 2] = sign * width, (1.0 - width) * (2.0 * draw[2] - 1.0)
    theta[:, 1, 1], theta[:, 1, 2] = height, (1.0 - height) * (2.0 * draw[3] - 1.0)
    images = pixels.permute(0, 3, 1, 2).float()
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    cropped = functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return cropped.permute(0, 2, 3, 1)
