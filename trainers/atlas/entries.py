"""One tensor's difference, dense or as low-rank factors, and mappings of them that are read when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """The matrix `scale * b @ a`, kept as factors: `a` [rank, columns], `b` [rows, rank]."""

    a: Tensor
    b: Tensor
    scale: float = 1.0

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.b.shape[0], self.a.shape[1]))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the factors; products are wider, see `dense`."""
        return torch.promote_types(self.a.dtype, self.b.dtype)

    @property
    def wide(self) -> torch.dtype:
        """Type that products are computed in."""
        return torch.promote_types(self.dtype, torch.float32)

    def dense(self) -> Tensor:
        """The product [rows, columns], computed in fp32 (fp64 for fp64 factors)."""
        return self.scale * (self.b.to(self.wide) @ self.a.to(self.wide))

    def dot(self, other: LowRank) -> float:
        """Inner product of the two matrices without either: sum((b.T @ b') * (a @ a'.T))."""
        b = self.b.double().T @ other.b.double()
        a = self.a.double() @ other.a.double().T
        return self.scale * other.scale * float((a * b).sum())

    def plus(self, other: LowRank) -> LowRank:
        """The sum of the two matrices: the ranks add up. The scales go into `b`, which becomes fp32 for them."""
        b = [self.scale * self.b.to(self.wide), other.scale * other.b.to(other.wide)]
        return LowRank(torch.cat([self.a, other.a]), torch.cat(b, dim=1))


Entry = Tensor | LowRank
E = TypeVar("E", bound=Entry, covariant=True)


class LazyTensors(Mapping[str, E], Generic[E]):
    """Entries that are read when asked for; `shapes`, and which ones are `low_rank`, are known before."""

    shapes: dict[str, torch.Size]
    low_rank: frozenset[str] = frozenset()

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes  # Mapping's own would read the tensor


def dense(entry: Entry) -> Tensor:
    """The entry as a tensor; a low-rank one is multiplied out."""
    return entry.dense() if isinstance(entry, LowRank) else entry


def times(entry: Entry, weight: float) -> Entry:
    return replace(entry, scale=weight * entry.scale) if isinstance(entry, LowRank) else weight * entry


def plus(one: Entry, other: Entry) -> Entry:
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        return one.plus(other)
    return dense(one) + dense(other)
