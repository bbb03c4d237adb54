"""Get and set unsharded optimizer states of a DeepSpeed engine, at any ZeRO stage and number of ranks.

    stage 0     the torch optimizer holds each parameter's state whole
    stage 1, 2  it holds one flat shard per rank; a parameter may span the shards of neighboring ranks
    stage 3     it holds flat shards of parameters that were each split into equal parts, the last one padded

States are saved unsharded, one tensor per parameter and field, so any stage and any world size can read them.
DeepSpeed's own checkpoint files are not used: they are pickles and require the world size that wrote them.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

Fields = Mapping[str, Tensor]


class Piece(NamedTuple):
    """Location of this rank's part of a parameter.

    Attributes:
        flat: the optimizer's own flat tensor, key of its state.
        at, size: offset and size of the part in `flat`.
        start: offset of the part in the flattened parameter.
    """

    flat: Tensor
    at: int
    size: int
    start: int


def stage_of(engine: Any) -> int:
    """The engine's ZeRO stage."""
    return int(engine.zero_optimization_stage())


def inner(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside the engine."""
    found: torch.optim.Optimizer = engine.optimizer.optimizer if stage_of(engine) else engine.optimizer
    return found


def whole_state(engine: Any, parameter: nn.Parameter) -> dict[str, Tensor]:
    """A parameter's optimizer state on the CPU: tensors of its shape, and scalars. Collective at stages 1 to 3."""
    if stage_of(engine) == 0:
        held = inner(engine).state.get(parameter, {})
        return {name: torch.as_tensor(value).detach().cpu().clone() for name, value in held.items()}
    flat = _flat(engine, parameter)
    found = {}
    for name, value in inner(engine).state.get(flat, {}).items():
        if torch.is_tensor(value) and value.shape == flat.shape:
            found[name] = _gathered(engine, parameter, name).detach().cpu().clone()
        else:
            found[name] = torch.as_tensor(value).detach().cpu().clone()
    return found


def put_back(engine: Any, states: Iterable[tuple[nn.Parameter, Fields]]) -> None:
    """Load the states that `whole_state` returned into the optimizer. Every rank keeps its own part."""
    state = inner(engine).state
    for parameter, fields in states:
        if stage_of(engine) == 0:
            state[parameter] = {name: value.to(parameter.device, copy=True) for name, value in fields.items()}
            continue
        for piece in _pieces(engine, parameter):
            _fill(state[piece.flat], piece, fields)


def _fill(held: dict[str, Any], piece: Piece, fields: Fields) -> None:
    """Copy one parameter's part into the flat state; scalars are equal for all parameters of a flat tensor."""
    for name, value in fields.items():
        if value.dim() == 0:
            held[name] = value.to(piece.flat.device, copy=True)
            continue
        if name not in held:
            held[name] = torch.zeros_like(piece.flat)
        part = value.flatten()[piece.start : piece.start + piece.size]
        held[name][piece.at : piece.at + len(part)].copy_(part)


def _flat(engine: Any, parameter: nn.Parameter) -> Tensor:
    """The flat tensor of the parameter's group, also on a rank that holds no part of the parameter."""
    optimizer = engine.optimizer
    if stage_of(engine) == 3:
        flat: Tensor = optimizer.fp32_partitioned_groups_flat[_position(engine, parameter)[0]]
        return flat
    for parameters, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        if any(parameter is other for other in parameters):
            return flat
    raise KeyError("a parameter that the engine does not train")


def _position(engine: Any, parameter: nn.Parameter) -> tuple[int, int, int]:
    """Stage 3: group, offset and size of the parameter's part on this rank."""
    optimizer = engine.optimizer
    group, at, count = optimizer.grad_position[optimizer.get_param_id(parameter)]
    return int(group), int(at), int(count)


def _pieces(engine: Any, parameter: nn.Parameter) -> Iterator[Piece]:
    """This rank's part of a parameter, if it holds one."""
    if stage_of(engine) == 3:
        _, at, count = _position(engine, parameter)
        yield Piece(_flat(engine, parameter), at, count, count * dist.get_rank())
        return
    held = getattr(parameter, "_hp_mapping", None)
    if held is not None:
        inside, outside = held.hp_fragment_address, held.lp_fragment_address
        yield Piece(_flat(engine, parameter), inside.start, inside.numel, outside.start)


def _gathered(engine: Any, parameter: nn.Parameter, name: str) -> Tensor:
    """Gather a field from the parts of all ranks, in the parameter's shape."""
    shape = getattr(parameter, "ds_shape", parameter.shape)  # stage 3 leaves an empty shape on the parameter itself
    flat = _flat(engine, parameter)
    whole = torch.zeros(math.prod(shape), dtype=flat.dtype, device=flat.device)
    for piece in _pieces(engine, parameter):
        part = whole[piece.start : piece.start + piece.size]
        part.copy_(inner(engine).state[piece.flat][name][piece.at : piece.at + len(part)])
    if dist.get_world_size() > 1:
        dist.all_reduce(whole)  # every element is held by one rank and 0 on the others
    return whole.reshape(shape)
