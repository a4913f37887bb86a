"""Who takes part in an experiment, with which preferences: what the embedded world and texts have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random

from .contexts import Context
from .splits import Split
from .trials import draw_weights

Weights = Mapping[str, tuple[int, ...]]  # context's name -> its hidden weights


def shuffled(weights: Weights, contexts: Sequence[Context], seed: int) -> Weights:
    """The same weights, those of these contexts handed around in a ring, so that none keeps its own. A single context
    has nobody to get others from, and gets its own weights with the opposite sign."""
    if len(contexts) == 1:
        (only,) = contexts
        return {**weights, only.name: tuple(-weight for weight in weights[only.name])}
    ring = Random(f"shuffled {seed}").sample([one.name for one in contexts], len(contexts))
    return {**weights, **{one: weights[ring[place - 1]] for place, one in enumerate(ring)}}


class Experiment:
    """Contexts by their role in either fold, and weights.

    Attributes:
        seed: what everything follows from.
        folds: of each fold its split; native and never set contexts are the same in both.
        known: contexts that the base model was made with; none but in the embedded world.
        weights: those that are instilled; of native and never set contexts some that are not (the embedded world's
            native ones have theirs from the base model).
    """

    def __init__(self, seed: int, folds: Sequence[Split], weights: Weights, known: Sequence[Context] = ()) -> None:
        self.seed, self.folds, self.weights, self.known = seed, folds, weights, tuple(known)

    @property
    def instilled(self) -> tuple[Context, ...]:
        return self.folds[0].instilled

    @property
    def others(self) -> Weights:
        """Other weights of the instilled contexts, for controls."""
        rng = Random(f"new weights {self.seed}")
        drawn = {one.name: draw_weights(rng, len(one.attributes)) for one in self.instilled}
        return {**self.weights, **drawn}

    def shuffled(self, fold: int) -> Weights:
        """The weights of the contexts whose reports are trained handed around among them, and so with those to choose
        by: what is left is the form of reports and their distribution."""
        split = self.folds[fold]
        among = shuffled(self.weights, split.report_train, self.seed)
        return shuffled(among, split.report_dev, self.seed)

    def told(self, fold: int | None) -> tuple[Context, ...]:
        """The contexts whose reports are trained; without a fold all instilled ones."""
        return self.instilled if fold is None else self.folds[fold].report_train

    def roles(self, fold: int) -> dict[str, str]:
        """Context's name -> its role in a fold."""
        return {one.name: "known" for one in self.known} | self.folds[fold].roles()
