"""Gradient accumulation: a step in micro-batches with the gradient of the whole batch.

Losses that are means over rows (`Model.coupled` is False) are accumulated per micro-batch: the gradient of the batch is
the mean of the micro-batches' gradients, weighted by their rows. Batch-dependent losses need the features of all rows
at once; features are small, and what is large is the image tower. So all micro-batches first pass the tower without a
graph, the losses are backpropagated to the features of the whole batch, and each micro-batch then passes the tower
again to backpropagate its part of that gradient (gradient caching). This costs a second forward pass of the tower.
Without a trained tower, a model with batch-dependent losses takes the whole batch at once.
"""

from dataclasses import fields
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from zsr.batch import Batch
from zsr.data.sampling import seed_of
from zsr.errors import ConfigError
from zsr.models.protocol import Phase, Terms

if TYPE_CHECKING:
    from zsr.training.engines import Engines

FEATURES: Final = ("sketch", "photo", "negative")  # fields of a batch that a tower computes


def step(engines: "Engines", batch: Batch) -> Terms:
    """One step of a single-phase model on raw `batch`, in micro-batches. Returns the whole batch's losses, detached.

    Raises:
        ConfigError: batch-dependent losses at ZeRO stage 3, where passes that use different parameters are not
            supported.
    """
    (phase,) = engines.model.phases
    if engines.model.coupled and engines.stage == 3:
        raise ConfigError(
            f"{len(batch)} rows per worker, {engines.batch_size} at a time: {type(engines.model).__name__} has "
            "batch-dependent losses, which cannot be accumulated at ZeRO stage 3; use --zero-stage 2, or a larger "
            "--batch-size"
        )
    return _cached(engines, phase, batch) if engines.model.coupled else _accumulated(engines, phase, batch)


def _accumulated(engines: "Engines", phase: Phase, batch: Batch) -> Terms:
    parts = split(batch, engines.batch_size)
    logged: Terms = {}
    for number, part in enumerate(parts):
        share = len(part) / len(batch)
        terms = engines.terms(phase, *engines.begin(part))
        _add(engines, phase, terms, share, last=number == len(parts) - 1)
        logged = {name: share * value.detach() + logged.get(name, 0.0) for name, value in terms.items()}
    return logged


def _cached(engines: "Engines", phase: Phase, batch: Batch) -> Terms:
    seed = torch.initial_seed()
    parts = split(batch, engines.batch_size)
    with torch.no_grad():
        whole = joined([_passed(engines, part, seed, number) for number, part in enumerate(parts)])
    leaves = {name: value.detach().requires_grad_(True) for name, value in _made(whole).items()}
    torch.manual_seed(seed)
    held = whole.map(**leaves)
    terms = engines.terms(phase, held, engines.share(held))
    _add(engines, phase, terms, 1.0, last=False)
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    for number, part in enumerate(parts):
        again = _made(_passed(engines, part, seed, number))
        rows = slice(number * engines.batch_size, number * engines.batch_size + len(part))
        carried = {name: (again[name].float() * slope[rows].float()).sum() for name, slope in gradients.items()}
        _add(engines, phase, carried, 1.0, last=number == len(parts) - 1)
    return {name: value.detach() for name, value in terms.items()}


def _passed(engines: "Engines", part: Batch, seed: int, number: int) -> Batch:
    """Pass a micro-batch through the tower, with the same dropout masks each time."""
    torch.manual_seed(seed_of(seed, number))
    with engines.autocast():
        return engines.model.scaled(part)


def _add(engines: "Engines", phase: Phase, terms: Terms, share: float, *, last: bool) -> None:
    """Accumulate a fraction of the losses' gradient; the optimizer steps after the last one."""
    engine = engines.engines[phase.moves]
    engine.set_gradient_accumulation_boundary(last)
    if engines.stage == 3:
        # counts the backward passes of a step; DeepSpeed does so in its engine's forward, which is not called here, and
        # passes that are not counted would overwrite each other's gradients
        engine.optimizer.clear_backward_seen_flag()
    engines.backward(phase, terms, share)
    engine.step()  # before the boundary it only counts micro-batches
    engine.set_gradient_accumulation_boundary(True)


def _made(batch: Batch) -> dict[str, Tensor]:
    return {name: value for name, value in _tensors(batch).items() if name in FEATURES}


def _tensors(batch: Batch) -> dict[str, Tensor]:
    held = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return {name: value for name, value in held.items() if isinstance(value, Tensor)}


def split(batch: Batch, size: int) -> list[Batch]:
    """The batch in micro-batches of at most `size` rows, in order."""
    starts = range(0, len(batch), size)
    return [batch.map(**{name: value[at : at + size] for name, value in _tensors(batch).items()}) for at in starts]


def joined(parts: list[Batch]) -> Batch:
    """One batch of the micro-batches from `split`."""
    held = [_tensors(part) for part in parts]
    return parts[0].map(**{name: torch.cat([part[name] for part in held]) for name in held[0]})
