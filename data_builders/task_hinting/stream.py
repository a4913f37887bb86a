"""Endless rows of a main task and its hints: step by step, each step a function of the seed and its number alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from .arrays import PAD, Array, Arrays, NumpyArrays, Rows
from .family import Family, make_rows

HELD_OUT = 16  # one question in so many is for tests only, whatever the seed
TRIES = 1000
BLOCK = 4096  # rows of a task that are made at a time, the same ones however many a step has
TEST = 1 << 40  # numbers of steps from here on are test sets'
_MIX = (6364136223846793005, 1442695040888963407, 3935559000370003845)  # odd, from known congruential generators


@dataclass(frozen=True)
class Task:
    """What a mixture has of one task.

    Attributes:
        rows: of an optimiser step (with "random": its share).
        shortest, longest: lengths of the questions, in items.
        lengths: "uniform", or "longer": a length n with probability proportional to n.
        shared, queries: see `family.make_rows`.
    """

    name: str
    rows: int
    shortest: int
    longest: int
    lengths: Literal["uniform", "longer"] = "uniform"
    shared: bool = False
    queries: int = 1


class Step(NamedTuple):
    """The rows of one optimiser step: `Rows`, and the number of each row's task [rows]."""

    ids: Array
    targets: Array
    lengths: Array
    tasks: Array


