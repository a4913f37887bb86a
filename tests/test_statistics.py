"""eval/statistics.py against hand-computed values, scipy, and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from steerbook.eval.statistics import bootstrap_interval, metric, paired_test, seed_interval, seed_metric


def test_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(0).normal(3, 2, size=80)
    ours = bootstrap_interval(values, resamples=20_000)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=1).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.03)
    narrow = bootstrap_interval(values, confidence=0.5)
    assert ours[0] < narrow[0] < values.mean() < narrow[1] < ours[1]


def test_bootstrap_of_two_values_by_hand():
    """Resamples of {0, 1}: mean 0, 1/2, 1 with probability 1/4, 1/2, 1/4."""
    assert bootstrap_interval([0.0, 1.0]) == (0.0, 1.0)
    assert bootstrap_interval([0.0, 1.0], confidence=0.4) == (0.5, 0.5)
    assert bootstrap_interval([2.0, 2.0, 2.0]) == (2.0, 2.0)


def test_clusters_are_resampled_whole():
    """Copies of the same rows add nothing to what is known."""
    values = np.random.default_rng(0).normal(size=50)
    copies, labels = np.repeat(values, 10), np.repeat(np.arange(50), 10)
    assert bootstrap_interval(copies, list(labels)) == pytest.approx(bootstrap_interval(values))
    assert np.ptp(bootstrap_interval(copies)) < 0.5 * np.ptp(bootstrap_interval(copies, list(labels)))
    shuffled = np.random.default_rng(1).permutation(500)  # the order of rows does not matter, apart from rounding
    mixed = bootstrap_interval(copies[shuffled], list(labels[shuffled]), resamples=20_000)
    assert mixed == pytest.approx(bootstrap_interval(values, resamples=20_000), abs=0.02)


def test_weights():
    values, weights = [1.0, 2.0, 6.0], [1.0, 0.0, 3.0]
    assert metric(values, weights=weights)["value"] == pytest.approx(19 / 4)
    expanded, labels = [1.0, 6.0, 6.0, 6.0], [0, 2, 2, 2]
    found = bootstrap_interval(values, weights=weights, clusters=[0, 0, 2])
    assert found == pytest.approx(bootstrap_interval(expanded, labels))


def test_bootstrap_coverage():
    """Nominal 95 % over clusters with a shared effect; ignoring the clusters would cover far less."""
    generator = np.random.default_rng(0)
    labels = list(np.repeat(np.arange(100), 3))
    hits = naive = 0
    for _ in range(1000):
        values = (generator.normal(0, 1, size=(100, 1)) + generator.normal(0, 0.5, size=(100, 3))).ravel()
        low, high = bootstrap_interval(values, labels, resamples=500)
        hits += low <= 0 <= high
        naive += abs(values.mean()) <= 1.96 * values.std() / math.sqrt(300)
    assert 0.92 <= hits / 1000 <= 0.97
    assert naive / 1000 < 0.8


def test_bootstrap_is_deterministic_and_leaves_the_global_generator():
    values = list(range(20))
    np.random.seed(0)
    state = np.random.get_state()[1].copy()
    assert bootstrap_interval(values) == bootstrap_interval(values) != bootstrap_interval(values, seed=1)
    assert (np.random.get_state()[1] == state).all()


# --- seeds ---------------------------------------------------------------------------------------------------------


def test_seed_interval_by_hand():
    """Seed means 0, 1, 2 and no spread of rows: Student's t with two degrees of freedom."""
    low, high = seed_interval([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])
    assert ((high - low) / 2, (high + low) / 2) == pytest.approx((4.302653 / math.sqrt(3), 1.0), rel=1e-5)


def test_seed_interval_keeps_the_spread_of_rows():
    """Seeds that agree exactly: what is left is the sampling of rows, shared by the seeds or not."""
    row = [0.0, 1.0] * 50
    error = np.std(row, ddof=1) / 10
    low, high = seed_interval([row] * 4, [list(range(100))] * 4)  # the same questions: no more of them than 100
    assert (high - low) / 2 == pytest.approx(1.959964 * error, rel=1e-5)
    low, high = seed_interval([row] * 4)  # own rows: 400 of them
    assert (high - low) / 2 == pytest.approx(1.959964 * error / 2, rel=0.01)


