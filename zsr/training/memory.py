"""Estimate of the memory per GPU that training needs at each ZeRO stage, before anything is computed or read.

A trained parameter takes 4 bytes of weight, 4 of gradient and s of optimizer state, s = 8 for Adam, 12 with AMSGrad,
4 for SGD with momentum and 0 without; a frozen parameter takes 4 bytes at any stage. With P trained and F frozen
parameters and N workers (Rajbhandari et al., SC 2020, figure 1, with 32-bit weights; DeepSpeed keeps a 32-bit copy of
the shard that its optimizer steps at stages 1 and 2):

    stage 0    4F + (4 + 4 + s) P
    stage 1    4F + (4 + 4) P + (4 + s) P / N
    stage 2    4F + 4 P + (4 + 4 + s) P / N
    stage 3    4F + (4 + 4 + s) P / N        plus the layer being computed, unsharded

Activations are added by a rule of thumb: 4 bytes for every output element of every layer of the embedding network, per
row of the batch, times the phases of the model, each of which does its own forward pass. Buffers of DeepSpeed and of
CUDA libraries are not included.
"""

from typing import Any

import torch
from torch import nn

from zsr.models.protocol import Embedder, Inputs, Model, Optimizer

FLOAT = 4  # bytes


def memory(model: Embedder, rows: int, workers: int) -> dict[str, int]:
    """Bytes per GPU by the formulas above: weights, gradients and optimizer states at each stage, and activations.

    Args:
        model: on torch's meta device.
        rows: per worker and step.
        workers: N.
    """
    groups = dict(model.trained) if isinstance(model, Model) else {}
    sizes = {name: sum(p.numel() for p in group.module.parameters()) for name, group in groups.items()}
    states = sum(size * state_bytes(groups[name].optimizer) for name, size in sizes.items())
    trained = FLOAT * sum(sizes.values())
    frozen = FLOAT * sum(t.numel() for t in (*model.parameters(), *model.buffers())) - trained
    wholes = {0: 2 * trained + states, 1: 2 * trained, 2: trained, 3: 0}
    cut = {0: 0, 1: trained + states, 2: 2 * trained + states, 3: 2 * trained + states}
    found = {f"zero_{stage}": frozen + whole + -(-cut[stage] // workers) for stage, whole in wholes.items()}
    return {**found, "activations": activations(model, rows)}


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of optimizer state per parameter."""
    if optimizer.name == "sgd":
        return FLOAT if optimizer.momentum else 0
    return (3 if optimizer.amsgrad else 2) * FLOAT


def activations(model: Embedder, rows: int) -> int:
    """Bytes kept for the backward pass of `rows` sketches and as many photos (twice as many in triplets)."""
    if not isinstance(model, Model):
        return 0
    photos = 2 if model.batch_kind == "triplets" else 1
    row = _numbers(model, "sketch") + photos * _numbers(model, "photo")
    return FLOAT * rows * row * len(model.phases)


@torch.no_grad()
def _numbers(model: Model, side: str) -> int:
    """Output elements of all layers for one item of a side, counted with two items on the meta device (no data)."""
    counted = 0

    def count(_: nn.Module, __: Any, output: Any) -> None:
        nonlocal counted
        counted += output.numel() if torch.is_tensor(output) else 0

    leaves = [module for module in model.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(count) for module in leaves]
    was = model.training
    try:
        model.eval()
        model.embed(side, model.features(side, _items(model.inputs, side)))
    finally:
        model.train(was)
        for hook in hooks:
            hook.remove()
    return counted // 2


def _items(inputs: Inputs, side: str) -> torch.Tensor:
    if inputs.tower is not None:
        return torch.zeros(2, inputs.tower.size, inputs.tower.size, 3, device="meta")
    return torch.zeros(2, inputs.photo_dim if side == "photo" else inputs.sketch_dim, device="meta")
