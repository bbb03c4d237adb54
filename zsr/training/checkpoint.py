"""Checkpoints: safetensors and JSON, no pickle.

A checkpoint artifact holds `model.safetensors` (the chosen weights) and, if the run kept all, one
`steps/NNNNNNNN.safetensors` per epoch. Its config has the model with its options and input sizes, its facts the classes
that it saw and the metric that compares its embeddings. During a run, its states are in the staging area of the same
plan.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Self

from safetensors.torch import save
from torch import Tensor

from zsr import faults
from zsr.artifact import Artifact, Staging
from zsr.checkpoint import parse
from zsr.errors import ConfigError, DamagedArtifact


@dataclass(frozen=True)
class Progress:
    """Progress of a run after `step` steps.

    Attributes:
        history: (step, validation score) of every epoch; the score is None if no class is held out.
        best_step: the step with the highest score, or the last one if there are no scores.
    """

    step: int = 0
    history: tuple[tuple[int, float | None], ...] = field(default=())
    best_step: int = 0

    def after(self, step: int, score: float | None) -> "Progress":
        """The progress with one more epoch; of equal scores the earlier one is the best."""
        history = (*self.history, (step, score))
        scored = [(value, -at) for at, value in history if value is not None]
        return Progress(step, history, -max(scored)[1] if scored else step)

    def kept(self, keep: str) -> set[int]:
        """The steps whose weights are kept: that of the best epoch, all, or those of the N best epochs."""
        if keep == "best":
            return {self.best_step}
        most = len(self.history) if keep == "all" else int(keep)
        ranked = sorted(self.history, key=lambda h: (h[1] is None, -(h[1] or 0.0), h[0] if h[1] is not None else -h[0]))
        return {step for step, _ in ranked[:most]}

    def epochs_since_best(self) -> int:
        """Epochs after the best one."""
        return sum(step > self.best_step for step, _ in self.history)


def save_progress(
    staging: Staging, progress: Progress, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], keep: str
) -> None:
    """Stage the state after an epoch: weights, then the state that refers to them; then delete old ones."""
    kept = {f"steps/{step:08d}.safetensors" for step in progress.kept(keep)}
    weights, newest = f"steps/{progress.step:08d}.safetensors", f"state/{progress.step:08d}.safetensors"
    scratch = keep == "best"
    if weights in kept:
        staging.write(weights, save(dict(model)), scratch=scratch)
    state = {f"model/{k}": v for k, v in model.items()} | {f"optimizer/{k}": v for k, v in optimizer.items()}
    facts = {"step": progress.step, "history": [list(h) for h in progress.history], "best_step": progress.best_step}
    faults.here("train.save")
    staging.write(newest, save(state), scratch=True, facts=facts)
    faults.here("train.saved")
    for name in staging.pieces(scratch=True):
        if name.startswith("state/") and name < newest:
            staging.drop(name, scratch=True)
    for name in staging.pieces(scratch=scratch):
        if name.startswith("steps/") and name not in kept:
            staging.drop(name, scratch=scratch)


class Writer:
    """Writes states asynchronously, one at a time and in order; on exit all are on disk."""

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._last: Future[None] | None = None
        return self

    def write(self, save: Callable[[], None]) -> None:
        """Start `save` once the previous one is done. Raises what the previous one raised."""
        if self._last is not None:
            self._last.result()
        self._last = self._pool.submit(save)

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Raise what the last `save` raised, unless another exception is propagating."""
        self._pool.shutdown(wait=True)
        if self._last is not None and error is None:
            self._last.result()


def staged_step(staging: Staging) -> int:
    """The step of the newest staged state, by its receipt; 0 if there is none."""
    names = [name for name in staging.pieces(scratch=True) if name.startswith("state/")]
    entries = [staging.finished(name, scratch=True) for name in names]
    return max((int(entry.facts["step"]) for entry in entries if entry is not None), default=0)


def last_progress(staging: Staging) -> tuple[Progress, dict[str, Tensor], dict[str, Tensor]] | None:
    """The newest staged state that is complete, or None: (progress, model tensors, optimizer tensors)."""
    names = [name for name in staging.pieces(scratch=True) if name.startswith("state/")]
    for name in reversed(names):
        entry = staging.finished(name, scratch=True)
        if entry is None:
            continue
        try:
            state = parse(staging.read(name, scratch=True), name)
        except DamagedArtifact:
            continue
        history = tuple((int(s), None if score is None else float(score)) for s, score in entry.facts["history"])
        progress = Progress(int(entry.facts["step"]), history, int(entry.facts["best_step"]))
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
        for key, value in state.items():
            part, _, rest = key.partition("/")
            parts[part][rest] = value
        return progress, parts["model"], parts["optimizer"]
    return None


def seal(staging: Staging, keep: str, facts: Mapping[str, Any]) -> Artifact:
    """Seal the best weights as an artifact with a manifest.

    Raises:
        ConfigError: the run finished no epoch.
    """
    found = last_progress(staging)
    if found is None:
        raise ConfigError(f"{staging.directory}: no finished epoch to make a checkpoint from")
    progress = found[0]
    best = staging.read(f"steps/{progress.best_step:08d}.safetensors", scratch=keep == "best")
    staging.write("model.safetensors", best)
    score = dict(progress.history)[progress.best_step]
    run = {"history": [list(h) for h in progress.history], "best_step": progress.best_step, "steps": progress.step}
    return staging.seal(facts={"validation_map_all": score, **run, **facts})
