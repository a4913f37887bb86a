"""What one would try before learning a coefficient per block: TIES, DARE, and a search without gradients."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from peft.utils.merge_utils import dare_linear, ties
from scipy.optimize import minimize
from torch import Tensor

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
    def __init__(self, vectors: Sequence[TaskVector], merge: Callable[[str, list[Tensor]], Tensor]) -> None:
        self.vectors, self.merge, self.shapes = vectors, merge, vectors[0].shapes

    def __getitem__(self, name: str) -> Tensor:
        return self.merge(name, [vector.dense(name) for vector in self.vectors])


def _merged(vectors: Sequence[TaskVector], merge: Callable[[str, list[Tensor]], Tensor], source: str) -> TaskVector:
    if not vectors:
        raise ValueError("no task vectors to merge")
    return TaskVector(_Merged(vectors, merge), base=vectors[0].base, source=source)
