"""One DeepSpeed engine per parameter group.

DeepSpeed runs the step: it scales the loss, averages gradients over ranks, shards what its ZeRO stage shards and
applies the group's own torch optimizer. Its checkpoint files are pickles and are not used; states are exported here as
plain, unsharded tensors.
"""

import copy
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import resources
from pathlib import Path
from typing import Any, Final, get_args

import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn

from zsr.batch import Batch
from zsr.errors import ConfigError
from zsr.models.layers import world_size
from zsr.models.protocol import Embedder, Group, Model, Phase, Terms
from zsr.storage import read_text
from zsr.training import gradient_step
from zsr.training.activation_checkpointing import recomputed
from zsr.training.config import Precision, Stage
from zsr.training.optimizer_state import put_back, stage_of, whole_state

DTYPES: Final[Mapping[str, torch.dtype]] = {"bf16": torch.bfloat16, "fp16": torch.float16}
AUTOCAST: Final = "torch_autocast"  # DeepSpeed's section for computing in 16 bits with 32-bit weights
SECTIONS: Final[Mapping[str, str]] = {  # sections read here, and an example of each
    "zero_optimization": "{stage: 2}",
    "fp16": "{enabled: false}",
    "bf16": "{enabled: false}",
    AUTOCAST: "{enabled: true, dtype: bfloat16}",
}


def deepspeed_config(stage: Stage | None = None, precision: Precision | None = None) -> dict[str, Any]:
    """Read the DeepSpeed settings from the file $ZSR_DEEPSPEED if set, else from deepspeed.yaml of this package.

    Args:
        stage, precision: override those of the file.

    Raises:
        ConfigError: the file is missing, malformed, or enables a feature that checkpoints do not support.
    """
    default = Path(str(resources.files("zsr.training"))) / "deepspeed.yaml"
    path = Path(os.environ.get("ZSR_DEEPSPEED") or default)
    config = _read_config(path)
    if wrapped := [name for name in ("fp16", "bf16") if config.get(name, {}).get("enabled")]:
        raise ConfigError(
            f"{path}: section {wrapped[0]} keeps 16-bit copies of the weights, which checkpoints do not support; "
            f"use --precision {wrapped[0]}, or section {AUTOCAST} with enabled and dtype"
        )
    zero = dict(config.get("zero_optimization", {}))
    if offloaded := [name for name in zero if name.startswith("offload_")]:
        raise ConfigError(f"{path}: zero_optimization.{offloaded[0]} is not supported by checkpoints; remove it")
    zero["stage"] = zero.get("stage", 0) if stage is None else stage
    if zero["stage"] == 1 and zero.get("overlap_comm"):
        raise ConfigError(
            f"{path}: overlap_comm loses accumulated gradients at ZeRO stage 1; remove it, or use stage 2"
        )
    config["zero_optimization"] = zero
    if precision is not None:
        config[AUTOCAST] = {**config.get(AUTOCAST, {}), "enabled": precision != "fp32"}
        if precision != "fp32":
            config[AUTOCAST]["dtype"] = {"bf16": "bfloat16", "fp16": "float16"}[precision]
    return config