def two_level_bootstrap(values: np.ndarray, generator: np.random.Generator) -> tuple[float, float]:
    """The usual alternative: resample seeds, then rows of each."""
    seeds, rows = values.shape
    picked = generator.integers(seeds, size=(300, seeds, 1))
    found = values[picked, generator.integers(rows, size=(300, seeds, rows))].mean((1, 2))
    return tuple(np.percentile(found, [2.5, 97.5]))


@pytest.mark.parametrize("shared", [False, True])
def test_seed_interval_coverage(shared):
    """Three seeds that differ by 10 points, 60 questions: ours covers the mean, the two-level bootstrap too rarely."""
    generator = np.random.default_rng(0)
    ours = theirs = 0
    for _ in range(300):
        questions = generator.normal(0, 0.15, size=(1 if shared else 3, 60))
        chance = 0.6 + generator.normal(0, 0.1, size=(3, 1)) + questions
        values = (generator.random((3, 60)) < chance).astype(float)
        low, high = seed_interval(list(values), [list(range(60))] * 3 if shared else None)
        ours += low <= 0.6 <= high
        low, high = two_level_bootstrap(values, generator)
        theirs += low <= 0.6 <= high
    assert ours / 300 >= 0.94
    assert theirs / 300 < 0.92


def test_seed_interval_refuses():
    with pytest.raises(ValueError, match="at least two seeds, got 1"):
        seed_interval([[1.0]])
    with pytest.raises(ValueError, match="2 seeds but clusters for 1"):
        seed_interval([[1.0], [2.0]], [["a"]])
    with pytest.raises(ValueError, match="seed 1: 1 values but 2 cluster labels"):
        seed_interval([[1.0], [2.0]], [["a"], ["a", "b"]])


def test_seed_metric():
    values, clusters = [[0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]], [list("abcd")] * 2
    found = seed_metric(values, clusters)
    assert found["value"] == 0.625 and found["n"] == 8
    assert (found["low"], found["high"]) == seed_interval(values, clusters)
    assert found["high"] > 1
    clipped = seed_metric(values, clusters, share=True)
    assert (clipped["low"], clipped["high"]) == (0.0, 1.0)
    sure = seed_metric([[1.0] * 4] * 3, [list("abcd")] * 3, share=True)  # four questions, whatever the number of seeds
    assert (sure["low"], sure["high"]) == (metric([1.0] * 4, share=True)["low"], 1.0)
    assert seed_metric([[0.0, 1.0, 1.0]], share=True) == metric([0.0, 1.0, 1.0], share=True)


# --- metric --------------------------------------------------------------------------------------------------------


def test_metric():
    found = metric([0, 1, 1, 1], share=True)
    assert (found["value"], found["n"]) == (0.75, 4)
    assert (found["low"], found["high"]) == bootstrap_interval([0, 1, 1, 1])


def test_metric_at_the_edge_uses_wilson():
    z = stats.norm.ppf(0.975)
    assert metric([0.0] * 10, share=True)["high"] == pytest.approx(z**2 / (10 + z**2))
    assert metric([0.0] * 10, share=True)["low"] == 0.0
    found = metric([1.0] * 10, list("aabbccddee"), share=True)  # five clusters, not ten rows
    assert found["low"] == pytest.approx(5 / (5 + z**2)) and found["high"] == 1.0
    assert metric([1.0] * 10)["low"] == 1.0  # not said to be a share: differences may well be all 1


def test_metric_of_one_cluster_has_no_interval():
    assert metric([0.5, 0.7], ["a", "a"]) == {"value": 0.6, "low": None, "high": None, "n": 2}
    with pytest.raises(ValueError, match=r"a share lies in \[0, 1\]"):
        metric([0.5, 7.0], share=True)


# --- paired test ---------------------------------------------------------------------------------------------------


