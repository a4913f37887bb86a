"""Sorting lists of numbers, and simpler tasks about the same lists (spec 1.3, 1.4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .arrays import Array, Arrays, Part
from .family import BLANK, EOS, SEP, Family, asked, constant, one, told

RESTRICTED = 2  # a restriction keeps one in so many items of a longer list


class Lists(NamedTuple):
    """Tokens [rows, longest] as they were drawn and in ascending order, the void behind the end above all of them;
    items of each [rows, 1]."""

    items: Array
    ordered: Array
    count: Array


class Sorting(Family):
    """Lists of numbers 0 .. `values` - 1, each a token; `repetitions`: drawn independently, else all different."""

    main = "sort"
    hints = (
        "successor", "predecessor", "count", "copy", "copy_list", "min", "max", "parity", "fill", "run", "restrict",
    )  # fmt: skip

    def __init__(self, values: int = 40, repetitions: bool = False) -> None:
        super().__init__([str(number) for number in range(values)])
        self.values, self.repetitions = values, repetitions
        self.void = self.first + values

    def check(self, tasks: Sequence[str], longest: int) -> None:
        super().check(tasks, longest)
        if self.repetitions and "count" in tasks and longest >= self.values:
            raise ValueError(
                f"a number may occur {longest} times, and the hint count has tokens up to {self.values - 1} only: "
                "raise --values"
            )
        if not self.repetitions and longest > self.values:
            raise ValueError(
                f"lists of {longest} different numbers need at least so many values, and there are {self.values}: "
                "raise --values or allow --repetitions"
            )

    def draw(self, arrays: Arrays, task: str, lengths: Array, longest: int) -> Lists:
        rows = len(lengths)
        wider = longest * RESTRICTED if task == "restrict" else longest
        wider = wider if self.repetitions else min(wider, self.values)  # no longer list has different numbers
        if self.repetitions:
            drawn = arrays.integers(self.first, self.void, (rows, wider))
        else:
            drawn = arrays.argsort(arrays.uniform((rows, self.values)))[:, :wider] + self.first
        if wider > longest:  # a random choice of the longer list's items, in the order they have there
            places = arrays.sort(arrays.argsort(arrays.uniform((rows, wider)))[:, :longest])
            drawn = arrays.take(drawn, places)
        count = lengths[:, None]
        items = arrays.where(arrays.arange(longest)[None, :] < count, drawn, self.void)
        return Lists(items, arrays.sort(items), count)

    def question(self, arrays: Arrays, problem: Lists) -> list[Part]:
        return [Part(problem.items, problem.count, False)]

    def answer(self, arrays: Arrays, task: str, problem: Lists, queries: int) -> list[Part]:
        items, ordered, count = problem
        last = items.shape[1] - 1

        def at(place: Array) -> Array:
            return arrays.take(ordered, arrays.where(place > last, last, place))

        def successor(item: Array) -> Array:
            place = (items <= item).sum(1)[:, None]
            return arrays.where(place < count, at(place), EOS)

        def predecessor(item: Array) -> Array:
            place = (items < item).sum(1)[:, None]
            return arrays.where(place > 0, at(arrays.where(place > 0, place - 1, 0)), EOS)

        def times(item: Array) -> Array:
            return (items == item).sum(1)[:, None]

        def run(item: Array) -> list[Part]:
            again = arrays.where(items < 0, items, item)  # the item in every place
            return [Part(again, times(item) - 1, True), one(arrays, successor(item), True)]

        if task in ("sort", "restrict"):
            return [Part(ordered, count, True), *([constant(arrays, EOS, len(items), True)] * (task == "restrict"))]
        if task == "copy_list":
            return [Part(items, count, True), constant(arrays, EOS, len(items), True)]
        if task == "fill":
            return self._fill(arrays, problem)
        if task == "run":  # once: the next item asked about would look like one more repetition
            return asked(arrays, items, count, 1, run)
        if task in ("min", "max"):
            return [one(arrays, at(count - 1) if task == "max" else ordered[:, :1], True)]
        token = {
            "successor": successor,
            "predecessor": predecessor,
            "copy": lambda item: item,
            "count": lambda item: self.first + times(item),
            "parity": lambda item: self.first + (item - self.first) % 2,
        }[task]
        return asked(arrays, items, count, queries, lambda item: [one(arrays, token(item), True)])

    def _fill(self, arrays: Arrays, problem: Lists) -> list[Part]:
        """The sorted list with blanks, and then what belongs there. (The paper's `fill` is not described.)"""
        rows, width = problem.items.shape
        place = arrays.arange(width)[None, :]
        least = arrays.uniform((rows, 1)) * problem.count  # one blank at any rate
        blank = (arrays.uniform((rows, width)) < 0.5) | ((place <= least) & (least < place + 1))
        blank = blank & (place < problem.count)
        shown = arrays.where(blank, BLANK, problem.ordered)
        left = arrays.argsort(arrays.where(blank, place, place + width))
        missing = Part(arrays.take(problem.ordered, left), blank.sum(1)[:, None], True)
        again, end = constant(arrays, SEP, rows), constant(arrays, EOS, rows, True)
        return [Part(shown, problem.count, False), again, missing, end]

    def text(self, task: str, ids: Sequence[int], targets: Sequence[bool]) -> tuple[str, str]:
        names = self.vocabulary
        start = list(targets).index(True)
        words = [names[token] for token in ids]
        shown = " ".join("=>" if word == f"<{task}>" else word for word in words[:start])
        heading = "Sort" if f"<{task}>" not in words else task.replace("_", " ").capitalize()
        return f"{heading}: {shown}", told(names, ids[start:], "end", " ")
