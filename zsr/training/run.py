"""A training run on Ray Train: workers, the data they are fed, and the checkpoint that comes out.

The only file that imports ray.train. Ray Train starts the worker group and tells when a worker or a node is lost;
states and data position are ours (see `checkpoint`), so that a restart and a resubmission are the same thing.
"""

import logging
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray.train
import torch
import torch.distributed as dist
from ray.exceptions import RayActorError
from ray.train import RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer

from zsr.artifact import Artifact, Plan, Staging, Store, canonical
from zsr.cluster import connect, gpus, require_workers, set_data_context
from zsr.data.rows import home_rank
from zsr.data.sampling import Pool, Reservoir, Sampler, seed_of
from zsr.data.semantics import class_vectors
from zsr.data.shards import collect, stream
from zsr.data.splits import Split
from zsr.errors import ConfigError
from zsr.models import MODELS, build
from zsr.models.layers import Scale
from zsr.models.protocol import ClosedForm, Embedder, Inputs, Model
from zsr.models.protocol import Rows as FitRows
from zsr.training import checkpoint
from zsr.training.config import TrainSettings
from zsr.training.engines import deepspeed_config, init_distributed
from zsr.training.loop import Log, Place, Score, Validation, train

logger = logging.getLogger("zsr")

RESTARTS = 3  # after lost workers or nodes; an error of the code itself is never tried again


@dataclass(frozen=True)
class Run:
    """Everything that a worker needs to know.

    Attributes:
        options: the model's own options, complete.
        split: resolved: its training and validation classes are filled in.
    """

    data: Artifact
    features: Artifact
    semantics: Artifact
    split: Split
    model: str
    options: dict[str, Any]
    settings: TrainSettings
    output: Store
    score: Score
    deepspeed: dict[str, Any] = field(default_factory=deepspeed_config)

    @property
    def inputs(self) -> Inputs:
        """Sizes that the data dictates.

        Raises:
            ConfigError: a modality without features, or a class without a vector.
        """
        dims = self.features.facts["dims"]
        if missing := {"sketch", "photo"} - set(dims):
            raise ConfigError(f"features {self.features.digest[:12]} have no {sorted(missing)}; training wants both")
        words = class_vectors(self.semantics, self.split.training)
        return Inputs(
            sketch_dim=dims["sketch"],
            photo_dim=dims["photo"],
            semantic_dim=words.shape[1],
            classes=self.split.training,
        )

    def plan(self) -> Plan:
        """What shapes the checkpoint."""
        config = {
            "model": self.model,
            "options": checkpoint.canonical_options(self.options),
            "inputs": checkpoint.canonical_options(self.inputs.model_dump()),
            "settings": self.settings.model_dump(),
            "deepspeed": self.deepspeed,
            "features": dict(self.features.config),
            "split": self.split.as_json(),
            "torch": torch.__version__.partition("+")[0],
        }
        parents = {"data": self.data.digest, "features": self.features.digest, "semantics": self.semantics.digest}
        return Plan("checkpoint", config, parents)


def describe(run: Run) -> dict[str, Any]:
    """What `--plan` prints: sizes, steps and rows, without training."""
    model = build(run.model, run.options, run.inputs)
    settings = run.settings
    return {
        "plan": run.plan().digest,
        "model": f"{run.model}: {checkpoint.describe(model)}",
        "bytes_of_parameters": sum(p.numel() * p.element_size() for p in model.parameters()),
        "classes": {k: len(v) for k, v in run.split.as_json().items() if isinstance(v, list)},
        "rows": dict(run.features.facts["rows"]),
        "steps_at_most": settings.epochs * settings.steps_per_epoch,
        "global_batch": settings.batch_size * settings.num_workers,
        "workers": settings.num_workers,
    }


