"""Pictures under limits: what an image claims is checked by its header before anything is decoded.

Formats are allow-listed by magic bytes (JPEG, PNG, WebP). Large JPEGs decode with simplejpeg at a reduced scale of at
least twice the wanted size; everything else, and JPEGs that it refuses, go to Pillow. Resizing is antialiased as
Pillow's is, by cykooz_resizer: a quarter of the time, and the same bits on every processor.
"""

import io
import math
import re
import struct
import warnings
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import simplejpeg
from cykooz_resizer import CropBox, FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer
from PIL import Image

VERSION: Final = 2  # of the pixels that `decode` makes; FEATURES are keyed by it
Interpolation = Literal["bilinear", "bicubic"]
FORMATS: Final = ("JPEG", "PNG", "WEBP")
# endings (lower case) of everything that is called an image, readable here or not: what is found under one of them is
# used or quarantined, never overlooked
IMAGE_SUFFIXES: Final = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg", ".pjp", ".mpo", ".png", ".apng", ".webp", ".gif"),
        *(".bmp", ".dib", ".tif", ".tiff", ".heic", ".heif", ".hif", ".heics", ".heifs", ".avif", ".avifs"),
        *(".jp2", ".j2k", ".jpf", ".jpx", ".j2c", ".jpc", ".jxl", ".ppm", ".pgm", ".pbm", ".pnm", ".pam", ".pfm"),
        *(".svg", ".svgz", ".ico", ".icns", ".cur", ".psd", ".psb", ".xcf", ".kra", ".tga", ".exr", ".hdr", ".dds"),
        *(".pcx", ".eps", ".ai", ".wmf", ".emf"),
        *(".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw"),
    )
)
# Pillow's bicubic is Catmull-Rom
FILTERS: Final = {"bilinear": FilterType.bilinear, "bicubic": FilterType.catmull_rom}


@dataclass(frozen=True, slots=True)
class Limits:
    """Ceilings for one encoded picture: bytes as stored, pixels as its header claims."""

    encoded: int = 20 << 20
    pixels: int = 50_000_000


class BadImage(ValueError):
    """A picture that goes to quarantine; `kind` is the quarantine's word for why."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def sniff(data: bytes) -> str:
    """Format by magic bytes: JPEG, PNG or WEBP. Raises BadImage for anything else."""
    if data[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    raise BadImage("wrong_type", f"starts with {data[:8].hex()}, expected JPEG, PNG or WebP")


def check_header(data: bytes, limits: Limits) -> tuple[int, int]:
    """(width, height) as the header claims, with nothing decoded.

    Raises:
        BadImage: empty, too many bytes, of another format, unreadable header, animated, or too many pixels.
    """
    if not data:
        raise BadImage("empty", "0 bytes, expected an encoded picture")
    if len(data) > limits.encoded:
        raise BadImage("oversized", f"{len(data)} bytes, at most {limits.encoded} are read")
    kind = sniff(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is the tighter one
            with Image.open(io.BytesIO(data), formats=[kind]) as picture:
                width, height = picture.size
                # a JPEG of a phone may hold a depth map or a second view behind its picture, and is no animation
                frames = 1 if kind == "JPEG" else getattr(picture, "n_frames", 1)
    except Image.DecompressionBombError as error:
        raise BadImage("oversized", str(error)) from error
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        raise BadImage("undecodable", f"{kind} header: {_plain(error)}") from error
    if width * height > limits.pixels:
        raise BadImage("oversized", f"{width} x {height} pixels, at most {limits.pixels} are decoded")
    if frames > 1:
        raise BadImage("animated", f"{frames} frames, expected one")
    return width, height


def unreadable_reason(data: bytes) -> str | None:
    """Why the encoded image `data` (or its first 4 KiB) is of no kind that is read here; None where it is of one."""
    try:
        sniff(data)
    except BadImage as error:
        return str(error)
    return None


def _plain(error: Exception) -> str:
    """What `error` says, without the address of the object that it is about: messages go into artifacts."""
    return re.sub(r" ?<[^<>]* at 0x[0-9a-f]+>", "", str(error))


@dataclass(frozen=True, slots=True)
class Resize:
    """How a picture becomes square. The defaults keep all of it and not its aspect, as the papers do.

    Attributes:
        size: side in pixels.
        interpolation: of the resizing.
        crop: side of a square cut out of the middle first, as a share of the shorter side; None cuts nothing.
    """

    size: int
    interpolation: Interpolation = "bilinear"
    crop: float | None = None


@dataclass(frozen=True, slots=True)
class Pictures:
    """How the pictures of a data set are to look, and what a stream is asked for in place of FEATURES.

    Attributes:
        invert_sketches: white strokes on black.
    """

    resize: Resize
    invert_sketches: bool = False

    def look(self, modality: str, pixels: np.ndarray) -> np.ndarray:
        """Pixels (..., 3) uint8 of a modality, resized already, with black and white exchanged where that is asked."""
        return 255 - pixels if self.invert_sketches and modality == "sketch" else pixels


def decode(data: bytes, resize: int | Resize, limits: Limits) -> np.ndarray:
    """Decode and resize to (size, size, 3) uint8 RGB; a number is the size. Transparency becomes white.

    Raises:
        BadImage: see check_header; or the body does not decode.
    """
    wanted = Resize(resize) if isinstance(resize, int) else resize
    check_header(data, limits)
    if sniff(data) == "JPEG":
        try:
            # at less than twice the size, scaling in the DCT changes features visibly (cosine .956 on 256-pixel photos)
            least = math.ceil(2 * wanted.size / (wanted.crop or 1.0))
            pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=least, min_width=least, min_factor=1)
            return _resize(pixels, wanted)
        except ValueError:
            pass  # CMYK and slightly broken files that Pillow may still read
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            return square(picture, wanted)
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        raise BadImage("undecodable", _plain(error)) from error


def square(picture: Image.Image, wanted: Resize) -> np.ndarray:
    """An open picture as (size, size, 3) uint8 RGB. Transparency becomes white."""
    return _resize(np.asarray(_on_white(picture), np.uint8), wanted)


def _on_white(picture: Image.Image) -> Image.Image:
    """Flatten transparency onto white: sketches are black strokes on it, and black would hide them."""
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def _resize(pixels: np.ndarray, wanted: Resize) -> np.ndarray:
    """Pixels (H, W, 3) uint8 as (size, size, 3), in one step from the box that is cut out."""
    height, width = pixels.shape[:2]
    options = ResizeOptions(ResizeAlg.convolution(FILTERS[wanted.interpolation]), use_alpha=False)
    if wanted.crop is not None:
        side = wanted.crop * min(width, height)
        options.crop_box = CropBox((width - side) / 2, (height - side) / 2, side, side)
    elif width == height == wanted.size:
        return pixels
    source = ImageData(width, height, PixelType.U8x3, pixels.tobytes())
    target = ImageData(wanted.size, wanted.size, PixelType.U8x3)
    Resizer().resize(source, target, options)
    return np.frombuffer(target.get_buffer(), np.uint8).reshape(wanted.size, wanted.size, 3)
