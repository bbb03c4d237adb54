"""Encoded images to pixels, under limits: what an image claims is checked by its header before anything is decoded.

Formats are allow-listed by magic bytes, see `sniff`. Large JPEGs decode with simplejpeg at a reduced scale of at least
twice the required size; everything else, and JPEGs that it refuses, go to Pillow. Whatever decodes, the result is what
a viewer shows: the first frame, upright as Exif says, 8 bits per channel, on white where it is transparent. Resizing is
antialiased as Pillow's is, by cykooz_resizer: a quarter of the time, and the same bits on every processor.
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

VERSION: Final = 3  # of the pixels that `decode` makes; what is made of pixels is keyed by it
COMPATIBLE: Final = (2, 3)  # with this version: images that are upright and of 8 bits have the same pixels
Interpolation = Literal["bilinear", "bicubic"]
# Pillow's bicubic is Catmull-Rom
FILTERS: Final = {"bilinear": FilterType.bilinear, "bicubic": FilterType.catmull_rom}
MAX_MISSING: Final = 0.1  # of the rows of a JPEG that ends early; one that lacks more is refused

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
        *(".3fr", ".erf", ".iiq", ".mrw", ".rwl", ".sr2", ".x3f"),
    )
)
# first bytes of the formats that are read, by Pillow's names
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
# first bytes of other things that come along with images, what they are and how to go on
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
# a comment may be packed well, but not like a bomb; some programs write whole documents into one
PngImagePlugin.MAX_TEXT_CHUNK = 8 << 20
UPRIGHT: Final = {  # what turns an image whose Exif orientation is the key
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
    """Ceilings for one encoded image: bytes as stored, pixels as its header claims."""

    encoded: int = 20 << 20
    pixels: int = 50_000_000


class BadImage(ValueError):
    """An image that goes to quarantine; `kind` is the quarantine's word for why."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def sniff(data: bytes) -> str:
    """Format by magic bytes, by Pillow's name.

    Raises:
        BadImage: `unsupported`, a known kind of file that is not read, or not with what is installed; `wrong_type`,
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
    """Have Pillow read HEIC with the extra `heif`; False where it is not installed."""
    try:
        import pillow_heif
    except ImportError:
        return False
    # one thread: decoding is spread over processes
    pillow_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=1)
    return True


def reads() -> dict[str, Any]:
    """What shapes which images are read here and how: the version of decoding, and whether HEIC is among them."""
    return {"decode": VERSION, "heif": _heif()}


def unreadable_reason(data: bytes) -> str | None:
    """Why the encoded image `data` (or its first 4 KiB) is of no kind that is read here; None where it is of one."""
    try:
        sniff(data)
    except BadImage as error:
        return str(error)
    return None


@dataclass(frozen=True, slots=True)
class Header:
    """What an encoded image says of itself.

    Attributes:
        kind: its format.
        width, height: in pixels as stored, which is before it is turned upright.
        orientation: of a JPEG, its Exif orientation, 1 to 8; of other formats always 1, since it may lie anywhere.
    """

    kind: str
    width: int
    height: int
    orientation: int = 1


def check_header(data: bytes, limits: Limits) -> Header:
    """The header of an encoded image, with nothing decoded.

    Raises:
        BadImage: empty, too many bytes, of another format, unreadable header, or too many pixels.
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
        # of a PNG it may lie behind the pixels, which Pillow would then decode
        return Header(kind, width, height, _orientation(image) if kind == "JPEG" else 1)


@contextmanager
def _opened(data: bytes, kind: str, part: str = "") -> Iterator[Image.Image]:
    """The image as Pillow opens it; see `_as_bad_image`."""
    with _as_bad_image(kind, part), Image.open(io.BytesIO(data), formats=[kind]) as image:
        yield image


@contextmanager
def _as_bad_image(kind: str, part: str = "") -> Iterator[None]:
    """Whatever Pillow raises in the block becomes BadImage, which names `part` of the `kind`; it warns of nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our own limit of pixels is the tighter one; odd metadata is no matter
            yield
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage("oversized", str(error)) from error
    except Exception as error:  # a plug-in may stumble over damaged bytes in any way
        if "truncated" in str(error).lower():
            raise BadImage(
                "truncated", f"the {kind} ends early ({_plain(error)}): copy or download it again"
            ) from error
        raise BadImage("undecodable", f"the {kind}{part} does not decode: {_plain(error)}") from error


def _orientation(image: Image.Image) -> int:
    """Exif orientation of an open image, 1 to 8; 1 where there is none, or one that cannot be read."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, EOFError, struct.error):
        return 1  # a damaged block of Exif is no reason to lose an image
    return found if found in UPRIGHT else 1


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
    """Decode and resize to (size, size, 3) uint8 RGB; a number is the size.

    Raises:
        BadImage: see `upright`.
    """
    wanted = Resize(resize) if isinstance(resize, int) else resize
    # at less than twice the size, scaling in the DCT changes features visibly (cosine .956 on 256-pixel photos)
    return _resize(upright(data, limits, math.ceil(2 * wanted.size / (wanted.crop or 1.0))), wanted)