class Stream:
    """Rows of `tasks`, without the questions that are held out for tests.

    Args:
        tasks: the main task first.
        mix: "fixed": in every step so many rows of each; "random": each row's task drawn, by their numbers of rows;
            "alternate": all rows of a step of one task, in turn, each as often as it has rows. Over many steps all
            three show as many rows of each task.
        different: after so many rows the main task begins again with its first, and the hints in proportion (None:
            never).
        arrays: from the seed of a block of rows to the arrays that draw it.
    """

    def __init__(
        self,
        family: Family,
        tasks: Sequence[Task],
        seed: int,
        mix: Literal["fixed", "random", "alternate"] = "fixed",
        different: int | None = None,
        arrays: Callable[[Sequence[int]], Arrays] = NumpyArrays,
    ) -> None:
        self.family, self.tasks, self.seed, self.mix, self.different = family, list(tasks), seed, mix, different
        self._arrays, self._plain = arrays, arrays([seed])
        self._blocks: dict[int, tuple[int, Rows]] = {}  # of each task the last one made, by its number
        self.rows = sum(task.rows for task in self.tasks)  # of a step
        self._turns = _turns([task.rows for task in self.tasks])

    @property
    def identity(self) -> dict[str, Any]:
        """All that its rows follow from."""
        made_by = f"{type(self.family).__name__} by {type(self._plain).__name__}"
        tasks = [asdict(task) for task in self.tasks]
        return {"family": made_by, **vars(self.family), "tasks": tasks, "seed": self.seed, "mix": self.mix,
                "different": self.different}  # fmt: skip

    def step(self, number: int) -> Step:
        """The rows of step `number`, counted from 0."""
        full = self._plain.full
        made = [(place, rows) for place, count in enumerate(self._counts(number)) if count
                for rows in self._rows(place, number, count)]  # fmt: skip
        width = max(rows.ids.shape[1] for _, rows in made)
        ids, targets = full((self.rows, width), PAD), full((self.rows, width), 0) > 0
        lengths, tasks = full((self.rows,), 0), full((self.rows,), 0)
        start = 0
        for place, rows in made:
            stop = start + len(rows.ids)
            ids[start:stop, : rows.ids.shape[1]], targets[start:stop, : rows.ids.shape[1]] = rows.ids, rows.targets
            lengths[start:stop], tasks[start:stop] = rows.lengths, place
            start = stop
        return Step(ids, targets, lengths, tasks)

    def _rows(self, place: int, number: int, count: int) -> Iterator[Rows]:
        """`count` rows of a task for a step, cut from blocks of rows: made one by one, a step's cost ten times."""
        task = self.tasks[place]
        most = self.rows if self.mix == "alternate" or (self.mix == "random" and self.different is None) else task.rows
        if self.mix == "alternate":  # of the task's own turns
            rounds, turn = divmod(number, len(self._turns))
            number = rounds * self._turns.count(place) + self._turns[:turn].count(place)
        whole = None if self.different is None else max(1, self.different * task.rows // self.tasks[0].rows)
        start, stop = number * most, number * most + count
        while start < stop:
            first = start if whole is None else start % whole
            block, at = divmod(first, BLOCK)
            here = min(stop - start, BLOCK - at, stop if whole is None else whole - first)
            known, rows = self._blocks.get(place, (-1, None))
            if known != block or rows is None:
                rows = fresh(self.family, self._arrays([self.seed, place, block]), task, BLOCK, held_out=False)
                self._blocks[place] = block, rows
            yield Rows(*(part[at : at + here] for part in rows))
            start += here

    def _counts(self, number: int) -> list[int]:
        given = [task.rows for task in self.tasks]
        if self.mix == "fixed":
            return given
        if self.mix == "alternate":
            turn = self._turns[number % len(self._turns)]
            return [self.rows * (place == turn) for place in range(len(given))]
        drawn = self._arrays([self.seed, len(given), number]).integers(0, self.rows, (self.rows,))
        ends = [sum(given[: place + 1]) for place in range(len(given))]
        return [int(((drawn >= end - count) & (drawn < end)).sum()) for end, count in zip(ends, given, strict=True)]


def _turns(rows: Sequence[int]) -> list[int]:
    """Whose turn it is in each step of a round: each task as often as it has rows, spread evenly (64 + 32: 0 1 0)."""
    shares = [count // math.gcd(*rows) for count in rows]
    due = [((time + 0.5) / share, task) for task, share in enumerate(shares) for time in range(share)]
    return [task for _, task in sorted(due)]


def fresh(family: Family, arrays: Arrays, task: Task, count: int, held_out: bool) -> Rows:
    """`count` rows of a task whose questions are held out, or are not.

    Raises:
        ValueError: of these lengths there are no such questions.
    """

    def draw(count: int) -> Rows:
        lengths = _lengths(arrays, task, count)
        return make_rows(family, arrays, task.name, lengths, task.longest, shared=task.shared, queries=task.queries)

    rows = draw(count)
    wrong = held(arrays, rows) != held_out
    for _ in range(TRIES):
        left = int(wrong.sum())
        if not left:
            return rows
        again = draw(left)
        for old, new in zip(rows, again, strict=True):
            old[wrong] = new
        wrong = held(arrays, rows) != held_out
    what = "held out for tests" if held_out else "for training"
    raise ValueError(
        f"{task.name}: no questions of {task.shortest} to {task.longest} items are {what}; ask longer ones"
    )


def held(arrays: Arrays, rows: Rows) -> Any:
    """Of each row whether its question is held out [rows]: a hash of the question's tokens alone."""
    place = arrays.arange(rows.ids.shape[1])[None, :]
    factors = (place * _MIX[0] + _MIX[1]) * (place * _MIX[2] + _MIX[1])  # int64 wraps around, in NumPy and torch
    inside = arrays.where(place < rows.questions[:, None], rows.ids + 1, 0)
    return ((inside * factors).sum(1) // (1 << 40)) % HELD_OUT == 0


def test_rows(family: Family, task: Task, length: int, count: int, seed: int) -> Rows:
    """The test set of one length: the same for all runs of a seed, and of questions that no stream has."""
    only = Task(task.name, count, length, length, shared=task.shared, queries=task.queries)
    return fresh(family, NumpyArrays([seed, TEST, length]), only, count, held_out=True)


def _lengths(arrays: Arrays, task: Task, count: int) -> Array:
    span = task.longest - task.shortest + 1
    if task.lengths == "uniform":
        return task.shortest + arrays.integers(0, span, (count,))
    sizes = [length for length in range(task.shortest, task.longest + 1) for _ in range(length)]
    drawn = arrays.integers(0, len(sizes), (count, 1))
    ends = [sum(range(task.shortest, length + 1)) for length in range(task.shortest, task.longest)]
    return task.shortest + sum((drawn >= end)[:, 0] * 1 for end in ends)
