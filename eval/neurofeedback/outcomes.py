"""Numbers with intervals: accuracies over orders and sentences, and effect sizes (spec 3.4, 3.5)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..statistics import Metric

Array = NDArray[np.float64]
DRAWS = 2000


def resampled(values: ArrayLike, sentences: ArrayLike, *, draws: int = DRAWS, seed: int = 0) -> Array:
    """`[draws, arms]`: means of `values`, `[arms, orders, places]`, when orders and sentences are both drawn anew.

    `sentences`: `[orders, places]`, which sentence stood there. A sentence weighs as often as it is drawn times as
    often as its order is (Owen 2007): neither alone shows how far means move with new orders of new sentences.
    """
    array, which = np.asarray(values, dtype=np.float64), np.asarray(sentences)
    names, columns = np.unique(which, return_inverse=True)
    arms, orders, _ = array.shape
    there = np.zeros((orders, len(names)))
    dense = np.zeros((arms, orders, len(names)))
    rows = np.arange(orders)[:, None]
    there[rows, columns.reshape(which.shape)] = 1.0
    dense[:, rows, columns.reshape(which.shape)] = array
    rng = np.random.default_rng(seed)
    of_orders = rng.multinomial(orders, np.full(orders, 1 / orders), draws).astype(np.float64)
    of_sentences = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), draws)
    weight = ((of_orders @ there) * of_sentences).sum(1)
    totals = np.stack([((of_orders @ one) * of_sentences).sum(1) for one in dense], axis=1)
    with np.errstate(invalid="ignore"):
        return totals / weight[:, None]


def estimate(value: float, drawn: ArrayLike, count: int) -> Metric:
    """A number with the 95 % interval of its redrawn values; without one where nearly all of them are undefined."""
    numbers = np.asarray(drawn, dtype=np.float64)
    numbers = numbers[np.isfinite(numbers)]
    if len(numbers) < DRAWS / 2:
        return {"value": value, "low": None, "high": None, "n": count}
    low, high = np.quantile(numbers, [0.025, 0.975])
    return {"value": value, "low": float(low), "high": float(high), "n": count}


def bins(places: int) -> list[tuple[int, int]]:
    """Numbers of examples, in powers of two: 0, 1, 2 to 3, 4 to 7, ..."""
    edges = [0, *(2**power for power in range(places.bit_length()) if 2**power < places), places]
    return list(zip(edges, edges[1:], strict=False))


def effect(high: Sequence[float] | Array, low: Sequence[float] | Array) -> Metric:
    """Cohen's d of two groups with the 95 % interval of its normal approximation; ValueError for fewer than two each,
    or groups without any spread."""
    one, other = np.asarray(high, dtype=np.float64), np.asarray(low, dtype=np.float64)
    first, second = len(one), len(other)
    if min(first, second) < 2:
        raise ValueError(f"an effect size needs at least two scores on either side, got {first} and {second}")
    free = first + second - 2
    spread = np.sqrt(((first - 1) * one.var(ddof=1) + (second - 1) * other.var(ddof=1)) / free)
    if not spread > 0:
        raise ValueError("scores without any spread have no effect size")
    d = float((one.mean() - other.mean()) / spread)
    error = np.sqrt((first + second) / (first * second) + d**2 / (2 * (first + second)))
    return {"value": d, "low": float(d - 1.96 * error), "high": float(d + 1.96 * error), "n": first + second}
