"""Whether ZeRO stages, ranks and pieces of a batch train the same weights, for every model: `make stages`.

    python -m tests.training.stages [--models lcale cfsa ...] [--steps 20]

A run is a few steps of a small model on fixed batches. Runs are compared by their gap: the distance of their weights,
divided by the distance that the second one travelled from its start. Dropout is off, and every other draw of noise is
the same for a row of the global batch wherever that row is, as it is a function of (step, call, row).

ZeRO stages, and what stopped at one stage and goes on at another, agree in every bit, once the optimizers are not
fused: a fused one rounds the last numbers of a tensor in another way, and stages cut tensors up differently. Ranks and
pieces add in another order, so they are compared in 64 bits (EXACT; where pieces meet stage 2 or 3, whose sums over
pieces DeepSpeed keeps in 32 bits, SUMMED). In 32 bits Adam's first steps, of one size whatever the gradient's, blow
rounding up where a gradient is nearly 0, as that of a bias before batch normalisation is: to 1.9e-2 for CVAE behind a
tower, where a coupled term whose ranks do not gather loses 2.5e-2. What training really does, fused and in 32 or 16
bits, has to come within LOOSE.
"""

import argparse
import os
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast
from unittest.mock import patch

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from tests.models.helpers import CLASSES, INPUTS, batch, cut, triplets
from tests.models.test_models import SMALL, STEPPED
from zsr.batch import Batch
from zsr.models import backbones, build, layers, lcale
from zsr.models.protocol import Inputs, Model, Optimizer, Tower
from zsr.training.config import Precision, Stage
from zsr.training.engines import Engines, deepspeed_config, init_distributed

ROWS: Final = 16  # of the global batch
STEPS: Final = 20
EXACT: Final = 1e-6  # features behind a tower are rounded to 32 bits; measured: at most 7.6e-8
SUMMED: Final = 1e-2  # measured: at most 6.2e-3, for LCALE behind a tower
LOOSE: Final = 1e-1  # 8 bits of mantissa in place of 24
# every draw that is not a function of the row's place in the global batch is off
QUIET: Final[Mapping[str, Mapping[str, Any]]] = {
    "sem-pcyc": {"dim": 6, "dropout": 0.0, "gan": "logistic", "l21_weight": 1.0},
    "cfsa": {"alignment_weight": 1.0, "synthetic_weight": 1.0},
    **{name: {"dropout": 0.0} for name in ("cvae", "caae", "doodle2search", "sketch-gcn")},
}
WHOLE_ONLY: Final = ("sem-pcyc", "caae", "cfsa")  # several phases: no tower trains behind them
APART: Final = ("doodle2search", "classifier")  # their pieces are taken at stage 3, too
NO_STAGE_3: Final = ("cfsa",)
STAGES: Final[tuple[Stage, ...]] = (1, 2, 3)

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        pieces: how many the rows of a rank are passed in.
        tower: behind an image tower that trains along.
        half: stop after half of the steps, and keep the states too.
        after: go on from the states of that job, which stopped half way.
        recompute: the tower forgets its activations.
        apart: ranks do not gather the rows of coupled terms: the mistake that the tolerance has to see.
        double: everything in 64 bits.
        fused: optimizers as in training.
        like: the job whose weights it has to end with, in every bit.
    """

    model: str
    stage: Stage = 0
    world: int = 2
    pieces: int = 1
    tower: bool = False
    precision: Precision = "fp32"
    half: bool = False
    after: str = ""
    recompute: bool = False
    apart: bool = False
    double: bool = False
    fused: bool = False
    like: str = ""


def inputs(job: Job) -> Inputs:
    """Small sizes, none of which two ranks can share evenly; a tower's width is its own."""
    if not job.tower:
        return INPUTS
    tower = Tower(architecture=backbones.architecture("tiny"), size=16, rate=1.0)
    return Inputs(sketch_dim=64, photo_dim=64, semantic_dim=INPUTS.semantic_dim, classes=CLASSES, tower=tower)


def small(job: Job) -> Model:
    """The model at its start, the same on every rank."""
    torch.manual_seed(0)
    options = {**SMALL.get(job.model, {}), **QUIET.get(job.model, {})}
    return cast(Model, build(job.model, options, inputs(job)).train())


def global_batch(model: Model, step: int) -> Batch:
    """The rows of all ranks."""
    data = (triplets if model.batch_kind == "triplets" else batch)(rows=ROWS, seed=step)
    if model.inputs.tower is None:
        return data
    draw = torch.Generator().manual_seed(step)
    sides = ("sketch", "photo") if data.negative is None else ("sketch", "photo", "negative")
    return data.map(**{s: torch.randint(256, (ROWS, 16, 16, 3), dtype=torch.uint8, generator=draw) for s in sides})


