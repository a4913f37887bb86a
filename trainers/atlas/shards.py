"""Parameters under wrappers: names without what these add, and the part of a split one that this process holds."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that may be split; without graph."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def shard_bounds(name: str, parameter: DTensor) -> tuple[int, int]:
    """First and last element, in the flat whole tensor, of this process's part."""
    if any(not (isinstance(p, Shard) and p.dim == 0) for p in parameter.placements):
        raise ValueError(f"{name} is sharded as {parameter.placements}; composition knows rows only (FSDP2's default)")
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    row = parameter.shape[1:].numel()
    start = offset[0] * row
    return start, start + torch.Size(shape).numel()
