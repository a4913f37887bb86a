"""From the measurements of every arm and seed to the table and the claims of a self-interpretability run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..statistics import Metric, seed_interval
from .agreement import Estimate, agreement, disattenuated, gain, partial_r, permuted, pooled_r
from .comparisons import (
    AFTER,
    BEFORE,
    HELD_OUT,
    LEARNED,
    NATIVE,
    NATIVE_BEFORE,
    NEW,
    OLD,
    OTHER,
    SHUFFLED,
    TEST,
    Record,
    Row,
    comparisons,
    instilled_agreement,
    joined,
    learned_against_target,
    on_held_out,
    reports_against_target,
    trained_to_report,
)

LINEAR = 0.7  # with a smaller R^2, weights are no faithful summary of choices (spec 4.4)
RANGES = {"pooled_r": (-1.0, 1.0), "within_context_r": (-1.0, 1.0), "sign_agreement": (0.0, 1.0), "mae": (0.0, np.inf)}


class Results:
    """All measurements, `records[seed][arm]`, and the table's rows, `rows[name][seed]`: of the seeds that have it."""

    def __init__(self, records: Mapping[int, Mapping[str, Record]]) -> None:
        self.records, self.seeds = records, sorted(records)
        found = {seed: comparisons(records[seed]) for seed in self.seeds}
        longest = max(found.values(), key=len)
        order = [*longest, *(name for rows in found.values() for name in rows if name not in longest)]
        self.rows: dict[str, dict[int, Row]] = {
            name: {seed: rows[name] for seed, rows in found.items() if name in rows} for name in dict.fromkeys(order)
        }
        self._estimates: dict[str, dict[int, dict[str, Estimate]]] = {}

    def estimates(self, name: str) -> dict[int, dict[str, Estimate]]:
        """Seed -> all statistics of a row; of a single seed with intervals over contexts (each bootstrap takes 0.1
        s)."""
        if name not in self._estimates:
            draws = {"draws": 0} if len(self.rows[name]) > 1 else {}
            self._estimates[name] = {
                seed: agreement(row.found, row.true, **draws) for seed, row in self.rows[name].items()
            }
        return self._estimates[name]

    def metric(self, name: str, statistic: str = "pooled_r") -> Metric:
        """Mean over the seeds that have it with its 95 % interval; with one, that over its contexts."""
        found = [one[statistic] for one in self.estimates(name).values()]
        # Reports that are all alike have no r; they agree with nothing, which is what 0 says.
        found = [{**one, "value": one["value"] or 0.0} for one in found]
        if len(found) == 1:
            return {key: found[0][key] for key in ("value", "low", "high", "n")}  # type: ignore[return-value]
        over = _over_seeds([float(one["value"] or 0.0) for one in found], sum(one["n"] for one in found))
        least, most = RANGES.get(statistic, (-np.inf, np.inf))
        if over["low"] is not None and over["high"] is not None:
            over |= {"low": max(least, over["low"]), "high": min(most, over["high"])}
        return over

    def difference(self, one: str, other: str) -> Metric:
        """Of two rows' pooled r, on the contexts that both have (where they have some in common): mean over seeds with
        interval (of one seed: without)."""
        pairs = []
        for seed in self.rows[one]:
            if seed in self.rows[other]:
                first, second = self.rows[one][seed], self.rows[other][seed]
                if both := [name for name in first.names if name in second.names]:
                    first, second = first.only(both), second.only(both)
                pairs.append((first, second))
        values = [float(pooled_r(a.found, a.true) - pooled_r(b.found, b.true)) for a, b in pairs]
        return _over_seeds(values, sum(len(row.found) for row, _ in pairs))

    def validity(self) -> dict[str, dict[str, int]]:
        """Of each row about reports: how many replies were written freely, and how many of them are valid. Rows that
        look at the same replies once more are left out."""
        own = {name: rows.values() for name, rows in self.rows.items() if "the same" not in name and name != OLD}
        counts = {
            name: {"replies": sum(row.replies for row in rows), "valid": sum(row.valid for row in rows)}
            for name, rows in own.items()
        }
        return {name: count for name, count in counts.items() if count["replies"]}

    def more(self) -> dict[str, Any]:
        """Of each seed: what chance gives, the gain by report training, reliability, and what could be read."""
        return {str(seed): self._details(seed) for seed in self.rows.get(HELD_OUT, ())}

    def _details(self, seed: int) -> dict[str, Any]:
        arms, row, before = self.records[seed], self.rows[HELD_OUT][seed], self.rows[BEFORE][seed]
        instilled, folds = arms["instilled"], trained_to_report(arms)
        held_out = float(pooled_r(row.found, row.true))
        here: dict[str, Any] = {
            "chance": {
                "other contexts": permuted(row.found, row.true),
                "other attributes": permuted(row.found, row.true, within=True),
            },
            "gain": gain(row.found, before.found, row.true),
        }
        base = on_held_out(arms["base"], instilled, folds)
        if base is not None and len(base.found) == len(row.found):
            here["partial r given the base model's reports"] = partial_r(row.found, row.true, base.found)
        target = joined([reports_against_target(fold, TEST) for fold in folds])
        if target is not None:
            here["r against target"] = float(pooled_r(target.found, target.true))
        halves = [one["halves"] for one in instilled["contexts"].values() if one.get("halves")]
        r = _reliability(halves) or 0.0
        here["reliability of learned weights"] = r
        said = _reliability([one["reported_halves"] for fold in folds for one in fold["contexts"].values()
                             if one["role"] in TEST and "reported_halves" in one])  # fmt: skip
        if said is not None:  # asked several times; else every report is one exact number
            here["reliability of reports"] = said
        if r > 0 and said != 0:  # else there is nothing that r could be corrected for
            here["disattenuated r"] = disattenuated(held_out, here["reliability of learned weights"], said or 1.0)
        if "readable" in instilled:
            here["readable from embeddings"] = instilled["readable"]
        if instilled.get("readable", 0.0) > 0:
            here["reported of readable"] = held_out / instilled["readable"]
        chosen = [one for one in instilled["contexts"].values() if "learned" in one]
        here["agreement with target"] = instilled_agreement(instilled)
        linear = [one["linearity"] for one in chosen if "linearity" in one]
        here["linearity"] = float(np.mean(linear)) if linear else 0.0
        here["contexts with linearity under 0.7"] = sum(value < LINEAR for value in linear)
        for estimator in ("fractional", "least_squares"):
            other = learned_against_target(instilled, estimator)
            if other is not None:
                here[f"learned against target, {estimator}"] = float(pooled_r(other.found, other.true))
        here["off-answer mass"] = float(np.mean([one["off_answer"] for one in chosen]))
        here["contexts that could not be fitted"] = sum("refused" in one for one in chosen)
        here["mass on numbers"] = float(np.mean([np.mean(one["mass"]) for one in instilled["contexts"].values()]))
        # What is not defined (reports or weights that are all alike) is left out.
        return {key: value for key, value in here.items() if not isinstance(value, float) or np.isfinite(value)}


