"""Render strokes to images: anti-aliased black lines with round ends on white, as PNG.

The rasterizer is Agg, which is part of matplotlib. For 200 drawings of Quick, Draw! at 256 pixels it took 0.37 ms of
CPU time per drawing, Pillow with fourfold supersampling 0.79 ms; aggdraw (0.21 ms) has only square line ends.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

import matplotlib
import numpy as np
import PIL
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.path import Path
from matplotlib.transforms import IdentityTransform
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from zsr.data.decode import BadImage, Limits, decode

POINTS: Final = 100_000  # max points of one drawing; those of Quick, Draw! have a few hundred
DOT: Final = 0.01  # length in pixels given to a stroke of a single point, since Agg draws nothing for length 0

# a drawing has at least this fraction of its pixels within two of 32 gray levels of the most frequent level
EVEN: Final = 0.6

Strokes = Sequence[np.ndarray]  # each (2, P): x to the right, y downwards


class Drawing(BaseModel):
    """How strokes are rendered.

    Attributes:
        size: side of the image in pixels.
        stroke_width: width of the lines in pixels.
        padding: white pixels between the border and the drawing, which is centered and scaled to fill the rest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(256, ge=8, le=4096)
    stroke_width: float = Field(3.0, gt=0, le=256)
    padding: float = Field(8.0, ge=0)

    @property
    def facts(self) -> Mapping[str, Any]:
        """Everything that determines the bytes of a rendered image: options, matplotlib and Pillow versions."""
        return {**self.model_dump(), "matplotlib": matplotlib.__version__, "pillow": PIL.__version__}


def checked(strokes: object) -> list[np.ndarray]:
    """Convert strokes in the format of Quick, Draw!, [[[x...], [y...]], ...] with or without times, to (2, P) float64.

    Raises:
        BadImage: no stroke, no point, too many points, or values that are not finite numbers.
    """
    try:
        arrays = [np.asarray(stroke[:2], dtype=np.float64) for stroke in strokes]  # type: ignore[attr-defined]
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise BadImage("bad_drawing", f"{error}; expected a list of strokes [[x...], [y...]]") from error
    count = sum(array.size // 2 for array in arrays)
    if not 0 < count <= POINTS:
        raise BadImage("bad_drawing", f"{count} points in {len(arrays)} strokes; expected 1 to {POINTS} points")
    for array in arrays:
        if array.ndim != 2 or len(array) != 2 or not np.isfinite(array).all() or np.abs(array).max(initial=0) > 1e6:
            raise BadImage(
                "bad_drawing", f"a stroke of shape {array.shape}; expected [[x...], [y...]] of finite numbers"
            )
    return [array for array in arrays if array.size]


def draw(strokes: Strokes, how: Drawing) -> bytes:
    """Render strokes from `checked` to a gray PNG of `how.size` x `how.size` pixels; equal input gives equal bytes.

    The drawing is scaled by one factor to fill the image within its padding, and its bounding box is centered.
    """
    renderer: Any = cast(Any, RendererAgg)(how.size, how.size, 72)  # at 72 dots per inch a point is a pixel
    pen = renderer.new_gc()
    pen.set_linewidth(how.stroke_width)
    pen.set_capstyle("round")
    pen.set_joinstyle("round")
    pen.set_antialiased(True)
    pen.set_snap(False)
    for points in _placed(strokes, how):
        path = Path(points if len(points) > 1 else np.concatenate([points, points + DOT]))
        path.should_simplify = False
        renderer.draw_path(pen, path, IdentityTransform())
    ink = np.asarray(renderer.buffer_rgba())[..., 3]  # black on transparent
    encoded = io.BytesIO()
    Image.fromarray(255 - ink).save(encoded, "PNG")
    return encoded.getvalue()


def _placed(strokes: Strokes, how: Drawing) -> list[np.ndarray]:
    """Each stroke as (P, 2) in pixels, with y pointing up as in Agg."""
    points = np.concatenate(strokes, axis=1)
    low, high = points.min(1), points.max(1)
    room = max(1.0, how.size - 2 * how.padding - how.stroke_width)
    scale = room / max(float((high - low).max()), 1e-6)
    if not (high > low).any():
        scale = 1.0  # a single dot
    centre = (low + high) / 2
    flip = np.array([1.0, -1.0])
    return [(stroke.T - centre) * scale * flip + how.size / 2 for stroke in strokes]


def looks_like_a_photo(image: bytes) -> bool:
    """Whether an encoded image lacks the uniform background of a drawing.

    Classified as photos: 0 of 300 sketches and 256 of 300 photos of the Sketchy database, 298 of 300 photos in a shop.

    Raises:
        BadImage: it cannot be decoded.
    """
    gray = decode(image, 96, Limits()).mean(axis=2)
    counts = np.histogram(gray, bins=32, range=(0, 256))[0]
    most = int(counts.argmax())
    return bool(counts[max(0, most - 2) : most + 3].sum() < EVEN * gray.size)
