"""Small models and batches, and one step as the training loop takes it."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor

from zsr.batch import Batch
from zsr.models import build
from zsr.models.protocol import Inputs, Model, Terms
from zsr.models.sem_pcyc import SemPcyc

CLASSES = tuple("abcdef")
INPUTS = Inputs(sketch_dim=10, photo_dim=14, semantic_dim=7, classes=CLASSES)
ROWS = 16


def cut(whole: Batch, start: int, stop: int) -> Batch:
    """Rows start..stop of every tensor: a rank's share of a global batch."""
    held = {f.name: getattr(whole, f.name) for f in fields(whole)}
    return whole.map(**{name: value[start:stop] for name, value in held.items() if isinstance(value, Tensor)})


def batch(rows: int = ROWS, seed: int = 0) -> Batch:
    """Same-class pairs around one centre a class and modality."""
    draw = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(99)
    label = torch.randint(len(CLASSES), (rows,), generator=draw)
    word = torch.randn(len(CLASSES), INPUTS.semantic_dim, generator=fixed).abs()
    sketch = torch.randn(len(CLASSES), INPUTS.sketch_dim, generator=fixed)[label]
    photo = torch.randn(len(CLASSES), INPUTS.photo_dim, generator=fixed)[label]
    return Batch(
        sketch=sketch + 0.3 * torch.randn(sketch.shape, generator=draw),
        photo=photo + 0.3 * torch.randn(photo.shape, generator=draw),
        label=label,
        word=word[label],
    )


def triplets(rows: int = ROWS, seed: int = 0) -> Batch:
    """The pairs of `batch`, each with the photo of a row of another class."""
    data = batch(rows, seed)
    others = (data.label.unsqueeze(1) != data.label).double()
    other = torch.multinomial(others, 1, generator=torch.Generator().manual_seed(seed)).flatten()
    return data.map(negative=data.photo[other], negative_label=data.label[other])


def sem_pcyc(seed: int = 0, **options: Any) -> SemPcyc:
    """A SEM-PCYC of 6-d codes in training mode."""
    torch.manual_seed(seed)
    return cast(SemPcyc, build("sem-pcyc", {"dim": 6, **options}, INPUTS).train())


def optimizers(model: Model) -> dict[str, torch.optim.Optimizer]:
    """One optimizer a group, as its paper gives it."""
    return {name: group.build() for name, group in model.trained.items()}


def total(terms: Terms) -> Tensor:
    """The loss that a phase's terms make."""
    return torch.stack(list(terms.values())).sum()


def step(
    model: Model,
    steppers: Mapping[str, torch.optim.Optimizer],
    data: Batch,
    seed: int = 0,
    draw: Callable[[int], Batch] | None = None,
) -> dict[str, Terms]:
    """One batch through every phase, as the loop does it: a phase sees only its own group open. The terms by phase.

    A phase that repeats works on `data` again, or on `draw(repetition)` if it wants fresh batches.
    """
    torch.manual_seed(seed)
    groups = model.trained
    for group in groups.values():
        group.module.requires_grad_(True)
    data = model.scaled(data)
    shared = model.shared(data)
    seen = {}
    for phase in model.phases:
        for name, group in groups.items():
            group.module.requires_grad_(name == phase.moves)
        for repetition in range(phase.repeat):
            if repetition and phase.fresh_batch and draw is not None:
                data = model.scaled(draw(repetition))
            if repetition:
                shared = model.shared(data)
            seen[phase.name] = phase.terms(data, shared)
            steppers[phase.moves].zero_grad()
            torch.autograd.backward(total(seen[phase.name]))
            steppers[phase.moves].step()
    return seen


def reached(model: Model, loss: Tensor) -> set[str]:
    """The modules, as `part.space`, to whose open parameters `loss` sends a gradient other than zero."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, [parameter for _, parameter in named], allow_unused=True)
    return {
        ".".join(name.split(".")[:2])
        for (name, _), gradient in zip(named, gradients, strict=True)
        if gradient is not None and bool(gradient.any())
    }
