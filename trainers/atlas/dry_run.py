"""What composing would take, before any time is spent: bytes that stay in memory and bytes that move at each step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from ..memory import Composition, Engine
from .arguments import ArmArguments
from .blocks import split_blocks
from .low_rank import LowRankComposer
from .slots import tile_values
from .sources import align
from .task_vector import TaskVector

Size = tuple[int, int, int]  # of a composed parameter: elements, bytes of a weight and of a vector's value


class Composing(NamedTuple):
    """Shape of the coefficients, what composing holds in memory, and further bytes by name."""

    shape: tuple[int, ...]
    memory: Composition
    beside: dict[str, int]


def dense_composing(model: nn.Module, vectors: Sequence[TaskVector], arms: ArmArguments) -> Composing:
    """Composing these dense vectors as the flags say. The model's composed parameters are marked as trained and the
    others as frozen, as the composer does; values of one tensor are read."""
    targets, aligned = align(vectors, model)
    blocks = split_blocks(model, targets, arms.blocks, arms.include or (), arms.exclude)
    names = [name for members in blocks.values() for name in members]
    types = [vector.dense(names[0]).dtype for vector in aligned]
    width = max(dtype.itemsize for dtype in types)
    model.requires_grad_(False)
    for name in names:
        targets[name].requires_grad_(True)
    sizes = [(targets[name].numel(), targets[name].dtype.itemsize, width) for name in names]
    n, streams, device = len(vectors), arms.placement == "stream", targets[names[0]].device
    found = composition_bytes(sizes, n, streams)
    held = {name: size for name, size in found.items() if name.startswith("resident")}
    values = min(tile_values(device), n * max(elements for elements, *_ in sizes))  # worked on at a time
    working = values * (4 * (width < 4) + streams * width) + 8 * values // n
    shape = (n, len(blocks)) + ((arms.partitions,) if arms.partitions > 1 else ())
    beside = {name: size for name, size in found.items() if name not in held}
    return Composing(shape, Composition(held, working, math.prod(shape)), beside)


def low_rank_composing(composer: LowRankComposer) -> Composing:
    """Composing LoRA vectors, whose factors are in the model as an adapter."""
    factors = [layer.get_parameter(f"lora_{letter}.atlas.weight") for layer in composer.layers for letter in "AB"]
    held = sum(factor.numel() * factor.dtype.itemsize for factor in factors)
    memory = Composition(coefficients=composer.coefficients.numel())
    beside = {"of the weights: factors of task vectors": held, "moved a step: the factors, read twice": 2 * held}
    return Composing(tuple(composer.coefficients.shape), memory, beside)


def check_engine(engine: Engine, low_rank: bool) -> None:
    """ValueError for an engine that aTLAS does not run under."""
    if engine.startswith("zero"):
        raise ValueError(
            f"engine {engine}: aTLAS contracts each weight's gradient during the backward pass, which DeepSpeed keeps "
            "to itself; use ddp or fsdp2"
        )
    if engine == "fsdp2" and low_rank:
        raise ValueError(f"engine {engine}: LoRA vectors are composed in one process or under ddp")


def composition_bytes(sizes: Sequence[Size], n: int, streams: bool) -> dict[str, int]:
    """Memory beside the model, and what one optimiser step of one micro-batch reads and writes (spec 5.3: 2nDb + 3Dw +
    the gradients); a further micro-batch reads the vectors and gradients once more."""
    weights = sum(elements * width for elements, width, _ in sizes)
    vectors = n * sum(elements * width for elements, _, width in sizes)
    return {
        "resident: copy of the base weights": weights,
        "resident: task vectors": 0 if streams else vectors,
        "on disk: task vectors by block": vectors if streams else 0,
        "moved a step: task vectors, read twice": 2 * vectors,
        "moved a step: weights, base and gradients": 4 * weights,
    }


def show_composing(found: Composing) -> None:
    """Print the coefficients, and what stands beside the memory of a step."""
    n, m, *_ = found.shape
    print(f"Coefficients: {math.prod(found.shape):,} ({n} task vectors, {m} blocks).")
    for name, value in found.beside.items():
        print(f"  {name:<42}{value:>16,} bytes")