def train_model(run: Run) -> Artifact:
    """Train, seal the chosen checkpoint and publish it. An equal run that was finished before is returned as it is.

    Raises:
        NonFiniteLoss: see the loop.
        ConfigError: the data, the features, the vectors and the split do not fit each other.
    """
    plan = run.plan()
    if done := run.output.made(plan):
        return done
    staging = run.output.staging(plan)
    connect()
    if learns_by_gradient(run.model) or run.settings.num_workers > 1:
        _fit(run, staging)
    else:  # closed form needs no worker group: the stream does the reading, one process the sums
        torch.set_num_threads(run.settings.threads)
        _solve(run, staging, Place(0, 1, "cpu"))
    artifact = checkpoint.seal(staging, run.settings.keep_checkpoints, _facts(run))
    run.output.publish(artifact)
    return artifact


def learns_by_gradient(name: str) -> bool:
    """Whether model `name` learns by gradient (else it is solved in closed form)."""
    kind = MODELS[name].model
    return isinstance(kind, type) and issubclass(kind, Model)


def _facts(run: Run) -> dict[str, Any]:
    """What a reader of the checkpoint needs to know beyond its config."""
    model = build(run.model, run.options, run.inputs)
    return {"metric": model.metric, "dim": model.dim, "saw": sorted(run.split.training + run.split.validation)}


def _fit(run: Run, staging: Staging) -> None:
    """Run the workers to their end, starting them again after a lost worker or node.

    Ray Train's own FailureConfig would retry errors of the code too; states are ours, so a fresh start is a resumption.
    """
    require_workers(run.settings.num_workers)
    for attempt in range(RESTARTS + 1):
        # a name of its own each time: Ray Train would otherwise restore from its own state file, which is written in
        # place; ours is written once
        folder = run.output.root / "ray" / uuid.uuid4().hex
        try:
            _trainer(run, staging, folder).fit()
            return
        except WorkerGroupError as error:
            if attempt == RESTARTS or not any(map(_is_loss, error.worker_failures.values())):
                raise
            lost = sorted(error.worker_failures)
            logger.warning("workers %s failed; starting again from the last state (%d)", lost, attempt + 1)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _is_loss(error: Exception) -> bool:
    """Whether a worker's failure is a lost process: its own, or that of a peer, which breaks the connection to it."""
    signs = ("Connection closed by peer", "Connection reset by peer", "DistNetworkError", "worker health check failed")
    return isinstance(error, RayActorError) or any(sign in str(error) for sign in signs)


def _trainer(run: Run, staging: Staging, folder: Path) -> TorchTrainer:
    use_gpu = gpus() > 0
    return TorchTrainer(
        _worker,
        train_loop_config={"run": run, "staging": staging},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=run.settings.num_workers, use_gpu=use_gpu),
        run_config=RunConfig(name=folder.name, storage_path=str(folder.parent)),
    )


def _worker(config: dict[str, Any]) -> None:
    """One Ray Train worker: stream the data, build the model, train or solve it."""
    run, staging = config["run"], config["staging"]
    context = ray.train.get_context()
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"  # as the driver chose for all workers
    place = Place(context.get_world_rank(), context.get_world_size(), device)
    set_data_context()
    torch.set_num_threads(run.settings.threads)
    torch.use_deterministic_algorithms(device == "cpu")
    try:
        if learns_by_gradient(run.model):
            _train(run, staging, place)
        else:
            _solve(run, staging, place)
            ray.train.report({"step": 1.0})
    finally:
        # otherwise rank 0 may abort at exit, while DeepSpeed's threads still hold the group
        if dist.is_initialized():
            dist.destroy_process_group()


def _train(run: Run, staging: Staging, place: Place) -> None:
    init_distributed(dist.get_backend())
    model, words = _new_model(run, place)
    if not isinstance(model, Model):
        raise ConfigError(f"model {run.model} is solved in closed form, not trained")
    pools = {m: _pool(run, model, m, place) for m in ("sketch", "photo")}
    sampler = Sampler(
        pools["sketch"],
        pools["photo"],
        words,
        seed_of(run.settings.seed, 1),
        paired=run.settings.paired,
        triplets=model.eats == "triplets",
        negatives=model.negatives(words),
    )
    log = Log(run.output.root / "logs" / staging.plan.digest[:12] / "metrics.jsonl" if place.rank == 0 else None)
    train(model, sampler, _validation(run), run.settings, run.deepspeed, staging, log, place, ray.train.report)


