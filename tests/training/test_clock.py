"""The clock that a batch carries: epoch and batch inside the epoch, both from 0."""

from typing import cast
from unittest.mock import MagicMock

import torch

from zsr.batch import Batch
from zsr.training.config import TrainSettings
from zsr.training.loop import Place, train_step

BATCH = Batch(sketch=torch.zeros(4), photo=torch.zeros(4), label=torch.zeros(4), word=torch.zeros(4))


def clock(step: int) -> tuple[int, int]:
    """What the batch of `step` says, with 3 steps an epoch."""
    sampler, engines = MagicMock(), MagicMock()
    sampler.batch.return_value = BATCH
    engines.model.scaled = lambda batch: batch
    engines.train_batch = lambda draw: draw(0)
    batch = cast(Batch, train_step(engines, sampler, TrainSettings(steps_per_epoch=3), Place(0, 1, "cpu"), step))
    return batch.epoch, batch.index


def test_the_clock_follows_the_step() -> None:
    assert [clock(step) for step in (1, 2, 3, 4, 7)] == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0)]