def claims(results: Results) -> list[dict[str, Any]]:
    """What the run asks. A claim holds only if its whole 95 % interval does; at least three seeds judge, and where a
    gate stopped some of them, what they would have shown is not known, and no claim about it holds."""
    if len(results.seeds) < 3:
        return []
    made: list[dict[str, Any]] = []
    stopped = [seed for seed in results.seeds if seed not in results.rows.get(HELD_OUT, {})]

    def about(text: str, found: Callable[[], Metric], low: float, *rows: str) -> None:
        there = [set(results.rows.get(row, {})) for row in rows]
        seeds = set.intersection(*there)
        if len(seeds) == len(results.seeds):
            made.append(claim(text, found(), low))
        elif seeds or stopped:
            missing = ", ".join(str(seed) for seed in results.seeds if seed not in seeds)
            made.append({"claim": text, "supported": False, "detail": f"not measured with seed {missing}"})

    def bound(text: str, row: str, low: float) -> None:
        about(text, lambda: results.metric(row), low, row)

    def ahead(text: str, one: str, other: str, low: float = 0.0) -> None:
        about(text, lambda: results.difference(one, other), low, one, other)

    bound("choices alone instil preferences: learned against target r 0.95", LEARNED, 0.95)
    bound("experiment 1: reports after instilling agree with choices", AFTER, 0.0)
    bound("experiment 2: reports on held-out contexts r 0.45", HELD_OUT, 0.45)
    ahead("and 0.35 above training on shuffled reports", HELD_OUT, SHUFFLED, 0.35)
    ahead("and above another model's reports", HELD_OUT, OTHER)
    ahead("report training adds to reports on held-out contexts", HELD_OUT, BEFORE)
    ahead("experiment 3: and to reports of native preferences", NATIVE, NATIVE_BEFORE)
    ahead("after new preferences, reports follow the new choices rather than the old", NEW, OLD)
    return made


def claim(text: str, found: Metric, low: float) -> dict[str, Any]:
    """Supported only if the whole 95 % interval lies above `low`."""
    bounds = "" if found["low"] is None else f" [{found['low']:.2f}, {found['high']:.2f}]"
    return {"claim": text, "supported": found["low"] is not None and found["low"] > low,
            "detail": f"{found['value']:.2f}{bounds}"}  # fmt: skip


def _reliability(halves: Sequence[Sequence[Sequence[float]]]) -> float | None:
    """Of means over both halves of measurements, by Spearman and Brown; None for fewer than two contexts."""
    if len(halves) < 2:
        return None
    r = float(pooled_r(np.array([half[0] for half in halves]), np.array([half[1] for half in halves])))
    return 2 * r / (1 + r) if r > 0 else 0.0


def _over_seeds(values: Sequence[float], count: int) -> Metric:
    mean = float(np.mean(values))
    if len(values) < 2:
        return {"value": mean, "low": None, "high": None, "n": count}
    low, high = seed_interval([[value] for value in values])
    return {"value": mean, "low": low, "high": high, "n": count}
