"""Pictures under limits."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from zsr.data.decode import BadImage, Interpolation, Limits, Resize, check_header, decode


def encoded(kind: str, size: tuple[int, int] = (40, 30), mode: str = "RGB", colour: object = (200, 30, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, kind)  # type: ignore[arg-type]
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_images_decode_to_the_requested_size(kind: str) -> None:
    pixels = decode(encoded(kind), 16, Limits())
    assert pixels.shape == (16, 16, 3)
    assert pixels.dtype == np.uint8
    assert abs(int(pixels[8, 8, 0]) - 200) < 6


def test_transparency_becomes_white() -> None:
    pixels = decode(encoded("PNG", mode="RGBA", colour=(0, 0, 0, 0)), 8, Limits())
    assert int(pixels.min()) == 255


def test_cmyk_goes_through_pillow() -> None:
    assert decode(encoded("JPEG", mode="CMYK", colour=(0, 0, 0, 0)), 8, Limits()).shape == (8, 8, 3)


@pytest.mark.parametrize(("crop", "columns"), [(None, [0, 100, 200]), (1.0, [100, 100, 100])])
def test_a_crop_keeps_the_middle_and_no_crop_keeps_all(crop: float | None, columns: list[int]) -> None:
    buffer = io.BytesIO()
    thirds = np.repeat(np.array([0, 100, 200], np.uint8), 30)
    Image.fromarray(np.broadcast_to(thirds[None, :, None], (30, 90, 3)).copy()).save(buffer, "PNG")
    pixels = decode(buffer.getvalue(), Resize(3, crop=crop), Limits())
    assert pixels[1, :, 0].tolist() == pytest.approx(columns, abs=20)


@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
def test_the_interpolation_is_the_one_asked_for(name: Interpolation) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    pixels = decode(saved(noise), Resize(16, name), Limits()).astype(int)
    apart = {kind: np.abs(pixels - by_pillow(noise, kind)).mean() for kind in ("bilinear", "bicubic")}
    assert apart.pop(name) < 0.5
    assert min(apart.values()) > 4


@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(97, 61), (20, 300), (16, 16), (7, 5)])
def test_pictures_are_resized_as_pillow_does(name: Interpolation, shape: tuple[int, int]) -> None:
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]]
    waves = np.stack([128 + 100 * np.sin(x * a + y * b) for a, b in ((0.1, 0.3), (0.5, 0.05), (0.2, 0.2))], 2)
    smooth = waves.astype(np.uint8)
    pixels = decode(saved(smooth), Resize(16, name), Limits()).astype(int)
    assert np.abs(pixels - by_pillow(smooth, name)).max() <= 2


def test_a_cut_is_not_rounded_to_whole_pixels() -> None:
    ramp = np.repeat(np.arange(101, dtype=np.uint8)[None, :, None], 101, 0).repeat(3, 2)
    pixels = decode(saved(2 * ramp), Resize(50, crop=0.875), Limits()).astype(int)
    half = 0.875 * 101 / 2
    assert np.abs(pixels - by_pillow(2 * ramp, "bilinear", 50, (50.5 - half,) * 2 + (50.5 + half,) * 2)).max() <= 2


def saved(pixels: np.ndarray) -> bytes:
    """A PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def by_pillow(
    pixels: np.ndarray, name: str, size: int = 16, box: tuple[float, float, float, float] | None = None
) -> np.ndarray:
    """What Pillow makes of it."""
    kind = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[name]
    return np.asarray(Image.fromarray(pixels).resize((size, size), kind, box), int)


def bomb(side: int) -> bytes:
    """A PNG whose header claims side x side pixels, with no body."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8_000, 13_000, 30_000])
def test_a_bomb_is_refused_by_its_header(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "load", never)
    with pytest.raises(BadImage) as error:
        decode(bomb(side), 16, Limits())
    assert error.value.kind == "oversized"


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "empty"),
        (b"GIF89a" + bytes(30), "undecodable"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "undecodable"),
        (b"x" * 40, "wrong_type"),
    ],
)
def test_what_is_no_picture_is_named(data: bytes, kind: str) -> None:
    with pytest.raises(BadImage) as error:
        check_header(data, Limits())
    assert error.value.kind == kind


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_half_a_body_is_refused(kind: str) -> None:
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(buffer, kind)
    data = buffer.getvalue()
    with pytest.raises(BadImage):
        decode(data[: len(data) // 2], 64, Limits())


def test_too_many_bytes_are_refused_unread() -> None:
    with pytest.raises(BadImage, match="at most 10"):
        check_header(encoded("PNG"), Limits(encoded=10))


def test_a_jpeg_with_a_second_view_behind_it_is_no_animation() -> None:
    buffer = io.BytesIO()
    views = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (200, 0)]
    views[0].save(buffer, "MPO", save_all=True, append_images=views[1:])
    assert Image.open(io.BytesIO(buffer.getvalue())).n_frames == 2  # type: ignore[attr-defined]
    assert abs(int(decode(buffer.getvalue(), 8, Limits())[4, 4, 0]) - 200) < 6


def test_cmyk_keeps_its_colours_roughly() -> None:
    red = decode(encoded("JPEG", mode="CMYK", colour=(0, 255, 255, 0)), 8, Limits())[4, 4]
    assert red[0] > 200 > 60 > max(red[1:])


def test_what_is_wrong_is_said_alike_in_every_run() -> None:
    said = set()
    for _ in range(2):
        with pytest.raises(BadImage) as error:
            check_header(b"\xff\xd8\xff" + bytes(99), Limits())
        said.add(str(error.value))
    assert said == {"the JPEG header does not decode: cannot identify image file"}
