"""Hidden weights, options, and what they imply: the numbers of an experiment, before any text (spec 1.2, 1.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from .contexts import Attribute, Context

LARGEST = 100  # the largest magnitude of every vector of weights


@dataclass(frozen=True)
class Trial:
    """Two options: their values of the context's attributes, in its order."""

    a: tuple[float, ...]
    b: tuple[float, ...]

    def swapped(self) -> Trial:
        return Trial(self.b, self.a)


def draw_weights(rng: Random, count: int) -> tuple[int, ...]:
    """Uniform between -100 and 100, scaled so that the largest magnitude is 100, and rounded: every vector has one
    weight of 100 or -100, and signs are random, so that common sense is no guide."""
    drawn = [rng.uniform(-LARGEST, LARGEST) for _ in range(count)]
    largest = max(map(abs, drawn))
    return tuple(round(LARGEST * weight / largest) for weight in drawn)


def decimals(attribute: Attribute) -> int:
    """Decimals of an attribute's values: none from a range of 5 on, one from 1 on, below that as many as it takes."""
    size = attribute.high - attribute.low
    if size >= 5:
        return 0
    return 1 if size >= 1 else abs(math.floor(math.log10(size))) + 1


def draw_trial(rng: Random, context: Context) -> Trial:
    """Values uniform in their ranges, rounded as they are shown, so that a label follows from what is seen."""

    def option() -> tuple[float, ...]:
        return tuple(round(rng.uniform(one.low, one.high), decimals(one)) for one in context.attributes)

    return Trial(option(), option())


def difference(context: Context, trial: Trial) -> tuple[float, ...]:
    """A's values less B's, in units of the attributes' ranges."""
    pairs = zip(context.attributes, trial.a, trial.b, strict=True)
    return tuple((a - b) / (one.high - one.low) for one, a, b in pairs)


def label(context: Context, trial: Trial, weights: Sequence[float]) -> str:
    """ "A" if its utility, the weighted sum of its values in units of the ranges, is larger, else "B"."""
    parts = zip(weights, difference(context, trial), strict=True)
    return "A" if sum(weight * value for weight, value in parts) > 0 else "B"
