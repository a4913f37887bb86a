"""Choice contexts: who chooses what, and by which numeric attributes (spec 1.1)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..reading import Row, RowError, read_rows, show
from ..rows import RowChecker

FEWEST, MOST = 2, 10  # attributes of a context; the paper has 5
COLUMNS = {"name": ("scenario", "short_name", "name"), "question": ("question",)}


@dataclass(frozen=True)
class Attribute:
    """One dimension of the options: values lie between `low` and `high`, in `units` (may be empty)."""

    name: str
    low: float
    high: float
    units: str = ""


@dataclass(frozen=True)
class Context:
    """A choice that is made again and again between options that differ in the same attributes."""

    name: str
    question: str
    attributes: tuple[Attribute, ...]


def read_contexts(path: str | Path) -> list[Context]:
    """Contexts of a file, in its order.

    Either columns `scenario`, `question`, `attr1`, `attr1_min`, `attr1_max` and so on (the form of the paper's
    scenarios.csv; `attr1_units` may be there), or objects with `short_name`, `question` and `attributes`, a list of
    `name`, `units` and `range` [low, high].

    Raises:
        RowError: a name twice, attributes fewer than 2, more than 10 or twice, a range that is empty or no numbers;
            with file and row.
        FileNotFoundError, ValueError: no file, or one of an unknown kind.
    """
    rows = read_rows(path)
    checker = RowChecker(rows, COLUMNS, "contexts")
    found = []
    for row in rows:
        name, question = checker.text(row, "name"), checker.text(row, "question")
        if name:
            checker.unique(row, "name", name)
        found.append(Context(name, question, tuple(_attributes(row, checker))))
    checker.finish()
    return found


def _attributes(row: Row, checker: RowChecker) -> Iterable[Attribute]:
    listed = row.values.get("attributes")
    if listed is None:
        numbers = sorted(int(match[1]) for key in row.values if (match := re.fullmatch(r"attr(\d+)", key)))
        cells = [_cells(row, number) for number in numbers]
    elif isinstance(listed, list) and all(isinstance(one, dict) for one in listed):
        cells = [_listed(one) for one in listed]
    else:
        _problem(checker, row, "attributes", show(listed), "a list of objects with name, units and range")
        return
    while cells and cells[-1]["name"] in (None, ""):  # of rows with fewer attributes than others
        cells.pop()
    if any(cell["name"] in (None, "") for cell in cells):
        _problem(checker, row, "attributes", "an empty name in front of others", "attributes without gaps")
        return
    if not FEWEST <= len(cells) <= MOST:
        _problem(checker, row, "attributes", f"{len(cells)} attributes", f"{FEWEST} to {MOST}")
        return
    names = [cell["name"] for cell in cells]
    for name in sorted({name for name in names if names.count(name) > 1}):
        _problem(checker, row, "attributes", f"{name!r} twice", "each name once")
    for cell in cells:
        low, high = _number(cell["low"]), _number(cell["high"])
        if not isinstance(cell["name"], str) or low is None or high is None or not low < high:
            text = f"{cell['name']!r} from {cell['low']!r} to {cell['high']!r}"
            _problem(checker, row, "attributes", text, "a name and two numbers, the first one smaller")
            continue
        yield Attribute(cell["name"], low, high, str(cell["units"] or ""))


def _cells(row: Row, number: int) -> dict[str, Any]:
    key = f"attr{number}"
    ends = {"low": f"{key}_min", "high": f"{key}_max", "units": f"{key}_units"}
    return {"name": row.values[key], **{name: row.values.get(column) for name, column in ends.items()}}


def _listed(one: dict[str, Any]) -> dict[str, Any]:
    ends = one.get("range")
    low, high = ends if isinstance(ends, Sequence) and len(ends) == 2 else (ends, None)
    return {"name": one.get("name"), "units": one.get("units"), "low": low, "high": high}


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if abs(number) < float("inf") else None


def _problem(checker: RowChecker, row: Row, column: str, found: str, expected: str) -> None:
    checker.problems.append(f"{row.place()}, {column}: found {found}, expected {expected}")


__all__ = ["Attribute", "Context", "RowError", "read_contexts"]
