"""A training run on Ray Train: workers, their data, and the resulting checkpoint.

The only file that imports ray.train. Ray Train starts the worker group and reports lost workers and nodes. States and
the position in the data are saved by `checkpoint`, so that a restart and a resubmission are the same thing.
"""

import gc
import json
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray.train
import torch
import torch.distributed as dist
from ray.exceptions import RayActorError
from ray.train import ControllerError, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer

from zsr import progress, telemetry
from zsr.artifact import Artifact, Plan, Staging, Store, canonical
from zsr.checkpoint import canonical_options, summary, tensors
from zsr.cluster import connect, environment, set_data_context, started_here
from zsr.data.decode import VERSION
from zsr.data.pictures import has_images
from zsr.data.rows import home_rank
from zsr.data.sampling import Pool, Reservoir, seed_of
from zsr.data.semantics import class_vectors
from zsr.data.shards import Source, collect, stream
from zsr.data.splits import Split
from zsr.data.stream import first_pictures, survey
from zsr.devices import AUTO, FAKE, Devices, DeviceSettings, choose, here, own_device
from zsr.errors import ConfigError, DamagedArtifact, Infeasible, Leakage
from zsr.models import MODELS, backbones, build
from zsr.models.choices import Query
from zsr.models.protocol import ClosedForm, Embedder, Inputs, Model, Tower
from zsr.models.protocol import Rows as FitRows
from zsr.preprocessing import pictures_of
from zsr.storage import url_of
from zsr.training import checkpoint
from zsr.training.batches import Batches, Sums, begin, begin_stream, fit_scale
from zsr.training.config import TrainSettings
from zsr.training.engines import deepspeed_config, init_distributed, leave_distributed, refuse
from zsr.training.loop import Place, Validation, train
from zsr.training.memory import memory
from zsr.training.metrics import Meter
from zsr.training.trackers import Tracking, follow

logger = logging.getLogger("zsr")

SCALED = 512  # images per side whose tower features the feature scale is fitted to
RESTARTS = 3  # after lost workers or nodes; errors of the code itself are not retried


@dataclass(frozen=True)
class TowerStart:
    """An image tower, and the file or directory of its initial weights (None: random)."""

    tower: Tower
    weights: Path | None


