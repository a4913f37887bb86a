"""Random task vectors that are drawn when read, so that making many of them takes no memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from steerbook.trainers import TaskVector
from steerbook.trainers.atlas import LowRank
from steerbook.trainers.atlas.task_vector import LazyTensors


class RandomTensors(LazyTensors[Tensor]):
    """Differences for every parameter of a model, of its type and on its device; the same ones at every reading."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.parameters = dict(model.named_parameters())
        self.shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        self.seed = seed

    def __getitem__(self, name: str) -> Tensor:
        parameter, number = self.parameters[name], list(self.shapes).index(name)
        generator = torch.Generator(parameter.device).manual_seed(1000 * self.seed + number)
        drawn = torch.randn(parameter.shape, generator=generator, device=parameter.device, dtype=parameter.dtype)
        return drawn.mul_(0.01)


def dense_vectors(model: nn.Module, count: int) -> list[TaskVector]:
    return [TaskVector(RandomTensors(model, seed)) for seed in range(count)]


def lora_vectors(model: nn.Module, count: int, rank: int = 4) -> list[TaskVector]:
    """Factors for all projections of attention and MLP."""

    def factors(seed: int) -> Iterator[tuple[str, LowRank]]:
        generators: dict[torch.device, torch.Generator] = {}
        for name, parameter in model.named_parameters():
            if "_proj" in name:
                generator = generators.setdefault(
                    parameter.device, torch.Generator(parameter.device).manual_seed(seed)
                )
                options = {"generator": generator, "device": parameter.device, "dtype": parameter.dtype}
                a = torch.randn(rank, parameter.shape[1], **options)
                yield name, LowRank(a, 0.01 * torch.randn(parameter.shape[0], rank, **options))

    return [TaskVector(dict(factors(seed))) for seed in range(count)]
