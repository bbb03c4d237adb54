"""The training loop: batches in, named losses out, a validation score and a staged state after each epoch."""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from zsr import fault
from zsr.artifact import Staging
from zsr.batch import Batch
from zsr.data.augment import augmented
from zsr.data.sampling import Sampler, seed_of
from zsr.data.shards import Rows
from zsr.errors import NonFiniteLoss
from zsr.models.protocol import Embedder, Metric, Model, Terms
from zsr.training.checkpoint import Progress, last_progress, save_progress, tensors
from zsr.training.config import TrainSettings
from zsr.training.engines import Engines, broadcast

logger = logging.getLogger("zsr")

# query (Q, P, D), gallery (G, P, D), of which the best pair of parts counts, their labels (Q,) and (G,), metric ->
# score, higher is better
Score = Callable[[Tensor, Tensor, Tensor, Tensor, Metric], float]

BLOCK: Final = 4096  # feature rows, or pictures, that are embedded at once
PICTURES: Final = 64


@dataclass(frozen=True)
class Place:
    """Where a worker stands: its rank, how many there are, and its device."""

    rank: int
    world: int
    device: str


@dataclass(frozen=True)
class Validation:
    """Queries and photos of the classes that choose the checkpoint, and how they are scored."""

    query: Rows
    photo: Rows
    score: Score

    def of(self, model: Embedder, device: str) -> float:
        """The score of `model` as it stands, photos as gallery."""
        parts = []
        for side, rows in (("sketch", self.query), ("photo", self.photo)):
            blocks = torch.split(torch.from_numpy(rows.features), BLOCK if rows.features.ndim == 2 else PICTURES)
            parts.append(torch.cat([model.encode(side, block.to(device)).cpu() for block in blocks]))
        labels = [torch.from_numpy(rows.labels) for rows in (self.query, self.photo)]
        return self.score(parts[0], parts[1], labels[0], labels[1], model.metric)


class Log:
    """JSONL metrics beside the artifact, written by rank 0: a line an epoch. A line each 30 s goes to the job's log."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.shown = time.monotonic()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, **values: Any) -> None:
        if self.path is not None:
            with self.path.open("a") as handle:
                handle.write(json.dumps(values) + "\n")
            if time.monotonic() - self.shown >= 30:
                self.shown = time.monotonic()
                logger.warning("train: step %(step)d, validation mAP %(validation_map_all)s", values)


def train(
    model: Model,
    sampler: Sampler,
    validation: Validation | None,
    settings: TrainSettings,
    last_step: int,
    deepspeed: Mapping[str, Any],
    staging: Staging,
    log: Log,
    place: Place,
    report: Callable[[dict[str, float]], None],
) -> Progress:
    """Train until `last_step` or until the patience runs out; the newest state lies in `staging` when this returns.

    Args:
        validation: None where no class is held out; the patience then never runs out.
        report: called once an epoch on every rank, with the epoch's numbers.

    Raises:
        NonFiniteLoss: naming the term and the step, within an epoch of the step.
    """
    engines = Engines(model, settings.batch_size, deepspeed)
    progress = _resume(model, engines, staging, place.device)
    while progress.step < last_step and not _patience_spent(progress, settings):
        started = time.monotonic()
        means = _epoch(engines, sampler, settings, place, progress.step)
        seconds = time.monotonic() - started
        score = None
        if validation is not None:
            score = broadcast(validation.of(model, place.device) if place.rank == 0 else 0.0)
        progress = progress.after(progress.step + settings.steps_per_epoch, score)
        if place.rank == 0:
            save_progress(staging, progress, tensors(model), engines.state(), settings.keep_checkpoints)
            fault.here("train.save")
            rate = settings.steps_per_epoch * settings.batch_size * place.world / seconds
            log.write(step=progress.step, validation_map_all=score, samples_a_second=round(rate, 1), **means)
        report({"step": float(progress.step)})
    return progress


def _resume(model: Model, engines: Engines, staging: Staging, device: str) -> Progress:
    """The last staged state put back into the model and its optimizers, or a fresh start."""
    found = last_progress(staging)
    if found is None:
        return Progress()
    progress, weights, optimizer = found
    model.load_state_dict({name: value.to(device) for name, value in weights.items()})
    engines.restore(optimizer)
    return progress


def _patience_spent(progress: Progress, settings: TrainSettings) -> bool:
    return progress.epochs_since_best() >= settings.patience


def _epoch(engines: Engines, sampler: Sampler, settings: TrainSettings, place: Place, done: int) -> dict[str, float]:
    """One epoch after `done` steps; the mean of each term. The device is waited for once, at the end."""
    engines.model.train()
    names: list[str] = []
    values: list[Tensor] = []
    for step in range(done + 1, done + settings.steps_per_epoch + 1):
        fault.here("train.step")
        terms = train_step(engines, sampler, settings, place, step)
        names = list(terms)
        values.append(torch.stack([terms[name].float() for name in names]))
    table = torch.stack(values).cpu()
    _require_finite(table, names, done)
    return dict(zip(names, table.mean(0).tolist(), strict=True))


def train_step(engines: Engines, sampler: Sampler, settings: TrainSettings, place: Place, step: int) -> Terms:
    """Step number `step`, from 1, of a run: its batch through every phase. The named terms, detached."""
    epoch, index = divmod(step - 1, settings.steps_per_epoch)

    def draw(repetition: int) -> Batch:
        batch = sampler.batch(step, settings.batch_size, place.rank, place.world, repetition)
        batch = batch.map(epoch=epoch, index=index)
        return engines.model.scaled(augmented(batch) if settings.augment else batch)

    # noise is a function of (seed, step, rank), never carried over: a resumed run draws what the unbroken one drew
    torch.manual_seed(seed_of(settings.seed, step, place.rank))
    return engines.train_batch(draw)


def _require_finite(table: Tensor, names: list[str], done: int) -> None:
    bad = torch.nonzero(~torch.isfinite(table))
    if len(bad):
        row, column = (int(i) for i in bad[0])
        value = float(table[row, column])
        kind = "NaN" if math.isnan(value) else "infinite"
        raise NonFiniteLoss(
            f"term {names[column]!r} is {kind} at step {done + row + 1}; lower the rate or look at the features. "
            "The state of the epoch before is kept"
        )
