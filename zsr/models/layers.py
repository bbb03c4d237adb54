"""Layers used by several models. Shapes: B batch, F features."""

from collections.abc import Callable
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn import functional as collectives


def world_size() -> int:
    """Number of processes in the default group; 1 outside of distributed training."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Rank of this process in the default group; 0 outside of distributed training."""
    return dist.get_rank() if world_size() > 1 else 0


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum `values`, of any shape, over the default group, with gradient. With one process, `values` itself."""
    all_reduce: Callable[[Tensor], Tensor] = collectives.all_reduce
    return values if world_size() == 1 else all_reduce(values)


def gather_over_ranks(rows: Tensor) -> Tensor:
    """Gather the rows (B, ...) of all ranks, in rank order, with gradient. With one process, `rows` itself.

    For batch-dependent losses. Each rank computes the loss on all rows and receives the sum over ranks of the gradients
    on its own rows; averaged over ranks, as DeepSpeed does, that is the gradient of the mean over ranks of their
    losses. Every rank must pass the same number of rows.
    """
    all_gather: Callable[[Tensor], tuple[Tensor, ...]] = collectives.all_gather
    return rows if world_size() == 1 else torch.cat(all_gather(rows))


class Scale(nn.Module):
    """Standardize features per column: (x - mean) / (deviation + 1e-3). Identity until fitted.

    `deviation` is the std. Fitted to min and range instead of mean and std, it maps features to [0, 1].

    The constants are fitted on the seen training rows of one modality, never on unseen ones, and are buffers, so that
    they are saved in checkpoints. 1e-3 keeps constant columns finite.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("deviation", torch.full((dim,), 1.0 - 1e-3))

    @torch.no_grad()
    def fit(self, mean: Tensor, deviation: Tensor) -> None:
        """Set the constants: `mean` and `deviation`, (F,) each."""
        self.mean.copy_(mean)
        self.deviation.copy_(deviation)

    def forward(self, features: Tensor) -> Tensor:
        return (features.float() - self.mean) / (self.deviation + 1e-3)


class BatchNorm(nn.BatchNorm1d):
    """Batch normalization synchronized over ranks: training statistics are those of all ranks' rows, with gradient.

    One rank with 2B rows and two ranks with B rows each then compute the same result, and running statistics are equal
    on all ranks. (torch's SyncBatchNorm does this on GPUs only.) With one process it is nn.BatchNorm1d. Every rank
    must pass the same number of rows.
    """

    def forward(self, features: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(features)
        # As in nn.BatchNorm1d, statistics are at least float32 whatever the features are.
        wide = features.to(torch.promote_types(features.dtype, torch.float32))
        count = features.shape[0] * world_size()
        mean = sum_over_ranks(wide.sum(0)) / count
        variance = sum_over_ranks((wide - mean).square().sum(0)) / count
        self._track(mean, variance * count / max(count - 1, 1))
        normal = (wide - mean) * torch.rsqrt(variance + self.eps)
        return (normal * self.weight + self.bias).to(features.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """Update the running statistics, each (F,), with those of this batch."""
        running_mean, running_var = cast(Tensor, self.running_mean), cast(Tensor, self.running_var)
        momentum = cast(float, self.momentum)
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_(variance.to(running_var.dtype), momentum)
        cast(Tensor, self.num_batches_tracked).add_(1)
