"""What an aTLAS run says: its claims with their intervals, and from how many rows on joint fine-tuning is ahead."""

from __future__ import annotations

import math
from typing import Any

from ..results import claim
from .summary import ALPHA, ATLAS, ISOTROPIC, NAMES, Results


def crossover(results: Results) -> dict[str, Any] | None:
    """From how many rows a task on joint fine-tuning's mean exceeds that of aTLAS.

    `rows_per_task`: the smallest such number, or None: none up to `up_to`. None where the run has no such arms.
    """
    sizes = [
        n for n in results.sizes("data") if all(results.has(("data", arm, n), "test") for arm in ("joint", "atlas"))
    ]
    if not sizes:
        return None
    above = []
    for n in sizes:
        found = results.combination({("data", "joint", n): 1, ("data", "atlas", n): -1}, "test", "accuracy")
        above += [n] if found["value"] > 0 else []
    return {"rows_per_task": above[0] if above else None, "up_to": sizes[-1]}


def rule_kept(results: Results) -> tuple[int, int]:
    """Of how many negations by aTLAS the control accuracy on dev rows is left by the rule, and of how many in all."""
    records = [r for seed in results.seeds for r in results.draws(seed, ("negation", "atlas", None))]
    kept = [r["dev"]["control"] >= r["dev"]["control_share"] * r["dev"]["base_control"] - 1e-9 for r in records]
    return sum(kept), len(kept)


def control_share(results: Results) -> float:
    """The share of the base's control accuracy that a negation had to leave."""
    return float(results.draws(results.seeds[0], ("negation", "atlas", None))[0]["dev"]["control_share"])


def claims(results: Results, toy: bool) -> list[dict[str, Any]]:
    """What the run set out to show. A claim holds only if its whole 95 % interval does; at least three seeds judge.

    `toy`: the embedded world, where the claims promise numbers; elsewhere only what is above what.
    """
    if len(results.seeds) < 3:
        return []
    made: list[dict[str, Any]] = []
    place = ("test", "accuracy")
    if toy:
        for arm, low, high, text in (
            (ALPHA, -math.inf, 0.85, "below 85 %"),
            (ISOTROPIC, -math.inf, 0.85, "below 85 %"),
            (ATLAS, 0.90, math.inf, "at least 90 %"),
        ):
            if results.has(arm, "test"):
                text = f"addition: {results.label(arm)} reaches {text}"
                made.append(claim(text, results.metric(arm, *place), low, high))
    for arm, ahead in ((ISOTROPIC, 0.10 if toy else 0.0), *([] if toy else [(ALPHA, 0.0)])):
        if results.has(ATLAS, "test") and results.has(arm, "test"):
            text = (
                f"addition: aTLAS {f'at least {100 * ahead:.0f} points ' if ahead else ''}above {results.label(arm)}"
            )
            made.append(claim(text, results.combination({ATLAS: 1, arm: -1}, *place), ahead))
    for n in results.sizes("fewshot"):
        for name in ("finetune", "lora"):
            ours, theirs = ("fewshot", "atlas", n), ("fewshot", name, n)
            if results.has(ours, "test") and results.has(theirs, "test"):
                text = f"few-shot: aTLAS above {NAMES[name]} at {n} shots"
                made.append(claim(text, results.combination({ours: 1, theirs: -1}, *place), 0.0))
    for n in results.sizes("budget"):
        for name in ("feature", "gradient", "blockwise"):
            ours, theirs = ("budget", name, n), ("budget", "random", n)
            if results.has(ours, "test") and results.has(theirs, "test"):
                text = f"budget: {NAMES[name]} above {NAMES['random']}, {n} of them"
                made.append(claim(text, results.combination({ours: 1, theirs: -1}, *place), 0.0))
    base, alpha, atlas = (("negation", name, None) for name in ("base", "alpha", "atlas"))
    if results.has(atlas, "test") and results.has(alpha, "test"):
        kept, count = rule_kept(results)
        text = "negation: aTLAS's target below the alpha search's, with control within the rule"
        share = control_share(results)
        more = f"; control on dev rows at least {100 * share:.0f} % of the base's in {kept} of {count}"
        found = results.combination({alpha: 1, atlas: -1}, "test", "target")
        made.append(claim(text, found, 0.0 if kept == count else math.inf, more=more))
    if results.has(atlas, "test") and results.has(base, "test"):
        share = control_share(results)
        found = results.combination({atlas: 1, base: -share}, "test", "control")
        text = f"negation: aTLAS keeps over {100 * share:.0f} % of the base's control on test rows (the surplus)"
        made.append(claim(text, found, 0.0))
    return made
