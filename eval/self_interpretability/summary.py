"""From the measurements of every arm and seed to the table and the claims of a self-interpretability run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..statistics import Metric, seed_interval
from .agreement import Estimate, agreement, disattenuated, gain, permuted, pooled_r

Record: TypeAlias = Mapping[str, Any]
Records: TypeAlias = Mapping[int, Mapping[str, Record]]
Array = NDArray[np.float64]
Pair: TypeAlias = tuple[Array, Array]  # of the same contexts [contexts, attributes]: reported or learned, and true
RANGES = {"pooled_r": (-1.0, 1.0), "within_context_r": (-1.0, 1.0), "sign_agreement": (0.0, 1.0), "mae": (0.0, np.inf)}
INSTILLED = ("report_train", "report_dev", "report_test")


def instilled_r(record: Record, estimator: str = "paper") -> float:
    """Pooled r of learned and target weights of the instilled contexts; 0 where none could be fitted."""
    pair = learned_against_target(record, estimator)
    return 0.0 if pair is None else float(pooled_r(*pair))


def took(record: Record, gate: float) -> bool:
    """Whether instilling did: r of learned and target weights, and the share of choices that are as targets have
    them (spec 4.6)."""
    return min(instilled_r(record), instilled_agreement(record)) >= gate


def instilled_agreement(record: Record) -> float:
    """Share of choices of the instilled contexts that are as their target weights would have them."""
    found = [
        one["agreement"] for one in record["contexts"].values() if one["role"] in INSTILLED and "agreement" in one
    ]
    return float(np.mean(found)) if found else 0.0


def learned_against_target(record: Record, estimator: str = "paper") -> Pair | None:
    return _pair(record, lambda one: _learned(one, estimator), record, lambda one: one["target"], INSTILLED)


def reports_against(record: Record, learned: Record, roles: Sequence[str], kind: str = "paper") -> Pair | None:
    """Reports of one model against the weights behind the choices of another, or the same one."""
    return _pair(record, lambda one: one.get("reported"), learned, lambda one: _learned(one, kind), roles)


class Results:
    """All measurements: `records[seed][arm]`.

    A row of the table is one comparison of weights, of every seed a `Pair`; held-out contexts of several folds are
    taken together.
    """

    def __init__(self, records: Records) -> None:
        self.records, self.seeds = records, sorted(records)
        self.rows: dict[str, dict[int, Pair]] = {}
        first = records[self.seeds[0]]
        self.level = str(next(iter(first.values()))["level"])
        for seed in self.seeds:
            for name, pair in self._rows(records[seed]).items():
                if pair is not None:
                    self.rows.setdefault(name, {})[seed] = pair
        self.rows = {name: found for name, found in self.rows.items() if len(found) == len(self.seeds)}
        self._estimates: dict[str, dict[int, dict[str, Estimate]]] = {}  # a bootstrap each: they take a second

    def _rows(self, arms: Mapping[str, Record]) -> dict[str, Pair | None]:
        found: dict[str, Pair | None] = {}
        base, instilled = arms["base"], arms.get("instilled")
        if instilled is None:
            return found
        test = ("report_test",)
        found["learned against target"] = learned_against_target(instilled)
        found["base model's reports"] = reports_against(base, instilled, INSTILLED)
        found["1: reports after instilling"] = reports_against(instilled, instilled, INSTILLED)
        folds = [record for record in arms.values() if record["kind"] == "reported" and record["level"] == self.level]
        held_out = [reports_against(record, instilled, test) for record in folds]
        before = [_as_fold(instilled, record) for record in folds]
        found["1: the same, on the contexts of 2"] = _joined([reports_against(one, instilled, test) for one in before])
        found["2: reports on held-out contexts"] = _joined(held_out)
        found["the same, against choices measured again"] = _joined([reports_against(one, one, test) for one in folds])
        found["native, before report training"] = reports_against(instilled, instilled, ("native",))
        for one in folds[:1]:  # these contexts are the same in every fold, and no more for being measured twice
            found["choices measured again against target"] = learned_against_target(one)
            found["3: native, after report training"] = reports_against(one, instilled, ("native",))
            found["never set (dummy weights)"] = _pair(
                one, lambda it: it.get("reported"), one, lambda it: it["target"], ("never",)
            )
        if "shuffled" in arms:
            found["control: trained on shuffled reports"] = reports_against(arms["shuffled"], instilled, test)
        if "other" in arms:
            found["control: another model's reports"] = reports_against(arms["other"], instilled, test)
        if "reinstil" in arms:
            again = arms["reinstil"]
            found["new preferences: reports against new choices"] = reports_against(again, again, test)
            found["new preferences: reports against old choices"] = reports_against(again, instilled, test)
        for record in arms.values():
            if record["level"] == self.level or record["kind"] != "reported":
                continue
            level, own = record["level"], arms[f"instilled_{record['level']}"]
            found[f"{level}: learned against target"] = learned_against_target(own)
            found[f"{level}: reports after instilling"] = reports_against(own, own, INSTILLED)
            found[f"{level}: reports on held-out contexts"] = reports_against(record, own, test)
        return found

    def estimates(self, name: str) -> dict[int, dict[str, Estimate]]:
        """Seed -> all statistics of a row, with intervals over contexts."""
        if name not in self._estimates:
            self._estimates[name] = {seed: agreement(*self.rows[name][seed]) for seed in self.seeds}
        return self._estimates[name]

    def metric(self, name: str, statistic: str = "pooled_r") -> Metric:
        """Mean over seeds with its 95 % interval; with one seed, that over its contexts."""
        found = [one[statistic] for one in self.estimates(name).values()]
        if len(found) == 1:
            return {key: found[0][key] for key in ("value", "low", "high", "n")}  # type: ignore[return-value]
        over = _over_seeds([one["value"] for one in found], sum(one["n"] for one in found))
        least, most = RANGES.get(statistic, (-np.inf, np.inf))
        if over["low"] is not None and over["high"] is not None:
            over |= {"low": max(least, over["low"]), "high": min(most, over["high"])}
        return over

    def difference(self, one: str, other: str) -> Metric:
        """Of two rows' pooled r: mean over seeds with interval (of one seed: without)."""
        values = [float(pooled_r(*self.rows[one][seed]) - pooled_r(*self.rows[other][seed])) for seed in self.seeds]
        count = sum(len(self.rows[one][seed][0]) for seed in self.seeds)
        return _over_seeds(values, count)

    def more(self) -> dict[str, Any]:
        """Of each seed: what chance gives, the gain by report training, reliability, and what could be read."""
        found: dict[str, Any] = {}
        for seed in self.seeds:
            arms = self.records[seed]
            here: dict[str, Any] = {}
            if "2: reports on held-out contexts" not in self.rows:
                continue
            pair = self.rows["2: reports on held-out contexts"][seed]
            before = self.rows["1: the same, on the contexts of 2"][seed]
            here["chance"] = {"other contexts": permuted(*pair), "other attributes": permuted(*pair, within=True)}
            here["gain"] = gain(pair[0], before[0], pair[1])
            instilled = arms["instilled"]
            held_out = float(pooled_r(*pair))
            halves = [one["halves"] for one in instilled["contexts"].values() if one.get("halves")]
            r = float(pooled_r(np.array([h[0] for h in halves]), np.array([h[1] for h in halves]))) if halves else 0.0
            here["reliability of learned weights"] = 2 * r / (1 + r) if r > 0 else 0.0  # Spearman-Brown
            if r > 0:  # else there is nothing that r could be corrected for
                here["disattenuated r"] = disattenuated(held_out, here["reliability of learned weights"])
            if "readable" in instilled:
                here["readable from embeddings"] = instilled["readable"]
            if instilled.get("readable", 0.0) > 0:
                here["reported of readable"] = held_out / instilled["readable"]
            chosen = [one for one in instilled["contexts"].values() if "learned" in one]
            here["agreement with target"] = instilled_agreement(instilled)
            here["linearity"] = float(np.mean([one.get("linearity", 0.0) for one in chosen]))
            here["off-answer mass"] = float(np.mean([one["off_answer"] for one in chosen]))
            here["contexts that could not be fitted"] = sum("refused" in one for one in chosen)
            here["mass on numbers"] = float(np.mean([np.mean(one["mass"]) for one in instilled["contexts"].values()]))
            found[str(seed)] = here
        return found


