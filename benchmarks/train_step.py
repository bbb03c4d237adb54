"""Steps a second of our training loop against a hand-written loop of the same model, in one process on one thread.

    python -m benchmarks.train_step [--models lcale cfsa ...] [--rounds 5] [--steps 20]
    python -m benchmarks.train_step --scaling [--models ...]

Ours is `zsr.training.loop.train_step`: DeepSpeed engines at ZeRO stage 0. The other one is plain torch: the same
batches of the same feed, the shared forward pass once a batch, a group's gradients only where a phase moves it, torch's
fused optimizers, gradients dropped rather than zeroed, and no seed a step, which only a run that is to resume needs.
Both train their own copy of one model, in turn and repeated, so that the load of the machine falls on both; the ratio
is that of CPU seconds, and wall seconds stand beside it.

With --scaling: seconds a step of one process alone, of two at once that do not know of each other, and of two that
train together, each with the same rows. The first step down is the machine's own (caches, memory); the second one is
what gathering rows, averaging gradients and waiting for each other cost.
"""

import argparse
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from zsr.batch import Batch
from zsr.data.sampling import Pool, Sampler
from zsr.models import MODELS, build
from zsr.models.protocol import Inputs, Model
from zsr.training.batches import begin
from zsr.training.config import TrainSettings
from zsr.training.engines import Engines, deepspeed_config, init_distributed
from zsr.training.loop import Place, train_step

FEATURES: Final = 1280
WORDS: Final = 300
CLASSES: Final = 44
EACH: Final = 20  # rows of a class and modality
STEPPED: Final = [name for name, entry in MODELS.items() if issubclass(entry.model, Model)]
SETTINGS: Final = TrainSettings(batch_size=128, num_workers=1)
WARM: Final = 3


def pool(seed: int) -> Pool:
    """Random rows of every class."""
    draw = torch.Generator().manual_seed(seed)
    ids = np.arange(CLASSES * EACH)
    sizes = torch.full((CLASSES,), EACH)
    return Pool(torch.randn(CLASSES * EACH, FEATURES, generator=draw), ids, ids, sizes)


def fresh(name: str) -> tuple[Model, Sampler]:
    """A model at its start, with its batches."""
    torch.manual_seed(0)
    names = tuple(f"{number:02d}" for number in range(CLASSES))
    inputs = Inputs(sketch_dim=FEATURES, photo_dim=FEATURES, semantic_dim=WORDS, classes=names)
    model = cast(Model, build(name, {}, inputs).train())
    words = torch.randn(CLASSES, WORDS, generator=torch.Generator().manual_seed(3))
    return model, begin(model, pool(1), pool(2), words, seed=0)


def ours(name: str, place: Place) -> Callable[[int], object]:
    """A step of our loop."""
    model, sampler = fresh(name)
    settings = SETTINGS.model_copy(update={"num_workers": place.world})
    engines = Engines(model, settings.batch_size, deepspeed_config(0, "fp32"))
    return lambda step: train_step(engines, sampler, settings, place, step)


class ByHand:
    """A step as one would write it for this model alone."""

    def __init__(self, name: str) -> None:
        self.model, self.sampler = fresh(name)
        self.groups = {group: list(entry.module.parameters()) for group, entry in self.model.groups.items()}
        self.optimizers = {group: entry.build() for group, entry in self.model.groups.items()}

    def __call__(self, step: int) -> dict[str, Tensor]:
        self.open(*self.groups)
        batch = self.draw(step, 0)
        shared = self.model.shared(batch)
        logged: dict[str, Tensor] = {}
        for phase in self.model.phases:
            self.open(phase.moves)
            for repetition in range(phase.repeat):
                if repetition:
                    batch = self.draw(step, repetition) if phase.fresh_batch else batch
                    shared = self.model.shared(batch)
                terms = phase.terms(batch, shared)
                torch.autograd.backward(torch.stack(list(terms.values())).sum())
                self.optimizers[phase.moves].step()
                self.optimizers[phase.moves].zero_grad(set_to_none=True)
                logged |= {f"{phase.name}/{term}": value.detach() for term, value in terms.items()}
        return logged

    def draw(self, step: int, repetition: int) -> Batch:
        epoch, index = divmod(step - 1, SETTINGS.steps_per_epoch)
        batch = self.sampler.batch(step, SETTINGS.batch_size, repetition=repetition)
        return self.model.scaled(batch.map(epoch=epoch, index=index))

    def open(self, *moved: str) -> None:
        for group, parameters in self.groups.items():
            for parameter in parameters:
                parameter.requires_grad_(group in moved)