@dataclass(frozen=True)
class Run:
    """Specification of a training run.

    Attributes:
        features: FEATURES as input of the model, or the image tower in front of it, whose input are DATA's images.
        options: all options of the model, defaults filled in.
        semantics: the class embeddings; None for models that use none.
        split: resolved: its training and validation classes are filled in.
        query: modality of the queries.
        chosen: when retraining on all seen classes, the checkpoint whose best step and options are used.
        tracking: experiment tracking.
        recompute: activation checkpointing of the image tower; the same bits with less memory.
        device: device of the workers.
    """

    data: Artifact
    features: Artifact | TowerStart
    semantics: Artifact | None
    split: Split
    model: str
    options: dict[str, Any]
    settings: TrainSettings
    output: Store
    query: Query = "sketch"
    chosen: Artifact | None = None
    deepspeed: dict[str, Any] = field(default_factory=deepspeed_config)
    tracking: Tracking = field(default_factory=Tracking)
    recompute: bool = False
    device: DeviceSettings = AUTO

    @property
    def source(self) -> Source:
        """Source of the rows that are streamed: the features, or the preprocessing of the images."""
        if isinstance(self.features, Artifact):
            return self.features
        return pictures_of(self.features.tower)

    @property
    def classes(self) -> tuple[str, ...]:
        """The trained classes: the split's training classes; when retraining, also its validation classes."""
        more = self.split.validation if self.chosen else ()
        return tuple(sorted(self.split.training + more))

    @property
    def held_out(self) -> tuple[str, ...]:
        """The validation classes, which choose the checkpoint; none when retraining."""
        return () if self.chosen else self.split.validation

    @property
    def last_step(self) -> int:
        """The last step of training, without early stopping."""
        if self.chosen:
            return int(self.chosen.facts["best_step"])
        return self.settings.epochs * self.settings.steps_per_epoch

    @property
    def words(self) -> np.ndarray:
        """The class embeddings (N, S) of the trained classes; S is 0 without semantics."""
        if self.semantics is None:
            return np.zeros((len(self.classes), 0), np.float32)
        return class_vectors(self.semantics, self.classes)

    @property
    def inputs(self) -> Inputs:
        """Input sizes of the model, from the data.

        Raises:
            ConfigError: a modality without features, or a class without an embedding.
        """
        if self.semantics is None and MODELS[self.model].model.wants_words:
            raise ConfigError(f"model {self.model} requires class embeddings; set --semantics")
        if isinstance(self.features, Artifact):
            dims, tower = self.features.facts["dims"], None
            if missing := {self.query, "photo"} - set(dims):
                raise ConfigError(f"features {self.features.digest[:12]} have no {sorted(missing)}; both are required")
        else:
            tower = self.features.tower
            if self.query == "text":
                raise ConfigError("an image tower cannot encode text; run zsr features and train on features")
            if lacking := [modality for modality in ("sketch", "photo") if not has_images(self.data, modality)]:
                raise ConfigError(
                    f"--tower requires images, and data {self.data.digest[:12]} have none of {' and '.join(lacking)}; "
                    "train on --features, or prepare data with images"
                )
            with torch.device("meta"):  # only the width is needed
                dims = dict.fromkeys(("sketch", "photo"), backbones.build(tower.architecture).dim)
        return Inputs(
            sketch_dim=dims[self.query],
            photo_dim=dims["photo"],
            semantic_dim=self.words.shape[1],
            classes=self.classes,
            query=self.query,
            tower=tower,
        )

    def plan(self) -> Plan:
        """Everything that determines the checkpoint."""
        config: dict[str, Any] = {
            "model": self.model,
            "options": canonical_options(self.options),
            "inputs": canonical_options(self.inputs.model_dump()),
            # training in this process and in one worker gives the same bits
            "settings": self.settings.model_dump() | {"num_workers": self.settings.num_workers or 1},
            "deepspeed": self.deepspeed,
            "features": dict(self.features.config) if isinstance(self.features, Artifact) else None,
            "split": self.split.as_json(),
            "torch": torch.__version__.partition("+")[0],
        }
        parents = {"data": self.data.digest}
        if self.semantics is not None:
            parents["semantics"] = self.semantics.digest
        if isinstance(self.features, Artifact):
            parents["features"] = self.features.digest
        else:
            config["decode"] = VERSION
        if self.chosen:
            parents["chosen"] = self.chosen.digest
        return Plan("checkpoint", config, parents)


def describe(run: Run) -> dict[str, Any]:
    """The output of `--dry-run`: sizes, steps and rows, without training. With `refit`, the plan of the first stage."""
    _refuse_combinations(run, "cpu" if run.device.device == "cpu" else "cuda")  # auto is resolved when the run starts
    with torch.device("meta"):  # only sizes are needed
        model = build(run.model, run.options, run.inputs)
    settings = run.settings
    first = replace(run, settings=settings.model_copy(update={"refit": False}))
    return {
        "plan": first.plan().digest,
        "then_refit": settings.refit,
        "model": f"{run.model}: {summary(model)}",
        "bytes_of_parameters": sum(p.numel() * p.element_size() for p in model.parameters()),
        "bytes_a_gpu": memory(model, settings.batch_size, settings.workers[1]),
        "classes": {k: len(v) for k, v in run.split.as_json().items() if isinstance(v, list)},
        "rows": dict(run.features.facts["rows"] if isinstance(run.features, Artifact) else run.data.facts["rows"]),
        "steps_at_most": settings.epochs * settings.steps_per_epoch,
        "global_batch": settings.rows(settings.workers[1]) * settings.workers[1],
        "deepspeed": run.deepspeed,
        "workers": settings.num_workers,
    }


