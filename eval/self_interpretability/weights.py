"""Which weights choices imply: three estimators, and how far a linear utility can be trusted (spec 1.6, 4.4)."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.linear_model import LogisticRegression

Array = NDArray[np.float64]
LARGEST = 100.0  # the largest magnitude of a vector of weights, by convention of the paper
CLIP = 10.0  # margins beyond this (in nats) say "certain", and how certain is noise
NEWTON: Any = {"solver": "newton-cholesky", "tol": 1e-10, "max_iter": 1000}  # lbfgs gives up near certain choices
ESTIMATORS = ("paper", "fractional", "least_squares")


def fit_weights(
    differences: ArrayLike,
    choices: ArrayLike,
    estimator: Literal["paper", "fractional", "least_squares"] = "paper",
) -> Array:
    """The weights of a linear utility that explain choices, scaled so that the largest magnitude is 100.

    Args:
        differences: `[trials, attributes]`, option A's value less option B's, in units of the attribute's range.
        choices: `[trials]`; for "paper" 1 where A was chosen, else 0; for "fractional" the probability of A; for
            "least_squares" the margin of A over B in nats.
        estimator: "paper" is the posterior mode of a logistic regression with a N(0, 1) prior on the slopes and a free
            intercept (the paper's, which takes the mean: r = 0.9999 between them); "fractional" a logistic regression
            on probabilities, without a prior; "least_squares" a linear one on margins, clipped at 10 nats.

    Returns:
        `[attributes]`.

    Raises:
        ValueError: shapes that do not fit, numbers that are not finite or outside of what the estimator reads, trials
            that are all chosen alike, fewer of them than numbers to fit, or no effect of any attribute.
    """
    x, y = _checked(differences, choices, estimator)
    if estimator == "paper":
        slopes = LogisticRegression(C=1.0, **NEWTON).fit(x, y.astype(int)).coef_[0]
    elif estimator == "fractional":
        twice, weights = np.concatenate([x, x]), np.concatenate([y, 1 - y])
        answers = np.repeat([1, 0], len(x))
        kept = weights > 0
        model = LogisticRegression(C=np.inf, **NEWTON)
        slopes = model.fit(twice[kept], answers[kept], sample_weight=weights[kept]).coef_[0]
    else:
        slopes = _line(x, y)[:-1]
    return scaled(slopes)


def linearity(differences: ArrayLike, margins: ArrayLike) -> float:
    """R^2 of the least-squares fit: under 0.7, weights are no faithful summary of what the model does."""
    x, y = _checked(differences, margins, "least_squares")
    left = np.clip(y, -CLIP, CLIP) - np.column_stack([x, np.ones(len(x))]) @ _line(x, y)
    return float(1 - left.var() / np.clip(y, -CLIP, CLIP).var())


def scaled(weights: ArrayLike) -> Array:
    """Weights times what makes their largest magnitude 100. Raises ValueError where all are 0."""
    values = np.asarray(weights, dtype=np.float64)
    largest = np.abs(values).max()
    if not largest > 0:
        raise ValueError("no attribute has any effect on the choices, so there are no weights to scale")
    return values * (LARGEST / largest)


def _line(x: Array, y: Array) -> Array:
    """Slopes and intercept of the clipped margins."""
    return np.linalg.lstsq(np.column_stack([x, np.ones(len(x))]), np.clip(y, -CLIP, CLIP), rcond=None)[0]


def _checked(differences: ArrayLike, choices: ArrayLike, estimator: str) -> tuple[Array, Array]:
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}; known: {', '.join(ESTIMATORS)}")
    x, y = np.asarray(differences, dtype=np.float64), np.asarray(choices, dtype=np.float64)
    if x.ndim != 2 or y.shape != x.shape[:1]:
        raise ValueError(f"differences must be [trials, attributes] and choices [trials], got {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("differences and choices must be finite numbers")
    if estimator == "paper" and not np.isin(y, (0, 1)).all():
        raise ValueError("choices must be 1 (A) or 0 (B); for probabilities there is the estimator fractional")
    if estimator == "fractional" and not ((y >= 0) & (y <= 1)).all():
        raise ValueError("choices must be probabilities, between 0 and 1")
    if len(x) <= x.shape[1]:
        raise ValueError(f"{len(x)} trials are too few to fit {x.shape[1]} weights and an intercept")
    if (y == y[0]).all():
        what = "A" if y[0] > (0 if estimator == "least_squares" else 0.5) else "B"
        raise ValueError(f"all {len(y)} choices are equal ({what}): they tell nothing about weights")
    return x, y
