"""Image decoding for a model: alternating with it in its own process, or prefetched by Ray tasks for a model on a GPU.

A GPU processes images faster than one CPU decodes them. The number of decoding tasks per model follows from a probe:
for a few seconds the actor alternates between decoding and computing, and both are timed. For models on CPUs,
decoding tasks would only compete for the same CPUs.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import ray

from zsr.data.decode import Pictures
from zsr.data.pictures import Decoded, decoded
from zsr.process import keep_freed_memory

PROBE: Final = 3.0  # seconds of the probe, after the first block, since a GPU starts slowly
AHEAD: Final = 2  # blocks in flight per decoding task: one is being decoded, one is ready
BLOCK: Final = 64  # images per task

NOBODY: Final[dict[str, Any]] = {"running": None}  # there are no decoding tasks, or their number is not known yet

Images = Sequence[bytes | None]


@ray.remote(num_cpus=1)  # type: ignore[misc,unused-ignore]
def _task(images: Images, pictures: Pictures, modality: str) -> Decoded:
    keep_freed_memory()
    return decoded(images, pictures, modality)


@dataclass
class Decoders:
    """Decoder of the images of one model.

    Attributes:
        most: max decoding tasks (one CPU each); with 0 the model's own process decodes.
        running: number of tasks that keep the model busy; None until the probe has ended.
        decode, model: seconds per image of both stages, measured by the probe; 0 before.
    """

    pictures: Pictures
    most: int
    running: int | None = None
    decode: float = 0.0
    model: float = 0.0
    _first: bool = True
    _seen: int = 0

    def at_once(self, batch: int) -> int:
        """Images per block, for a model with batch size `batch`."""
        return BLOCK if self.most else batch

    def blocks(self, modality: str, blocks: Iterator[Images]) -> Iterator[Decoded]:
        """Decode every block, in order. Ray reruns the task of a lost worker."""
        waiting: deque[Any] = deque()
        while True:
            while len(waiting) < AHEAD * (self.running or 0) and (images := next(blocks, None)) is not None:
                waiting.append(_task.remote(images, self.pictures, modality))
            if waiting:
                found = ray.get(waiting.popleft())
                yield replace(found, pixels=found.pixels.copy())  # memory of the object store is read-only
            elif (images := next(blocks, None)) is not None:
                yield decoded(images, self.pictures, modality)
            else:
                return

    def as_json(self) -> dict[str, Any]:
        """For a report: seconds per image of both stages, and the number of decoding tasks."""
        if self.running is None:
            return NOBODY
        return {"decode": round(self.decode, 6), "model": round(self.model, 6), "running": self.running}

    def note(self, pictures: int, decode: float, model: float) -> None:
        """Record a block's stage times in seconds. Once the probe has enough of them, choose `running`."""
        if self.running is not None or self._first:
            self._first = False
            return
        self._seen += pictures
        self.decode += decode
        self.model += model
        if self._seen and self.decode + self.model >= PROBE:
            self.decode, self.model = self.decode / self._seen, self.model / self._seen
            self.running = min(self.most, math.ceil(self.decode / max(self.model, 1e-9)))