def train_model(run: Run, *, fresh: bool = False) -> Artifact:
    """Train, seal the chosen checkpoint and publish it. If an equal run has finished before, return its checkpoint.

    With `settings.refit`, first train without it, which publishes a version of its own, and then retrain on all seen
    classes, which publishes the final version.

    Args:
        fresh: discard the staged state of a killed run instead of resuming from it.

    Raises:
        NonFiniteLoss: see `loop.train`.
        Infeasible: see `devices.choose` and `require_workers`.
        ConfigError: data, features, class embeddings and split do not match.
    """
    if run.settings.refit and run.chosen is None:
        if not run.split.validation:
            raise ConfigError("--refit requires validation classes to choose the step; hold some out, or remove it")
        once = replace(run, settings=run.settings.model_copy(update={"refit": False}))
        first = train_model(once, fresh=fresh)
        run = replace(run, chosen=first, options={**run.options, **first.facts["chosen_options"]})
    _refuse_leaks(run)
    plan = run.plan()
    if done := run.output.made(plan):
        progress.up_to_date("train", run.output, run.output.versions())
        return done
    if fresh:
        run.output.discard(plan)
    staging = run.output.staging(plan)
    if learns_by_gradient(run.model) or run.settings.workers[1] > 1:
        done_steps, output = checkpoint.staged_step(staging), metrics_path(run, plan.digest).parent
        progress.found_finished("train", done_steps, run.last_step, "steps")
        with follow(_log(run, plan.digest), run.last_step, run.tracking, plan, done_steps, output):
            (_fit if run.settings.num_workers else _fit_here)(run, staging)
    else:  # a closed form needs no worker group: the stream reads in parallel, and one process sums
        Devices(0, 1, f"{run.model} is solved in closed form by the driver").say(1)
        torch.set_num_threads(run.settings.threads)
        _solve(run, staging, Place(0, 1, "cpu"))
    artifact = checkpoint.seal(staging, run.settings.keep_checkpoints, _facts(run, staging))
    run.output.publish(artifact)
    return artifact


def metrics_path(run: Run, plan: str) -> Path:
    """The metrics file of a run with plan digest `plan`, next to the artifact: a path or a URL."""
    return run.output.place / "logs" / plan[:12] / "metrics.jsonl"


def _log(run: Run, plan: str) -> Path:
    """The metrics file that the run writes; it is on this machine even if the output is a bucket."""
    return run.output.root / "logs" / plan[:12] / "metrics.jsonl"


def _refuse_leaks(run: Run) -> None:
    """Raise Leakage if the features' backbone was fine-tuned on an unseen class of the split."""
    if not isinstance(run.features, Artifact):
        return
    if leaked := sorted(set(run.features.config.get("saw", ())) & set(run.split.unseen)):
        raise Leakage(
            f"the backbone of features {run.features.digest[:12]} was fine-tuned on {leaked[:5]}, which split "
            f"{run.split.source!r} evaluates as unseen; fine-tune it on the seen classes of this split"
        )


def _refuse_combinations(run: Run, device: str) -> None:
    """Raise ConfigError if model, ZeRO stage and precision are incompatible."""
    model = MODELS[run.model].model
    if issubclass(model, Model):
        refuse(model, run.deepspeed, device, run.settings.accumulate)


def learns_by_gradient(name: str) -> bool:
    """Whether model `name` learns by gradient (else it is solved in closed form)."""
    return issubclass(MODELS[name].model, Model)


def _facts(run: Run, staging: Staging) -> dict[str, Any]:
    """Facts of the checkpoint's manifest: what a reader needs beyond its config."""
    model = build(run.model, run.options, run.inputs)
    chosen = {} if learns_by_gradient(run.model) else json.loads(staging.read("tried.json"))["options"]
    saw = sorted(run.split.training + run.split.validation)
    facts: dict[str, Any] = {"metric": model.metric, "dim": model.dim, "saw": saw, "trained": list(run.classes)}
    facts["chosen_options"] = chosen
    if run.chosen:  # its own history has no scores
        facts |= {name: run.chosen.facts[name] for name in ("validation_map_all", "history")}
    return facts


