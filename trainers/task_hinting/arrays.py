"""The data builder's array operations on torch: rows are made on the device that trains on them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class TorchArrays:
    """`data_builders.task_hinting.arrays.Arrays` on `device`. Other draws than NumPy's from the same seed."""

    def __init__(self, seed: Sequence[int], device: torch.device | str) -> None:
        self.device = torch.device(device)
        mixed = np.random.SeedSequence(list(seed)).generate_state(1, np.uint64)[0]
        self.generator = torch.Generator(self.device).manual_seed(int(mixed))

    def integers(self, low: int, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator, device=self.device)

    def uniform(self, shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)

    def full(self, shape: tuple[int, ...], value: int) -> Tensor:
        return torch.full(shape, value, dtype=torch.long, device=self.device)

    def arange(self, stop: int) -> Tensor:
        return torch.arange(stop, device=self.device)

    def where(self, condition: Tensor, first: Tensor | int, second: Tensor | int) -> Tensor:
        return torch.where(condition, first, second)

    def sort(self, values: Tensor) -> Tensor:
        return values.sort(dim=1).values

    def argsort(self, values: Tensor) -> Tensor:
        return values.argsort(dim=1)

    def cumsum(self, values: Tensor) -> Tensor:
        return values.cumsum(dim=1)

    def take(self, values: Tensor, places: Tensor) -> Tensor:
        return values.gather(1, places)

    def put(self, into: Tensor, places: Tensor, values: Tensor) -> None:
        into.scatter_(1, places, values)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts), dim=1)