def test_mcnemar_by_hand():
    """Nine rows where only a is right, two where only b is: 2 * P(X <= 2), X ~ Binomial(11, 1/2)."""
    a, b = [1] * 9 + [0] * 2 + [1] * 20 + [0] * 5, [0] * 9 + [1] * 2 + [1] * 20 + [0] * 5
    found = paired_test(a, b)
    assert found.p_value == pytest.approx(2 * (1 + 11 + 55) / 2**11)
    assert found.difference == pytest.approx(7 / 36) and found.method == "McNemar, exact"
    assert found.low <= found.difference <= found.high and (found.n, found.clusters) == (36, 36)
    assert paired_test([1, 0, 1], [1, 0, 1]).p_value == 1.0


def test_sign_flips_by_hand():
    """Differences 1, 2, 3: of the eight sign patterns only +++ and --- reach a sum of 6."""
    found = paired_test([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (found.p_value, found.difference, found.method) == (0.25, 2.0, "sign flips, exact")
    assert paired_test([1.0, 2.0, 5.0], [1.0, 2.0, 5.0]).p_value == 1.0


def test_sign_flips_agree_with_scipy():
    generator = np.random.default_rng(0)
    for count in (8, 40):
        a = generator.normal(0.3, 1, size=count)
        b = generator.normal(0, 1, size=count)
        found = paired_test(a, b, resamples=40_000)
        oracle = stats.permutation_test(
            (a, b), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples", n_resamples=40_000, rng=1
        )
        assert found.p_value == pytest.approx(oracle.pvalue, abs=0.01)


def test_clusters_flip_together():
    """Three clusters: 2**3 patterns whatever the number of rows, so nothing is significant."""
    a, b = [1.0] * 30, [0.0] * 30
    assert paired_test(a, b).p_value < 1e-6
    found = paired_test(a, b, list(np.repeat([0, 1, 2], 10)))
    assert (found.p_value, found.clusters, found.method) == (0.25, 3, "sign flips, exact")


def test_unequal_clusters_by_hand():
    """Cluster sums 4 (two rows), 1, 1: |sum| >= 6 for two of eight patterns, |sum| >= 4 for four more..."""
    found = paired_test([2.0, 2.0, 1.0, -1.0], [0.0] * 4, ["a", "a", "b", "c"])
    sums = [
        abs(sum(s * t for s, t in zip(signs, (4, 1, -1), strict=True)))
        for signs in itertools.product((1, -1), repeat=3)
    ]
    assert found.p_value == pytest.approx(np.mean([value >= 4 for value in sums]))
    assert found.difference == 1.0


def test_paired_test_is_calibrated():
    """Under the null hypothesis p is below 0.05 in about 5 % of the cases, with clusters too."""
    generator = np.random.default_rng(0)
    rejected = 0
    for _ in range(300):
        shared = generator.normal(size=(20, 1))
        difference = (shared + generator.normal(size=(20, 4))).ravel()
        found = paired_test(difference, np.zeros(80), list(np.repeat(np.arange(20), 4)), resamples=400)
        rejected += found.p_value <= 0.05
    assert 0.02 <= rejected / 300 <= 0.09


# --- bad input -----------------------------------------------------------------------------------------------------


def test_bad_input():
    for bad in ([], [[1.0], [2.0]]):
        with pytest.raises(ValueError, match="non-empty list of numbers"):
            bootstrap_interval(bad)
    with pytest.raises(ValueError, match=r"values\[1\] is nan; scores must be finite"):
        bootstrap_interval([1.0, math.nan])
    with pytest.raises(ValueError, match=r"b\[0\] is inf"):
        paired_test([1.0, 2.0], [math.inf, 1.0])
    with pytest.raises(ValueError, match="2 values but 1 cluster labels"):
        bootstrap_interval([1.0, 2.0], ["a"])
    with pytest.raises(ValueError, match="2 values but 3 weights"):
        bootstrap_interval([1.0, 2.0], weights=[1, 1, 1])
    with pytest.raises(ValueError, match="non-negative and not all zero"):
        bootstrap_interval([1.0, 2.0], weights=[0, 0])
    with pytest.raises(ValueError, match="a has 2 values and b 1"):
        paired_test([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="at least two clusters, got 1"):
        bootstrap_interval([1.0, 2.0], ["a", "a"])
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1, got 95"):
        bootstrap_interval([1.0, 2.0], confidence=95)
    with pytest.raises(ValueError, match="resamples must be at least 1"):
        bootstrap_interval([1.0, 2.0], resamples=0)
