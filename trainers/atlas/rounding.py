"""Stochastic rounding of composed weights (spec 4.3)."""

from __future__ import annotations

from zlib import crc32

import torch
from torch import Tensor


def rounded(value: Tensor, place: str) -> Tensor:
    """fp32 to bf16, up or down with probabilities that make the mean exact: random bits below the kept ones.

    Args:
        place: what the draw depends on; the same text gives the same bits.
    """
    seed = crc32(place.encode())  # of a seed the CPU's generator uses 32 bits
    generator = torch.Generator(value.device).manual_seed(seed)
    bits = value.float().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=value.device, generator=generator)
    return ((bits + noise) & -65536).view(torch.float32).to(torch.bfloat16)
