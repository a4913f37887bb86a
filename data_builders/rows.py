"""Checking rows, and telling two sets of rows apart.

TRL trains silently on an empty completion and dies with an `AttributeError` on a missing one, so every source row
passes a `RowChecker` first: it collects all bad cells and raises one `RowError` that names file, split, row, id,
column, what was found and what was expected.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .reading import Row, RowError, read_hub, read_rows, show

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

__all__ = ["Row", "RowChecker", "RowError", "fingerprint", "read_hub", "read_rows"]

SHOWN = 5


class RowChecker:
    """Reads cells of `rows` by our own column names and collects every problem, so that one error can list them.

    columns: our name -> the names accepted for it in a file. A cell that is bad comes back as "" or []; call `finish`
    before using anything. Raises RowError at once for no rows, and for a column no row of a file has.
    """

    def __init__(self, rows: Sequence[Row], columns: Mapping[str, Sequence[str]], what: str) -> None:
        self.columns, self.what = columns, what
        self.problems: list[str] = []
        self._first: dict[tuple[str, str], Row] = {}
        if not rows:
            raise RowError(f"{what}: there are no rows")
        there: dict[tuple[str, str], dict[str, None]] = {}
        for row in rows:
            there.setdefault((row.file, row.split), {}).update(dict.fromkeys(row.values))
        for (file, split), found in there.items():
            missing = [" or ".join(map(repr, names)) for names in columns.values() if not set(names) & set(found)]
            if missing:
                raise RowError(
                    f"{what}: {file}, split {split}: missing column {', '.join(missing)}; there are "
                    f"{', '.join(map(repr, found)) or 'none'}"
                )

    def value(self, row: Row, column: str) -> Any:
        """The raw cell, or None where this row lacks it."""
        return row.values.get(self._name(row, column))

    def text(self, row: Row, column: str) -> str:
        """A text that is not blank, as it stands."""
        value = self.value(row, column)
        if isinstance(value, str) and value.strip():
            return value
        self.problem(row, column, show(value), "a non-empty text")
        return ""

    def texts(self, row: Row, column: str, separator: str | None = None, may_be_empty: bool = False) -> list[str]:
        """Texts from a list as they stand, or from one text cut at `separator` and trimmed; blank ones dropped."""
        value = self.value(row, column)
        if isinstance(value, str) and separator is not None:
            value = [part.strip() for part in value.split(separator)]
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            parts = [part for part in value if part.strip()]
            if parts or may_be_empty:
                return parts
        cut = f", or one text cut at {separator!r}" if separator else ""
        self.problem(row, column, show(self.value(row, column)), f"a list of texts{cut}")
        return []

    def identifier(self, row: Row, column: str = "id") -> str:
        """A unique id: a non-empty text, or a whole number."""
        value = self.value(row, column)
        known = self.text(row, column) if type(value) is not int else str(value)
        if known:
            self.unique(row, column, known)
        return known

    def unique(self, row: Row, column: str, key: str, across_splits_only: bool = False) -> None:
        """A problem if an earlier row has the same `key` in this column (of another split, if so asked)."""
        first = self._first.setdefault((column, key), row)
        if first is not row and not (across_splits_only and first.split == row.split):
            self.problem(row, column, f"{show(key)}, which is also in {first.place()}", "each one once")

    def problem(self, row: Row, column: str, found: str, expected: str) -> None:
        identity = f", id {self.value(row, 'id')!r}" if "id" in self.columns else ""
        name = self._name(row, column)
        self.problems.append(f"{row.place()}{identity}, column {name!r}: found {found}, expected {expected}")

    def finish(self) -> None:
        """Raise RowError if there was any problem."""
        if self.problems:
            more = len(self.problems) - SHOWN
            lines = self.problems[:SHOWN] + ([f"and {more} more"] if more > 0 else [])
            raise RowError(f"{self.what}: {len(self.problems)} problem(s)\n  " + "\n  ".join(lines))

    def _name(self, row: Row, column: str) -> str:
        names = self.columns.get(column, (column,))
        return next((name for name in names if name in row.values), names[0])


def fingerprint(data: Dataset | DatasetDict) -> str:
    """sha256 over the content of all rows (and split names). `datasets`' own fingerprint also depends on how and when
    a set was made, so it cannot tell whether two runs saw the same data."""
    digest = hashlib.sha256()
    for split, rows in sorted(data.items()) if isinstance(data, dict) else [("", data)]:
        digest.update(f"{split}\n".encode())
        for batch in rows.iter(1000):  # row by row takes three times as long
            for values in zip(*batch.values(), strict=True):
                row = dict(zip(batch, values, strict=True))
                digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()