@dataclass(frozen=True, slots=True)
class Seconds:
    """CPU and wall seconds of some steps."""

    cpu: float
    wall: float


def timed(step: Callable[[int], object], first: int, count: int) -> Seconds:
    """Steps first, first + 1, ..."""
    cpu, wall = time.process_time(), time.perf_counter()
    for number in range(first, first + count):
        step(number)
    return Seconds(time.process_time() - cpu, time.perf_counter() - wall)


def against(name: str, rounds: int, steps: int) -> float:
    """Print both loops' steps a second; ours as a share of the other's, median over the rounds."""
    loops: dict[str, Callable[[int], object]] = {"ours": ours(name, Place(0, 1, "cpu")), "by hand": ByHand(name)}
    for loop in loops.values():
        timed(loop, 1, WARM)
    taken: dict[str, list[Seconds]] = {which: [] for which in loops}
    for number in range(rounds):
        order = list(loops) if number % 2 else list(reversed(loops))  # neither is always the one that follows
        for which in order:
            taken[which].append(timed(loops[which], WARM + 1 + number * steps, steps))
    ratios = [hand.cpu / our.cpu for hand, our in zip(taken["by hand"], taken["ours"], strict=True)]
    walls = [hand.wall / our.wall for hand, our in zip(taken["by hand"], taken["ours"], strict=True)]
    rates = {which: steps / statistics.median(s.cpu for s in found) for which, found in taken.items()}
    ratio = statistics.median(ratios)
    print(
        f"{name:15} {rates['ours']:8.1f} {rates['by hand']:8.1f} {ratio:7.3f}  {min(ratios):.3f} to {max(ratios):.3f}"
        f"  wall {statistics.median(walls):.3f}",
        flush=True,
    )
    return ratio


def join(rank: int, world: int, port: int) -> None:
    """Make the process group that the engines stand on."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    init_distributed("gloo")


def free_port() -> int:
    """A port that nobody listened on just now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def member(rank: int, world: int, ports: Sequence[int], models: Sequence[str], steps: int, folder: str) -> None:
    """One process of the scaling runs: alone where there is a port for each, else together."""
    together = len(ports) == 1
    join(rank if together else 0, world if together else 1, ports[0 if together else rank])
    lines = []
    for name in models:
        step = ours(name, Place(dist.get_rank(), dist.get_world_size(), "cpu"))
        timed(step, 1, WARM)
        found = timed(step, WARM + 1, steps)
        lines.append(f"{name} {found.cpu / steps} {found.wall / steps}")
    Path(folder, str(rank)).write_text("\n".join(lines))
    dist.destroy_process_group()


def scaling(models: Sequence[str], steps: int) -> None:
    """Print seconds a step of one process, of two apart, and of two together."""
    runs = {"alone": (1, 1), "two apart": (2, 2), "two together": (2, 1)}
    start: Callable[..., object] = spawn
    found: dict[str, dict[str, Seconds]] = {}
    for which, (world, ports) in runs.items():
        with tempfile.TemporaryDirectory() as folder:
            start(member, args=(world, [free_port() for _ in range(ports)], models, steps, folder), nprocs=world)
            lines = Path(folder, "0").read_text().splitlines()
        found[which] = {name: Seconds(float(cpu), float(wall)) for name, cpu, wall in map(str.split, lines)}
    print(
        f"{'model':15} {'alone':>10} {'apart':>10} {'together':>10}   efficiency (wall), CPU seconds together / alone"
    )
    for name in models:
        alone, apart, both = (found[which][name] for which in runs)
        print(
            f"{name:15} {alone.wall:10.4f} {apart.wall:10.4f} {both.wall:10.4f}   {alone.wall / both.wall:.2f}, of "
            f"which the machine takes {alone.wall / apart.wall:.2f}; CPU {both.cpu / alone.cpu:.2f}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=STEPPED, default=STEPPED)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scaling", action="store_true")
    asked = parser.parse_args()
    if asked.scaling:
        scaling(asked.models, asked.steps)
        return 0
    join(0, 1, free_port())
    print(f"{'model':15} {'ours':>8} {'by hand':>8} {'ratio':>7}  over rounds; steps a CPU second, batch 128")
    ratios = [against(name, asked.rounds, asked.steps) for name in asked.models]
    dist.destroy_process_group()
    return 0 if min(ratios) >= 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())
