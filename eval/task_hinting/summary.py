"""From the measurements of every arm and seed to the table and the claims of a task hinting run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import results as shared
from ..results import Arm, Column, Record, claim
from ..statistics import Metric
from .scores import area, error_shares, falls_under

UNTOUCHED, STANDARD, TOTAL = (("untouched", False), ("standard", False), ("standard_total", False))
COLLATERAL = Column("text perplexity", "collateral", "nats_per_token", 1.0)
TIMES = 5  # the paper's headline is about inputs five times as long as in training


class Results(shared.Results):
    """All measurements: `records[seed][folder]`, each with `name` (the arm's key), `at_test` (whether the softmax was
    switched on for the test only), `label`, `longest` (items in training), `trained`, `seconds`, `splits`."""

    def __init__(self, records: Mapping[int, Mapping[str, Record]]) -> None:
        super().__init__(records)
        first = next(iter(records[self.seeds[0]].values()))
        self.longest: int = first["longest"]
        tests = [split for split in first["splits"] if split.startswith("test_")]
        self.lengths = sorted(int(split.removeprefix("test_")) for split in tests)
        self.main_length = min(self.lengths, key=lambda n: (abs(n - TIMES * self.longest), n))

    def arm(self, record: Record) -> Arm:
        return record["name"], record["at_test"]

    def label(self, arm: Arm) -> str:
        return str(self.draws(self.seeds[0], arm)[0]["label"])

    def curve(self, seed: int, arm: Arm) -> dict[int, float]:
        """Length -> share of rows that are right throughout."""
        return {n: float(self.questions(seed, arm, f"test_{n}", "em")[0].mean()) for n in self.lengths}

    def looks(self, seed: int, arm: Arm) -> dict[int, float]:
        """Length -> attention mass on what may come next (copies of the last number, its successor), of the head that
        has most of it at the shortest length; empty where nothing was looked at."""
        masses = {int(n): found for n, found in self.draws(seed, arm)[0].get("attention", {}).items()}
        next_ones = {n: np.add(found["identity"], found["successor"]) for n, found in sorted(masses.items())}
        if not next_ones:
            return {}
        head = np.unravel_index(next_ones[min(next_ones)].argmax(), next_ones[min(next_ones)].shape)
        return {n: float(mass[head]) for n, mass in next_ones.items()}

    def heads(self, seed: int, arm: Arm) -> dict[str, list[list[float]]]:
        """Kind of token -> attention mass of each layer's heads at the length that claims speak of."""
        return dict(self.draws(seed, arm)[0]["attention"][str(self.main_length)])

    def probes(self, arm: Arm) -> dict[str, dict[int, list[float]]]:
        """Probe -> length -> its score on each layer (the embedding first), mean over seeds; empty without any."""
        found = [self.draws(seed, arm)[0].get("probes", {}) for seed in self.seeds]
        return {
            name: {n: np.mean([one[name][str(n)] for one in found], axis=0).tolist() for n in self.lengths if n > 1}
            for name in found[0]
            if all(name in one for one in found)
        }

    def tokens(self, arm: Arm) -> dict[str, Metric]:
        """`tokens/N`: the share of answers' tokens that are right."""
        return {f"tokens/{n}": self.metric(arm, f"test_{n}", "tokens") for n in self.lengths}

    def hints(self, arm: Arm) -> dict[str, Metric]:
        """`em/HINT/N` and `tokens/HINT/N` of the hints that the arm was trained on."""
        splits = [split.rpartition("_") for split in self.draws(self.seeds[0], arm)[0]["splits"]]
        hints = dict.fromkeys(task for task, _, n in splits if task != "test" and n.isdecimal())
        return {
            f"{name}/{hint}/{n}": self.metric(arm, f"{hint}_{n}", name)
            for hint in hints
            for name in ("em", "tokens")
            for n in self.lengths
        }

    def losses(self) -> dict[str, dict[str, list[list[tuple[float, float]]]]]:
        """Task -> arm -> the points (step, loss) of each seed."""
        found: dict[str, dict[str, list[list[tuple[float, float]]]]] = {}
        for arm in self.arms:
            logs = [self.draws(seed, arm)[0].get("log", []) for seed in self.seeds]
            for task in dict.fromkeys(key[5:] for log in logs for entry in log for key in entry if key[:5] == "loss/"):
                points = [[(e["step"], e[f"loss/{task}"]) for e in log if f"loss/{task}" in e] for log in logs]
                found.setdefault(task, {})[self.label(arm)] = points
        return found

    def errors(self, arm: Arm, length: int) -> dict[str, float]:
        """Kind of the first error -> share of the rows of all seeds."""
        found = [error_shares(self.draws(seed, arm)[0]["splits"][f"test_{length}"]) for seed in self.seeds]
        return {kind: float(np.mean([shares[kind] for shares in found])) for kind in found[0]}

    def columns(self) -> list[Column]:
        """The length that claims speak of first, then the others, then what there is of unrelated texts."""
        order = [self.main_length, *(n for n in self.lengths if n != self.main_length)]
        shown = [Column(str(n), f"test_{n}", "em") for n in order]
        return shown + [COLLATERAL] * all(self.has(arm, COLLATERAL.split) for arm in self.arms)

    def prompt_tokens(self) -> dict[int, float]:
        """Length in items -> mean length of a text's prompt in tokens; empty for rows of tokens."""
        first = next(iter(self.records[self.seeds[0]].values()))["splits"]
        found = {n: [sample.get("tokens") for sample in first[f"test_{n}"]] for n in self.lengths}
        return {n: float(np.mean(tokens)) for n, tokens in found.items() if None not in tokens}

    def breakdown(self, arm: Arm) -> dict[str, Any]:
        """Of each seed: area under the curve, and the first lengths under 0.9 and 0.5 (None: none of those tested)."""
        curves = [self.curve(seed, arm) for seed in self.seeds]
        found: dict[str, Any] = {"area": [area(curve) for curve in curves]} if len(self.lengths) > 1 else {}
        return found | {f"under_{level}": [falls_under(curve, level) for curve in curves] for level in (0.9, 0.5)}


