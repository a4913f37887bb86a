"""Choices and reports of any model from files: one row a trial, as the paper published them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...data_builders.reading import Row, RowError, read_rows
from ...data_builders.self_interpretability.contexts import Context

SHOWN = 5


@dataclass
class Choices:
    """Of one context: option A's value less B's in units of the attribute's range [trials][attributes], whether A was
    chosen [trials], and how many answers were neither A nor B (these are not among the trials)."""

    differences: list[list[float]] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)
    invalid: int = 0


@dataclass
class Replies:
    """Of one context: the weights of each valid reply [replies][attributes], and how many replies were not valid."""

    weights: list[list[float]] = field(default_factory=list)
    invalid: int = 0


def read_choices(paths: Sequence[str | Path], contexts: Mapping[str, Context]) -> dict[str, Choices]:
    """Columns `scenario`, `selection` (A or B), `A_attribute_1`, `B_attribute_1` and so on.

    Raises:
        RowError: a scenario that `contexts` do not have, or values that are no numbers; with file and row.
    """
    found: dict[str, Choices] = {}
    problems: list[str] = []
    for row in _rows(paths, "selection"):
        context = _context(row, contexts, problems)
        if context is None:
            continue
        of_context = found.setdefault(context.name, Choices())
        answer = str(row.values["selection"]).strip()
        if answer not in ("A", "B"):
            of_context.invalid += 1
            continue
        values = {side: _numbers(row, f"{side}_attribute_", context) for side in "AB"}
        if values["A"] is None or values["B"] is None:
            columns = f"A_attribute_1 to B_attribute_{len(context.attributes)}"
            problems.append(f"{row.place()}: {columns} must be numbers, for {context.name!r}")
            continue
        pairs = zip(values["A"], values["B"], context.attributes, strict=True)
        of_context.differences.append([(a - b) / (kind.high - kind.low) for a, b, kind in pairs])
        of_context.chosen.append(int(answer == "A"))
    _finish("choices", problems)
    return found


def read_replies(paths: Sequence[str | Path], contexts: Mapping[str, Context]) -> dict[str, Replies]:
    """Columns `scenario` and `report_attr1` and so on. A reply without a number for each attribute is not valid, and
    counted.

    Raises:
        RowError: a scenario that `contexts` do not have; with file and row.
    """
    found: dict[str, Replies] = {}
    problems: list[str] = []
    for row in _rows(paths, "report_attr1"):
        context = _context(row, contexts, problems)
        if context is None:
            continue
        of_context = found.setdefault(context.name, Replies())
        weights = _numbers(row, "report_attr", context)
        if weights is None:
            of_context.invalid += 1
        else:
            of_context.weights.append(weights)
    _finish("reports", problems)
    return found


def read_weights(path: str | Path, contexts: Mapping[str, Context]) -> dict[str, list[float]]:
    """Columns `scenario` and `attr1` and so on: known weights, like those that were instilled.

    Raises:
        RowError: a weight that is no number; with file and row. (Scenarios that `contexts` do not have are left out.)
    """
    found: dict[str, list[float]] = {}
    problems: list[str] = []
    for row in _rows([path], "attr1"):
        context = contexts.get(str(row.values["scenario"]))
        if context is None:
            continue
        weights = _numbers(row, "attr", context)
        if weights is None:
            problems.append(f"{row.place()}: attr1 to attr{len(context.attributes)} must be numbers")
        elif context.name in found:
            problems.append(f"{row.place()}: weights of {context.name!r} for the second time")
        else:
            found[context.name] = weights
    _finish("weights", problems)
    return found


def _rows(paths: Sequence[str | Path], needed: str) -> list[Row]:
    given = [str(Path(path).resolve()) for path in paths]
    if twice := sorted({path for path in given if given.count(path) > 1}):
        raise ValueError(f"{twice[0]} is given twice: its rows would count twice")
    rows = [row for path in paths for row in read_rows(path)]
    models = sorted({str(row.values["model"]) for row in rows if row.values.get("model") not in (None, "")})
    if len(models) > 1:
        raise RowError(
            f"{', '.join(map(str, paths))}: rows of {len(models)} models ({', '.join(models[:4])}); give those of one"
        )
    for row in rows:
        if missing := [column for column in ("scenario", needed) if column not in row.values]:
            raise RowError(f"{row.place()}: no column {', '.join(missing)}; there are {', '.join(row.values)}")
    if not rows:
        raise RowError(f"{', '.join(map(str, paths))}: there are no rows")
    return rows


def _context(row: Row, contexts: Mapping[str, Context], problems: list[str]) -> Context | None:
    name = str(row.values["scenario"])
    if name not in contexts:
        problems.append(f"{row.place()}: the scenario {name!r} is not among the {len(contexts)} known ones")
    return contexts.get(name)


def _numbers(row: Row, prefix: str, context: Context) -> list[float] | None:
    """The cells PREFIX1, PREFIX2, ... of the context's attributes; None unless all are finite numbers."""
    try:
        values = [float(row.values[f"{prefix}{place}"]) for place in range(1, len(context.attributes) + 1)]
    except (KeyError, TypeError, ValueError):
        return None
    return values if all(map(math.isfinite, values)) else None


def _finish(what: str, problems: list[str]) -> None:
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise RowError(f"{what}: {len(problems)} problem(s)\n  " + "\n  ".join(problems[:SHOWN] + more))


def validity(replies: Mapping[str, Replies], asked: Sequence[str], each: int | None) -> dict[str, Any]:
    """How many replies there are of contexts that were `asked`; `each`: how often (default: as often as the most any
    context has replied). What is not in the files was not valid for whoever wrote them.

    Raises:
        ValueError: `each` below what some context has replied.
    """
    of_asked = {name: one for name, one in replies.items() if name in set(asked)}
    most = max((len(one.weights) + one.invalid for one in of_asked.values()), default=0)
    if each is not None and each < max(1, most):
        raise ValueError(f"--asked {each}: some context has {most} replies in the files")
    return {
        "asked": (most if each is None else each) * len(asked),
        "valid": sum(len(one.weights) for one in of_asked.values()),
        "unparsable": sum(one.invalid for one in of_asked.values()),
        "contexts_asked": len(asked),
        "contexts": sum(bool(one.weights) for one in of_asked.values()),
        "not_asked": sorted(set(replies) - set(asked)),
    }