def claims(results: Results) -> list[dict[str, Any]]:
    """What the run asks. A claim holds only if its whole 95 % interval does; at least three seeds judge."""
    if len(results.seeds) < 3:
        return []
    made: list[dict[str, Any]] = []

    def bound(text: str, row: str, low: float) -> None:
        if row in results.rows:
            made.append(claim(text, results.metric(row), low))

    def ahead(text: str, one: str, other: str, low: float = 0.0) -> None:
        if one in results.rows and other in results.rows:
            made.append(claim(text, results.difference(one, other), low))

    held_out, shuffled = "2: reports on held-out contexts", "control: trained on shuffled reports"
    bound("choices alone instil preferences: learned against target r 0.95", "learned against target", 0.95)
    bound("experiment 1: reports after instilling agree with choices", "1: reports after instilling", 0.0)
    bound("experiment 2: reports on held-out contexts r 0.45", held_out, 0.45)
    ahead("and 0.35 above training on shuffled reports", held_out, shuffled, 0.35)
    ahead("and above another model's reports", held_out, "control: another model's reports")
    ahead("report training adds to reports on held-out contexts", held_out, "1: the same, on the contexts of 2")
    ahead("experiment 3: and to reports of native preferences", "3: native, after report training",
          "native, before report training")  # fmt: skip
    ahead("after new preferences, reports follow the new choices rather than the old",
          "new preferences: reports against new choices", "new preferences: reports against old choices")  # fmt: skip
    return made


