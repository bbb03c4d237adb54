"""Two ranks of B rows are one rank of 2B: normalisation, gathering, all phases of a model, and ridge's sums."""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.testing import assert_close

from tests.models.helpers import INPUTS, batch, cut, sem_pcyc, total, triplets
from tests.models.test_models import SMALL
from zsr.models import build, cvae, lcale, sketch_gcn
from zsr.models.layers import BatchNorm, gather_over_ranks
from zsr.models.protocol import Model, Rows
from zsr.models.ridge import Config, Ridge

ROWS = 24
LATE = 100
Result = dict[str, Tensor]


def small(name: str, **options: Any) -> Model:
    """A small model `name` in training mode, the same on every rank."""
    torch.manual_seed(0)
    return cast(Model, build(name, {**SMALL[name], **options}, INPUTS).train())


def normalised(start: int, stop: int) -> Result:
    """Output, input gradient, parameter gradients and running statistics of two training passes."""
    torch.manual_seed(0)
    features = 2 * torch.randn(ROWS, 5) + torch.arange(5.0)
    weight = torch.randn(ROWS, 5)
    layer = BatchNorm(5)
    layer.weight.data.uniform_(0.5, 2.0)
    mine = features[start:stop].requires_grad_(True)
    layer(2 * mine.detach())
    output = layer(mine)
    torch.autograd.backward((output * weight[start:stop]).sum())
    assert mine.grad is not None
    gradients = {f"sum.{name}": p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"rows.output": output.detach(), "rows.gradient": mine.grad, **gradients, **layer.state_dict()}


def gathered(start: int, stop: int) -> Result:
    """Rows of all ranks, with the gradient of a term that couples each with each."""
    torch.manual_seed(0)
    rows = torch.randn(ROWS, 3)
    mine = rows[start:stop].requires_grad_(True)
    everyone = gather_over_ranks(mine)
    # each rank has the term of its own rows with all, as the mean over ranks is what DeepSpeed descends
    loss = (everyone[start:stop] @ everyone.T).tanh().mean()
    torch.autograd.backward(loss)
    assert mine.grad is not None
    labels = gather_over_ranks(torch.arange(start, stop))
    return {"everyone": everyone.detach(), "labels": labels, "shares.gradient": mine.grad}


def gradients(model: Model, start: int, stop: int) -> Result:
    """Gradients of all phases, in float64; the late epoch is past every warm-up."""
    model = model.double()
    data = cut((triplets if model.batch_kind == "triplets" else batch)(rows=ROWS), start, stop)
    held = {f.name: getattr(data, f.name) for f in fields(data)}
    wide = {name: v.double() for name, v in held.items() if isinstance(v, Tensor) and v.is_floating_point()}
    data = data.map(**wide, epoch=LATE)
    shared = model.shared(data)
    result: Result = {}
    for phase in model.phases:
        group = model.groups[phase.moves].module
        loss = total(phase.terms(data, shared))
        found = torch.autograd.grad(loss, list(group.parameters()), retain_graph=True)
        names = [f"mean.{phase.name}.{name}" for name, _ in group.named_parameters()]
        result.update(zip(names, found, strict=True))
    return result


def stepped(start: int, stop: int) -> Result:
    """Gradients of all phases of SEM-PCYC in float64, with every draw of noise switched off."""
    return gradients(sem_pcyc(dropout=0.0, noise=0.0, gan="logistic", l21_weight=1.0), start, stop)


def related(start: int, stop: int) -> Result:
    """SketchGCN with its latents at their means."""
    with patch.object(sketch_gcn, "reparameterise", lambda mean, _: mean):
        return gradients(small("sketch-gcn", dropout=0.0), start, stop)


def aligned(start: int, stop: int) -> Result:
    """LCALE with its latents at their means."""
    with patch.object(lcale, "reparameterise", lambda mean, _: mean):
        return gradients(small("lcale"), start, stop)


def imagined(start: int, stop: int, prior: str) -> Result:
    """CVAE with its latents at their means."""
    with patch.object(cvae, "reparameterise", lambda mean, _: mean):
        return gradients(small("cvae", dropout=0.0, prior=prior), start, stop)


