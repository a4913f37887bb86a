"""What composing would take, before any time is spent: bytes that stay in memory and bytes that move at each step."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from torch import nn

from .arguments import ArmArguments
from .blocks import split_blocks
from .low_rank import LowRankComposer
from .sources import align
from .task_vector import TaskVector

Size = tuple[int, int, int]  # of a composed parameter: elements, bytes of a weight and of a vector's value


def show_composition(model: nn.Module, vectors: Sequence[TaskVector], arms: ArmArguments) -> None:
    """Print coefficients and memory of composing dense vectors as the flags say. Values of one tensor are read."""
    targets, aligned = align(vectors, model)
    blocks = split_blocks(model, targets, arms.blocks, arms.include or (), arms.exclude)
    names = [name for members in blocks.values() for name in members]
    types = [vector.dense(names[0]).dtype for vector in aligned]
    width = max(dtype.itemsize for dtype in types)
    sizes = [(targets[name].numel(), targets[name].dtype.itemsize, width) for name in names]
    _show(
        len(vectors), len(blocks), arms.partitions, composition_bytes(sizes, len(vectors), arms.placement == "stream")
    )


def show_low_rank(composer: LowRankComposer) -> None:
    """Print coefficients and memory of composing LoRA vectors, whose factors stay factors."""
    n, m, *last = composer.coefficients.shape
    factors = [layer.get_parameter(f"lora_{letter}.atlas.weight") for layer in composer.layers for letter in "AB"]
    held = sum(factor.numel() * factor.dtype.itemsize for factor in factors)
    _show(n, m, last[0] if last else 1, {"resident: factors of the task vectors": held,
                                         "moved a step: the factors, read twice": 2 * held})  # fmt: skip


def composition_bytes(sizes: Sequence[Size], n: int, streams: bool) -> dict[str, int]:
    """Memory beside the model, and what one optimiser step of one micro-batch reads and writes (spec 5.3: 2nDb + 3Dw +
    the gradients); a further micro-batch reads the vectors and gradients once more."""
    weights = sum(elements * width for elements, width, _ in sizes)
    vectors = n * sum(elements * width for elements, _, width in sizes)
    largest = max(elements * width for elements, width, _ in sizes)
    return {
        "resident: copy of the base weights": weights,
        "resident: task vectors": 0 if streams else vectors,
        "on disk: task vectors by block": vectors if streams else 0,
        "alive at most: one weight gradient": largest,
        "moved a step: task vectors, read twice": 2 * vectors,
        "moved a step: weights, base and gradients": 4 * weights,
    }


def _show(n: int, m: int, each: int, sizes: dict[str, int]) -> None:
    console = Console(highlight=False)
    console.print(f"Coefficients: {n * m * each:,} ({n} task vectors, {m} blocks).")
    for name, value in sizes.items():
        console.print(f"  {name:<42}{value:>16,} bytes")
