"""What one GPU does with the models: samples a second, its busy share, and the share of its roofline, in bfloat16.

    python -m benchmarks.gpu [--only cvae lcale ...] [--towers lite0 resnet50 vit-b] [--batch 128] [--pictures 32]

First the device itself: multiply-adds of large matrices, and copies of a large tensor. Then each model at the sizes of
its paper (`benchmarks.paper_sizes`) through the loop's own engine at ZeRO stage 0, from batches that lie on the device;
then the image towers forward at 224 pixels, as zsr features passes them.

The roofline is the larger of two times: the step's floating-point operations (counted by torch as it runs) over the
measured rate of matrices, and the bytes of weights over the measured rate of copies: read forward and backward, written
and read as gradients, and with Adam's two moments read and written, 4 bytes each. Activations are left out, so that it
is a lower bound of the time. The busy share is kernels' time over wall time, from torch's profiler. What limits a step
is "launches" below a busy share of one half, and otherwise the larger term of the roofline.

`--device cpu` runs the same code without a GPU, to see that it works; a CPU has no kernels, and no busy share.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from itertools import count
from multiprocessing import get_context
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.paper_sizes import CASES, start
from zsr.batch import Batch
from zsr.models import backbones, build, configure
from zsr.models.protocol import Model

WARM: Final = 3
SIDE: Final = 224
TOWERS: Final = {"lite0": "lite0", "resnet50": "resnet", "vit-b": "vit"}


@dataclass(frozen=True, slots=True)
class Device:
    """What was measured of it: operations and bytes a second."""

    name: str
    operations: float
    bytes: float


@dataclass(frozen=True, slots=True)
class Found:
    """One model or tower.

    Attributes:
        rate: samples a second. seconds: of a step. operations: of a step. busy: share; NaN on a CPU.
        compute, memory: the two times of the roofline, in seconds.
    """

    name: str
    rate: float
    seconds: float
    operations: float
    busy: float
    compute: float
    memory: float

    def row(self) -> str:
        """Of the table."""
        bound = max(self.compute, self.memory)
        limit = "launches" if self.busy < 0.5 else "compute" if self.compute >= self.memory else "memory"
        cells = (
            self.name,
            f"{self.rate:,.0f}",
            f"{1000 * self.seconds:.2f}",
            f"{self.operations / self.seconds / 1e12:.2f}",
            f"{self.busy:.2f}",
            f"{bound / self.seconds:.3f}",
            limit,
        )
        return f"| {' | '.join(cells)} |"


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts floating-point operations by torch's own formulas.

    torch's FlopCounterMode also hooks into modules, which a gradient penalty's `autograd.grad` refuses.
    """

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def wait(device: str) -> None:
    """Until the device has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(step: Callable[[], object], device: str, steps: int) -> float:
    """Of one of `steps`, after some to warm up."""
    for _ in range(WARM):
        step()
    wait(device)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    wait(device)
    return (time.perf_counter() - began) / steps


def measured(device: str) -> Device:
    """The device's own rates."""
    side = 8192 if device == "cuda" else 512
    one, two = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    operations = 2 * side**3 / seconds_of(lambda: one @ two, device, 10)
    block = torch.empty(2**30 if device == "cuda" else 2**24, dtype=torch.uint8, device=device)
    other = torch.empty_like(block)
    copied = 2 * block.numel() / seconds_of(lambda: other.copy_(block), device, 10)
    return Device(torch.cuda.get_device_name() if device == "cuda" else "CPU", operations, copied)


def busy_share(step: Callable[[], object], device: str, steps: int) -> float:
    """Kernels' time over wall time."""
    if device == "cpu":
        return math.nan
    wait(device)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        began = time.perf_counter()
        for _ in range(steps):
            step()
        wait(device)
        wall = time.perf_counter() - began
    return float(sum(event.self_device_time_total for event in seen.key_averages())) / 1e6 / wall


