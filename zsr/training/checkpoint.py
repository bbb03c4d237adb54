"""Checkpoints: safetensors and JSON, no pickle.

A checkpoint artifact holds `model.safetensors` (the chosen weights) and, where the run kept all, one
`steps/NNNNNNNN.safetensors` an epoch; its config says which model with which options and sizes, its facts which classes
it saw and how its embeddings compare. While a run is on, its states lie in the staging area of the same plan.
"""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Self

from safetensors.torch import load, save
from torch import Tensor, nn

from zsr import faults
from zsr.artifact import Artifact, Staging, canonical
from zsr.errors import ConfigError, DamagedArtifact
from zsr.models import build
from zsr.models.protocol import Embedder, Inputs


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers on the CPU, contiguous and unshared, as safetensors wants them."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in module.state_dict().items()}


def parse(data: bytes, where: str) -> dict[str, Tensor]:
    """Tensors of safetensors bytes. Raises DamagedArtifact if they are none."""
    try:
        return load(data)
    except Exception as error:  # SafetensorError has no public base class
        raise DamagedArtifact(f"{where}: not safetensors: {error}") from error


def open_model(checkpoint: Artifact, name: str = "model.safetensors") -> Embedder:
    """The model of a checkpoint, in eval mode on the CPU.

    Args:
        name: which weights; `steps/...` for those of one epoch.

    Raises:
        DamagedArtifact: bytes or tensors are not what the manifest and the model say.
        ConfigError: a model or option that this version does not know.
    """
    config = checkpoint.config
    model = build(str(config["model"]), config["options"], Inputs.model_validate(config["inputs"]))
    state = parse(checkpoint.read(name), f"{checkpoint.directory / name}")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise DamagedArtifact(
            f"{checkpoint.directory / name}: does not fit model {config['model']}: {error}"
        ) from error
    return model.eval()


@dataclass(frozen=True)
class Progress:
    """Where a run stands after `step` steps.

    Attributes:
        history: (step, validation score) of every epoch; the score is None where no class is held out.
        best_step: the step with the highest score, or the last one where there are no scores.
    """

    step: int = 0
    history: tuple[tuple[int, float | None], ...] = field(default=())
    best_step: int = 0

    def after(self, step: int, score: float | None) -> "Progress":
        """The progress with one more epoch; the earlier of equal scores stays the best."""
        history = (*self.history, (step, score))
        scored = [(value, -at) for at, value in history if value is not None]
        return Progress(step, history, -max(scored)[1] if scored else step)

    def kept(self, keep: str) -> set[int]:
        """The steps whose weights are kept: of the best epoch, of all, or of a number of the best."""
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
    """Stage the state after an epoch: weights, then the state that refers to them; old ones are dropped after that."""
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
    """Writes one state at a time behind the steps' back, in the order given; on leaving it, all is on disk."""

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._last: Future[None] | None = None
        return self

    def write(self, save: Callable[[], None]) -> None:
        """Start `save` once the one before is done. Raises what that one raised."""
        if self._last is not None:
            self._last.result()
        self._last = self._pool.submit(save)

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Raise what the last `save` raised, unless another error is on its way."""
        self._pool.shutdown(wait=True)
        if self._last is not None and error is None:
            self._last.result()


def staged_step(staging: Staging) -> int:
    """The step of the newest staged state, by its receipt; 0 where there is none."""
    names = [name for name in staging.pieces(scratch=True) if name.startswith("state/")]
    entries = [staging.finished(name, scratch=True) for name in names]
    return max((int(entry.facts["step"]) for entry in entries if entry is not None), default=0)


def last_progress(staging: Staging) -> tuple[Progress, dict[str, Tensor], dict[str, Tensor]] | None:
    """The newest staged state that is whole, or None: (progress, model tensors, optimizer tensors)."""
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
    """Put the best weights under a manifest.

    Raises:
        ConfigError: the run finished no epoch.
    """
    found = last_progress(staging)
    if found is None:
        raise ConfigError(f"{staging.directory}: no finished epoch to make a checkpoint of")
    progress = found[0]
    best = staging.read(f"steps/{progress.best_step:08d}.safetensors", scratch=keep == "best")
    staging.write("model.safetensors", best)
    score = dict(progress.history)[progress.best_step]
    run = {"history": [list(h) for h in progress.history], "best_step": progress.best_step, "steps": progress.step}
    return staging.seal(facts={"validation_map_all": score, **run, **facts})


def describe(model: Embedder) -> str:
    """One line on the size of a model."""
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{parameters:,} parameters, {trained:,} of them trained, {model.dim}-d embeddings"


def canonical_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as plain JSON values, tuples as lists, so that a plan made from flags equals one read from a manifest."""
    plain: dict[str, Any] = json.loads(canonical(dict(options)))
    return plain
