"""What people's image files hold: other formats, turned, deep, transparent, animated and damaged ones."""

import io
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
from PIL import ExifTags, Image, ImageDraw, PngImagePlugin

from zsr.data import decode as module
from zsr.data.decode import IMAGE_SUFFIXES, BadImage, Limits, Resize, decode, square, unreadable_reason, upright

T = Image.Transpose
# how a camera stores an upright scene, by the orientation that it then writes
STORED = {1: None, 2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE, 6: T.ROTATE_90}
STORED |= {7: T.TRANSVERSE, 8: T.ROTATE_270}


@pytest.fixture(autouse=True)
def _heif() -> None:
    pillow_heif.register_heif_opener()


def scene(size: tuple[int, int] = (320, 192)) -> Image.Image:
    """An image without any symmetry."""
    image = Image.new("RGB", size, (200, 220, 250))
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 0, size[0] // 3, size[1] // 4), fill=(200, 40, 40))
    pen.ellipse((size[0] // 2, size[1] // 2, size[0] - 4, size[1] - 4), fill=(40, 60, 180))
    return image


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def turned(kind: str, orientation: int, image: Image.Image | None = None, **options: Any) -> bytes:
    """The scene as stored under `orientation`."""
    image = image or scene()
    method, exif = STORED[orientation], Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = image if method is None else image.transpose(method)
    return saved(stored, kind, exif=exif.tobytes() if kind == "HEIF" else exif, **options)


def apart(found: np.ndarray, wanted: Image.Image, size: int = 64) -> float:
    """Mean difference to what `wanted` is when resized."""
    return float(np.abs(found.astype(int) - square(wanted, Resize(size))).mean())


def refused(data: bytes) -> BadImage:
    with pytest.raises(BadImage) as error:
        decode(data, 64, Limits())
    return error.value


# ---- orientation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", list(STORED))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF"])
def test_images_are_upright(kind: str, orientation: int) -> None:
    data = turned(kind, orientation)
    assert apart(decode(data, 64, Limits()), scene()) < 3
    assert upright(data, Limits()).shape == (192, 320, 3)
    assert apart(decode(data, Resize(64, crop=1.0), Limits()), scene().crop((64, 0, 256, 192))) < 3


@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.parametrize("mode", ["CMYK", "L"])
def test_jpegs_of_other_modes_are_upright(mode: str, orientation: int) -> None:
    image = scene().convert(mode)
    assert apart(decode(turned("JPEG", orientation, image), 64, Limits()), image) < 4


def test_large_jpegs_are_upright_at_a_reduced_scale() -> None:
    large = scene((1600, 960))
    assert upright(turned("JPEG", 6, large), Limits(), 128).shape == (240, 400, 3)
    assert apart(decode(turned("JPEG", 6, large), 64, Limits()), large) < 3


def test_exif_behind_the_pixels_of_a_png_counts() -> None:
    data = turned("PNG", 6)
    at, end = data.index(b"eXIf") - 4, data.index(b"IEND") - 4
    length = 12 + int.from_bytes(data[at : at + 4])
    moved = data[:at] + data[at + length : end] + data[at : at + length] + data[end:]
    assert apart(decode(moved, 64, Limits()), scene()) < 1


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_is_none_is_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    assert apart(decode(saved(scene(), "JPEG", exif=exif), 64, Limits()), scene()) < 3


def test_damaged_exif_is_no_reason_to_lose_an_image() -> None:
    assert apart(decode(saved(scene(), "JPEG", exif=b"Exif\0\0" + b"\xff" * 50), 64, Limits()), scene()) < 3


def test_an_open_image_is_turned_and_left_as_it_was() -> None:
    image = Image.open(io.BytesIO(turned("JPEG", 6)))
    assert apart(square(image, Resize(64)), scene()) < 3
    assert image.size == (192, 320)


# ---- deep, paletted, transparent -------------------------------------------------------------------------------------


def ramp() -> np.ndarray:
    """(64, 64) uint8 from black to white."""
    return np.repeat(np.linspace(0, 255, 64).round().astype(np.uint8)[None], 64, 0)


def png(depth: int, colors: int, rows: np.ndarray, *before: tuple[bytes, bytes]) -> bytes:
    """A PNG of rows (H, W, ...) that are stored as they are."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], depth, colors, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    chunks = [(b"IHDR", header), *before, (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def deep(values: np.ndarray, mode: str) -> Image.Image:
    return Image.frombytes(mode, values.shape[::-1], values.tobytes())


SIXTEEN = ramp().astype(np.uint16) * 257
DEEP: dict[str, Callable[[], bytes]] = {
    "PNG gray": lambda: png(16, 0, SIXTEEN.astype(">u2")),
    "PNG gray alpha": lambda: png(16, 4, np.stack([SIXTEEN, np.full_like(SIXTEEN, 65535)], 2).astype(">u2")),
    "PNG rgb": lambda: png(16, 2, np.stack([SIXTEEN] * 3, 2).astype(">u2")),
    "PNG rgba": lambda: png(16, 6, np.stack([*[SIXTEEN] * 3, np.full_like(SIXTEEN, 65535)], 2).astype(">u2")),
    "TIFF I;16": lambda: saved(deep(SIXTEEN, "I;16"), "TIFF"),
    "TIFF I;16B": lambda: saved(deep(SIXTEEN.astype(">u2"), "I;16B"), "TIFF"),
    "TIFF I": lambda: saved(deep(SIXTEEN.astype(np.int32), "I"), "TIFF"),
    "TIFF F": lambda: saved(deep(ramp().astype(np.float32) / 255, "F"), "TIFF"),
    "PGM": lambda: b"P5 64 64 65535\n" + SIXTEEN.astype(">u2").tobytes(),
    "JPEG 2000": lambda: saved(deep(SIXTEEN, "I;16"), "JPEG2000"),
}


@pytest.mark.parametrize("kind", list(DEEP))
def test_files_of_16_bits_are_scaled(kind: str) -> None:
    found = decode(DEEP[kind](), 64, Limits())
    assert np.abs(found.astype(int) - ramp()[:, :, None]).max() <= 1


OPEN = {
    "I;16": lambda: deep(SIXTEEN, "I;16"),
    "I;16B": lambda: deep(SIXTEEN.astype(">u2"), "I;16B"),
    "I of 16 bits": lambda: deep(SIXTEEN.astype(np.int32), "I"),
    "I of 8 bits": lambda: deep(ramp().astype(np.int32), "I"),
    "I of 32 bits": lambda: deep(ramp().astype(np.int32) * 8_000_000, "I"),
    "I below 0": lambda: deep(ramp().astype(np.int32) - 128, "I"),
    "F of 1": lambda: deep(ramp().astype(np.float32) / 255, "F"),
    "F of 255": lambda: deep(ramp().astype(np.float32), "F"),
    "F of 65535": lambda: deep(SIXTEEN.astype(np.float32), "F"),
}


@pytest.mark.parametrize("kind", list(OPEN))
def test_open_images_of_more_than_8_bits_are_scaled(kind: str) -> None:
    found = square(OPEN[kind](), Resize(64))
    assert np.abs(found.astype(int) - ramp()[:, :, None]).max() <= 1


def test_a_dark_image_of_16_bits_stays_dark() -> None:
    assert square(deep(SIXTEEN // 512, "I;16"), Resize(64)).max() == 0


def test_values_that_are_not_finite_are_refused() -> None:
    values = ramp().astype(np.float32)
    values[3, 3] = np.nan
    with pytest.raises(BadImage, match="not finite"):
        square(deep(values, "F"), Resize(8))


def test_what_a_gray_png_of_16_bits_calls_transparent_is_white() -> None:
    data = png(16, 0, np.zeros((8, 8), ">u2"), (b"tRNS", b"\0\0"))
    assert decode(data, 8, Limits()).min() == 255


def line(mode: str, ground: Any, ink: Any) -> Image.Image:
    image = Image.new(mode, (64, 64), ground)
    ImageDraw.Draw(image).line((8, 8, 56, 40), fill=ink, width=6)
    return image


@pytest.mark.parametrize(
    ("kind", "mode"),
    [*((kind, "RGBA") for kind in ("PNG", "WEBP", "TIFF", "AVIF", "HEIF", "GIF")), ("PNG", "LA"), ("TIFF", "LA")],
)
def test_a_drawing_on_a_transparent_ground_is_one_on_white(kind: str, mode: str) -> None:
    plain = line("RGB", "white", "black")
    drawing = line("LA", (0, 0), (0, 255)).convert(mode)
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind in ("AVIF", "HEIF") else {}
    assert apart(decode(saved(drawing, kind, **options), 64, Limits()), plain) < 2


def test_a_palette_may_be_transparent() -> None:
    plain = line("RGB", "white", "black")
    paletted = line("P", 0, 1)
    paletted.putpalette([200, 0, 0, 0, 0, 0])
    for transparency in (0, bytes([0, 255])):
        assert apart(decode(saved(paletted, "PNG", transparency=transparency), 64, Limits()), plain) == 0
    assert apart(decode(saved(line("RGB", (9, 9, 9), 0), "PNG", transparency=(9, 9, 9)), 64, Limits()), plain) == 0
    assert apart(decode(saved(line("L", 9, 0), "PNG", transparency=9), 64, Limits()), plain) == 0


@pytest.mark.parametrize("mode", ["RGBa", "La", "PA", "1", "YCbCr", "HSV", "RGBX", "CMYK", "LAB"])
def test_open_images_of_any_mode_are_used(mode: str) -> None:
    between = {"La": "LA", "RGBa": "RGBA"}.get(mode, "RGB")
    image = line("RGB", "white", "black").convert(between)
    if mode == "LAB":
        image = Image.merge("LAB", [image.getchannel(0), *[Image.new("L", image.size, 128)] * 2])
    else:
        image = image.convert(mode)
    assert apart(square(image, Resize(64)), line("RGB", "white", "black")) < 2


def test_an_open_image_without_pixels_or_with_half_a_file_is_refused() -> None:
    with pytest.raises(BadImage, match="0 x 5"):
        square(Image.new("RGB", (0, 5)), Resize(8))
    data = saved(scene(), "PNG")
    with pytest.raises(BadImage, match="ends early"):
        square(Image.open(io.BytesIO(data[: len(data) // 2])), Resize(8))


# ---- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF"])
def test_every_format_is_read(kind: str) -> None:
    data = saved(scene(), kind)
    assert apart(decode(data, 64, Limits()), scene()) < 3
    assert unreadable_reason(data[:4096]) is None


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "AVIF", "TIFF", "HEIF"])
def test_the_first_frame_of_several_is_used(kind: str) -> None:
    frames = [scene(), scene().transpose(T.ROTATE_180), scene().transpose(T.FLIP_LEFT_RIGHT)]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 3  # type: ignore[attr-defined]
    assert apart(decode(data, 64, Limits()), scene()) < 3


def test_heic_without_the_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_heif", lambda: False)
    error = refused(saved(scene(), "HEIF"))
    assert error.kind == "unsupported"
    assert "pip install 'zsr[heif]'" in str(error)
    assert module.reads()["heif"] is False  # so that prepare looks again where it is installed later


def raw_tiff() -> bytes:
    """The thumbnail that a camera's raw file begins with."""
    return saved(scene(), "TIFF", tiffinfo={ExifTags.Base.NewSubfileType: 1})


@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "unsupported", "an SVG drawing: convert"),
        (b"\xef\xbb\xbf<!-- me --> <svg width='3'></svg>", "unsupported", "an SVG drawing: convert"),
        (b"<!DOCTYPE html><html><svg ></svg>404</html>", "unsupported", "a web page instead of an image"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "unsupported", "git lfs pull"),
        (b"\0\0\0\x18ftypmp42" + bytes(9), "unsupported", "a video: extract a frame"),
        (b"\x1aE\xdf\xa3" + bytes(90), "unsupported", "a video: extract a frame"),
        (b"8BPS\0\1" + bytes(90), "unsupported", "a Photoshop document"),
        (b"\0\0\0\x18ftypcrx " + bytes(90), "unsupported", "a camera raw file"),
        (b"II*\0\x10\0\0\0CR\2\0" + bytes(90), "unsupported", "a camera raw file"),
        (raw_tiff(), "unsupported", "a camera raw file"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(90), "unsupported", "a JPEG XL image"),
        (b"\0\0\1\0\1\0" + bytes(90), "unsupported", "an icon"),
        (b"PK\3\4" + bytes(90), "unsupported", "an archive"),
        (bytes(90), "wrong_type", "not an image: starts with 0000000000000000"),
        (b"hello, world", "wrong_type", "not an image"),
        (b"BM, as a text may begin", "wrong_type", "not an image"),
        (b"\0\0\0\x18ftypheic" + bytes(200), "undecodable", "the HEIF header does not decode"),
    ],
)
def test_what_is_not_read_says_what_it_is_and_how_to_go_on(data: bytes, kind: str, words: str) -> None:
    error = refused(data)
    assert (error.kind, words in str(error)) == (kind, True), str(error)