def judged(start: int, stop: int) -> Result:
    """CAAE with the same draw of the prior for a row wherever it is."""
    draws = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(2)).double()[start:stop]
    with patch.object(torch, "randn_like", lambda _: draws):
        return gradients(small("caae", dropout=0.0, encoder_input="image+sketch"), start, stop)


def searched(start: int, stop: int) -> Result:
    """Doodle2Search, past the warm-up of its reversal."""
    return gradients(small("doodle2search", dropout=0.0), start, stop)


def synthesised(start: int, stop: int, alignment: str) -> Result:
    """CFSA with the same noise for a row wherever it is, and interpolates in the middle."""
    noise = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(2)).double()[start:stop]
    model = small("cfsa", alignment=alignment, alignment_weight=1.0, synthetic_weight=1.0, modality_weight=0.5)
    with (
        patch.object(model, "draw_noise", lambda _: {"photo": noise, "sketch": -noise}),
        patch.object(torch, "rand", lambda *size, **kind: torch.full(size, 0.5, **kind)),
    ):
        return gradients(model, start, stop)


def contrasted(start: int, stop: int) -> Result:
    """Contrastive with the rows of all ranks."""
    return gradients(small("contrastive"), start, stop)


def solved(start: int, stop: int) -> Result:
    """Ridge's maps."""
    model = Ridge(Config(penalties=(3.0,)), INPUTS)
    data = cut(batch(rows=ROWS), start, stop)
    word = torch.randn(len(INPUTS.classes), INPUTS.semantic_dim, generator=torch.Generator().manual_seed(5))
    model.fit([Rows("sketch", data.sketch, data.label), Rows("photo", data.photo, data.label)], word, lambda: 0.0)
    return {name: value for name, value in model.state_dict().items() if name.startswith("maps")}


PARTS: dict[str, Callable[[int, int], Result]] = {
    "normalised": normalised,
    "gathered": gathered,
    "stepped": stepped,
    "related": related,
    "aligned": aligned,
    **{f"imagined {prior}": partial(imagined, prior=prior) for prior in ("standard", "conditional")},
    "judged": judged,
    "searched": searched,
    **{f"synthesised {kind}": partial(synthesised, alignment=kind) for kind in ("cmpm", "coral", "mmd")},
    "contrasted": contrasted,
    "solved": solved,
}


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    half = ROWS // 2
    results = {name: part(rank * half, (rank + 1) * half) for name, part in PARTS.items()}
    torch.save(results, f"{folder}/rank{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Result]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    start: Callable[..., object] = spawn
    start(rank_main, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}") for rank in range(2)]


def merged(name: str, parts: list[Tensor]) -> Tensor:
    """What one process would hold: rows side by side, gradients of sums added, of means averaged, all else equal.

    A share is a row's part in the sum over ranks of their losses.
    """
    if name.startswith("rows."):
        return torch.cat(parts)
    if name.startswith("sum."):
        return parts[0] + parts[1]
    if name.startswith("shares."):
        return torch.cat(parts) / 2
    if name.startswith("mean."):
        return (parts[0] + parts[1]) / 2
    assert_close(parts[0], parts[1], rtol=0, atol=0)
    return parts[0]


@pytest.mark.parametrize("part", PARTS)
def test_two_ranks_of_half_the_rows_equal_one_rank(part: str, two_ranks: list[dict[str, Result]]) -> None:
    alone = PARTS[part](0, ROWS)
    for name, value in alone.items():
        both = merged(name, [rank[part][name] for rank in two_ranks])
        assert_close(both, value, rtol=1e-5, atol=1e-5)


def test_batch_norm_alone_is_torchs_own() -> None:
    torch.manual_seed(0)
    ours, torchs = BatchNorm(5), torch.nn.BatchNorm1d(5)
    features = torch.randn(8, 5)
    assert ours(features).equal(torchs(features))
    assert_close(ours.state_dict(), torchs.state_dict())
