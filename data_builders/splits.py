"""What every row's splits need: their names, sampling, unrelated texts, and that nothing is in two of them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

from .plain_text import PARAGRAPHS
from .rows import RowChecker, read_rows

if TYPE_CHECKING:
    from datasets import Dataset

# How files and Hub data sets call a split -> our name.
NAMES = {"train": "train", "training": "train", "test": "test"}
NAMES |= dict.fromkeys(("val", "valid", "validation", "dev"), "dev")

T = TypeVar("T")


def sample(items: Sequence[T], limit: int | None, seed: int) -> list[T]:
    """`random.Random(seed).sample`, in the order of the file; everything where the limit is None or not reached."""
    if limit is not None and limit < 1:
        raise ValueError(f"a limit of {limit} rows leaves nothing; leave it out to take all rows")
    if limit is None or limit >= len(items):
        return list(items)
    return [items[index] for index in sorted(random.Random(seed).sample(range(len(items)), limit))]


def text_rows(path: str | None) -> list[dict[str, Any]]:
    """Unrelated texts: {"id", "group", "text"}, from a file with a `text` column, or the built-in paragraphs."""
    texts = list(PARAGRAPHS)
    if path is not None:
        source = read_rows(path, "text")
        checker = RowChecker(source, {"text": ("text",)}, "collateral texts")
        texts = [checker.text(row, "text") for row in source]
        checker.finish()
    return [{"id": f"text-{n:03}", "group": f"text-{n:03}", "text": text} for n, text in enumerate(texts)]


def check_disjoint(
    data: Mapping[str, Dataset],
    pairs: Iterable[tuple[str, str]],
    columns: Sequence[str] = ("id", "group", "prompt"),
) -> None:
    """Raises ValueError unless every split has rows, ids are unique in each, and the two splits of each of `pairs`
    share no value of `columns`."""
    for split, rows in data.items():
        if not len(rows):
            raise ValueError(f"the split {split} is empty")
        if (ids := len(set(rows["id"][:]))) != len(rows):
            raise ValueError(f"the split {split} has {len(rows)} rows but only {ids} ids")
    pairs = list(pairs)
    for column in columns:
        # A column is read from disk row by row unless it is taken as a whole, once.
        values = {split: set(data[split][column][:]) for split in dict.fromkeys(chain.from_iterable(pairs))}
        for one, other in pairs:
            if shared := sorted(values[one] & values[other]):
                raise ValueError(f"{one} and {other} share {len(shared)} {column}s, among them {shared[0]!r}")
