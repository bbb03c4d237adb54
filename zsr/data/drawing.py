"""Strokes to pictures: anti-aliased black lines with round ends on white, as PNG.

The rasteriser is Agg, which comes with matplotlib. On 200 drawings of Quick, Draw! at 256 pixels it took 0.37 ms of
processor time each, Pillow at four times the size and reduced 0.79 ms; aggdraw (0.21 ms) ends its lines square.
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

POINTS: Final = 100_000  # of one drawing; those of Quick, Draw! have some hundreds
DOT: Final = 0.01  # pixels: the length of a stroke of a single point, since Agg draws none of no length

EVEN: Final = 0.6  # of the pixels within two of 32 gray levels of the most frequent one, at least, in a drawing

Strokes = Sequence[np.ndarray]  # each (2, P): x to the right, y downwards


class Drawing(BaseModel):
    """How strokes are drawn.

    Attributes:
        size: side of the picture in pixels.
        stroke_width: of the lines, in pixels.
        padding: white pixels between the border and the drawing, which fills the rest and is centred.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(256, ge=8, le=4096)
    stroke_width: float = Field(3.0, gt=0, le=256)
    padding: float = Field(8.0, ge=0)

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the bytes of a picture depend on: the options, and the versions of what draws and encodes."""
        return {**self.model_dump(), "matplotlib": matplotlib.__version__, "pillow": PIL.__version__}


def checked(strokes: object) -> list[np.ndarray]:
    """Strokes as Quick, Draw! writes them, [[[x...], [y...]], ...] with or without times, as arrays (2, P) float64.

    Raises:
        BadImage: no stroke, no point, too many points, or anything but finite numbers.
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
    """PNG bytes (grey, `how.size` pixels a side) of strokes that `checked` has passed; equal input gives equal bytes.

    The drawing is scaled by one factor to fill the picture within its padding, and its bounding box is centred.
    """
    renderer: Any = cast(Any, RendererAgg)(how.size, how.size, 72)  # at 72 dots an inch a point is a pixel
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
    """Each stroke as (P, 2) in pixels, y upwards as Agg has it."""
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
    """Whether an encoded image has no even background, as drawings on paper or screen have.

    Of 300 sketches of the Sketchy database none is taken for a photo; of 300 of its photos 256, of 300 photos in a shop
    298.

    Raises:
        BadImage: it does not decode.
    """
    gray = decode(image, 96, Limits()).mean(axis=2)
    counts = np.histogram(gray, bins=32, range=(0, 256))[0]
    most = int(counts.argmax())
    return bool(counts[max(0, most - 2) : most + 3].sum() < EVEN * gray.size)
