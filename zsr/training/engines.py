"""One DeepSpeed engine a parameter group.

DeepSpeed owns the step: it averages gradients over ranks and applies the group's own torch optimizer. The disk is ours:
its checkpoint files are pickles, so states are taken out here as plain tensors.
"""

import logging
import os
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn

from zsr.batch import Batch
from zsr.errors import ConfigError
from zsr.models.protocol import Model, Phase, Terms


def deepspeed_config() -> dict[str, Any]:
    """The content of deepspeed.yaml: $ZSR_DEEPSPEED if set, else cluster/deepspeed.yaml of the checkout.

    Raises:
        ConfigError: the file is missing, or asks for a ZeRO stage or precision that the checkpoints do not cover.
    """
    default = Path(str(resources.files("zsr"))).parent / "cluster" / "deepspeed.yaml"
    path = Path(os.environ.get("ZSR_DEEPSPEED", default))
    try:
        config: dict[str, Any] = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}; it holds the DeepSpeed settings of every engine") from error
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage != 0:
        raise ConfigError(f"{path}: ZeRO stage {stage}, but checkpoints gather optimizer states of stage 0 only; use 0")
    if wrapped := [name for name in ("fp16", "bf16") if config.get(name, {}).get("enabled")]:
        raise ConfigError(
            f"{path}: {wrapped} enabled, but checkpoints take optimizer states in fp32 only; switch it off"
        )
    return config


def init_distributed(backend: str) -> None:
    """Hand the process group that Ray Train made to DeepSpeed."""
    if backend == "gloo":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # late: it probes the machine when it is imported

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # its shared-memory collectives would be compiled for over a minute at the first call; gloo does the same work
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


class Engines:
    """The engines of a model, by group name."""

    def __init__(self, model: Model, batch_size: int, config: Mapping[str, Any]) -> None:
        import deepspeed  # late, see init_distributed

        self.model = model
        self.groups = dict(model.trained)
        base = {**config, "train_micro_batch_size_per_gpu": batch_size, "gradient_accumulation_steps": 1}
        self.engines: dict[str, Any] = {}
        for name, group in self.groups.items():
            optimizer = group.build()
            # always given: DeepSpeed's default of 1.0 would silently change every paper's optimizer
            settings = base | {"gradient_clipping": group.optimizer.clip}
            self.engines[name] = deepspeed.initialize(model=group.module, optimizer=optimizer, config=settings)[0]

    def train_batch(self, draw: Callable[[int], Batch]) -> Terms:
        """Pass one step's batch through every phase.

        Args:
            draw: repetition -> batch; 0 is the step's own, higher ones are fresh for phases that ask for them.

        Returns:
            The named terms, detached, as `PHASE/TERM`.
        """
        for group in self.groups.values():
            group.module.requires_grad_(True)
        batch = draw(0)
        shared = self.model.shared(batch)
        logged: Terms = {}
        for phase in self.model.phases:
            for name, group in self.groups.items():
                group.module.requires_grad_(name == phase.moves)
            for repetition in range(phase.repeat):
                if repetition and phase.fresh_batch:
                    batch = draw(repetition)
                if repetition:
                    shared = self.model.shared(batch)  # the last step freed the graph, and moved the group
                logged |= self._step(phase, batch, shared)
        return logged

    def _step(self, phase: Phase, batch: Batch, shared: Any) -> Terms:
        terms = phase.terms(batch, shared)
        engine = self.engines[phase.moves]
        engine.backward(torch.stack(list(terms.values())).sum())
        engine.step()
        return {f"{phase.name}/{name}": value.detach() for name, value in terms.items()}

    def state(self) -> dict[str, Tensor]:
        """Optimizer states as `GROUP/PARAMETER/FIELD`, on the CPU."""
        found = {}
        for group, name, parameter in self._parameters():
            for field, value in self.engines[group].optimizer.state.get(parameter, {}).items():
                found[f"{group}/{name}/{field}"] = torch.as_tensor(value).detach().cpu().clone()
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` returned."""
        by_parameter: dict[tuple[str, str], dict[str, Tensor]] = {}
        for key, value in state.items():
            group, name, field = key.split("/")
            by_parameter.setdefault((group, name), {})[field] = value
        for group, name, parameter in self._parameters():
            fields = by_parameter.get((group, name))
            if fields is not None:
                # Adam's step counter stays on the CPU, moments live beside their parameter
                self.engines[group].optimizer.state[parameter] = {
                    field: value.clone() if value.dim() == 0 else value.to(parameter.device)
                    for field, value in fields.items()
                }

    def _parameters(self) -> list[tuple[str, str, nn.Parameter]]:
        return [
            (group, name, parameter)
            for group, entry in self.groups.items()
            for name, parameter in entry.module.named_parameters()
        ]


def broadcast(value: float) -> float:
    """Rank 0's `value` on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor([value], dtype=torch.float64, device=device)
    dist.broadcast(tensor, 0)
    return float(tensor.item())
