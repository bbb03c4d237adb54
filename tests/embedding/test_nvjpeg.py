"""JPEGs through nvImageCodec: by its CPU decoder here, and on a GPU where there is one."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from tests.pipeline import ok
from zsr.artifact import open_artifact
from zsr.data.decode import Pictures, Resize
from zsr.data.pictures import decoded
from zsr.embedding.backbone import Extractor
from zsr.embedding.nvjpeg import DeviceDecoders
from zsr.embedding.prefetch import Images
from zsr.embedding.settings import BackboneSettings
from zsr.embedding.shards import Clocks
from zsr.models import backbones

pytestmark = pytest.mark.usefixtures("ray_cluster")

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]


def saved(picture: Image.Image, kind: str = "JPEG") -> bytes:
    out = io.BytesIO()
    picture.save(out, kind)
    return out.getvalue()


def waves(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    bands = [128 + 90 * np.sin(x * a + y * b) for a, b in ((0.05, 0.1), (0.11, 0.02), (0.03, 0.03))]
    return Image.fromarray(np.stack(bands, 2).astype(np.uint8))


def images() -> Images:
    whole = saved(waves(120, 90))
    return [
        whole,
        saved(waves(60, 64), "PNG"),
        None,
        saved(waves(80, 80).convert("L")),
        whole[:300],
        saved(waves(64, 100)),
        b"no image",
        saved(Image.new("CMYK", (40, 30))),
        turned(waves(100, 64)),
        whole[:-2],
        whole[: len(whole) // 2],
    ]


def turned(picture: Image.Image) -> bytes:
    """A JPEG that lies on its side, and says so."""
    out, exif = io.BytesIO(), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture.transpose(Image.Transpose.ROTATE_90).save(out, "JPEG", exif=exif)
    return out.getvalue()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("resize", [Resize(32), Resize(24, "bicubic", 0.875)], ids=["whole", "cut"])
def test_pixels_and_refusals_are_those_of_the_cpu_up_to_rounding(resize: Resize, device: str) -> None:
    pictures = Pictures(resize, invert_sketches=True)
    (found,) = DeviceDecoders(pictures, device).blocks("sketch", iter([images()]))
    own = decoded(images(), pictures, "sketch")
    assert found.rows == own.rows == [0, 1, 3, 5, 7, 8, 9]
    assert found.bad == own.bad
    assert [kind for _, kind, _ in found.bad] == ["empty", "truncated", "wrong_type", "truncated"]
    apart = np.abs(found.pixels.astype(int) - own.pixels)
    # colors are put between pixels otherwise, and a cut is rounded to whole ones
    assert apart[:4].mean() < 2.0 > apart[5:].mean((1, 2, 3)).max()
    assert np.array_equal(found.pixels[1], own.pixels[1])  # a PNG is decoded on the CPU


def test_nothing_that_decodes_is_an_empty_block() -> None:
    (found,) = DeviceDecoders(Pictures(Resize(8)), "cpu").blocks("photo", iter([[None, b""]]))
    assert found.pixels.shape == (0, 8, 8, 3)
    assert [row for row, _, _ in found.bad] == [0, 1]


def test_features_are_near_those_of_the_cpu(tmp_path: Path) -> None:
    for modality in ("photo", "sketch"):
        (tmp_path / "raw" / modality / "cat").mkdir(parents=True)
        for number in range(5):
            picture = saved(waves(150 + 30 * number, 140))
            (tmp_path / "raw" / modality / "cat" / f"{number}.jpg").write_bytes(picture)
    ok("prepare", "--source", "folders", "--input", tmp_path / "raw", "--output", tmp_path / "data")
    weights, made = backbones.weights_path("lite0", None), open_artifact(tmp_path / "data", "data")
    found = []
    for jpegs in ("cpu", "gpu"):  # without a GPU the extractor has the library's decoder for CPUs
        settings = BackboneSettings.model_validate({"size": 96, "jpegs": jpegs})
        extractor = Extractor(made, settings, weights, backbones.digest(weights), "", 3)
        parts = list(extractor.made(made.shards("photo")[0].path, Clocks()))
        found.append(np.concatenate([f for _, p in parts for f in p.features]).astype(np.float32))
    assert found[0].shape == found[1].shape == (5, 1280)
    cosine = (found[0] * found[1]).sum(1) / np.prod([np.linalg.norm(f, axis=1) for f in found], axis=0)
    assert 0.98 < cosine.min() < cosine.max() < 1.0
