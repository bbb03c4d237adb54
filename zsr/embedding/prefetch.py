"""Pictures for a model: decoded in turn with it on its own CPU, or by Ray tasks ahead of a model that has a GPU.

A GPU takes pictures faster than one CPU decodes them. How many tasks decode for a model follows from a probe: for some
seconds it decodes and computes in turn, and both are timed. Where the model itself runs on CPUs, tasks would only take
from each other what they share.
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

PROBE: Final = 3.0  # seconds of decoding and computing in turn, after the first block: a GPU starts slowly
AHEAD: Final = 2  # blocks for each of those CPUs: one is decoded, one lies ready
BLOCK: Final = 64  # pictures of a task

NOBODY: Final[dict[str, Any]] = {"running": None}  # decodes, or nobody knows yet who shall

Images = Sequence[bytes | None]


@ray.remote(num_cpus=1)  # type: ignore[misc,unused-ignore]
def _task(images: Images, pictures: Pictures, modality: str) -> Decoded:
    keep_freed_memory()
    return decoded(images, pictures, modality)


@dataclass
class Decoders:
    """Decodes for one model.

    Attributes:
        most: CPUs that tasks may decode on for it; with 0 its own process decodes.
        running: how many of them keep the model busy; None until the probe has told.
        decode, model: seconds a picture, as the probe found them; 0 before.
    """

    pictures: Pictures
    most: int
    running: int | None = None
    decode: float = 0.0
    model: float = 0.0
    _first: bool = True
    _seen: int = 0

    def at_once(self, batch: int) -> int:
        """Pictures of a block, for a model that takes `batch` at once."""
        return BLOCK if self.most else batch

    def blocks(self, modality: str, blocks: Iterator[Images]) -> Iterator[Decoded]:
        """Every block decoded, in order. Ray runs the task of a lost worker again."""
        waiting: deque[Any] = deque()
        while True:
            while len(waiting) < AHEAD * (self.running or 0) and (images := next(blocks, None)) is not None:
                waiting.append(_task.remote(images, self.pictures, modality))
            if waiting:
                found = ray.get(waiting.popleft())
                yield replace(found, pixels=found.pixels.copy())  # what lies in the object store may not be written to
            elif (images := next(blocks, None)) is not None:
                yield decoded(images, self.pictures, modality)
            else:
                return

    def as_json(self) -> dict[str, Any]:
        """For a report: seconds a picture of both stages as the probe found them, and the tasks that decode."""
        if self.running is None:
            return NOBODY
        return {"decode": round(self.decode, 6), "model": round(self.model, 6), "running": self.running}

    def note(self, pictures: int, decode: float, model: float) -> None:
        """A block took so many seconds, one stage after the other. When enough are known, `running` is chosen."""
        if self.running is not None or self._first:
            self._first = False
            return
        self._seen += pictures
        self.decode += decode
        self.model += model
        if self._seen and self.decode + self.model >= PROBE:
            self.decode, self.model = self.decode / self._seen, self.model / self._seen
            self.running = min(self.most, math.ceil(self.decode / max(self.model, 1e-9)))
