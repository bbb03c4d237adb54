"""Image towers that forget: activation checkpointing, block by block. The bits of a step are the same with it."""

import math
from collections.abc import Callable
from functools import partial
from typing import Final

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from zsr.errors import ConfigError

FEWEST: Final = 4  # parts of a list that is worth it


def recomputed(tower: nn.Module) -> None:
    """Let the tower's blocks keep nothing but their inputs.

    A list of blocks (transformers, EfficientNet) forgets a block at a time, a plain sequence of n layers (VGG) about
    sqrt(n) layers at a time. Dropout is drawn again as it was.

    Raises:
        ConfigError: the tower is made of neither.
    """
    if not _forget(tower):
        raise ConfigError(f"{type(tower).__name__} has no blocks to recompute; leave --recompute out")


def _forget(module: nn.Module) -> bool:
    """Wrap the outermost lists below `module`; whether there were any."""
    if isinstance(module, nn.Sequential) and len(module) >= FEWEST:
        _wrap(module, _segments(module))
        return True
    if isinstance(module, nn.ModuleList) and len(module) >= FEWEST:
        for block in module:
            _wrap(block, _alone(block.forward))
        return True
    return any([_forget(child) for child in module.children()])


def _wrap(module: nn.Module, forward: Callable[..., object]) -> None:
    module.forward = forward  # in place of a wrapping module, which would rename the parameters of checkpoints


def _alone(forward: Callable[..., object]) -> Callable[..., object]:
    def run(*inputs: object, **options: object) -> object:
        return checkpoint(partial(forward, **options), *inputs, use_reentrant=False)

    return run


def _segments(layers: nn.Sequential) -> Callable[[Tensor], object]:
    def run(inputs: Tensor) -> object:
        in_segments: Callable[..., object] = checkpoint_sequential
        return in_segments(layers, math.isqrt(len(layers)), inputs, use_reentrant=False)

    return run
