"""aTLAS x K: element groups drawn by a hash, so that nothing needs to be stored (spec 1.4)."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor


def partition_indices(seed: int, name: str, place: slice, k: int, device: torch.device | str = "cpu") -> Tensor:
    """Group, 0 to k - 1, of each element of `place` in the flat tensor called `name`; the same on every machine.

    The elements' numbers go through the finaliser of splitmix64, keyed by the seed and the CRC-32 of the name.
    """
    key = (zlib.crc32(name.encode()) + (seed << 32)) & 0x7FFF_FFFF_FFFF_FFFF
    x = torch.arange(place.start, place.stop, dtype=torch.int64, device=device)
    x = x * -7046029254386353131 + key  # 0x9E3779B97F4A7C15
    x = (x ^ _shifted(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shifted(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return _shifted(x ^ _shifted(x, 31), 1) % k


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right (torch's keeps the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