def _read_config(path: Path) -> dict[str, Any]:
    """Read a file of DeepSpeed settings. Raises ConfigError unless it is a mapping whose sections are mappings."""
    what = "the DeepSpeed settings of every engine"
    try:
        config = yaml.safe_load(read_text(path, "ZSR_DEEPSPEED"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}; expected {what}, YAML") from error
    if not isinstance(config, dict):
        raise ConfigError(
            f"{path}: found {type(config).__name__}, expected {what}, a mapping as in zsr/training/deepspeed.yaml"
        )
    for name in SECTIONS:
        if not isinstance(config.get(name, {}), dict):
            found = config[name]
            raise ConfigError(f"{path}: {name}: found {found!r}, expected a mapping such as {name}: {SECTIONS[name]}")
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in get_args(Stage) or isinstance(stage, bool):
        raise ConfigError(f"{path}: zero_optimization.stage: found {stage!r}, expected one of {get_args(Stage)}")
    return config


def precision_of(config: Mapping[str, Any]) -> Precision:
    """The compute precision of a DeepSpeed configuration."""
    section = config.get(AUTOCAST, {})
    if not section.get("enabled"):
        return "fp32"
    return "fp16" if section.get("dtype") in ("float16", "fp16") else "bf16"


def refuse(model: type[Model], config: Mapping[str, Any], device: str, accumulate: int) -> None:
    """Raise ConfigError, with the fix, if a model, a ZeRO stage and a precision are incompatible."""
    name, precision = model.__name__, precision_of(config)
    if config["zero_optimization"]["stage"] == 3 and model.second_order:
        raise ConfigError(
            f"{name} has a gradient penalty, whose second derivatives ZeRO stage 3 does not support; use --zero-stage 2"
        )
    if config["zero_optimization"]["stage"] == 3 and accumulate > 1 and model.coupled:
        raise ConfigError(
            f"{name} has batch-dependent losses, whose accumulation ZeRO stage 3 does not support; use --zero-stage 2"
        )
    if precision == "fp16" and device == "cpu":
        raise ConfigError("fp16 requires a GPU; on CPUs use --precision bf16 or fp32")
    if precision == "fp16" and accumulate > 1 and model.coupled:
        raise ConfigError(
            f"{name} has batch-dependent losses, whose accumulation does not support fp16 loss scaling; with "
            "--accumulate use --precision bf16"
        )


def init_distributed(backend: str) -> None:
    """Initialize DeepSpeed on the process group that Ray Train created."""
    if backend == "gloo":
        os.environ["DS_ACCELERATOR"] = "cpu"
    with _unheard():
        import deepspeed  # late: importing it probes the hardware, with a compiler that complains

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # compiling its shared-memory collectives would take over a minute at the first call; gloo does the same work
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


@contextmanager
def _unheard() -> Iterator[None]:
    """Send what child processes write to stderr nowhere; errors of this process are exceptions."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def leave_distributed() -> None:
    """Destroy the process group, in DeepSpeed too: it would look for the old one if this process trains again."""
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None and deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()
    elif dist.is_initialized():
        dist.destroy_process_group()


class Engines:
    """The DeepSpeed engines of a model, by group name.

    Load the model's weights first: engines shard the weights that they are given, and broadcast them from rank 0.

    Args:
        batch_size: micro-batch size: rows that an image tower, or a model with per-sample losses, processes at a time.
            Gradients of larger batches are accumulated (see `gradient_step`).
        config: from `deepspeed_config`.
        recompute: activation checkpointing of the image tower.

    Raises:
        ConfigError: `recompute` with an image tower that has no list of blocks.
    """

    def __init__(self, model: Model, batch_size: int, config: Mapping[str, Any], *, recompute: bool = False) -> None:
        import deepspeed  # late, see init_distributed

        self.model = model
        self.batch_size = batch_size
        self.groups = dict(model.trained)
        self.parameters = {name: list(group.module.parameters()) for name, group in self.groups.items()}
        self.stage = int(config["zero_optimization"]["stage"])
        self.device = next(model.parameters()).device.type
        self.dtype = DTYPES.get(precision_of(config))
        # no gradients to average, nothing to shard and no loss to scale
        self.alone = self.stage == 0 and world_size() == 1 and self.dtype is not torch.float16
        tower = model.inputs.tower
        self.tower_trains = tower is not None and tower.rate > 0
        # validation on rank 0 requires unsharded weights, and at stage 3 each rank holds only a shard
        self.spare = copy.deepcopy(model) if self.stage == 3 and _rank() == 0 else None
        if recompute and self.tower_trains:
            for side in model.towers.values():
                recomputed(side)
        self.engines: dict[str, Any] = {}
        for name, group in self.groups.items():
            group.module.requires_grad_(True)
            settings = _settings(config, group, batch_size)
            made = deepspeed.initialize(model=self._root(group), optimizer=group.build(), config=settings)[0]
            # with one rank there is nothing to average, but stage 0 would still copy every gradient twice
            made.enable_backward_allreduce = self.stage > 0 or world_size() > 1
            self.engines[name] = made

    def _root(self, group: Group) -> nn.Module:
        """The module that an engine owns, with the whole tower, since stage 3 hooks into the tower's forward."""
        return group.module if group.tower is None else nn.ModuleList([group.module, self.model.towers])

    def train_batch(self, draw: Callable[[int], Batch]) -> Terms:
        """Run every phase on one step's batch.

        Args:
            draw: repetition -> batch of raw features or images; 0 is the step's own, higher ones are fresh batches for
                phases that require them.

        Returns:
            The losses, detached, as `PHASE/TERM`.
        """
        self._open(*self.groups)
        batch = draw(0)
        if len(batch) > self.batch_size and (self.tower_trains or not self.model.coupled):
            (phase,) = self.model.phases
            return named(phase, gradient_step.step(self, batch))
        batch, shared = self.begin(batch)
        logged: Terms = {}
        for phase in self.model.phases:
            self._open(phase.moves)
            for repetition in range(phase.repeat):
                if repetition and phase.fresh_batch:
                    batch, shared = self.begin(draw(repetition))
                elif repetition:
                    shared = self.share(batch)  # the last step freed the graph and updated the parameters
                terms = self.terms(phase, batch, shared)
                self.backward(phase, terms)
                self.engines[phase.moves].step()
                logged |= named(phase, terms)
        return logged

    def _open(self, *moved: str) -> None:
        """Enable gradients for these groups only."""
        for name, parameters in self.parameters.items():
            for parameter in parameters:
                parameter.requires_grad_(name in moved)

    def autocast(self) -> AbstractContextManager[object]:
        """Autocast context of the engines' precision."""
        return nullcontext() if self.dtype is None else torch.autocast(self.device, self.dtype)

    def begin(self, batch: Batch) -> tuple[Batch, Any]:
        """The batch with features instead of images, and the forward pass that its phases share."""
        with self.autocast():
            if self.model.inputs.tower is None or self.tower_trains:
                batch = self.model.scaled(batch)
            else:  # a frozen tower keeps no graph, so micro-batches give the same result with less memory
                batch = gradient_step.joined(
                    [self.model.scaled(p) for p in gradient_step.split(batch, self.batch_size)]
                )
            return batch, self.model.shared(batch)

    def share(self, batch: Batch) -> Any:
        """The forward pass that the phases of a batch share."""
        with self.autocast():
            return self.model.shared(batch)

    def terms(self, phase: Phase, batch: Batch, shared: Any) -> Terms:
        """The losses of a phase, by name."""
        with self.autocast():
            return phase.terms(batch, shared)

    def backward(self, phase: Phase, terms: Terms, share: float = 1.0) -> None:
        """Backpropagate `share` times the sum of `terms` into the group that the phase updates."""
        loss = torch.stack([value.float() for value in terms.values()]).sum()
        loss = loss if share == 1.0 else share * loss
        if self.alone:  # DeepSpeed's wrappers would do nothing here, and take 4% of a classifier's step
            torch.autograd.backward(loss)
        else:  # micro-batches are already weighted by `share`; do not divide by their number again
            self.engines[phase.moves].backward(loss, scale_wrt_gas=False)

    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers by name, unsharded, on the CPU, contiguous copies. Collective at stage 3."""
        found = {}
        for name, value in self.model.state_dict(keep_vars=True).items():
            found[name] = _whole(value).detach().cpu().contiguous().clone()
        return found

    def whole_model(self, weights: Mapping[str, Tensor]) -> Embedder:
        """On rank 0, the model with `weights`, for computing embeddings."""
        if self.spare is None:
            return self.model
        self.spare.load_state_dict(weights)
        return self.spare

    def state(self) -> dict[str, Tensor]:
        """Optimizer states as `GROUP/PARAMETER/FIELD`, unsharded, on the CPU. Collective at stages 1 to 3."""
        found = {}
        for group, entry in self.groups.items():
            for name, parameter in entry.module.named_parameters():
                for field, value in whole_state(self.engines[group], parameter).items():
                    found[f"{group}/{name}/{field}"] = value
            if (scaler := _scaler(self.engines[group])) is not None:
                found |= {f"{group}//{k}": torch.tensor(v, dtype=torch.float64) for k, v in scaler.state_dict().items()}
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state` returned, at any stage and number of ranks."""
        by_parameter: dict[tuple[str, str], dict[str, Tensor]] = {}
        for key, value in state.items():
            group, name, field = key.split("/")
            by_parameter.setdefault((group, name), {})[field] = value
        for group, entry in self.groups.items():
            named = entry.module.named_parameters()
            held = [(parameter, by_parameter.get((group, name), {})) for name, parameter in named]
            put_back(self.engines[group], held)
            scaler = _scaler(self.engines[group])
            if scaler is not None and (group, "") in by_parameter:
                scaler.load_state_dict({k: type(scaler.state_dict()[k])(v) for k, v in by_parameter[group, ""].items()})


def _settings(config: Mapping[str, Any], group: Group, batch_size: int) -> dict[str, Any]:
    """The DeepSpeed configuration of one engine."""
    zero = dict(config["zero_optimization"])
    size = sum(p.numel() for p in group.module.parameters())
    # every engine allocates a full bucket
    zero["reduce_bucket_size"] = min(int(zero.get("reduce_bucket_size", 5e7)), size)
    if group.whole:
        zero["stage"] = min(int(zero["stage"]), 2)
    return {
        **config,
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": 1,
        # always set: DeepSpeed's default of 1.0 would silently change every paper's optimizer
        "gradient_clipping": group.optimizer.clip,
    }


def _scaler(engine: Any) -> Any:
    """The loss scaler of an fp16 engine, or None."""
    if stage_of(engine) == 0:
        return engine.torch_autocast_z0_gradscaler
    return engine.optimizer.torch_autocast_gradscaler


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _whole(value: Tensor) -> Tensor:
    """A parameter sharded by stage 3, gathered; any other tensor as it is."""
    if not hasattr(value, "ds_id"):
        return value
    import deepspeed  # late, see init_distributed

    with deepspeed.zero.GatheredParameters([value]):
        return value.detach().clone()


def named(phase: Phase, terms: Terms) -> Terms:
    """Losses as they are logged: detached, as `PHASE/TERM`."""
    return {f"{phase.name}/{name}": value.detach() for name, value in terms.items()}


def broadcast(value: float) -> float:
    """Rank 0's `value` on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor([value], dtype=torch.float64, device=device)
    dist.broadcast(tensor, 0)
    return float(tensor.item())


def min_over_ranks(value: int) -> int:
    """The minimum of `value` over all ranks."""
    if world_size() == 1:
        return value
    tensor = torch.tensor([value], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(tensor, dist.ReduceOp.MIN)
    return int(tensor.item())
