"""How well reported weights agree with the learned ones, with intervals over contexts (spec 1.8, 4.6)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Weights = Sequence[ArrayLike] | Array  # of each context its attributes' weights, all finite
DRAWS = 2000


class Estimate(TypedDict):
    """A statistic (None where it is not defined: of reports that are all alike, say), its 95 % interval by bootstrap
    over contexts, and how many of these there are."""

    value: float | None
    low: float | None
    high: float | None
    n: int


# Statistics of arrays [..., contexts, attributes] -> [...]; where a context has fewer attributes, both hold NaN.


def pooled_r(reported: Array, learned: Array) -> Array:
    """Pearson's r over all attributes of all contexts."""
    return _pearson(_flat(reported), _flat(learned))


def within_context_r(reported: Array, learned: Array) -> Array:
    """The mean over contexts of Pearson's r over their attributes; contexts where either is constant are left out."""
    each = _pearson(reported, learned)
    defined = np.isfinite(each)
    return _ratio(np.where(defined, each, 0.0).sum(-1), defined.sum(-1))


def sign_agreement(reported: Array, learned: Array) -> Array:
    """The share of attributes whose weights have the same sign; a weight of 0 agrees with nothing but 0."""
    same = np.where(np.isnan(learned), np.nan, np.sign(reported) == np.sign(learned))
    return np.nanmean(_flat(same), axis=-1)


def mae(reported: Array, learned: Array) -> Array:
    """Mean absolute error, in units of weights (largest 100)."""
    return np.nanmean(_flat(np.abs(reported - learned)), axis=-1)


def slope(reported: Array, learned: Array) -> Array:
    """Of reported on learned weights, least squares: under 1 reports are compressed, however large r is."""
    x, y = _centred(_flat(learned)), _centred(_flat(reported))
    return _ratio(np.nansum(x * y, axis=-1), np.nansum(x * x, axis=-1))


def sd_ratio(reported: Array, learned: Array) -> Array:
    """Standard deviation of reported weights over that of learned ones."""
    return _ratio(np.nanstd(_flat(reported), axis=-1), np.nanstd(_flat(learned), axis=-1))


STATISTICS: dict[str, Callable[[Array, Array], Array]] = {
    "pooled_r": pooled_r,
    "within_context_r": within_context_r,
    "sign_agreement": sign_agreement,
    "mae": mae,
    "slope": slope,
    "sd_ratio": sd_ratio,
}


def agreement(reported: Weights, learned: Weights, seed: int = 0, draws: int = DRAWS) -> dict[str, Estimate]:
    """All of `STATISTICS`; contexts are drawn anew, `draws` times, for intervals (0: without).

    Raises:
        ValueError: shapes that differ, fewer than two contexts or attributes, numbers that are not finite.
    """
    one, other = _checked(reported, learned)
    drawn = np.random.default_rng(seed).integers(0, len(one), (draws, len(one)))
    found: dict[str, Estimate] = {}
    for name, statistic in STATISTICS.items():
        found[name] = _estimate(float(statistic(one, other)), statistic(one[drawn], other[drawn]), len(one))
    return found


def gain(after: Weights, before: Weights, learned: Weights, seed: int = 0) -> Estimate:
    """Pooled r of reports `after` less that of reports `before`, on the same contexts."""
    late, true = _checked(after, learned)
    early, _ = _checked(before, learned)
    drawn = np.random.default_rng(seed).integers(0, len(true), (DRAWS, len(true)))
    values = pooled_r(late[drawn], true[drawn]) - pooled_r(early[drawn], true[drawn])
    return _estimate(float(pooled_r(late, true) - pooled_r(early, true)), values, len(true))