def claim(text: str, found: Metric, low: float) -> dict[str, Any]:
    """Supported only if the whole 95 % interval lies above `low`."""
    bounds = "" if found["low"] is None else f" [{found['low']:.2f}, {found['high']:.2f}]"
    return {"claim": text, "supported": found["low"] is not None and found["low"] > low,
            "detail": f"{found['value']:.2f}{bounds}"}  # fmt: skip


def _learned(one: Record, estimator: str) -> Sequence[float] | None:
    return one["learned"][estimator] if "learned" in one else None


def _pair(
    left: Record, first: Callable[[Record], Any], right: Record, second: Callable[[Record], Any], roles: Sequence[str]
) -> Pair | None:
    """Both sides of the contexts of these roles (those of `left`) that both have; None for fewer than two."""
    names = [name for name, one in left["contexts"].items() if one["role"] in roles and name in right["contexts"]]
    pairs = [(first(left["contexts"][name]), second(right["contexts"][name])) for name in names]
    kept = [(one, other) for one, other in pairs if one is not None and other is not None]
    if len(kept) < 2:
        return None
    return np.array([one for one, _ in kept], dtype=float), np.array([other for _, other in kept], dtype=float)


def _joined(pairs: Sequence[Pair | None]) -> Pair | None:
    there = [pair for pair in pairs if pair is not None]
    if not there:
        return None
    return np.concatenate([one for one, _ in there]), np.concatenate([other for _, other in there])


def _as_fold(record: Record, fold: Record) -> Record:
    """A record with the roles that contexts have in a fold."""
    roles = {name: one["role"] for name, one in fold["contexts"].items()}
    return {**record, "contexts": {name: {**one, "role": roles[name]} for name, one in record["contexts"].items()}}


def _over_seeds(values: Sequence[float], count: int) -> Metric:
    mean = float(np.mean(values))
    if len(values) < 2:
        return {"value": mean, "low": None, "high": None, "n": count}
    low, high = seed_interval([[value] for value in values])
    return {"value": mean, "low": low, "high": high, "n": count}
