"""Training metrics log: a JSONL file next to the artifact, written by rank 0. Trackers and progress displays read it.

A line of kind `step` every few steps: the mean of each loss since the previous line, the gradient norm of each group in
that step, learning rates, samples per second, the fraction of time spent waiting for data, and peak memory. A line of
kind `epoch` after each epoch: the validation score, the mean losses over the epoch, and the bottleneck.

Steps do not synchronize with the device: losses and norms stay tensors until a line is written.
"""

import json
import math
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from zsr.artifact import write_atomically
from zsr.storage import is_file, read_file
from zsr.training.engines import Engines
from zsr.training.optimizer_state import inner, stage_of

WAIT: Final = "data_wait_share"  # fraction of a line's seconds that rank 0 waited for data
NETWORK: Final = "network_share"
PROBE: Final = 4 << 20  # maximum number of elements in the all-reduce that measures the network

Values = dict[str, Any]


class Meter:
    """Measures the steps of a run and, on rank 0, where `path` is given, logs them.

    Args:
        path: the JSONL file; None on other ranks.
        every: steps between step lines.
        rows: rows in the global batch.
        copy: URL to upload the file to after each epoch, if the output is a bucket, which does not support appending.
    """

    def __init__(self, path: Path | None, every: int, rows: int, copy: Path | None = None) -> None:
        self.path, self.every, self.rows, self.copy = path, every, rows, copy
        self._norms: dict[str, Tensor] = {}
        self._due = False
        self._since = self._epoch_began = (0.0, 0.0)  # clock, and seconds waited for data

    def begin(self, engines: Engines, step: int) -> None:
        """Start, or resume after `step`: lines that a killed run logged past it are removed and logged again."""
        self.engines = engines
        self._due = (step + 1) % self.every == 0
        if self.path is None:
            return
        if self.copy is not None and not self.path.is_file() and is_file(self.copy):  # the run began elsewhere
            write_atomically(self.path, read_file(self.copy))
        write_atomically(self.path, "".join(_kept(self.path, step)).encode())
        for name, engine in engines.engines.items():
            if stage_of(engine) == 0:  # at other stages DeepSpeed computes the global norm
                inner(engine).register_step_pre_hook(self._hook(name))

    def start_epoch(self, waited: float) -> None:
        """Start timing the epoch. `waited`: total seconds that the run has waited for data so far."""
        self._since = self._epoch_began = (time.perf_counter(), waited)

    def step(self, step: int, names: Sequence[str], losses: Sequence[Tensor], waited: float) -> None:
        """Log a step if a line is due; call after each step.

        Args:
            names, losses: names of the T loss terms, and their values (T,) in each step of this epoch so far.
            waited: see `start_epoch`.
        """
        due, self._due = self._due, (step + 1) % self.every == 0
        if self.path is None or not due:
            return
        means = torch.stack(list(losses[-self.every :])).mean(0).tolist()  # synchronizes with the device
        now = (time.perf_counter(), waited)
        values = {
            "kind": "step",
            "step": step,
            **_pace(self._since, now, self.rows * min(self.every, len(losses))),
            "memory_bytes": peak_memory(),
            **{f"loss/{name}": mean for name, mean in zip(names, means, strict=True)},
            **{f"norm/{group}": float(norm) for group, norm in self._gradients().items()},
            **learning_rates(self.engines),
        }
        self._since = now
        self._write(values)

    def pace(self, steps: int, waited: float) -> Values:
        """Throughput of the epoch's `steps` and their bottleneck; call right after the last step. Collective."""
        now = (time.perf_counter(), waited)
        found = _pace(self._epoch_began, now, self.rows * steps)
        seconds = max(now[0] - self._epoch_began[0], 1e-9)
        network = min(1.0 - found[WAIT], steps * network_seconds(self.engines) / seconds)
        return {**found, NETWORK: round(network, 4), "bottleneck": bottleneck(found[WAIT], network)}

    def epoch(self, step: int, score: float | None, pace: Values, means: Mapping[str, float]) -> None:
        """Log an epoch; call before its state is saved, so that every saved epoch has been logged.

        Args:
            score: validation score.
            pace: from `pace`.
            means: mean of each loss term over the epoch.
        """
        losses = {f"loss/{name}": mean for name, mean in means.items()}
        self._write({"kind": "epoch", "step": step, "validation_map_all": score, **pace, **losses})
        if self.path is not None and self.copy is not None:
            write_atomically(self.copy, self.path.read_bytes())

    def _hook(self, name: str) -> Callable[[torch.optim.Optimizer, Any, Any], None]:
        """A hook that records a group's gradient norm right before the optimizer step, in logged steps."""

        def take(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if self._due:
                held = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
                self._norms[name] = torch.nn.utils.get_total_norm(held)

        return take

    def _gradients(self) -> dict[str, Any]:
        """The norm of each group's rank-averaged gradient in its last step, after clipping."""
        sharded = {name: e.get_global_grad_norm() for name, e in self.engines.engines.items() if stage_of(e)}
        return {**self._norms, **{name: norm for name, norm in sharded.items() if norm is not None}}

    def _write(self, values: Values) -> None:
        if self.path is not None:
            with self.path.open("a") as handle:
                handle.write(json.dumps({name: _finite(value) for name, value in values.items()}) + "\n")


def waited_share(path: Path) -> float | None:
    """Fraction of a run's time that rank 0 waited for data, from the epoch lines at `path`; None if there are none."""
    lines = [json.loads(line) for line in read_file(path).splitlines()] if is_file(path) else []
    epochs = [(line[WAIT], 1.0 / line["samples_a_second"]) for line in lines if line["kind"] == "epoch"]
    seconds = sum(each for _, each in epochs)  # per sample: all epochs have the same number of samples
    return round(sum(share * each for share, each in epochs) / seconds, 4) if epochs else None


def _finite(value: Any) -> Any:
    """Replace NaN and infinity by None, since JSON has neither."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _kept(path: Path, step: int) -> list[str]:
    """Lines of `path` up to `step`, without a line that a kill left incomplete."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return kept


def _pace(since: tuple[float, float], now: tuple[float, float], rows: int) -> dict[str, float]:
    seconds = max(now[0] - since[0], 1e-9)
    return {"samples_a_second": round(rows / seconds, 1), WAIT: round(min(1.0, (now[1] - since[1]) / seconds), 4)}


def learning_rates(engines: Engines) -> dict[str, float]:
    """The learning rate of each group, and of the tower in it, as `rate/GROUP` and `rate/GROUP.tower`."""
    found = {}
    for name, engine in engines.engines.items():
        for place, group in zip((name, f"{name}.tower"), inner(engine).param_groups, strict=False):
            found[f"rate/{place}"] = float(group["lr"])
    return found


def peak_memory() -> int:
    """Peak memory of this process in bytes: GPU memory if it uses a GPU, else main memory."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def network_seconds(engines: Engines) -> float:
    """Seconds that the all-reduces of one step take when nothing else runs. Collective; 0 with one rank.

    A buffer of the gradients' size (if that exceeds `PROBE` elements, of `PROBE`, scaled up) is summed over ranks after
    a barrier. Overlap with computation is not subtracted, and waiting for a slower rank counts as computation.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return 0.0
    sizes = {name: sum(p.numel() for p in group.module.parameters()) for name, group in engines.groups.items()}
    numbers = sum(sizes[phase.moves] * phase.repeat for phase in engines.model.phases)
    buffer = torch.zeros(min(numbers, PROBE), device=next(engines.model.parameters()).device)
    seconds = []
    for _ in range(2):  # the first may still set up connections
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(buffer)
        buffer[:1].cpu()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return min(seconds) * numbers / len(buffer)


def bottleneck(data: float, network: float) -> str:
    """What takes the largest fraction of the time: `data`, `network` or `compute` (the rest)."""
    shares = {"data": data, "network": network, "compute": 1.0 - data - network}
    return max(shares, key=lambda name: shares[name])