def permuted(reported: Weights, learned: Weights, within: bool = False, seed: int = 0) -> Estimate:
    """Pooled r that chance gives: reports of other contexts, or (`within`) of other attributes of the same context.

    The latter is above 0 where contexts differ in how much is liked at all. The interval is that of single draws.
    """
    one, other = _checked(reported, learned)
    rng = np.random.default_rng(seed)
    counts = (~np.isnan(one)).sum(1)
    drawn = np.broadcast_to(one, (DRAWS, *one.shape)).copy()
    for count in np.unique(counts):  # contexts with as many attributes change places among themselves
        places = np.flatnonzero(counts == count)
        part = drawn[:, places, :count]
        if within:
            part = rng.permuted(part, axis=2)
        else:
            order = rng.permuted(np.broadcast_to(np.arange(len(places)), (DRAWS, len(places))), axis=1)
            part = part[np.arange(DRAWS)[:, None], order]
        drawn[:, places, :count] = part
    values = pooled_r(drawn, np.broadcast_to(other, drawn.shape))
    return _estimate(float(values.mean()), values, len(one))


def partial_r(reported: Weights, learned: Weights, given: Weights) -> float:
    """Pooled r of what is left of reported and of learned weights when each has been regressed on weights `given`:
    agreement that the latter do not explain."""
    one, two = _checked(reported, learned)
    three, _ = _checked(given, learned)
    r, first, second = (float(pooled_r(*pair)) for pair in ((one, two), (one, three), (two, three)))
    return float(_ratio(np.array(r - first * second), np.sqrt((1 - first**2) * (1 - second**2))))


def disattenuated(r: float, *reliabilities: float) -> float:
    """What r would be without measurement error: r / sqrt of the product of reliabilities (each above 0, at most 1).

    Raises ValueError for others.
    """
    if not all(0 < reliability <= 1 for reliability in reliabilities):
        raise ValueError(f"reliabilities must be above 0 and at most 1, got {reliabilities}")
    return float(r / np.sqrt(np.prod(reliabilities)))


def _estimate(value: float, drawn: Array, count: int) -> Estimate:
    values = drawn[np.isfinite(drawn)]
    if not np.isfinite(value) or len(values) <= DRAWS / 2:
        return {"value": value if np.isfinite(value) else None, "low": None, "high": None, "n": count}
    low, high = np.quantile(values, [0.025, 0.975])
    return {"value": value, "low": float(low), "high": float(high), "n": count}


def _checked(reported: Weights, learned: Weights) -> tuple[Array, Array]:
    """[contexts, attributes], with NaN where a context has fewer attributes than others."""
    one, other = ([np.asarray(vector, dtype=np.float64) for vector in vectors] for vectors in (reported, learned))
    shapes = [[vector.shape for vector in vectors] for vectors in (one, other)]
    if shapes[0] != shapes[1] or len(one) < 2 or any(len(shape) != 1 or shape[0] < 2 for shape in shapes[0]):
        raise ValueError(
            "reported and learned weights must be of the same contexts, at least 2, with as many attributes, at least "
            f"2; got {shapes[0][:3]} and {shapes[1][:3]} ({len(one)} and {len(other)} contexts)"
        )
    if not all(np.isfinite(vector).all() for vector in (*one, *other)):
        raise ValueError("weights must be finite numbers; leave out contexts without reports")
    width = max(len(vector) for vector in one)
    padded = [
        np.stack([np.pad(vector, (0, width - len(vector)), constant_values=np.nan) for vector in vectors])
        for vectors in (one, other)
    ]
    return padded[0], padded[1]


def _flat(values: Array) -> Array:
    return values.reshape(*values.shape[:-2], values.shape[-2] * values.shape[-1])


def _centred(values: Array) -> Array:
    return values - np.nanmean(values, axis=-1, keepdims=True)


def _pearson(x: Array, y: Array) -> Array:
    x, y = _centred(x), _centred(y)
    both = np.nansum(x * x, axis=-1) * np.nansum(y * y, axis=-1)
    return _ratio(np.nansum(x * y, axis=-1), np.sqrt(both))


def _ratio(above: Array, below: Array) -> Array:
    """NaN where there is no variation (but for rounding)."""
    return np.where(below > 1e-12, above / np.where(below > 1e-12, below, 1), np.nan)
