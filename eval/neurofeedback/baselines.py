"""Label guessing without a look inside: from words, from another model's embeddings, and from the true hidden states
as an upper bound. Each sees the same examples as the model does, in the same order (spec 3.8)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.model_selection import GridSearchCV, cross_val_predict

Array = NDArray[np.float64]
PENALTIES = {"C": [0.01, 0.1, 1.0, 10.0, 100.0]}
ALPHAS = np.logspace(-3, 5, 17)


def word_features(fit: Sequence[str], rest: Sequence[str]) -> tuple[Array, Array]:
    """TF-IDF of words and pairs of words, of both parts; the vocabulary is that of the first."""
    reader = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit(fit)
    return reader.transform(fit).toarray(), reader.transform(rest).toarray()


def standardised(fit: ArrayLike, rest: ArrayLike) -> tuple[Array, Array]:
    """Mean 0 and variance 1 / width on the first part, so that vectors are about as long as those of TF-IDF."""
    one, other = np.asarray(fit, dtype=np.float64), np.asarray(rest, dtype=np.float64)
    mean, scale = one.mean(0), one.std(0) * np.sqrt(one.shape[1])
    scale[scale == 0] = 1.0
    return (one - mean) / scale, (other - mean) / scale


def penalty(features: Array, labels: Sequence[int] | Array, examples: int) -> float:
    """The best of a logistic regression's `PENALTIES` by cross-validation on the part that axes were fitted on, with
    as many of its sentences as there will be examples."""
    count = min(len(features), max(examples, 10))
    kinds, sizes = np.unique(np.asarray(labels)[:count], return_counts=True)
    if len(kinds) < 2 or sizes.min() < 2:
        return 1.0
    # Not by accuracy: among as many of either kind, the strongest penalty is right as often, and has no opinion.
    folds = int(min(5, sizes.min()))
    search = GridSearchCV(LogisticRegression(max_iter=1000), PENALTIES, cv=folds, scoring="neg_log_loss")
    return float(search.fit(features[:count], np.asarray(labels)[:count]).best_params_["C"])


def running_logits(features: ArrayLike, labels: ArrayLike, levels: int, strength: float) -> Array:
    """`[sentences, levels]`: log-probabilities of each sentence's label by a logistic regression on all before it.

    While these are of one kind only, their counts (plus one each) decide.
    """
    rows, right = _rotated(np.asarray(features, dtype=np.float64)), np.asarray(labels)
    found = np.empty((len(rows), levels))
    for place in range(len(rows)):
        counts = np.bincount(right[:place], minlength=levels) + 1.0
        found[place] = np.log(counts / counts.sum())
        if (counts > 1).sum() < 2:
            continue
        model = LogisticRegression(C=strength, max_iter=1000).fit(rows[:place], right[:place])
        seen = model.classes_  # the others keep what counts give them
        share = np.exp(found[place, seen]).sum()
        found[place, seen] = np.log(share) + model.predict_log_proba(rows[place : place + 1])[0]
    return found


def residuals(fit: Array, fit_scores: Array, rest: Array, scores: Array) -> tuple[Array, Array]:
    """What of the scores a ridge regression on what a sentence is does not explain, of both parts; of the part it is
    fitted on, by cross-validation."""
    model = RidgeCV(ALPHAS)
    inside = fit_scores - cross_val_predict(model, fit, fit_scores, cv=min(5, len(fit)))
    return inside, scores - model.fit(fit, fit_scores).predict(rest)


def _rotated(rows: Array) -> Array:
    """The same points in at most as many dimensions as there are rows: a penalised regression sees no difference."""
    if rows.shape[1] <= rows.shape[0]:
        return rows
    left, sizes, _ = np.linalg.svd(rows, full_matrices=False)
    return left * sizes
