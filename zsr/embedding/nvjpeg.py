"""Decode and resize JPEGs on the model's GPU, by NVIDIA's nvImageCodec (the extra `nvjpeg`).

Headers are checked first, as everywhere. Images that the library does not decode, such as other formats, are decoded on
the CPU, which also reports their errors. The GPU decoder rounds differently and resizing is in float32, so that pixels
differ by a few of 255: the configuration of FEATURES records which decoder was used. Crops of the published
preprocessing are rounded to whole pixels here.

Not yet run on a GPU; the tests run the same code with the library's CPU decoder.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.dlpack import from_dlpack

from zsr.data.decode import BadImage, Header, Limits, Pictures, Resize, check_header, turned
from zsr.data.pictures import Decoded, pixels
from zsr.embedding.prefetch import BLOCK, NOBODY, Images
from zsr.errors import ConfigError


class DeviceDecoders:
    """Decoder for one model, with the interface of `prefetch.Decoders`."""

    def __init__(self, pictures: Pictures, device: str) -> None:
        """Raises ConfigError: the extra is not installed."""
        try:
            from nvidia import nvimgcodec
        except ImportError:
            raise ConfigError("--jpegs gpu requires nvImageCodec; install zsr with the extra 'nvjpeg'") from None
        self.pictures, self.device = pictures, device
        place: dict[str, Any] = {}
        if device == "cpu":
            backends = [nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)]
            place = {"device_id": nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY, "backends": backends}
        self.decoder = nvimgcodec.Decoder(max_num_cpu_threads=1, **place)
        # images are rotated after they are resized, by the Exif orientation as read by the CPU decoders
        self.how = nvimgcodec.DecodeParams(color_spec=nvimgcodec.ColorSpec.SRGB, apply_exif_orientation=False)

    def at_once(self, batch: int) -> int:
        """Images per block, for a model with batch size `batch`."""
        return max(BLOCK, batch)

    def blocks(self, modality: str, blocks: Iterator[Images]) -> Iterator[Decoded]:
        """Decode every block, in order."""
        for images in blocks:
            yield self._decoded(images, modality)

    def note(self, pictures: int, decode: float, model: float) -> None:
        """Do nothing: there are no decoding tasks to choose."""

    def as_json(self) -> dict[str, Any]:
        """For a report: there are no decoding tasks."""
        return NOBODY

    def _decoded(self, images: Images, modality: str) -> Decoded:
        headers = {row: header for row, image in enumerate(images) if image and (header := _whole_jpeg(image))}
        decoded = self.decoder.decode([images[row] for row in headers], params=self.how)
        found = dict(zip(headers, decoded, strict=True))
        rows: list[int] = []
        kept: list[np.ndarray] = []
        bad: list[tuple[int, str, str]] = []
        for row, image in enumerate(images):
            try:
                kept.append(self._pixels(found.get(row), headers.get(row), image, modality))
                rows.append(row)
            except BadImage as error:
                bad.append((row, error.kind, str(error)))
        side = self.pictures.resize.size
        return Decoded(rows, np.stack(kept) if kept else np.zeros((0, side, side, 3), np.uint8), bad)

    def _pixels(self, found: Any, header: Header | None, image: bytes | None, modality: str) -> np.ndarray:
        """(S, S, 3) uint8 from the library's result, or from the CPU if there is none. Raises BadImage."""
        if found is None or header is None or found.shape[2] != 3:
            return pixels(image, self.pictures, modality)
        whole = torch.from_numpy(np.asarray(found)) if self.device == "cpu" else from_dlpack(found)
        upright = turned(resized(whole, self.pictures.resize).cpu().numpy(), header.orientation)
        return self.pictures.look(modality, upright)


def _whole_jpeg(image: bytes) -> Header | None:
    """The header of a JPEG that may be passed to the library; None for anything else, which the CPU decodes or rejects.

    A truncated JPEG is left to the CPU, which decides whether enough of it is there.
    """
    try:
        header = check_header(image, Limits())
    except BadImage:
        return None
    return header if header.kind == "JPEG" and image.rstrip(b"\0").endswith(b"\xff\xd9") else None


def resized(pixels: Tensor, wanted: Resize) -> Tensor:
    """Resize pixels (H, W, 3) uint8 to (S, S, 3) uint8 on their device, antialiased."""
    if wanted.crop is not None:
        side = round(wanted.crop * min(pixels.shape[:2]))
        top, left = ((edge - side) // 2 for edge in pixels.shape[:2])
        pixels = pixels[top : top + side, left : left + side]
    planes = pixels.permute(2, 0, 1)[None].float()
    size = (wanted.size, wanted.size)
    made = functional.interpolate(planes, size, mode=wanted.interpolation, antialias=True, align_corners=False)
    return made[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
