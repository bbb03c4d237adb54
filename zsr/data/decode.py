"""Decode encoded images to pixels, under limits that are checked in the header before anything is decoded.

Formats are allow-listed by magic bytes, see `sniff`. Large JPEGs are decoded by simplejpeg at a reduced scale of at
least twice the required size; everything else, and JPEGs that it rejects, by Pillow. Either way the result is what a
viewer shows: the first frame, rotated by its Exif orientation, 8 bits per channel, transparency on white. Resizing is
antialiased like Pillow's, by cykooz_resizer, which takes a quarter of the time and gives the same bits on every CPU.
"""

import io
import math
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal

import numpy as np
import simplejpeg
from cykooz_resizer import CropBox, FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer
from PIL import ExifTags, Image, PngImagePlugin

VERSION: Final = 3  # of the pixels of `decode`; part of the configuration of everything computed from pixels
COMPATIBLE: Final = (2, 3)  # versions with the same pixels for images that are upright and of 8 bits
Interpolation = Literal["bilinear", "bicubic"]
# Pillow's bicubic is Catmull-Rom
FILTERS: Final = {"bilinear": FilterType.bilinear, "bicubic": FilterType.catmull_rom}
MAX_MISSING: Final = 0.1  # max fraction of missing rows of a truncated JPEG