def claims(results: Results, toy: bool) -> list[dict[str, Any]]:
    """What the run asks. A claim holds only if its whole 95 % interval does; at least three seeds judge.

    `toy`: the embedded world, where the claims promise numbers as well.
    """
    if len(results.seeds) < 3:
        return []
    made: list[dict[str, Any]] = []
    length, longest = results.main_length, results.lengths[-1]
    main = f"test_{length}"

    def ahead(one: Arm, other: Arm, what: str, n: int = length) -> None:
        if one in results.arms and other in results.arms:
            made.append(
                claim(f"{what}, at length {n}", results.combination({one: 1, other: -1}, f"test_{n}", "em"), 0)
            )

    if toy and STANDARD in results.arms:
        if results.longest in results.lengths:
            found = results.metric(STANDARD, f"test_{results.longest}", "em")
            made.append(claim(f"standard training does lengths of training ({results.longest}): 99 %", found, 0.99))
        found = results.metric(STANDARD, f"test_{longest}", "em")
        made.append(claim(f"and fails at length {longest}: under 30 %", found, high=0.3))
    hints = [arm for arm in results.arms if arm[0].startswith("hint_") and "softmax" not in arm[0] and not arm[1]]
    controls = [arm for arm in results.arms if arm[0].startswith("control_") and not arm[1]]
    for hint in hints:
        name = hint[0].removeprefix("hint_")
        ahead(hint, STANDARD, f"hint {name} above standard training on the same main rows")
        ahead(hint, TOTAL, f"hint {name} above standard training on as many rows")
        for control in controls:
            ahead(hint, control, f"hint {name} above the control {control[0].removeprefix('control_')}")
        text = f"the paper's headline: over 92 % at length {length} with the hint {name}"
        made.append(claim(text, results.metric(hint, main, "em"), 0.92))
    for n in dict.fromkeys((length, longest)):
        ahead(("standard", True), STANDARD, "the softmax, switched on for the test, raises standard training", n)
    ahead(("softmax", False), STANDARD, "the softmax in training raises standard training")
    for hint in hints:
        name = hint[0].removeprefix("hint_")
        ahead((f"hint_softmax_{name}", False), ("softmax", False), f"hint {name} adds to the softmax")
    return made


def bounded(value: float | None, digits: int = 0) -> str:
    """A number for a table; empty where there is none."""
    return "" if value is None or math.isnan(value) else f"{value:.{digits}f}"
