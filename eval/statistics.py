"""Intervals and paired tests for scores that come in clusters (rows of one question) and from several seeds."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Array = NDArray[np.float64]


class Metric(TypedDict):
    """A number of a report. ``low`` and ``high`` are None where one cluster leaves no way to estimate the spread."""

    value: float
    low: float | None
    high: float | None
    n: int


class Evaluation(TypedDict):
    """What scorers return: metrics by name, and one sample a row, in the rows' order."""

    metrics: dict[str, Metric]
    samples: list[dict[str, Any]]


@dataclass(frozen=True)
class PairedTest:
    """``a - b`` over the same rows: mean, bootstrap interval, two-sided p-value and how it was found."""

    difference: float
    low: float
    high: float
    p_value: float
    n: int
    clusters: int
    method: str


def bootstrap_interval(
    values: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    weights: ArrayLike | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the (weighted) mean of ``values``, resampling whole clusters.

    ``clusters``: a label for each value (default: each value its own). ``weights``: non-negative, as tokens of a text.
    Raises ValueError for empty, non-finite or mismatched input, and for a single cluster, which has no spread to see.
    """
    totals, masses = _cluster_sums(values, clusters, weights)
    count = len(totals)
    if count < 2:
        raise ValueError("an interval needs at least two clusters, got 1; give rows of more than one group")
    _check_options(confidence, resamples)
    generator = np.random.default_rng(seed)
    means = []
    step = max(1, 4_000_000 // count)  # bounds memory at some 64 MB
    for start in range(0, resamples, step):
        index = generator.integers(count, size=(min(step, resamples - start), count))
        mass = masses[index].sum(1)
        # A resample without any weight says nothing; it cannot happen where all weights are positive.
        means.append(totals[index].sum(1) / np.where(mass > 0, mass, np.nan))
    tail = 50 * (1 - confidence)
    low, high = np.nanpercentile(np.concatenate(means), [tail, 100 - tail])
    return float(low), float(high)


def seed_interval(
    values: Sequence[ArrayLike],
    clusters: Sequence[Sequence[Hashable]] | None = None,
    *,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Interval of the mean over seeds, ``values[s]`` being the row scores of seed ``s``; it speaks about new seeds.

    Two parts, added in quadrature: Student's t over the seed means (``seeds - 1`` degrees of freedom), and the normal
    interval from the sampling of rows, clusters taken as one where a label occurs in several seeds (the same questions
    under each seed). Not clipped to the range of the scores. Slightly too wide where each seed has its own rows, since
    the seed means then scatter by the rows as well.

    The two-level bootstrap (seeds, then rows) is no substitute: three numbers resampled cannot show more spread than
    they have, so its nominal 95 % cover 85 % and less (``tests/test_statistics.py`` measures both). For an interval
    about exactly these seeds, pool the rows and use ``bootstrap_interval``.
    """
    seeds = len(values)
    if seeds < 2:
        raise ValueError(f"an interval over seeds needs at least two seeds, got {seeds}")
    if clusters is not None and len(clusters) != seeds:
        raise ValueError(f"{seeds} seeds but clusters for {len(clusters)}")
    _check_options(confidence, 1)
    means = []
    spread: dict[Hashable, float] = {}
    for number, scores in enumerate(values):
        array = _checked(scores, "values")
        labels = [(number, row) for row in range(len(array))] if clusters is None else clusters[number]
        if len(labels) != len(array):
            raise ValueError(f"seed {number}: {len(array)} values but {len(labels)} cluster labels")
        means.append(array.mean())
        # The linearised bootstrap variance of a mean over clusters, in closed form.
        for label, value in zip(labels, (array - array.mean()) / (len(array) * seeds), strict=True):
            spread[label] = spread.get(label, 0.0) + float(value)
    rows = sum(value**2 for value in spread.values()) * len(spread) / max(1, len(spread) - 1)
    upper = (1 + confidence) / 2
    between = stats.t.ppf(upper, seeds - 1) * np.std(means, ddof=1) / math.sqrt(seeds)
    half = math.hypot(between, stats.norm.ppf(upper) * math.sqrt(rows))
    centre = float(np.mean(means))
    return centre - half, centre + half


def metric(
    values: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    weights: ArrayLike | None = None,
    share: bool = False,
    seed: int = 0,
) -> Metric:
    """The (weighted) mean with its 95 % bootstrap interval, as it stands in a report; ``n`` counts rows.

    ``share``: the values lie in [0, 1]. Where all of them are 0, or all 1, resampling sees no spread and would claim
    certainty; Wilson's interval for the number of clusters takes its place.
    """
    array = _checked(values, "values")
    totals, masses = _cluster_sums(array, clusters, weights)
    value = float(totals.sum() / masses.sum())
    low: float | None = None
    high: float | None = None
    if share and (array.min() < 0 or array.max() > 1):
        raise ValueError(f"a share lies in [0, 1], got values from {array.min()} to {array.max()}")
    if share and array.min() == array.max() and value in (0.0, 1.0):
        low, high = _wilson(value, len(totals))
    elif len(totals) > 1:
        low, high = bootstrap_interval(array, clusters, weights=weights, seed=seed)
    return {"value": value, "low": low, "high": high, "n": len(array)}


def seed_metric(
    values: Sequence[ArrayLike], clusters: Sequence[Sequence[Hashable]] | None = None, *, share: bool = False
) -> Metric:
    """The mean of the seeds' means with ``seed_interval``, as it stands in a report; ``n``: the rows of all seeds.

    ``share``: the interval is clipped to [0, 1], and where all values are 0, or all 1, it is Wilson's for the number
    of different clusters. A single seed gets the interval of ``metric``, which says nothing about other seeds.
    """
    if len(values) == 1:
        return metric(values[0], None if clusters is None else clusters[0], share=share)
    low, high = seed_interval(values, clusters)
    arrays = [_checked(scores, "values") for scores in values]
    every = np.concatenate(arrays)
    value = float(np.mean([array.mean() for array in arrays]))
    if share:
        if every.min() < 0 or every.max() > 1:
            raise ValueError(f"a share lies in [0, 1], got values from {every.min()} to {every.max()}")
        low, high = max(0.0, low), min(1.0, high)
        if every.min() == every.max() and value in (0.0, 1.0):
            labels = len(every) if clusters is None else len({label for group in clusters for label in group})
            low, high = _wilson(value, labels)
    return {"value": value, "low": low, "high": high, "n": len(every)}


def _wilson(value: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval where none (value 0) or all (1) of ``count`` trials succeeded."""
    interval = stats.binomtest(round(value * count), count).proportion_ci(method="wilson")
    return (0.0, float(interval.high)) if value == 0 else (float(interval.low), 1.0)


def paired_test(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> PairedTest:
    """Whether ``a`` and ``b``, scores of the same rows, differ in the mean.

    Binary scores without clusters of several rows: McNemar's exact test. Otherwise a sign-flip permutation test of the
    cluster differences, all flips where there are at most 2**13 and else ``resamples`` random ones (the observed one
    counted in, so p is never 0). The interval is the clustered bootstrap's. With c clusters no p-value can fall below
    2 / 2**c: three seeds as clusters cannot be significant.
    Raises ValueError for empty, non-finite or mismatched input and for a single cluster.
    """
    first, second = _checked(a, "a"), _checked(b, "b")
    if len(first) != len(second):
        raise ValueError(
            f"a has {len(first)} values and b {len(second)}; give scores of the same rows in the same order"
        )
    totals, _ = _cluster_sums(first - second, clusters, None)
    low, high = bootstrap_interval(first - second, clusters, confidence=confidence, resamples=resamples, seed=seed)
    binary = bool(np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all())
    count = len(totals)
    if binary and count == len(first):
        wins, losses = int((totals > 0).sum()), int((totals < 0).sum())
        p_value = float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
        method = "McNemar, exact"
    elif count <= 13:
        signs = 1 - 2 * (np.arange(2**count)[:, None] >> np.arange(count) & 1)
        p_value = float(_as_extreme(signs @ totals, totals).mean())
        method = "sign flips, exact"
    else:
        generator = np.random.default_rng(seed)
        step = max(1, 4_000_000 // count)
        extreme = 0
        for start in range(0, resamples, step):
            signs = 2 * generator.integers(2, size=(min(step, resamples - start), count)) - 1
            extreme += int(_as_extreme(signs @ totals, totals).sum())
        p_value = (1 + extreme) / (1 + resamples)
        method = f"sign flips, {resamples} random"
    difference = float(totals.sum() / len(first))
    return PairedTest(difference, low, high, p_value, len(first), count, method)


def _as_extreme(flipped: Array, totals: Array) -> NDArray[np.bool_]:
    """Sums that differ only by rounding count as equal."""
    return np.abs(flipped) >= abs(totals.sum()) - 1e-9 * np.abs(totals).sum()


def _checked(values: ArrayLike, name: str) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} must be a non-empty list of numbers, got an array of shape {array.shape}")
    if not np.isfinite(array).all():
        place = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(f"{name}[{place}] is {array[place]}; scores must be finite")
    return array


def _cluster_sums(
    values: ArrayLike, clusters: Sequence[Hashable] | None, weights: ArrayLike | None
) -> tuple[Array, Array]:
    """For each cluster the sum of weight * value and the sum of weights."""
    array = _checked(values, "values")
    weight = np.ones_like(array) if weights is None else _checked(weights, "weights")
    if len(weight) != len(array):
        raise ValueError(f"{len(array)} values but {len(weight)} weights")
    if weight.min() < 0 or weight.sum() == 0:
        raise ValueError("weights must be non-negative and not all zero")
    if clusters is None:
        return array * weight, weight
    if len(clusters) != len(array):
        raise ValueError(f"{len(array)} values but {len(clusters)} cluster labels")
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(label, len(numbers)) for label in clusters])
    return np.bincount(index, array * weight).astype(np.float64), np.bincount(index, weight).astype(np.float64)


def _check_options(confidence: float, resamples: int) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