def _solve(run: Run, staging: Staging, place: Place) -> None:
    model, words = _new_model(run, place)
    if not isinstance(model, ClosedForm):
        raise ConfigError(f"model {run.model} is trained, not solved in closed form")
    if model.standardises:
        for modality in ("sketch", "photo"):
            _fit_scale(run, model, modality)
    validation = _validation(run)
    scores = model.fit(_fit_rows(run, place), words, lambda: validation.of(model, place.device))
    if place.rank == 0:
        progress = checkpoint.Progress().after(1, validation.of(model, place.device))
        weights = checkpoint.tensors(model)
        staging.write("tried.json", canonical(dict(scores)))
        checkpoint.save_progress(staging, progress, weights, {}, run.settings.keep_checkpoints)


def _new_model(run: Run, place: Place) -> tuple[Embedder, torch.Tensor]:
    """The model with its seeded initial weights, equal on all ranks, and the class vectors."""
    torch.manual_seed(seed_of(run.settings.seed, 0))
    model = build(run.model, run.options, run.inputs).to(place.device)
    words = torch.from_numpy(class_vectors(run.semantics, run.split.training)).to(place.device)
    return model, words


def _pool(run: Run, model: Model, modality: str, place: Place) -> Pool:
    """The training rows of one modality on the device, and the model's scale fitted on all of them in the same pass."""
    held = Reservoir(len(run.split.training), run.settings.rows_per_class, seed_of(run.settings.seed, 2))
    sums = Sums()
    for block in stream(run.data, run.features, modality, run.split.training):
        held.add(block)
        sums.add(block.features)
    if model.standardises:
        cast(Scale, model.scale[modality]).fit(*sums.moments(modality))
    return held.finish(place.device)


def _fit_scale(run: Run, model: Embedder, modality: str) -> None:
    sums = Sums()
    for block in stream(run.data, run.features, modality, run.split.training):
        sums.add(block.features)
    cast(Scale, model.scale[modality]).fit(*sums.moments(modality))


class Sums:
    """Mean and deviation of the columns of a stream, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.total = np.zeros(0)
        self.square = np.zeros(0)

    def add(self, features: np.ndarray) -> None:
        """Take in (N, F)."""
        wide = features.astype(np.float64)
        self.total = wide.sum(0) + (self.total if self.count else 0.0)
        self.square = np.square(wide).sum(0) + (self.square if self.count else 0.0)
        self.count += len(features)

    def moments(self, modality: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and population deviation, (F,) float32 each. Raises ConfigError if no row came."""
        if self.count == 0:
            raise ConfigError(f"no {modality} row of a training class has a feature; check the split and the features")
        mean = self.total / self.count
        variance = np.maximum(self.square / self.count - np.square(mean), 0.0)
        return torch.from_numpy(mean).float(), torch.from_numpy(np.sqrt(variance)).float()


def _fit_rows(run: Run, place: Place) -> Iterator[FitRows]:
    """The training rows whose home is this rank, modality after modality."""
    for modality in ("sketch", "photo"):
        for block in stream(run.data, run.features, modality, run.split.training):
            mine = home_rank(block.ids, place.world) == place.rank
            features = torch.from_numpy(block.features[mine]).to(place.device)
            yield FitRows(modality, features, torch.from_numpy(block.labels[mine]).to(place.device))


def _validation(run: Run) -> Validation:
    classes = run.split.validation
    parts = [collect(run.data, run.features, modality, classes) for modality in ("sketch", "photo")]
    return Validation(parts[0], parts[1], run.score)