def looked_at(
    name: str, step: Callable[[], object], rows: int, weights: float, own: Device, device: str, steps: int
) -> Found:
    """Time a step, and count what it does.

    Args:
        weights: bytes that a step has to move for the weights alone.
    """
    seconds = seconds_of(step, device, steps)
    counter = Operations()  # type: ignore[no-untyped-call]
    with counter:
        step()
    operations = float(counter.total)
    busy = busy_share(step, device, steps)
    return Found(name, rows / seconds, seconds, operations, busy, operations / own.operations, weights / own.bytes)


def trained(name: str, rows: int, steps: int, device: str, own: Device) -> Found:
    """A model of `paper_sizes` in training. In a process of its own."""
    torch.manual_seed(0)
    case = CASES[name]
    model = build(case.model, configure(case.model, {}, case.preset).model_dump(), case.inputs())
    assert isinstance(model, Model)
    word = torch.randn(case.classes, case.words)
    model.begin(word)
    engines = start(model.to(device), rows, "bf16")
    batches = [on(device, case.batch(rows, word)) for _ in range(2)]
    turn = count()

    def step() -> dict[str, Tensor]:
        return engines.train_batch(lambda _: batches[next(turn) % 2])

    bad = [term for term, value in step().items() if not math.isfinite(float(value))]
    if bad:
        raise SystemExit(f"{name}: {bad} are not finite in bfloat16")
    size = sum(p.numel() for group in model.trained.values() for p in group.module.parameters())
    # read twice, gradient written and read, weight written, two moments read and written
    found = looked_at(name, step, rows, 9 * 4 * size, own, device, steps)
    dist.destroy_process_group()
    return found


def on(device: str, batch: Batch) -> Batch:
    """The batch there."""
    held = {entry.name: getattr(batch, entry.name) for entry in fields(batch)}
    return batch.map(**{name: value.to(device) for name, value in held.items() if isinstance(value, Tensor)})


def tower_of(name: str) -> backbones.Backbone:
    """A tower with random weights, of its library's default sizes: a ResNet-50, a ViT-B with patches of 16 pixels."""
    import transformers

    kind = TOWERS[name]
    sizes = {"resnet": transformers.ResNetConfig, "vit": transformers.ViTConfig}
    if kind not in sizes:
        return backbones.build(backbones.architecture(kind))
    entry = backbones.BACKBONES[kind]
    about = {"name": kind, "layer": entry.layers[0], "config": sizes[kind]().to_dict()}
    return backbones.build({**entry.published.model_dump(), **about})


def embedded(name: str, rows: int, steps: int, device: str, own: Device) -> Found:
    """A tower forward, in bfloat16. In a process of its own."""
    torch.manual_seed(0)
    tower = tower_of(name).to(device).eval()
    pixels = torch.randint(256, (rows, SIDE, SIDE, 3), dtype=torch.uint8, device=device)

    def step() -> Any:
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16):
            return tower(pixels)

    size = sum(p.numel() for p in tower.parameters())
    return looked_at(f"{name}, forward", step, rows, 4 * size, own, device, steps)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--towers", nargs="*", choices=TOWERS, default=list(TOWERS))
    parser.add_argument("--batch", type=int, default=128, help="rows of features")
    parser.add_argument("--pictures", type=int, default=32, help="rows of pictures that train")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    asked = parser.parse_args()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        own = pool.submit(measured, asked.device).result()
        print(f"{own.name}: {own.operations / 1e12:.1f} TFLOP/s in matrices, {own.bytes / 1e9:.0f} GB/s in copies\n")
        print("| what | samples a second | ms a step | TFLOP/s | busy | share of the roofline | limit |")
        print("|---|---|---|---|---|---|---|")
        for name in asked.only:
            rows = asked.pictures if CASES[name].pictures else asked.batch
            print(pool.submit(trained, name, rows, asked.steps, asked.device, own).result().row(), flush=True)
        for name in asked.towers:
            rows = backbones.pictures_at_once(asked.device)
            print(pool.submit(embedded, name, rows, asked.steps, asked.device, own).result().row(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
