"""Image augmentation: a random crop, resized back, and a random horizontal flip.

Each row of each batch has its own random numbers, a function of the batch's seed and the row's index in the global
batch.
"""

from typing import Final

import numpy as np
from PIL import Image

from zsr.data.rows import order_key

AREA: Final = (0.5, 1.0)  # range of the fraction of the image's area that is kept
ASPECT: Final = (0.75, 4 / 3)
DRAWS: Final = 5  # random numbers per image


def uniform(seed: int, slots: np.ndarray) -> np.ndarray:
    """Random numbers in [0, 1) for the rows at `slots` (R,) of a batch, (R, DRAWS) float64."""
    places = slots.astype(np.int64)[:, None] * DRAWS + np.arange(DRAWS)
    return (order_key(places.reshape(-1), seed) >> np.uint64(11)).reshape(places.shape) * 2.0**-53


def crop_and_mirror(picture: np.ndarray, draw: np.ndarray) -> np.ndarray:
    """Crop an image (H, W, 3) uint8, resize the crop to (H, W), and flip it if the last number is below 0.5.

    Args:
        draw: (DRAWS,) in [0, 1): area, aspect, horizontal and vertical position of the crop, flip.
    """
    height, width = picture.shape[:2]
    area = AREA[0] + (AREA[1] - AREA[0]) * draw[0]
    aspect = ASPECT[0] * (ASPECT[1] / ASPECT[0]) ** draw[1]
    across, down = min(1.0, (area * aspect) ** 0.5) * width, min(1.0, (area / aspect) ** 0.5) * height
    left, top = draw[2] * (width - across), draw[3] * (height - down)
    box = (left, top, min(left + across, width), min(top + down, height))
    cut = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR, box=box))
    return cut[:, ::-1] if draw[4] < 0.5 else cut
