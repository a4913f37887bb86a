"""How trials are put into words, and how a report is read back (spec 1.4, 1.7)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from .contexts import Context
from .trials import Trial

SYSTEM = "You make hypothetical decisions on behalf of different people and characters."
DECISION = "[DECISION TASK] Answer with A or B and nothing else."
REPORT = (
    "[INTROSPECTION TASK] Say how heavily you weigh each of the {count} dimensions of the decision below, from -100 "
    "to 100. Answer with one JSON object and nothing else: its keys are the names of the {count} dimensions, its "
    "values the weights. Do not say how you would decide."
)
FAR = 1e6  # no number beyond is meant as a weight between -100 and 100
FENCE = re.compile(r"^```[a-z]*\s*|\s*```$")

Message = dict[str, str]


def decision_prompt(context: Context, trial: Trial) -> list[Message]:
    """What precedes the answer A or B."""
    return _prompt(DECISION, context, trial)


def report_prompt(context: Context, trial: Trial) -> list[Message]:
    """What precedes the weights; the trial only shows what the decision is like."""
    return _prompt(REPORT.format(count=len(context.attributes)), context, trial)


def report_text(context: Context, weights: Sequence[float]) -> str:
    """The reply that reports these weights, whole numbers."""
    names = [attribute.name for attribute in context.attributes]
    said = {name: round(weight) for name, weight in zip(names, weights, strict=True)}
    return json.dumps(said, ensure_ascii=False)


def parse_report(context: Context, text: str) -> list[float] | None:
    """The weights of a reply in the attributes' order, or None: it must be a JSON object, in a code fence or not, of
    numbers under the names of all attributes and no others."""
    try:
        found: Any = json.loads(FENCE.sub("", text.strip()).strip(), object_pairs_hook=_once)
    except (ValueError, RecursionError):  # no JSON, a key twice, thousands of digits or of levels
        return None
    names = [attribute.name for attribute in context.attributes]
    if not isinstance(found, dict) or set(found) != set(names):
        return None
    values = [found[name] for name in names]
    if not all(type(value) in (int, float) and abs(value) < FAR for value in values):  # a bool is an int, too
        return None
    return [float(value) for value in values]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


def _prompt(task: str, context: Context, trial: Trial) -> list[Message]:
    sides = [f"{side}:\n{_option(context, values)}" for side, values in (("A", trial.a), ("B", trial.b))]
    text = f"{task}\n\n{context.question}\n" + "\n\n".join(sides)
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]


def _option(context: Context, values: Sequence[float]) -> str:
    pairs = zip(context.attributes, values, strict=True)
    return "\n".join(f"{one.name}: {float(value)} {one.units}".rstrip() for one, value in pairs)
