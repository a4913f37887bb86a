"""One parameter that a composer writes, and the pieces it is worked on in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

# Values (n vectors by the elements of a piece) that are read, converted and contracted at a time. On a CPU as much as
# its cache holds: with 8 bf16 vectors, tiles of 2^23 take five times as long. Elsewhere 64 times as many, as starting
# a kernel has a price.
TILE = 1 << 20


@dataclass
class Slot:
    """One composed parameter: its values at the base, and where it lies."""

    name: str
    block: int
    vectors: int  # how many of them move it
    parameter: nn.Parameter
    base: Tensor  # flat, the part that this process holds
    start: int = 0  # of that part in the whole tensor

    @cached_property
    def tiles(self) -> list[tuple[int, int]]:
        """Pieces that need the same memory for any number of vectors, and are the same for every placement."""
        size, step = self.base.numel(), max(1, tile_values(self.parameter.device) // self.vectors)
        return [(start, min(size, start + step)) for start in range(0, size, step)]


def tile_values(device: torch.device) -> int:
    """Values of a tile there."""
    return TILE if device.type == "cpu" else 64 * TILE


def cut(values: Tensor, start: int, stop: int) -> Tensor:
    """`values[..., start:stop]`, sooner where that is all: a slice costs as much as a small product."""
    return values if stop - start == values.shape[-1] else values[..., start:stop]
