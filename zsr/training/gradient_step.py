"""A step on more rows than a tower, or a model, passes at a time. The result is that of the whole batch at once.

Terms that are means over rows (`Model.coupled` is False) are taken piece by piece: the gradient of the batch is the
mean of the pieces', weighed by their rows. Terms that couple rows want all features at once, and features are small;
what is large is the tower in front. So all pieces pass the tower without a graph first, the terms send their gradient
back to the features of the whole batch, and then each piece passes the tower again to carry its share of that gradient
on. This costs a second forward pass of the tower. Known as gradient caching. Without a tower that trains, a model of
coupled terms takes the whole batch at once: there is nothing large to pass in pieces.
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

FEATURES: Final = ("sketch", "photo", "negative")  # what a tower makes of a batch's pictures


def step(engines: "Engines", batch: Batch) -> Terms:
    """One step of a model of one phase on raw `batch`, in pieces. The named terms of the whole batch, detached.

    Raises:
        ConfigError: coupled terms at ZeRO stage 3, whose passes may not each reach another part of the group.
    """
    (phase,) = engines.model.phases
    if engines.model.coupled and engines.stage == 3:
        raise ConfigError(
            f"{len(batch)} rows a worker, {engines.batch_size} at a time: {type(engines.model).__name__} couples rows, "
            "and at ZeRO stage 3 takes no pieces; use --zero-stage 2, or a larger --batch-size"
        )
    return _cached(engines, phase, batch) if engines.model.coupled else _apart(engines, phase, batch)


def _apart(engines: "Engines", phase: Phase, batch: Batch) -> Terms:
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
    """A piece through the tower, whose dropout is the same each time."""
    torch.manual_seed(seed_of(seed, number))
    with engines.autocast():
        return engines.model.scaled(part)


def _add(engines: "Engines", phase: Phase, terms: Terms, share: float, *, last: bool) -> None:
    """Add a share of the terms' gradient to the step, which is taken with the last one."""
    engine = engines.engines[phase.moves]
    engine.set_gradient_accumulation_boundary(last)
    if engines.stage == 3:
        # counts the backward passes of a step; DeepSpeed itself does so in its engine's forward, which is not ours, and
        # uncounted passes would replace each other's gradients
        engine.optimizer.clear_backward_seen_flag()
    engines.backward(phase, terms, share)
    engine.step()  # before the last one it counts, and does no more
    engine.set_gradient_accumulation_boundary(True)


def _made(batch: Batch) -> dict[str, Tensor]:
    return {name: value for name, value in _tensors(batch).items() if name in FEATURES}


def _tensors(batch: Batch) -> dict[str, Tensor]:
    held = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return {name: value for name, value in held.items() if isinstance(value, Tensor)}


def split(batch: Batch, size: int) -> list[Batch]:
    """The batch in pieces of at most `size` rows, in order."""
    starts = range(0, len(batch), size)
    return [batch.map(**{name: value[at : at + size] for name, value in _tensors(batch).items()}) for at in starts]


def joined(parts: list[Batch]) -> Batch:
    """What `split` took apart, as one batch."""
    held = [_tensors(part) for part in parts]
    return parts[0].map(**{name: torch.cat([part[name] for part in held]) for name in held[0]})