def upright(data: bytes, limits: Limits, min_side: int = 0) -> np.ndarray:
    """Decode to (H, W, 3) uint8 RGB as a viewer shows it: upright, the first frame, on white where it is transparent.

    A JPEG that ends early is used as far as it goes, see `_cut_short`.

    Args:
        min_side: a JPEG may be reduced, by halves at most to this width and height; 0 keeps its size.

    Raises:
        BadImage: see check_header; or the body does not decode.
    """
    header = check_header(data, limits)
    if header.kind == "JPEG":
        try:
            pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=min_side, min_width=min_side, min_factor=1)
            return turned(pixels, header.orientation)
        except ValueError:
            pass  # damaged files that Pillow may still read
    try:
        with _opened(data, header.kind) as image:
            return rgb(image)
    except BadImage as error:
        if header.kind != "JPEG" or error.kind != "truncated":
            raise
        return _cut_short(data)


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels (H, W, 3) uint8 upright, which were stored in this Exif orientation."""
    method = UPRIGHT.get(orientation)
    return pixels if method is None else np.asarray(Image.fromarray(pixels).transpose(method))


def _cut_short(data: bytes) -> np.ndarray:
    """A JPEG that ends early: its missing rows are gray, as libjpeg fills them.

    Raises:
        BadImage: more than MAX_MISSING of its rows are missing, or whole scans, each of which makes all rows finer.
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
    """Whether a JPEG goes on to where the last scan of each of its components has begun."""
    components: set[int] = set()
    begun: set[int] = set()
    at = 2
    while found := _SEGMENT.search(data, at):
        marker, body = found[1][0], data[found.end() : found.start() + 2 + int.from_bytes(found[2])]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame
            components = set(body[6::3])
        elif marker == 0xDA and body[-2:-1] == b"\x3f" and body[-1] & 15 == 0:  # up to the last bit of coefficient 63
            begun |= set(body[1:-3:2])
        at = found.end() + len(body)
    return bool(components) and components <= begun


def square(image: Image.Image, wanted: Resize) -> np.ndarray:
    """An open image as (size, size, 3) uint8 RGB, as `decode` makes it of its file. Raises BadImage as `upright`."""
    with _as_bad_image(image.format or "image"):
        return _resize(rgb(image), wanted)


def rgb(image: Image.Image) -> np.ndarray:
    """An open image as (H, W, 3) uint8 RGB: upright, and on white where it is transparent.

    Raises:
        BadImage: no pixels, or values that are not finite.
    """
    if not image.width or not image.height:
        raise BadImage("empty", f"{image.width} x {image.height} pixels")
    image.load()  # which turns a TIFF, and finds the Exif behind the pixels of a PNG
    return turned(np.asarray(_on_white(image), np.uint8), _orientation(image))


def _on_white(image: Image.Image) -> Image.Image:
    """Flatten transparency onto white: sketches are black strokes on it, and black would hide them."""
    if image.mode[0] in "IF":
        image = _eight_bits(image)
    elif image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Gray of more than 8 bits as 8 bits; Pillow itself would clip it to white. What is transparent becomes white."""
    values = np.array(image, np.float32)
    if not np.isfinite(values).all():
        raise BadImage("undecodable", "its values are not finite")
    black, white = _ends(image, values)
    if isinstance(key := image.info.get("transparency"), int):
        values[values == key] = white
    values -= black  # in place: there may be many of them
    values *= 255 / (white - black)
    return Image.fromarray(np.rint(values, out=values).astype(np.uint8))


def _ends(image: Image.Image, values: np.ndarray) -> tuple[float, float]:
    """The values that are black and white.

    16 bits have their whole range, or that of the bits that a TIFF says it uses. Integers of 32 bits and floats do not
    say: the range is the smallest of 0 to 1 (floats), 255 and 65535 that holds all values, or else their own.
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