# extensions (lower case) of all image formats, readable here or not: files with one of them are used or quarantined,
# never ignored
IMAGE_SUFFIXES: Final = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg", ".pjp", ".mpo", ".png", ".apng", ".webp", ".gif"),
        *(".bmp", ".dib", ".tif", ".tiff", ".heic", ".heif", ".hif", ".heics", ".heifs", ".avif", ".avifs"),
        *(".jp2", ".j2k", ".jpf", ".jpx", ".j2c", ".jpc", ".jxl", ".ppm", ".pgm", ".pbm", ".pnm", ".pam", ".pfm"),
        *(".svg", ".svgz", ".ico", ".icns", ".cur", ".psd", ".psb", ".xcf", ".kra", ".tga", ".exr", ".hdr", ".dds"),
        *(".pcx", ".eps", ".ai", ".wmf", ".emf"),
        *(".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw"),
        *(".3fr", ".erf", ".iiq", ".mrw", ".rwl", ".sr2", ".x3f"),
    )
)
# magic bytes of the supported formats, by Pillow's names
READ: Final = (
    ("JPEG", rb"\xff\xd8\xff"),
    ("PNG", rb"\x89PNG\r\n\x1a\n"),
    ("WEBP", rb"RIFF.{4}WEBP"),
    ("GIF", rb"GIF8[79]a"),
    ("BMP", rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\x00\x00\x00"),
    ("TIFF", rb"II\*\x00(?!.{4}CR)|MM\x00\*|II\+\x00|MM\x00\+"),
    ("PPM", rb"P[1-6f]\s"),
    ("JPEG2000", rb"\x00\x00\x00\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51"),
    ("AVIF", rb".{4}ftyp(?:avi[fs]|m[is]f1.{4}(?:.{4}){0,8}?avi[fs])"),
    ("HEIF", rb".{4}ftyp(?:hei[cmsx]|hev[cmsx]|m[is]f1)"),
)
_RAW: Final = "a camera raw file: convert it to JPEG, or give the JPEG that the camera made"
# magic bytes of other files that are found among images, with a description and a fix
OTHER: Final = (
    (rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype html|html|head|body)", "a web page instead of an image: download it again"),
    (rb"(?:\xef\xbb\xbf)?\s*<(?=.{0,4000}svg[\s>])", "an SVG drawing: convert it to PNG"),
    (rb"version https://git-lfs", "a pointer of Git LFS: run `git lfs pull` in the folder that it came from"),
    (rb"\x00\x00\x00\x0cJXL |\xff\x0a", "a JPEG XL image: convert it to JPEG or PNG"),
    (rb"8BPS", "a Photoshop document: export it as PNG"),
    (rb"gimp xcf", "a GIMP document: export it as PNG"),
    (rb"\x00\x00[\x01\x02]\x00[^\x00]\x00|icns", "an icon: convert it to PNG"),
    (rb"II\*\x00.{4}CR|.{4}ftypcrx|IIR[OS]|IIU\x00|FUJIFILMCCD-RAW|\x00MRM|FOVb", _RAW),
    (rb"v/1\x01|#\?(?:RADIANCE|RGBE)|DDS ", "a texture or an image of high dynamic range: convert it to PNG"),
    (
        rb".{4}(?:ftyp|moov|mdat|wide)|RIFF.{4}AVI |\x1aE\xdf\xa3|\x00\x00\x01[\xb3\xba]|FLV\x01",
        "a video: extract a frame as JPEG",
    ),
    (rb"%PDF|%!PS|\xc5\xd0\xd3\xc6", "a PDF or PostScript document: export its pages as PNG"),
    (rb"\xd7\xcd\xc6\x9a|\x01\x00\x00\x00.{36} EMF", "a Windows metafile: convert it to PNG"),
    (rb"\x00\x05\x16[\x00\x07]", "an AppleDouble file, which holds no image: delete it"),
    (rb"PK\x03\x04|\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!", "an archive or a compressed file: unpack it"),
)
# limit against decompression bombs in PNG comments; some programs write whole documents into one
PngImagePlugin.MAX_TEXT_CHUNK = 8 << 20
UPRIGHT: Final = {  # Exif orientation -> transpose operation that makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True)
class Limits:
    """Max size of one encoded image: bytes as stored, pixels according to its header."""

    encoded: int = 20 << 20
    pixels: int = 50_000_000


class BadImage(ValueError):
    """An image that is quarantined; `kind` is the quarantine's code for the reason."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def sniff(data: bytes) -> str:
    """Detect the format by magic bytes; returns Pillow's name of it.

    Raises:
        BadImage: `unsupported` for a known format that is not read, or not with what is installed; `wrong_type` for
            anything else.
    """
    found = next((name for name, pattern in READ if re.match(pattern, data, re.DOTALL)), None)
    if found == "HEIF" and not _heif():
        raise BadImage(
            "unsupported",
            "a HEIC image: install the extra `heif` (pip install 'zsr[heif]') on every machine, or convert it to JPEG",
        )
    if found is not None:
        return found
    for pattern, reason in OTHER:
        if re.match(pattern, data[:4096], re.DOTALL | re.IGNORECASE):
            raise BadImage("unsupported", reason)
    known = ", ".join(name for name, _ in READ)
    raise BadImage("wrong_type", f"not an image: starts with {data[:8].hex()}, expected one of {known}")


@cache
def _heif() -> bool:
    """Register HEIC with Pillow, by the extra `heif`; False if it is not installed."""
    try:
        import pillow_heif
    except ImportError:
        return False
    # one thread: decoding is parallel over processes
    pillow_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=1)
    return True


def reads() -> dict[str, Any]:
    """Everything that determines which images can be read, and how: decoder version, support for HEIC."""
    return {"decode": VERSION, "heif": _heif()}


def unreadable_reason(data: bytes) -> str | None:
    """Why the format of the encoded image `data` (or of its first 4 KiB) is not supported; None if it is."""
    try:
        sniff(data)
    except BadImage as error:
        return str(error)
    return None


@dataclass(frozen=True, slots=True)
class Header:
    """Header of an encoded image.

    Attributes:
        kind: its format.
        width, height: in pixels as stored, before it is rotated upright.
        orientation: Exif orientation of a JPEG, 1 to 8; always 1 for other formats, which may store it anywhere.
    """

    kind: str
    width: int
    height: int
    orientation: int = 1


def check_header(data: bytes, limits: Limits) -> Header:
    """Read and check the header of an encoded image, without decoding it.

    Raises:
        BadImage: empty, too many bytes, unsupported format, unreadable header, or too many pixels.
    """
    if not data:
        raise BadImage("empty", "0 bytes, expected an encoded image")
    if len(data) > limits.encoded:
        raise BadImage("oversized", f"{len(data)} bytes, at most {limits.encoded} are read")
    kind = sniff(data)
    with _opened(data, kind, " header") as image:
        width, height = image.size
        if width * height > limits.pixels:
            raise BadImage("oversized", f"{width} x {height} pixels, at most {limits.pixels} are decoded")
        tags = getattr(image, "tag_v2", {})
        if tags.get(ExifTags.Base.NewSubfileType) == 1 or ExifTags.Base.DNGVersion in tags:
            raise BadImage("unsupported", _RAW)  # their first image is a thumbnail
        # in a PNG the Exif block may follow the pixels, which Pillow would then decode
        return Header(kind, width, height, _orientation(image) if kind == "JPEG" else 1)


@contextmanager
def _opened(data: bytes, kind: str, part: str = "") -> Iterator[Image.Image]:
    """Open the image with Pillow; errors as in `_as_bad_image`."""
    with _as_bad_image(kind, part), Image.open(io.BytesIO(data), formats=[kind]) as image:
        yield image


@contextmanager
def _as_bad_image(kind: str, part: str = "") -> Iterator[None]:
    """Turn every error in the block into BadImage, with `kind` and `part` in the message; silence warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our pixel limit is stricter than Pillow's; odd metadata does not matter
            yield
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage("oversized", str(error)) from error
    except Exception as error:  # on damaged bytes a plug-in may raise anything
        if "truncated" in str(error).lower():
            raise BadImage(
                "truncated", f"the {kind} ends early ({_plain(error)}): copy or download it again"
            ) from error
        raise BadImage("undecodable", f"the {kind}{part} does not decode: {_plain(error)}") from error


def _orientation(image: Image.Image) -> int:
    """Exif orientation of an open image, 1 to 8; 1 if there is none or it cannot be read."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, EOFError, struct.error):
        return 1  # do not reject an image because of a damaged Exif block
    return found if found in UPRIGHT else 1


def _plain(error: Exception) -> str:
    """The message of `error` without object addresses: messages are stored in artifacts, which must be reproducible."""
    return re.sub(r" ?<[^<>]* at 0x[0-9a-f]+>", "", str(error))


@dataclass(frozen=True, slots=True)
class Resize:
    """How to resize an image to a square. By default the whole image is stretched, as in the papers.

    Attributes:
        size: side in pixels.
        interpolation: interpolation of the resizing.
        crop: side of a center crop taken first, as a fraction of the shorter side; None for no crop.
    """

    size: int
    interpolation: Interpolation = "bilinear"
    crop: float | None = None


@dataclass(frozen=True, slots=True)
class Pictures:
    """Image preprocessing; also passed to a stream to request images instead of FEATURES.

    Attributes:
        invert_sketches: turn sketches into white strokes on black.
    """

    resize: Resize
    invert_sketches: bool = False

    def look(self, modality: str, pixels: np.ndarray) -> np.ndarray:
        """Invert resized pixels (..., 3) uint8 if they are a sketch's and `invert_sketches` is set."""
        return 255 - pixels if self.invert_sketches and modality == "sketch" else pixels


def decode(data: bytes, resize: int | Resize, limits: Limits) -> np.ndarray:
    """Decode and resize to (size, size, 3) uint8 RGB; a number is the size.

    Raises:
        BadImage: see `upright`.
    """
    wanted = Resize(resize) if isinstance(resize, int) else resize
    # at less than twice the size, scaling in the DCT changes features visibly (cosine .956 on 256-pixel photos)
    return _resize(upright(data, limits, math.ceil(2 * wanted.size / (wanted.crop or 1.0))), wanted)


def upright(data: bytes, limits: Limits, min_side: int = 0) -> np.ndarray:
    """Decode to (H, W, 3) uint8 RGB as a viewer shows it: upright, the first frame, transparency on white.

    Most of a truncated JPEG is enough, see `_cut_short`.

    Args:
        min_side: a JPEG may be downscaled in the DCT, by powers of 2 to at least this width and height; 0 keeps its
            size.

    Raises:
        BadImage: see check_header; or the body cannot be decoded.
    """
    header = check_header(data, limits)
    if header.kind == "JPEG":
        try:
            pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=min_side, min_width=min_side, min_factor=1)
            return turned(pixels, header.orientation)
        except ValueError:
            pass  # Pillow may still read a damaged file
    try:
        with _opened(data, header.kind) as image:
            return rgb(image)
    except BadImage as error:
        if header.kind != "JPEG" or error.kind != "truncated":
            raise
        return _cut_short(data)


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Rotate pixels (H, W, 3) uint8 of this Exif orientation upright."""
    method = UPRIGHT.get(orientation)
    return pixels if method is None else np.asarray(Image.fromarray(pixels).transpose(method))


def _cut_short(data: bytes) -> np.ndarray:
    """Decode a truncated JPEG: its missing rows are gray, as libjpeg fills them.

    Raises:
        BadImage: more than MAX_MISSING of its rows are missing, or whole scans, each of which refines all rows.
    """
    with _opened(data + b"\xff\xd9", "JPEG") as image:
        there = np.flatnonzero((np.abs(np.asarray(image, np.int16) - 128) > 1).reshape(image.height, -1).any(1))
        missing = 1 - (int(there[-1]) + 1 if len(there) else 0) / image.height
        if missing > MAX_MISSING or not _all_scans_begun(data):
            what = f"{missing:.0%} of its rows are" if missing > MAX_MISSING else "most of its detail is"
            raise BadImage("truncated", f"the JPEG ends early, {what} missing: copy or download it again")
        return rgb(image)


_SEGMENT: Final = re.compile(rb"\xff([\xc0-\xcf\xda-\xfe])(..)", re.DOTALL)


def _all_scans_begun(data: bytes) -> bool:
    """Whether a truncated JPEG contains the beginning of the last scan of each of its components."""
    components: set[int] = set()
    begun: set[int] = set()
    at = 2
    while found := _SEGMENT.search(data, at):
        marker, body = found[1][0], data[found.end() : found.start() + 2 + int.from_bytes(found[2])]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame
            components = set(body[6::3])
        elif (
            marker == 0xDA and body[-2:-1] == b"\x3f" and body[-1] & 15 == 0
        ):  # includes the last bit of coefficient 63
            begun |= set(body[1:-3:2])
        at = found.end() + len(body)
    return bool(components) and components <= begun


def square(image: Image.Image, wanted: Resize) -> np.ndarray:
    """An open image as (size, size, 3) uint8 RGB, as `decode` returns for its file. Raises BadImage like `upright`."""
    with _as_bad_image(image.format or "image"):
        return _resize(rgb(image), wanted)


def rgb(image: Image.Image) -> np.ndarray:
    """An open image as (H, W, 3) uint8 RGB: upright, transparency on white.

    Raises:
        BadImage: no pixels, or values that are not finite.
    """
    if not image.width or not image.height:
        raise BadImage("empty", f"{image.width} x {image.height} pixels")
    image.load()  # rotates a TIFF, and reads the Exif block that follows the pixels of a PNG
    return turned(np.asarray(_on_white(image), np.uint8), _orientation(image))


def _on_white(image: Image.Image) -> Image.Image:
    """Flatten transparency onto white: sketches are often black strokes on a transparent background."""
    if image.mode[0] in "IF":
        image = _eight_bits(image)
    elif image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale gray of more than 8 bits to 8 bits, where Pillow would clip it to white. Transparency becomes white."""
    values = np.array(image, np.float32)
    if not np.isfinite(values).all():
        raise BadImage("undecodable", "its values are not finite")
    black, white = _ends(image, values)
    if isinstance(key := image.info.get("transparency"), int):
        values[values == key] = white
    values -= black  # in place, since the array may be large
    values *= 255 / (white - black)
    return Image.fromarray(np.rint(values, out=values).astype(np.uint8))


def _ends(image: Image.Image, values: np.ndarray) -> tuple[float, float]:
    """The values of black and white.

    For 16 bits the full range, or that of the BitsPerSample of a TIFF. For 32-bit integers and floats, whose range is
    not declared: the smallest of 0 to 1 (floats only), 0 to 255 and 0 to 65535 that holds all values, or else their
    min and max.
    """
    tags = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16"):
        white = float(2 ** tags.get(ExifTags.Base.BitsPerSample, (16,))[0] - 1)
    else:
        least, most = float(values.min()), float(values.max())
        if least < 0:
            return least, max(most, least + 1)
        white = next((full for full in (1.0, 255.0, 65535.0)[image.mode != "F" :] if most <= full), most)
    inverted = tags.get(ExifTags.Base.PhotometricInterpretation) == 0
    return (white, 0.0) if inverted else (0.0, white)


def _resize(pixels: np.ndarray, wanted: Resize) -> np.ndarray:
    """Crop and resize pixels (H, W, 3) uint8 to (size, size, 3) in one step."""
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