def test_a_png_with_much_text_is_read() -> None:
    much = PngImagePlugin.PngInfo()
    much.add_text("prompt", "a cat, " * 500_000, zip=True)
    much.add_itxt("workflow", "{}" * 900_000, zip=True)
    assert apart(decode(saved(scene(), "PNG", pnginfo=much), 64, Limits()), scene()) == 0


def test_all_endings_of_what_is_read_are_known() -> None:
    Image.init()
    kinds = {name for name, _ in module.READ}
    odd = {".apng", ".bigtif", ".bigtiff", ".rgb", ".j2c"}
    assert {end for end, kind in Image.EXTENSION.items() if kind in kinds} - odd <= IMAGE_SUFFIXES
    assert {Path(f"x{end}").suffix for end in IMAGE_SUFFIXES} == IMAGE_SUFFIXES
    assert {end.lower() for end in IMAGE_SUFFIXES} == IMAGE_SUFFIXES


# ---- JPEGs that end early --------------------------------------------------------------------------------------------


def busy(mode: str = "RGB", **options: Any) -> tuple[Image.Image, bytes]:
    """An image whose bytes are spread over its rows, and its JPEG."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).convert(mode)
    return image, saved(image, "JPEG", **options)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_without_its_end_marker_is_whole(mode: str) -> None:
    _, data = busy(mode)
    whole = upright(data, Limits())
    assert np.abs(upright(data[:-2], Limits()).astype(int) - whole).max() <= 1  # CMYK is converted by another library
    assert np.array_equal(upright(data + bytes(5000), Limits()), whole)


@pytest.mark.parametrize("orientation", [1, 3])
def test_the_last_rows_of_a_jpeg_may_be_missing(orientation: int) -> None:
    image, _ = busy()
    data = turned("JPEG", orientation, image)
    found, whole = upright(data[: len(data) * 95 // 100], Limits()), upright(data, Limits())
    if orientation == 3:
        found, whole = found[::-1], whole[::-1]
    assert np.array_equal(found[:400], whole[:400])
    assert 1 <= (found == 128).all((1, 2)).sum() <= 48


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_a_jpeg_that_lacks_more_is_refused_and_says_how_much(mode: str, share: float) -> None:
    _, data = busy(mode)
    error = refused(data[: int(len(data) * share)])
    assert error.kind == "truncated"
    missing = int(str(error).removeprefix("the JPEG ends early, ").partition("%")[0])
    assert missing == pytest.approx(100 - 100 * share, abs=6)


def test_a_gray_image_is_not_taken_for_missing_rows() -> None:
    data = saved(Image.new("L", (64, 64), 60), "JPEG")
    assert decode(data[:-2], 8, Limits()).max() == 60


def test_a_progressive_jpeg_may_end_within_its_last_scans() -> None:
    image, data = busy(progressive=True)
    assert apart(decode(data, 64, Limits()), image) < 3
    assert apart(decode(data[: len(data) * 95 // 100], 64, Limits()), image) < 3
    error = refused(data[: len(data) * 3 // 10])
    assert (error.kind, "most of its detail is missing" in str(error)) == ("truncated", True)
    error = refused(data[: len(data) // 20])
    assert (error.kind, "of its rows are missing" in str(error)) == ("truncated", True)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "GIF", "WEBP", "AVIF", "HEIF", "JPEG2000", "PPM"])
def test_half_a_file_of_any_format_is_refused(kind: str) -> None:
    image, _ = busy()
    data = saved(image, kind)
    assert refused(data[: len(data) // 2]).kind in ("truncated", "undecodable")


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF"])
def test_damaged_bytes_are_refused_or_read_and_never_raise_otherwise(kind: str) -> None:
    data = saved(scene((48, 32)), kind)
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(data)
        for at in rng.integers(0, min(len(data), 400), 3):
            damaged[at] = rng.integers(256)
        with suppress(BadImage):
            assert decode(bytes(damaged), 16, Limits()).shape == (16, 16, 3)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "JPEG2000", "HEIF", "AVIF"])
def test_the_limit_of_pixels_holds_for_every_format(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(scene(), kind)

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "load", never)
    with pytest.raises(BadImage) as error:
        decode(data, 16, Limits(pixels=1000))
    assert error.value.kind == "oversized"