def _fit(run: Run, staging: Staging) -> None:
    """Train with Ray Train, restarting the workers after a lost worker or node.

    Ray Train's own FailureConfig would also retry errors of the code. A new worker group resumes from the staged state.
    """
    connect()  # otherwise Ray Train would start or join a cluster without our workers' environment
    devices = _devices(run)
    place = run.output.root / "ray" / staging.plan.digest[:12]
    shutil.rmtree(place, ignore_errors=True)  # left by a killed driver
    for attempt in range(RESTARTS + 1):
        try:
            # a new name each time: otherwise Ray Train would restore from its own state file, which it overwrites in
            # place; our states are written once
            _trainer(run, staging, place / uuid.uuid4().hex, devices).fit()
            return
        except (WorkerGroupError, ControllerError, RayActorError) as error:
            failures = _failures(error)
            if attempt == RESTARTS or not any(map(_is_loss, failures.values())):
                raise
            lost = sorted(map(str, failures))
            logger.warning("workers %s failed; restarting from the last saved state (restart %d)", lost, attempt + 1)
        finally:
            shutil.rmtree(place, ignore_errors=True)


def _fit_here(run: Run, staging: Staging) -> None:
    """Train in this process: that of a command, or of a Ray actor, on the device that Ray assigned to it."""
    devices = here(run.device)
    _refuse_combinations(run, devices.name)
    devices.say(1)
    backend = "nccl" if devices.name == "cuda" else "gloo"
    # read by DeepSpeed; its choice of a CPU is for this training, not for what this process starts later
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    variables |= {} if devices.name == "cuda" else {"DS_ACCELERATOR": "cpu"}
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with tempfile.TemporaryDirectory() as folder, environment(variables):
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            _work(run, staging, Place(0, 1, devices.name), lambda _: None)
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(strict)
            if devices.name == "cuda":  # Ray counts the GPU as free, and a later stage of this process may request it
                gc.collect()
                torch.cuda.empty_cache()


def _failures(error: Exception) -> Mapping[Any, Exception]:
    """The failures by rank; "controller" is Ray Train's own actor.

    With several Ray clusters on one machine, Ray's placement group cleaner may look for the controller in the wrong
    cluster, consider it dead and remove its workers.
    """
    if isinstance(error, WorkerGroupError):
        return cast(Mapping[Any, Exception], error.worker_failures)
    return {"controller": error.controller_failure if isinstance(error, ControllerError) else error}


def _is_loss(error: Exception) -> bool:
    """Whether a worker failed because its process, or that of a peer connected to it, was lost."""
    signs = ("Connection closed by peer", "Connection reset by peer", "DistNetworkError", "worker health check failed")
    return isinstance(error, RayActorError) or any(sign in str(error) for sign in signs)


def _devices(run: Run) -> Devices:
    """Choose the workers' devices, and log the choice.

    Raises:
        Infeasible: see `devices.choose` and `require_workers`.
        ConfigError: workers that share a GPU; or see `_refuse_combinations`.
    """
    least, most = run.settings.workers
    devices = choose(run.device, cpus=0)  # Ray Train requests no CPUs for GPU workers
    if devices.gpus and devices.gpus < 1 and most > 1:
        raise ConfigError(
            f"--gpus-per-worker {devices.gpus:g}: NCCL does not support workers that share a GPU; use 1, or "
            "--num-workers 1"
        )
    _refuse_combinations(run, devices.name)
    require_workers(least, devices)
    devices.say(min(most, max(least, devices.most)))
    return devices


