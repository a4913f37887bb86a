"""The few array operations that rows are made with, here on NumPy; a trainer may bring the same ones on a GPU.

Everything else the generators do (comparisons, sums, slices) NumPy arrays and torch tensors spell alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

Array = Any  # a NumPy array, or a torch tensor
PAD = 0


class Arrays(Protocol):
    """Random draws from one generator, and what NumPy and torch spell differently. All integers are int64."""

    def integers(self, low: int, high: int, shape: tuple[int, ...]) -> Array:
        """Uniform on `low <= x < high`."""

    def uniform(self, shape: tuple[int, ...]) -> Array: ...
    def full(self, shape: tuple[int, ...], value: int) -> Array: ...
    def arange(self, stop: int) -> Array: ...
    def where(self, condition: Array, first: Array | int, second: Array | int) -> Array: ...
    def sort(self, values: Array) -> Array:
        """Each row of a matrix in ascending order."""

    def argsort(self, values: Array) -> Array:
        """Of each row of a matrix; equal values in any order."""

    def cumsum(self, values: Array) -> Array:
        """Along each row of a matrix."""

    def take(self, values: Array, places: Array) -> Array:
        """`values[r, places[r, k]]`, like `places` of shape [rows, k]."""

    def put(self, into: Array, places: Array, values: Array) -> None:
        """`into[r, places[r, k]] = values[r, k]`, in place."""

    def join(self, parts: Sequence[Array]) -> Array:
        """Matrices side by side."""


class NumpyArrays:
    """`Arrays` on NumPy, with draws from `seed` (one number or several)."""

    def __init__(self, seed: int | Sequence[int]) -> None:
        self.generator = np.random.default_rng(seed)

    def integers(self, low: int, high: int, shape: tuple[int, ...]) -> Array:
        return self.generator.integers(low, high, shape)

    def uniform(self, shape: tuple[int, ...]) -> Array:
        return self.generator.random(shape)

    def full(self, shape: tuple[int, ...], value: int) -> Array:
        return np.full(shape, value, dtype=np.int64)

    def arange(self, stop: int) -> Array:
        return np.arange(stop)

    def where(self, condition: Array, first: Array | int, second: Array | int) -> Array:
        return np.where(condition, first, second)

    def sort(self, values: Array) -> Array:
        return np.sort(values, axis=1)

    def argsort(self, values: Array) -> Array:
        return np.argsort(values, axis=1)

    def cumsum(self, values: Array) -> Array:
        return np.cumsum(values, axis=1)

    def take(self, values: Array, places: Array) -> Array:
        return np.take_along_axis(values, places, axis=1)

    def put(self, into: Array, places: Array, values: Array) -> None:
        np.put_along_axis(into, places, values, axis=1)

    def join(self, parts: Sequence[Array]) -> Array:
        return np.concatenate(parts, axis=1)


class Part(NamedTuple):
    """A stretch of every row: its tokens [rows, width], how many of them count [rows, 1], and which carry loss."""

    tokens: Array
    length: Array
    target: bool


class Rows(NamedTuple):
    """Rows of one task, padded at their ends.

    Attributes:
        ids: tokens [rows, width].
        targets: which of them carry loss, bool [rows, width].
        lengths: items of the problem (numbers of a list, digits) [rows].
        questions: tokens of the question, which is what a row starts with [rows].
    """

    ids: Array
    targets: Array
    lengths: Array
    questions: Array


def concatenate(arrays: Arrays, question: Sequence[Part], answer: Sequence[Part], lengths: Array) -> Rows:
    """Put the parts of every row one behind the other, without the places of each part that do not count."""
    parts = [*question, *answer]
    rows, width = len(lengths), sum(part.tokens.shape[1] for part in parts)
    ids = arrays.full((rows, width + 1), PAD)  # the last column takes what does not count
    targets = arrays.full((rows, width + 1), 0)
    start = arrays.full((rows, 1), 0)
    for part in parts:
        place = arrays.arange(part.tokens.shape[1])[None, :]
        places = arrays.where(place < part.length, start + place, width)
        arrays.put(ids, places, part.tokens)
        if part.target:
            arrays.put(targets, places, arrays.full(tuple(part.tokens.shape), 1))
        start = start + part.length
    questions = sum(part.length for part in question)[:, 0]
    return Rows(ids[:, :width], targets[:, :width] > 0, lengths, questions)
