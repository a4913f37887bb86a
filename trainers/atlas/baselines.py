"""What one would try before learning a coefficient per block: TIES, DARE, and a search without gradients."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from peft.utils.merge_utils import dare_linear, ties
from scipy.optimize import minimize
from torch import Tensor

from .matching import listed
from .task_vector import LazyTensors, TaskVector


def ties_vector(vectors: Sequence[TaskVector], density: float = 0.2) -> TaskVector:
    """TIES (Yadav et al., 2023): of each tensor keep the largest `density` of the entries, elect signs, average those
    that agree. PEFT's implementation, tensor by tensor; to be scaled by a searched alpha."""
    weights = torch.ones(len(vectors))
    return _merged(vectors, lambda name, entries: ties(entries, weights, density), f"TIES, density {density}")


def dare_vector(vectors: Sequence[TaskVector], density: float = 0.5, seed: int = 0) -> TaskVector:
    """DARE (Yu et al., 2023): of each tensor keep a random `density` of the entries, rescale, add up. PEFT's
    implementation; the draw depends on the seed and the tensor's name alone."""
    weights = torch.ones(len(vectors))

    def merge(name: str, entries: list[Tensor]) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(f"{seed} {name}".encode()))  # the CPU's generator reads 32 bits
            return dare_linear(entries, weights, density)

    return _merged(vectors, merge, f"DARE, density {density}, seed {seed}")


def search_weights(loss: Callable[[list[float]], float], count: int, budget: int) -> tuple[list[float], list[float]]:
    """LoraHub's search (Huang et al., 2023): one weight a vector, no gradients, `loss + 0.05 * mean|w|` within +-1.5.

    By Nelder-Mead from zero (LoraHub: NGOpt), at most `budget` evaluations.

    Returns:
        The best weights, and the objective of every evaluation in order.
    """
    seen: list[float] = []

    def objective(weights: np.ndarray) -> float:
        seen.append(loss(weights.tolist()) + 0.05 * float(np.abs(weights).mean()))
        return seen[-1]

    simplex = np.vstack([np.zeros(count), 0.2 * np.eye(count)])
    options = {"maxfev": budget, "initial_simplex": simplex}
    found = minimize(objective, np.zeros(count), method="Nelder-Mead", bounds=[(-1.5, 1.5)] * count, options=options)
    return found.x.tolist(), seen


class _Merged(LazyTensors):
    """Every tensor that a vector changes; one that is all factors (LoRA) is zero where it has none."""

    def __init__(self, vectors: Sequence[TaskVector], merge: Callable[[str, list[Tensor]], Tensor]) -> None:
        self.vectors, self.merge = vectors, merge
        self.shapes = {name: shape for vector in vectors for name, shape in vector.shapes.items()}
        for number, vector in enumerate(vectors, 1):
            missing = [name for name in self.shapes if name not in vector]
            if missing and len(vector.low_rank) < len(vector):
                raise ValueError(f"task vector {number} ({vector.source}) has no {listed(missing)}, another one has")

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shapes[name]
        return self.merge(name, [v.dense(name) if name in v else torch.zeros(shape) for v in self.vectors])


def _merged(vectors: Sequence[TaskVector], merge: Callable[[str, list[Tensor]], Tensor], source: str) -> TaskVector:
    if not vectors:
        raise ValueError("no task vectors to merge")
    return TaskVector(_Merged(vectors, merge), base=vectors[0].base, source=source)