def require_workers(workers: int, devices: Devices) -> None:
    """Refuse more workers than a local cluster has room for: they would hang silently.

    For a cluster that was not started here it is a warning, since nodes may be added to it.

    Raises:
        Infeasible: with the maximum that fits.
    """
    if workers <= devices.most:
        return
    message = f"{workers} workers requested, but the cluster has room for {devices.most} ({devices.why})"
    if started_here():
        raise Infeasible(f"{message}; use --num-workers {devices.most}")
    logger.warning("%s; the workers wait until nodes are added", message)


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]  # known at run time
    """Initializes the process group, after a check of every worker's device."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(own_device)  # its error names the node and the fix, unlike NCCL's
        super().on_start(worker_group, backend_config)


@dataclass
class _Distributed(TorchConfig):
    @property
    def backend_cls(self) -> type[Any]:
        return _Backend


def _trainer(run: Run, staging: Staging, folder: Path, devices: Devices) -> TorchTrainer:
    use_gpu = bool(devices.gpus)
    nccl = use_gpu and FAKE not in os.environ
    return TorchTrainer(
        _worker,
        train_loop_config={"run": run, "staging": staging},
        torch_config=_Distributed(backend="nccl" if nccl else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=_number(run.settings, devices),  # type: ignore[arg-type]  # typed by a class that it shadows
            use_gpu=use_gpu,
            resources_per_worker={"GPU": devices.gpus} if use_gpu else {"CPU": 1},
        ),
        run_config=RunConfig(name=folder.name, storage_path=str(folder.parent)),
    )


def _number(settings: TrainSettings, devices: Devices) -> int | tuple[int, int]:
    """The number of workers to request from Ray Train."""
    least, most = settings.workers
    return most if least == most else (least, max(least, min(most, devices.most)))


def _worker(config: dict[str, Any]) -> None:
    """Run one Ray Train worker: stream the data, build the model, train or solve it."""
    run, staging = config["run"], config["staging"]
    context = ray.train.get_context()
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"  # the driver's choice for all workers
    place = Place(context.get_world_rank(), context.get_world_size(), device)
    _work(run, staging, place, ray.train.report)
    telemetry.spend("train", time.process_time())


def _work(run: Run, staging: Staging, place: Place, report: Callable[[dict[str, float]], None]) -> None:
    """Train or solve in the existing process group, and destroy the group afterwards."""
    set_data_context()
    torch.set_num_threads(run.settings.threads)
    torch.use_deterministic_algorithms(place.device == "cpu")
    try:
        if learns_by_gradient(run.model):
            _train(run, staging, place, report)
        else:
            _solve(run, staging, place)
            report({"step": 1.0})
    finally:
        # otherwise rank 0 may abort at exit while DeepSpeed's threads still use the group
        leave_distributed()


def _train(run: Run, staging: Staging, place: Place, report: Callable[[dict[str, float]], None]) -> None:
    init_distributed(dist.get_backend())
    model, words = _new_model(run, place)
    if not isinstance(model, Model):
        raise ConfigError(f"model {run.model} is solved in closed form, not trained")
    if run.settings.augment and run.inputs.tower is None:
        raise ConfigError("--augment requires images; train with --tower, or remove it")
    rows = run.settings.rows(place.world) * place.world
    path, copy = _log(run, staging.plan.digest), metrics_path(run, staging.plan.digest)
    meter = Meter(path if place.rank == 0 else None, run.tracking.every, rows, copy if url_of(copy) else None)
    validation = _validation(run) if place.rank == 0 else None  # unsharded: no other rank should hold the rows
    with closing(_batches(run, model, words, place)) as batches:
        train(
            model,
            batches,
            validation,
            run.settings,
            run.last_step,
            run.deepspeed,
            staging,
            meter,
            place,
            report,
            recompute=run.recompute,
        )


def _solve(run: Run, staging: Staging, place: Place) -> None:
    model, words = _new_model(run, place)
    if not isinstance(model, ClosedForm):
        raise ConfigError(f"model {run.model} is trained, not solved in closed form")
    if model.inputs.tower is not None:
        raise ConfigError(f"model {run.model} is solved in closed form and cannot train a tower; run zsr features")
    if model.scaling != "none":
        for side in ("sketch", "photo"):
            sums = Sums()
            for block in stream(run.data, run.source, _modality(run, side), run.classes):
                sums.add(block.features)
            fit_scale(model, side, sums)
    validation = _validation(run)
    score = None if validation is None else lambda: validation.of(model, place.device)
    choice = model.fit(_fit_rows(run, place), words, score)
    if place.rank == 0:
        progress = checkpoint.Progress().after(1, None if score is None else score())
        weights = tensors(model)
        staging.write("tried.json", canonical({"scores": dict(choice.scores), "options": dict(choice.options)}))
        checkpoint.save_progress(staging, progress, weights, {}, run.settings.keep_checkpoints)


def _new_model(run: Run, place: Place) -> tuple[Embedder, torch.Tensor]:
    """The model with its seeded initial weights, equal on all ranks, and the class embeddings."""
    torch.manual_seed(seed_of(run.settings.seed, 0))
    model = build(run.model, run.options, run.inputs)
    if isinstance(run.features, TowerStart) and run.features.weights is not None:
        _load_towers(model, run.features)
    return model.to(place.device), torch.from_numpy(run.words).to(place.device)


def _load_towers(model: Embedder, start: TowerStart) -> None:
    """Load the towers' initial weights. Raises DamagedArtifact if the file is not the one of the plan."""
    path = cast(Path, start.weights)
    if (found := backbones.digest(path)) != start.tower.weights:
        raise DamagedArtifact(f"{path}: digest {found[:12]}, expected {start.tower.weights[:12]} on every node")
    for tower in model.towers.values():
        backbones.load_weights(cast(backbones.Backbone, tower), path)


