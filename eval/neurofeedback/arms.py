"""What a model's reports on one axis are compared with, on the same orders of the same sentences (spec 3.8)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ..choices import CausalLM
from ..statistics import Metric
from .axes import Axis, label_edges
from .baselines import penalty, residuals, running_logits, standardised, word_features
from .outcomes import bins, estimate, resampled
from .reporting import judged, label_logits

Array = NDArray[np.float64]
SELF, OTHER, WORDS, EMBEDDING = "the model", "another model", "words", "another model's embedding"
SHUFFLED, IDEAL = "shuffled labels", "ideal observer"
RELABELLED, RELABELLED_INPUT = "relabelled", "relabelled, from input"
BASELINES = (OTHER, WORDS, EMBEDDING)  # none of them has the model's hidden states


@dataclass(frozen=True)
class Half:
    """Half of the sentences: their texts, what they are about (0 or 1), hidden states of the model `[sentences,
    layers, width]`, and their embedding by the other one `[sentences, width]`."""

    texts: Sequence[str]
    kinds: NDArray[np.int64]
    vectors: Array
    embedding: Array


@dataclass(frozen=True)
class Reports:
    """Of one axis: arm -> whether each label was reported rightly, and its nats, both `[orders, examples]`."""

    axis: Axis
    orders: NDArray[np.int64]
    correct: dict[str, Array]
    nats: dict[str, Array]

    def accuracies(self) -> dict[str, Metric]:
        """Of each arm, over the second half of the places: with at least half of the examples."""
        return self._means(self.correct, self.orders.shape[1] // 2, self.orders.shape[1])

    def cross_entropies(self) -> dict[str, Metric]:
        """In nats, over the same places."""
        return self._means(self.nats, self.orders.shape[1] // 2, self.orders.shape[1])

    def headline(self) -> Metric:
        """Accuracy of the model less that of the best of `BASELINES`, over the same places; which of them is the best
        is settled anew in every draw."""
        start = self.orders.shape[1] // 2
        names = [SELF, *BASELINES]
        values = np.stack([self.correct[name][:, start:] for name in names])
        drawn = resampled(values, self.orders[:, start:])
        means = values.mean((1, 2))
        ahead = drawn[:, 0] - drawn[:, 1:].max(1)
        return estimate(float(means[0] - means[1:].max()), ahead, values[0].size)

    def curve(self) -> list[dict[str, Any]]:
        """Accuracies by the number of examples, in powers of two."""
        return [
            {"from": start, "to": stop - 1, "accuracy": self._means(self.correct, start, stop)}
            for start, stop in bins(self.orders.shape[1])
        ]

    def _means(self, values: Mapping[str, Array], start: int, stop: int) -> dict[str, Metric]:
        part = np.stack([one[:, start:stop] for one in values.values()])
        drawn = resampled(part, self.orders[:, start:stop])
        return {
            name: estimate(float(part[place].mean()), drawn[:, place], part[place].size)
            for place, name in enumerate(values)
        }


Reader = tuple[CausalLM, PreTrainedTokenizerBase]


def report(
    axis: Axis,
    fit: Half,
    rest: Half,
    orders: NDArray[np.int64],
    model: Reader,
    other: Reader,
    *,
    seed: int = 0,
    template: Mapping[str, Any] | None = None,
    step: Callable[[], Any] = lambda: None,
) -> Reports:
    """Ask for the axis's labels, and let everything else guess them.

    Args:
        fit: what the axis was fitted on; strengths of penalties are chosen there.
        rest: the sentences that are asked about; `orders`: their places, `[orders, examples]`.
        model, other: whose axis it is, and the other one, which reads the same labels: each with its tokenizer.
        step: called after every order.
    """
    levels = len(axis.edges) + 1
    own, labels = (axis.labels(half.vectors[:, axis.layer]) for half in (fit, rest))
    words, embedding = word_features(fit.texts, rest.texts), standardised(fit.embedding, rest.embedding)
    states = standardised(fit.vectors[:, axis.layer], rest.vectors[:, axis.layer])
    inputs = [np.concatenate([*parts, half.kinds[:, None]], axis=1)
              for *parts, half in zip(words, embedding, (fit, rest), strict=True)]  # fmt: skip
    scores = [axis.scores(half.vectors[:, axis.layer]) for half in (fit, rest)]
    inside, left = residuals(inputs[0], scores[0], inputs[1], scores[1])
    edges = label_edges(inside / inside.std(), levels)
    own_again, again = (np.searchsorted(edges, part / inside.std(), side="right") for part in (inside, left))
    count = orders.shape[1]
    guesses = {
        WORDS: (words, own, labels),
        EMBEDDING: (embedding, own, labels),
        RELABELLED_INPUT: (tuple(inputs), own_again, again),
        IDEAL: (states, own, labels),
    }
    strength = {name: penalty(parts[0], known, count) for name, (parts, known, _) in guesses.items()}
    found: dict[str, list[tuple[Array, Array]]] = {}
    rng = np.random.default_rng(seed)
    for order in orders:
        texts = [rest.texts[place] for place in order]
        mixed = rng.permutation(labels[order])
        for name, reader, shown in (
            (SELF, model, labels[order]),
            (OTHER, other, labels[order]),
            (SHUFFLED, model, mixed),
            (RELABELLED, model, again[order]),
        ):
            logits = label_logits(*reader, texts, shown.tolist(), levels, template=template)
            found.setdefault(name, []).append(judged(logits, shown))
        for name, (parts, _, known) in guesses.items():
            logits = running_logits(parts[1][order], known[order], levels, strength[name])
            found.setdefault(name, []).append(judged(logits, known[order]))
        step()
    names = (SELF, OTHER, WORDS, EMBEDDING, SHUFFLED, RELABELLED, RELABELLED_INPUT, IDEAL)
    return Reports(
        axis, orders,
        {name: np.stack([one[0] for one in found[name]]) for name in names},
        {name: np.stack([one[1] for one in found[name]]) for name in names},
    )  # fmt: skip
