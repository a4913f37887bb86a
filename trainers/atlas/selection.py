"""Which task vectors to compose on a budget (paper, section 5 and appendix; spec 2.5)."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .blocks import split_blocks
from .entries import Entry, LazyTensors, LowRank
from .sources import align
from .task_vector import TaskVector


def random_vectors(count: int, budget: int, seed: int) -> list[int]:
    """`budget` of `count` vectors, drawn without replacement, in ascending order."""
    check_budget(budget, count)
    return sorted(random.Random(seed).sample(range(count), budget))


def vectors_by_feature(features: Tensor, target: Tensor, budget: int) -> list[int]:
    """The vectors whose tasks look most like the target, best first: cosine of mean features of the base model.

    Args:
        features: [n, d], one mean feature a vector's task.
        target: [d]
    """
    check_budget(budget, len(features))
    cosines = torch.nn.functional.cosine_similarity(features.double(), target.double()[None])
    return cosines.argsort(descending=True, stable=True)[:budget].tolist()


def gradient_scores(
    model: nn.Module,
    vectors: Sequence[TaskVector],
    losses: Iterable[Tensor],
    blocks: str = "tensor",
    exclude: Sequence[str] | None = None,
) -> tuple[Tensor, dict[str, list[str]]]:
    """`d mean loss / d coefficients` at zero, [n, m] in fp64, exact, in one pass over the vectors.

    At zero every composition is the base, so the weights' gradients are summed over the batches once and each vector
    is then read past them, tensor by tensor.

    Args:
        losses: one a batch, as scalar tensors of the model at its base weights, made when asked for.

    Returns:
        The scores, and the blocks (name -> parameters) of their columns.
    """
    targets, vectors = align(vectors, model)
    cut = split_blocks(model, targets, blocks, (), exclude)
    parameters = dict(model.named_parameters())
    trained = {name: parameter.requires_grad for name, parameter in parameters.items()}
    wanted = {name for names in cut.values() for name in names}
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in wanted)
    count = 0
    try:
        for count, loss in enumerate(losses, 1):  # noqa: B007 (counted)
            loss.backward()
        if not count:
            raise ValueError("no batches to take gradients on")
        scores = torch.zeros(len(vectors), len(cut), dtype=torch.float64)
        for row, vector in enumerate(vectors):
            for column, names in enumerate(cut.values()):
                for name in names:
                    gradient = parameters[name].grad
                    if gradient is not None and name in vector:
                        scores[row, column] += _product(gradient / count, vector[name])
    finally:
        for name, parameter in parameters.items():
            parameter.grad = None
            parameter.requires_grad_(trained[name])
    return scores, cut


def vectors_by_gradient(scores: Tensor, budget: int) -> list[int]:
    """Gradient, whole: the vectors with the largest sum of |score| over blocks, best first."""
    check_budget(budget, len(scores))
    return scores.abs().sum(1).argsort(descending=True, stable=True)[:budget].tolist()


def blockwise_vectors(
    vectors: Sequence[TaskVector], scores: Tensor, cut: Mapping[str, Sequence[str]], budget: int
) -> list[TaskVector]:
    """Gradient, blockwise: `budget` vectors, of which the r-th takes in each block the vector with the r-th largest
    |score| there. Nothing is copied: their tensors are read from the given vectors."""
    check_budget(budget, len(vectors))
    order = scores.abs().argsort(dim=0, descending=True, stable=True)
    picked = []
    for rank in range(budget):
        owner = {name: int(order[rank, column]) for column, names in enumerate(cut.values()) for name in names}
        picked.append(TaskVector(_Picked(vectors, owner), base=vectors[0].base, source=f"rank {rank + 1} by block"))
    return picked


def check_budget(budget: int, count: int) -> None:
    if not 1 <= budget <= count:
        raise ValueError(f"a budget of {budget} out of {count} task vectors; choose 1 to {count}")


def _product(gradient: Tensor, entry: Entry) -> float:
    if isinstance(entry, LowRank):  # <G, s b a> = s * sum((b.T G) * a)
        return entry.scale * float(((entry.b.double().T @ gradient.double()) * entry.a.double()).sum())
    return float(gradient.double().flatten() @ entry.double().flatten())


class _Picked(LazyTensors):
    def __init__(self, vectors: Sequence[TaskVector], owner: Mapping[str, int]) -> None:
        self.vectors, self.owner = vectors, owner
        self.shapes = {name: vectors[number].shapes[name] for name, number in owner.items()}
        self.low_rank = frozenset(name for name, number in owner.items() if name in vectors[number].low_rank)

    def __getitem__(self, name: str) -> Entry:
        return self.vectors[self.owner[name]][name]
