"""Activation checkpointing of image towers, per block. A step gives the same bits as without it."""

import math
from collections.abc import Callable
from functools import partial
from typing import Final

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from zsr.errors import ConfigError

FEWEST: Final = 4  # blocks in a list for which checkpointing pays off


def recomputed(tower: nn.Module) -> None:
    """Keep only the inputs of the tower's blocks, and recompute activations in the backward pass. Works in place.

    A list of blocks (transformers, EfficientNet) is checkpointed per block, a plain sequence of n layers (VGG) in
    segments of about sqrt(n) layers. Recomputed dropout masks are the same.

    Raises:
        ConfigError: the tower has neither.
    """
    if not _wrap_blocks(tower):
        raise ConfigError(f"{type(tower).__name__} has no blocks to recompute; leave --recompute out")


def _wrap_blocks(module: nn.Module) -> bool:
    """Wrap the outermost lists below `module`; return whether there are any."""
    if isinstance(module, nn.Sequential) and len(module) >= FEWEST:
        _wrap(module, _segments(module))
        return True
    if isinstance(module, nn.ModuleList) and len(module) >= FEWEST:
        for block in module:
            _wrap(block, _alone(block.forward))
        return True
    return any([_wrap_blocks(child) for child in module.children()])


def _wrap(module: nn.Module, forward: Callable[..., object]) -> None:
    module.forward = forward  # a wrapper module would rename the parameters in checkpoints


def _alone(forward: Callable[..., object]) -> Callable[..., object]:
    def run(*inputs: object, **options: object) -> object:
        return checkpoint(partial(forward, **options), *inputs, use_reentrant=False)

    return run


def _segments(layers: nn.Sequential) -> Callable[[Tensor], object]:
    def run(inputs: Tensor) -> object:
        in_segments: Callable[..., object] = checkpoint_sequential
        return in_segments(layers, math.isqrt(len(layers)), inputs, use_reentrant=False)

    return run
