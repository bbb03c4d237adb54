"""The training loop: one step per batch; validation and a staged state after each epoch."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from zsr import faults
from zsr.artifact import Staging
from zsr.batch import Batch
from zsr.data.sampling import seed_of
from zsr.data.shards import Rows
from zsr.errors import NonFiniteLoss
from zsr.metrics import mean_average_precision
from zsr.models.backbones import pictures_at_once
from zsr.models.protocol import Embedder, Model, Terms
from zsr.training.batches import Batches
from zsr.training.checkpoint import Progress, Writer, last_progress, save_progress
from zsr.training.config import TrainSettings
from zsr.training.engines import Engines, broadcast, min_over_ranks
from zsr.training.metrics import Meter

# query (Q, P, D) and gallery (G, P, D) multi-vectors, compared by their best pair of vectors, their labels (Q,) and
# (G,), metric -> score, higher is better

BLOCK: Final = 4096  # feature rows per embedding batch


@dataclass(frozen=True)
class Place:
    """Distributed context of a worker: rank, world size and device."""

    rank: int
    world: int
    device: str


@dataclass(frozen=True)
class Validation:
    """Queries and photos of the validation classes, which choose the checkpoint."""

    query: Rows
    photo: Rows

    def of(self, model: Embedder, device: str) -> float:
        """The score of `model` in its current state, with photos as gallery."""
        parts = []
        for side, rows in (("sketch", self.query), ("photo", self.photo)):
            at_once = BLOCK if rows.features.ndim == 2 else pictures_at_once(device)
            blocks = torch.split(torch.from_numpy(rows.features), at_once)
            parts.append(torch.cat([model.encode(side, block.to(device)).cpu() for block in blocks]))
        labels = [torch.from_numpy(rows.labels) for rows in (self.query, self.photo)]
        return mean_average_precision(parts[0], parts[1], labels[0], labels[1], model.metric)


def train(
    model: Model,
    sampler: Batches,
    validation: Validation | None,
    settings: TrainSettings,
    last_step: int,
    deepspeed: Mapping[str, Any],
    staging: Staging,
    meter: Meter,
    place: Place,
    report: Callable[[dict[str, float]], None],
    *,
    recompute: bool = False,
) -> Progress:
    """Train until `last_step` or early stopping; the newest state is in `staging` when this returns.

    Args:
        validation: on rank 0. None if no class is held out; there is no early stopping then.
        report: called once per epoch on every rank, with the step.
        recompute: see `Engines`.

    Raises:
        NonFiniteLoss: with the loss term and the step, at the end of the epoch of that step.
    """
    found = last_progress(staging)
    if found is not None:
        model.load_state_dict(found[1])  # before the engines, since ZeRO shards the weights when it is initialized
    engines = Engines(model, settings.batch_size, deepspeed, recompute=recompute)
    progress = Progress() if found is None else found[0]
    if found is not None:
        engines.restore(found[2])
    meter.begin(engines, progress.step)
    with Writer() as writer:
        while progress.step < last_step and not _patience_spent(progress, settings):
            meter.start_epoch(sampler.waited)
            means = _epoch(engines, sampler, settings, place, progress.step, meter)
            pace = meter.pace(settings.steps_per_epoch, sampler.waited)
            weights, state = engines.weights(), engines.state()
            score = _score(validation, engines, weights, place)
            progress = progress.after(progress.step + settings.steps_per_epoch, score)
            meter.epoch(progress.step, score, pace, means)
            if place.rank == 0:
                writer.write(partial(save_progress, staging, progress, weights, state, settings.keep_checkpoints))
            report({"step": float(progress.step)})
            faults.here("train.report")
    return progress


def _score(
    validation: Validation | None, engines: Engines, weights: Mapping[str, Tensor], place: Place
) -> float | None:
    """The validation score of unsharded weights, computed on rank 0, which alone has the rows; equal on all ranks.

    None without validation. NaN is broadcast in that case, since the other ranks cannot know.
    """
    found = broadcast(math.nan if validation is None else validation.of(engines.whole_model(weights), place.device))
    return None if math.isnan(found) else found


def _patience_spent(progress: Progress, settings: TrainSettings) -> bool:
    return progress.epochs_since_best() >= settings.patience


def _epoch(
    engines: Engines, sampler: Batches, settings: TrainSettings, place: Place, done: int, meter: Meter
) -> dict[str, float]:
    """Train one epoch after `done` steps; return the mean of each loss term. Waits for the device once, at the end."""
    engines.model.train()
    names: list[str] = []
    values: list[Tensor] = []
    for step in range(done + 1, done + settings.steps_per_epoch + 1):
        faults.here("train.step")
        terms = train_step(engines, sampler, settings, place, step)
        names = list(terms)
        values.append(torch.stack([terms[name].float() for name in names]))
        meter.step(step, names, values, sampler.waited)
    table = torch.stack(values).cpu()
    _require_finite(table, names, done)
    return dict(zip(names, table.mean(0).tolist(), strict=True))


def train_step(engines: Engines, sampler: Batches, settings: TrainSettings, place: Place, step: int) -> Terms:
    """Run step number `step`, counted from 1: every phase on its batch. Returns the losses by name, detached."""
    epoch, index = divmod(step - 1, settings.steps_per_epoch)

    def draw(repetition: int) -> Batch:
        batch = sampler.batch(step, settings.rows(place.world), place.rank, place.world, repetition)
        return batch.map(epoch=epoch, index=index)

    # seeded by (seed, step, rank) at each step, so that a resumed run samples the same noise as an uninterrupted one
    seed = seed_of(settings.seed, step, place.rank)
    if place.device == "cpu":
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would format a stack trace for absent GPUs
    else:
        torch.manual_seed(seed)
    return engines.train_batch(draw)


def _require_finite(table: Tensor, names: list[str], done: int) -> None:
    """Raise NonFiniteLoss on all ranks for the first non-finite loss term of the epoch on any rank. Collective."""
    bad = torch.nonzero(~torch.isfinite(table.flatten()))
    first = min_over_ranks(int(bad[0]) if len(bad) else table.numel())
    if first < table.numel():
        row, column = divmod(first, len(names))
        raise NonFiniteLoss(
            f"loss term {names[column]!r} is NaN or infinite at step {done + row + 1}; lower the learning rate or "
            "check the features. The state of the previous epoch is kept"
        )