def _modality(run: Run, side: str) -> str:
    """The data modality of a model's side."""
    return run.query if side == "sketch" else "photo"


def _batches(run: Run, model: Model, words: torch.Tensor, place: Place) -> Batches:
    """The training batches: features are streamed once and held on the device, images are streamed during training."""
    seed, paired = seed_of(run.settings.seed, 1), run.settings.paired
    if isinstance(run.source, Artifact):
        query, photo = (_pool(run, model, side, place) for side in ("sketch", "photo"))
        return begin(model, query, photo, words, seed, paired=paired)
    sides = survey(run.data, (run.query, "photo"), run.classes, run.settings.window, seed_of(run.settings.seed, 2))
    if model.scaling != "none":
        for side, rows in (("sketch", sides.sketch), ("photo", sides.photo)):
            sums = Sums()
            for part in first_pictures(run.data, run.source, sides, rows, SCALED):
                sums.add(_unscaled(model, side, torch.from_numpy(part).to(place.device)))
            fit_scale(model, side, sums)
    return begin_stream(
        model,
        run.data,
        run.source,
        sides,
        words,
        seed,
        paired=paired,
        augment=run.settings.augment,
        last_step=run.last_step,
    )


def _pool(run: Run, model: Model, side: str, place: Place) -> Pool:
    """Load the training rows of one side to the device, and fit the model's feature scale in the same pass."""
    held = Reservoir(len(run.classes), run.settings.rows_per_class, seed_of(run.settings.seed, 2))
    sums = Sums()
    for block in stream(run.data, run.source, _modality(run, side), run.classes):
        held.add(block)
        sums.add(block.features)
    fit_scale(model, side, sums)
    return held.finish(place.device)


@torch.no_grad()
def _unscaled(model: Model, side: str, pixels: torch.Tensor) -> np.ndarray:
    """Features (N, F), before scaling, of images (N, S, S, 3) by the untrained model's tower."""
    model.eval()
    return np.asarray(cast(torch.nn.Module, model.tower(side))(pixels).cpu().numpy())


def _fit_rows(run: Run, place: Place) -> Iterator[FitRows]:
    """The training rows assigned to this rank, first one side, then the other."""
    for side in ("sketch", "photo"):
        for block in stream(run.data, run.source, _modality(run, side), run.classes):
            mine = home_rank(block.ids, place.world) == place.rank
            features = torch.from_numpy(block.features[mine]).to(place.device)
            yield FitRows(side, features, torch.from_numpy(block.labels[mine]).to(place.device))


def _validation(run: Run) -> Validation | None:
    if not run.held_out:
        return None
    parts = [collect(run.data, run.source, modality, run.held_out) for modality in (run.query, "photo")]
    return Validation(parts[0], parts[1])