@contextmanager
def row_noise(step: int, rank: int, world: int) -> Iterator[None]:
    """Each draw is a function of (step, number of the call, row of the global batch)."""
    calls = iter(range(1000))

    def rows(make: Callable[..., Tensor], size: Sequence[int], dtype: torch.dtype | None) -> Tensor:
        draw = torch.Generator().manual_seed(1000 * step + next(calls))
        count = size[0] * world
        return make((count, *size[1:]), generator=draw, dtype=dtype)[rank * size[0] : (rank + 1) * size[0]]

    def sized(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def drawn(*size: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
            return rows(make, size[0] if isinstance(size[0], tuple) else size, dtype)

        return drawn

    randn, rand = torch.randn, torch.rand
    with (
        patch.object(torch, "randn", sized(randn)),
        patch.object(torch, "rand", sized(rand)),
        patch.object(torch, "randn_like", lambda like: rows(randn, like.shape, like.dtype)),
    ):
        yield


def steps(engines: Engines, first: int, last: int) -> None:
    """Steps first..last, 1 the first."""
    rank, world = dist.get_rank(), dist.get_world_size()
    share = ROWS // world
    for step in range(first, last + 1):
        data = cut(global_batch(engines.model, step), rank * share, (rank + 1) * share)
        torch.manual_seed(step)
        with row_noise(step, rank, world):
            engines.train_batch(lambda _, data=data: data.map(epoch=100))  # type: ignore[misc]


def run(job: Job, count: int, held: Weights | None) -> Weights:
    """The weights after the job's share of `count` steps, in the process group that is there.

    Args:
        held: what the job goes on from: parts `model/` and `state/`, as a job that stops half way returns them.
    """
    model = small(job)
    if held is not None:
        model.load_state_dict(part(held, "model/"))
    gather = (lambda values: values) if job.apart else layers.gather_over_ranks
    build_optimizer = Optimizer.build if job.fused else unfused
    with patch.object(lcale, "gather_over_ranks", gather), patch.object(Optimizer, "build", build_optimizer):
        rows = ROWS // job.world // job.pieces
        engines = Engines(model, rows, deepspeed_config(job.stage, job.precision), recompute=job.recompute)
        if held is not None:
            engines.restore(part(held, "state/"))
        steps(engines, count // 2 + 1 if held is not None else 1, count // 2 if job.half else count)
    weights = engines.weights()
    if not job.half:
        return weights
    states = {f"state/{name}": value for name, value in engines.state().items()}
    return {f"model/{name}": value for name, value in weights.items()} | states


def unfused(options: Optimizer, parameters: Any, build: Callable[..., Any] = Optimizer.build) -> torch.optim.Optimizer:
    """`Optimizer.build`, for an optimizer whose rounding does not depend on where a tensor begins."""
    made: torch.optim.Optimizer = build(options, parameters)
    for group in (*made.param_groups, made.defaults):
        group["fused"] = False
    return made


def part(held: Weights, beginning: str) -> Weights:
    """The entries that begin so, without the beginning."""
    return {name.removeprefix(beginning): value for name, value in held.items() if name.startswith(beginning)}


@contextmanager
def bits(double: bool) -> Iterator[None]:
    """Numbers of 64 bits, which DeepSpeed can pass on but does not list, or of 32."""
    accelerator = type(get_accelerator())
    known = [*get_accelerator().supported_dtypes(), torch.float64]
    with patch.object(accelerator, "supported_dtypes", lambda _: known if double else known[:-1]):
        torch.set_default_dtype(torch.float64 if double else torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def worker(rank: int, world: int, jobs: Mapping[str, Job], count: int, folder: Path, port: int) -> None:
    """Every job of this world size, one after the other; rank 0 keeps the results."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    warnings.simplefilter("ignore")
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    init_distributed("gloo")
    try:
        for name, job in jobs.items():
            with bits(job.double):
                found = run(job, count, torch.load(folder / job.after) if job.after else None)
            if rank == 0:
                torch.save(found, folder / name)
            dist.barrier()
    finally:
        dist.destroy_process_group()


def together(jobs: Mapping[str, Job], count: int, folder: Path) -> dict[str, Weights]:
    """The results of jobs by name; those of two ranks run first, then those of one."""
    start: Callable[..., object] = spawn
    for world in (2, 1):
        mine = {name: job for name, job in jobs.items() if job.world == world}
        if mine:
            start(worker, args=(world, mine, count, folder, free_port()), nprocs=world)
    return {name: torch.load(folder / name) for name in jobs}


def free_port() -> int:
    """A port that nobody listened on just now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def gap(found: Weights, wanted: Weights, start: Weights) -> float:
    """|found - wanted| / |wanted - start|, over all weights."""

    def distance(left: Weights, right: Weights) -> float:
        return float(sum((left[n].double() - right[n].double()).square().sum() for n in wanted) ** 0.5)

    return distance(found, wanted) / distance(wanted, start)


def jobs_of(model: str, *, tower: bool = False) -> dict[str, Job]:
    """The runs of a model that have to be `like` another of them."""
    base = Job(model, tower=tower, like="stage 0")
    stages = [stage for stage in STAGES if stage < 3 or model not in NO_STAGE_3]
    last = stages[-1]
    jobs = {"stage 0": replace(base, like="")}
    jobs |= {f"stage {stage}": replace(base, stage=stage) for stage in stages}
    jobs |= {
        "half": replace(base, stage=last, half=True, like=""),
        "half of stage 1": replace(base, stage=1, half=True, like=""),
        f"stage {last}, on at stage 0": replace(base, after="half"),
        f"stage 1, on at stage {last}": replace(base, stage=last, after="half of stage 1"),
        f"stage {last}, on alone at stage 0": replace(base, world=1, after="half", like=""),
        f"stage {last}, on alone at stage 1": replace(
            base, stage=1, world=1, after="half", like=f"stage {last}, on alone at stage 0"
        ),
    }
    if tower:
        jobs["stage 0, two pieces"] = replace(base, pieces=2, like="")
        jobs["stage 1, two pieces"] = replace(base, pieces=2, stage=1, like="stage 0, two pieces")
        jobs["recomputed"] = replace(base, stage=last, recompute=True)
    return named(model, tower, jobs)


def doubled(model: str, *, tower: bool = False) -> dict[str, Job]:
    """The same model in 64 bits: on two ranks, on one, and in two pieces, each added over ranks from stage 2 on."""
    base = Job(model, tower=tower, double=True)
    alone = replace(base, world=1)
    jobs = {"two ranks": base, "one rank": alone, "one rank, two pieces": replace(alone, pieces=2)}
    if tower:
        stages: tuple[Stage, ...] = (2, 3) if model in APART else (2,)
        jobs |= {f"stage {stage}, two pieces": replace(base, stage=stage, pieces=2) for stage in stages}
    return named(model, tower, {f"64 bits, {name}": job for name, job in jobs.items()})


def loose(model: str, *, tower: bool = False) -> dict[str, Job]:
    """The same model as it really trains, fused, and on features in bfloat16, too."""
    base = Job(model, tower=tower, fused=True)
    stages: tuple[Stage, ...] = (0, 2) if model in NO_STAGE_3 else (0, 2, 3)
    jobs = {f"fused, stage {stage}": replace(base, stage=stage) for stage in stages}
    jobs["fused, one rank, two pieces"] = replace(base, world=1, pieces=2)
    if not tower:
        jobs |= {f"fused, bf16, stage {stage}": replace(base, stage=stage, precision="bf16") for stage in stages}
    return named(model, tower, jobs)


def named(model: str, tower: bool, jobs: Mapping[str, Job]) -> dict[str, Job]:
    """The jobs by their whole names, by which they also name each other."""
    whole = f"{model}{' behind a tower' if tower else ''}: "
    links = {
        name: {link: whole + at for link in ("after", "like") if (at := getattr(job, link))}
        for name, job in jobs.items()
    }
    return {whole + name: replace(job, **links[name]) for name, job in jobs.items()}


def compare(models: Sequence[str], count: int, folder: Path) -> bool:
    """Run and print everything; whether all gaps are as small, and the control's as large, as they should be."""
    good = True
    for model in models:
        control = {"lcale: ranks that do not gather": Job(model, apart=True, double=True)} if model == "lcale" else {}
        for tower in (False, True)[: 1 + (model not in WHOLE_ONLY)]:
            same, wide, rough = (kind(model, tower=tower) for kind in (jobs_of, doubled, loose))
            apart = {} if tower else control
            results = together(same | wide | rough | apart, count, folder)
            for name, job in same.items():
                good &= not job.like or show(name, job, results[name], results[job.like], 0.0)
            exact, plain = next(iter(wide)), next(iter(same))
            for name, job in wide.items():
                good &= name == exact or show(name, job, results[name], results[exact], bar(job))
            for name, job in rough.items():
                good &= show(name, job, results[name], results[plain], LOOSE)
            for name, job in apart.items():
                good &= not show(name, job, results[name], results[exact], EXACT)
    return good


def bar(job: Job) -> float:
    """The largest gap that a run in 64 bits may have."""
    return SUMMED if job.stage >= 2 and job.pieces > 1 else EXACT


def show(name: str, job: Job, found: Weights, wanted: Weights, most: float) -> bool:
    """Print one gap; whether it is at most `most`."""
    with bits(job.double):
        distance = gap(found, wanted, dict(small(job).state_dict()))
    print(f"{name:55} {distance:.1e}{'' if distance <= most else f'   above {most:.0e}'}", flush=True)
    return distance <= most


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=STEPPED, default=STEPPED)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return 0 if compare(arguments.models, arguments.steps, Path(folder)) else 1


if __name__ == "__main__":
    sys.exit(main())
